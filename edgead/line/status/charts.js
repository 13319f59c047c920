"use strict";
// Drawings of the status page, in plain SVG.

const SVG = "http://www.w3.org/2000/svg";

function draw(parent, tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function sheet(svg) {
  const width = svg.clientWidth || 320, height = svg.clientHeight || 190;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  return { width, height };
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(1);
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3);
}

function count(value) {
  return value.toLocaleString("en-US");
}

function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${number(value / 1000)} s`;
  return `${value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)} ms`;
}

function clock(timeMs, withSeconds = true) {
  const options = { hour: "2-digit", minute: "2-digit", hour12: false };
  if (withSeconds) options.second = "2-digit";
  return new Date(timeMs).toLocaleTimeString("en-GB", options);
}

/* Steps of 1, 2 and 5 times a power of ten. */
function ticks(low, high, most) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return { found, step };
}

/* Latencies: logarithmic in both directions, so that a single late part is seen among a million. */
function drawHistogram(svg, histogram, deadlineMs) {
  const { width, height } = sheet(svg);
  const used = histogram.counts.map((n, i) => (n ? i : -1)).filter((i) => i >= 0);
  if (!used.length) {
    draw(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no part yet");
    return;
  }
  const edges = histogram.edges_ms, lower = (i) => (i > 0 ? edges[i - 1] : edges[0] / 1.122);
  const upper = (i) => (i < edges.length ? edges[i] : Math.max(histogram.max_ms, edges[edges.length - 1] * 1.122));
  const lowMs = Math.min(lower(used[0]) / 1.1, (deadlineMs || Infinity) / 4);
  const highMs = Math.max(upper(used[used.length - 1]) * 1.1, (deadlineMs || 0) * 1.5);
  const left = 40, right = width - 6, top = 22, bottom = height - 20;
  const x = (ms) => left + ((right - left) * Math.log(ms / lowMs)) / Math.log(highMs / lowMs);
  const most = Math.log10(Math.max(...histogram.counts)) + 0.3;
  const y = (n) => (n < 1 ? bottom : bottom - ((bottom - top) * (Math.log10(n) + 0.3)) / (most + 0.3));
  if (deadlineMs && x(deadlineMs) < right) {
    draw(svg, "rect", { class: "beyond-area", x: x(deadlineMs), y: top, width: right - x(deadlineMs), height: bottom - top });
  }
  const powers = Math.floor(most) + 1;
  for (let power = 0; power < powers; power += powers > 5 ? 2 : 1) {
    const at = y(10 ** power);
    draw(svg, "line", { class: "grid-line", x1: left, x2: right, y1: at, y2: at });
    draw(svg, "text", { x: left - 5, y: at + 4, "text-anchor": "end" }, power < 3 ? 10 ** power : `10${"⁰¹²³⁴⁵⁶⁷⁸⁹"[power]}`);
  }
  for (const i of used) {
    const from = x(lower(i)), to = x(upper(i)), at = y(histogram.counts[i]);
    const isBeyond = deadlineMs && lower(i) >= deadlineMs * 0.999;
    draw(svg, "rect", { class: `column${isBeyond ? " beyond" : ""}`, x: from + 0.5, y: at, width: Math.max(to - from - 1, 1), height: bottom - at });
  }
  draw(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
  let last = -Infinity;
  for (let power = -2; power < 6; power++) {
    for (const digit of [1, 2, 5]) {
      const ms = digit * 10 ** power, at = x(ms);
      if (ms < lowMs || ms > highMs || at - last < 44 || at > right - 16) continue;
      last = at;
      draw(svg, "line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 });
      draw(svg, "text", { x: at, y: bottom + 16, "text-anchor": "middle" }, ms >= 1000 ? `${ms / 1000} s` : `${ms} ms`);
    }
  }
  if (deadlineMs) {
    const at = x(deadlineMs);
    draw(svg, "line", { class: "deadline", x1: at, x2: at, y1: top - 4, y2: bottom });
    draw(svg, "text", { class: "strong", x: Math.min(Math.max(at, left + 52), right - 52), y: 13, "text-anchor": "middle" }, `deadline ${number(deadlineMs).replace(/\.0+$/, "")} ms`);
  }
}

const TIME_STEPS_S = [5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400, 172800, 604800];

/* Quantiles 5 % to 95 % of the OK scores as a band, the median as a line; above, how many NG parts there were. */
function drawDrift(svg, drift, threshold) {
  const { width, height } = sheet(svg);
  const rows = drift ? drift.windows.ok : [];
  if (!rows.length) {
    draw(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no OK part yet");
    return;
  }
  const times = rows.map((row) => row[0] / 1e6);
  const gaps = times.slice(1).map((time, i) => time - times[i]);
  const windowMs = gaps.length ? Math.min(...gaps) : 10000;
  const from = times[0], to = Math.max(times[times.length - 1] + windowMs, from + 2 * windowMs);
  const known = threshold !== null && threshold !== undefined;
  const values = rows.flatMap((row) => [row[2], row[4]]).concat(known ? [threshold] : []);
  let low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low || Math.abs(high) || 1) * 0.12;
  low -= pad; high += pad;
  const left = 46, right = width - 6, top = 26, bottom = height - 20;
  const x = (ms) => left + ((right - left) * (ms - from)) / (to - from);
  const y = (value) => bottom - ((bottom - top) * (Math.min(Math.max(value, low), high) - low)) / (high - low);
  const { found, step } = ticks(low, high, 4);
  const digits = Math.min(Math.max(0, -Math.floor(Math.log10(step))), 6);
  for (const value of found) {
    draw(svg, "line", { class: "grid-line", x1: left, x2: right, y1: y(value), y2: y(value) });
    draw(svg, "text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(digits));
  }
  const stepS = TIME_STEPS_S.find((s) => (to - from) / 1000 / s <= (right - left) / 72) || 2592000;
  const zoneMs = new Date(to).getTimezoneOffset() * 60000;
  for (let ms = Math.ceil((from - zoneMs) / (stepS * 1000)) * stepS * 1000 + zoneMs; ms <= to; ms += stepS * 1000) {
    if (x(ms) > right - 24 || x(ms) < left + 12) continue;
    draw(svg, "line", { class: "axis", x1: x(ms), x2: x(ms), y1: bottom, y2: bottom + 4 });
    const label = stepS >= 86400 ? new Date(ms).toLocaleDateString("en-GB", { day: "numeric", month: "short" }) : clock(ms, stepS < 60);
    draw(svg, "text", { x: x(ms), y: bottom + 16, "text-anchor": "middle" }, label);
  }
  draw(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
  // Stretches without a pause, each window drawn at its middle.
  const stretches = [];
  rows.forEach((row, i) => {
    if (!i || times[i] - times[i - 1] > 3.5 * windowMs) stretches.push([]);
    stretches[stretches.length - 1].push({ x: x(times[i] + windowMs / 2), low: y(row[2]), middle: y(row[3]), high: y(row[4]) });
  });
  for (const stretch of stretches) {
    if (stretch.length === 1) {
      const [{ x: at, low: floor, middle, high: ceiling }] = stretch;
      draw(svg, "rect", { class: "band", x: at - 3, y: ceiling, width: 6, height: Math.max(floor - ceiling, 1) });
      draw(svg, "circle", { class: "point", cx: at, cy: middle, r: 3 });
      continue;
    }
    const there = stretch.map((p) => `${p.x.toFixed(1)},${p.high.toFixed(1)}`);
    const back = stretch.map((p) => `${p.x.toFixed(1)},${p.low.toFixed(1)}`).reverse();
    draw(svg, "polygon", { class: "band", points: there.concat(back).join(" ") });
    draw(svg, "polyline", { class: "median", points: stretch.map((p) => `${p.x.toFixed(1)},${p.middle.toFixed(1)}`).join(" ") });
  }
  draw(svg, "text", { x: left - 5, y: 14, "text-anchor": "end" }, "NG");
  const mostBad = Math.max(...drift.windows.ng.map((row) => row[1]));
  for (const row of drift.windows.ng) {
    const at = x(row[0] / 1e6 + windowMs / 2), size = 3 + (12 * row[1]) / mostBad;
    if (at >= left && at <= right) draw(svg, "line", { class: "bad", x1: at, x2: at, y1: 17 - size, y2: 17 });
  }
  if (drift.baseline.median !== null) {
    draw(svg, "line", { class: "first", x1: left, x2: right, y1: y(drift.baseline.median), y2: y(drift.baseline.median) });
  }
  if (known) {
    draw(svg, "line", { class: "threshold", x1: left, x2: right, y1: y(threshold), y2: y(threshold) });
    draw(svg, "text", { class: "strong halo", x: left + 6, y: y(threshold) + (y(threshold) < top + 18 ? 16 : -6) }, `threshold ${number(threshold)}`);
  }
  if (drift.alarm) {
    const at = Math.max(x(drift.alarm.since_ns / 1e6), left);
    draw(svg, "line", { class: "since", x1: at, x2: at, y1: top, y2: bottom });
  }
}

/* The score on a scale from good to bad, with the threshold. */
function drawMeter(svg, score, threshold, verdict) {
  const { width } = sheet(svg);
  if (threshold === null || threshold === undefined) return;
  const span = Math.max(Math.abs(threshold), Math.abs(score || 0) / 1.9, 1e-6);
  const low = Math.min(0, threshold - span, score === null ? 0 : score * 1.1);
  const high = Math.max(threshold + span, score === null ? -Infinity : score * 1.05);
  const left = 8, right = width - 8, top = 24, bottom = 38;
  const x = (value) => left + ((right - left) * (value - low)) / (high - low);
  draw(svg, "rect", { x: left, y: top, width: x(threshold) - left, height: bottom - top, fill: "#bfe3d6" });
  draw(svg, "rect", { x: x(threshold), y: top, width: right - x(threshold), height: bottom - top, fill: "#f1c3b2" });
  draw(svg, "line", { x1: x(threshold), x2: x(threshold), y1: top - 4, y2: bottom + 4, stroke: "#16202a", "stroke-width": 2 });
  draw(svg, "text", { x: Math.min(Math.max(x(threshold), left + 60), right - 60), y: bottom + 18, "text-anchor": "middle" }, `threshold ${number(threshold)}`);
  if (score === null || score === undefined) return;
  const at = x(score), label = Math.min(Math.max(at, left + 44), right - 44);
  draw(svg, "path", { d: `M${at} ${top + 6}l-9 -14h18z`, class: verdict, fill: "currentColor", stroke: "#fff" });
  draw(svg, "text", { class: "strong", x: label + (at > width / 2 ? -14 : 14), y: top - 8, "text-anchor": at > width / 2 ? "end" : "start", "font-size": 16 }, `score ${number(score)}`);
}
