"use strict";
// The status page: asks the line for its state twice a second, for pictures five times.

const STATE_MS = 500, PICTURE_MS = 200, CHARTS_MS = 2500, HIDDEN_MS = 3000;
const VERDICTS = { OK: "OK", NG: "NG", LATE: "LATE", ERROR: "ERROR", NOT_INSPECTED: "NOT INSPECTED" };
const find = (parent, selector) => parent.querySelector(selector);
const byId = (id) => document.getElementById(id);

let state = null;
const views = new Map();

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function shape(verdict) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", verdict);
  draw(svg, "use", { href: `#shape-${verdict}` });
  return svg;
}

/* Sets what has changed, so that the page is at rest when the line is. */
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

async function ask(path, options) {
  const answer = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  if (answer.status === 401 && path !== "api/login") login();
  if (!answer.ok) {
    const error = new Error((await answer.text()) || answer.statusText);
    error.status = answer.status;
    throw error;
  }
  return answer;
}

function send(path, data) {
  const headers = { "Content-Type": "application/json", "X-EdgeAD": "1" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(data) });
}

function repeat(work, everyMs) {
  const turn = async () => {
    const start = performance.now();
    try {
      await work();
    } catch (error) {
      if (error.status === undefined && !(error instanceof TypeError)) console.error(error);
    }
    const pauseMs = document.hidden ? HIDDEN_MS : everyMs;
    setTimeout(turn, Math.max(pauseMs - (performance.now() - start), 20));
  };
  turn();
}

function login() {
  const dialog = byId("login");
  if (!dialog.open) dialog.showModal();
}

byId("login").addEventListener("cancel", (event) => event.preventDefault());
find(byId("login"), "form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const dialog = byId("login"), input = find(dialog, ".token");
  try {
    await send("api/login", { token: input.value });
    input.value = "";
    put(find(dialog, ".problem"), "");
    dialog.close();
  } catch (error) {
    put(find(dialog, ".problem"), error.message);
  }
});

class CameraView {
  constructor(name) {
    this.name = name;
    this.number = 0;
    this.root = make("div");
    this.root.append(byId("camera").content.cloneNode(true));
    this.root.dataset.camera = name;
    put(find(this.root, ".camera-name"), name);
    find(this.root, ".change").addEventListener("click", () => change.open(this.name));
    find(this.root, ".heat").addEventListener("change", () => { this.number = 0; });
    const counts = find(this.root, ".counts");
    this.counts = {};
    for (const [verdict, words] of Object.entries(VERDICTS)) {
      const item = make("li"), label = make("span", "label");
      label.append(shape(verdict), make("span", "", words));
      item.append(label, make("b"), make("span", "share"));
      counts.append(item);
      this.counts[verdict] = item;
    }
    byId("cameras").append(this.root);
    const more = find(this.root, ".more");
    more.open = state.cameras.length <= 2 || innerWidth >= 2300; // where there is room for them
    more.addEventListener("toggle", () => this.updateCharts());
    repeat(() => this.updatePicture(), PICTURE_MS);
    repeat(() => this.updateCharts(), CHARTS_MS);
  }

  update(camera, timeMs) {
    this.camera = camera;
    const bundle = camera.recipes[camera.recipe] || "";
    put(find(this.root, ".bundle"), camera.recipes.length > 1 ? `${bundle} (recipe ${camera.recipe})` : bundle);
    put(find(this.root, ".load"), `${camera.queue} waiting · ${camera.open_parts} open`);
    const button = find(this.root, ".change");
    button.disabled = !state.can_change;
    button.title = state.can_change ? "" : "read-only: no password is set";
    this.updateVerdict(camera, timeMs);
    this.updateStrip([...camera.last]);
    const total = Object.values(camera.counts).reduce((sum, n) => sum + n, 0);
    for (const [verdict, item] of Object.entries(this.counts)) {
      const n = camera.counts[verdict], share = total ? (100 * n) / total : 0;
      put(find(item, "b"), count(n));
      put(find(item, ".share"), total ? `${share > 0 && share < 0.01 ? "< 0.01" : share.toFixed(share < 10 ? 2 : 1)} %` : "–");
      item.className = n ? "" : "zero";
    }
    const ms = camera.latency_ms;
    put(find(this.root, ".latency .numbers"), ms.count
      ? `p50 ${milliseconds(ms.p50)} · p99 ${milliseconds(ms.p99)} · p99.9 ${milliseconds(ms.p99_9)} · max ${milliseconds(ms.max)}`
      : "");
    put(find(this.root, ".drift .numbers"), driftWords(camera.drift));
    this.updateNg(state.ng.filter((row) => row.camera === this.name));
  }

  updateVerdict(camera, timeMs) {
    const last = camera.last[camera.last.length - 1], box = find(this.root, ".verdict");
    find(box, ".shape").toggleAttribute("hidden", !last);
    if (!last) {
      box.className = "verdict none";
      put(find(box, "strong"), "No part yet");
      return;
    }
    box.className = `verdict ${last.verdict}`;
    find(box, "use").setAttribute("href", `#shape-${last.verdict}`);
    put(find(box, "strong"), VERDICTS[last.verdict]);
    put(find(box, ".part"), `part ${last.part_id} · ${ago(timeMs - last.time_ms)} · ${milliseconds(last.total_ms)}`);
    const reason = find(this.root, ".reason"), meter = find(this.root, ".meter");
    put(reason, last.reason);
    reason.hidden = last.score !== null;
    meter.toggleAttribute("hidden", last.score === null);
    if (last.score !== null) drawMeter(meter, last.score, last.threshold ?? camera.threshold, last.verdict);
  }

  updateStrip(rows) {
    const strip = find(this.root, ".strip"), newest = rows.length ? rows[rows.length - 1].part_id : null;
    if (this.newest === newest) return;
    this.newest = newest;
    strip.replaceChildren(...rows.reverse().map((row) => {
      const item = make("li", row.verdict);
      item.title = `part ${row.part_id}: ${VERDICTS[row.verdict]}, ${row.reason}`;
      item.append(shape(row.verdict));
      return item;
    }));
  }

  updateNg(rows) {
    const list = find(this.root, ".ng ul"), ids = rows.map((row) => row.part_id).join();
    if (this.ng === ids) return;
    this.ng = ids;
    find(this.root, ".ng .hint").hidden = rows.length > 0;
    const known = new Map([...list.children].map((item) => [item.dataset.part, item]));
    list.replaceChildren(...rows.map((row) => known.get(String(row.part_id)) || ngItem(row)));
  }

  async updatePicture() {
    const heat = find(this.root, ".heat").checked ? 1 : 0;
    const answer = await ask(`live.jpg?camera=${encodeURIComponent(this.name)}&after=${this.number}&heat=${heat}`);
    if (answer.status === 204) return;
    this.number = Number(answer.headers.get("X-Number"));
    const row = JSON.parse(answer.headers.get("X-Part")), image = find(this.root, ".live img");
    const url = URL.createObjectURL(await answer.blob());
    image.onload = () => URL.revokeObjectURL(url);
    image.src = url;
    image.hidden = false;
    find(this.root, ".live .empty").hidden = true;
    const shown = find(this.root, ".shown");
    const words = [`part ${row.part_id}`, VERDICTS[row.verdict], clock(row.time_ms)].join(" · ");
    shown.replaceChildren(shape(row.verdict), make("span", "", words));
  }

  async updateCharts() {
    if (!this.camera || !find(this.root, ".more").open) return;
    const charts = await (await ask(`api/charts?camera=${encodeURIComponent(this.name)}`)).json();
    drawHistogram(find(this.root, ".latency svg"), charts.histogram, this.camera.deadline_ms);
    drawDrift(find(this.root, ".drift svg"), charts.drift, this.camera.threshold);
  }
}

function ngItem(row) {
  const item = make("li"), image = make("img"), links = make("span", "links");
  item.dataset.part = row.part_id;
  image.src = `ng/small.jpg?part=${row.part_id}`;
  image.alt = `part ${row.part_id}`;
  for (const [words, path] of [["original", "original.png"], ["heat map", "heat.jpg"]]) {
    const link = make("a", "", words);
    link.href = `ng/${path}?part=${row.part_id}`;
    link.download = "";
    links.append(link);
  }
  item.append(image, make("b", "", `part ${row.part_id}`), document.createTextNode(` ${number(row.score)}`), links);
  return item;
}

function driftWords(drift) {
  if (!drift) return "";
  const { scores, of: wanted, median } = drift.baseline;
  if (scores < wanted) return `learning what is usual: ${scores} of ${wanted} scores`;
  const now = drift.now.ok ? drift.now.ok[1] : null;
  const level = Math.round((100 * Math.max(...drift.sums)) / drift.limit);
  return `median now ${number(now)}, at first ${number(median)} · drift ${Math.min(level, 100)} % of alarm level`;
}

function ago(ms) {
  const s = Math.max(ms, 0) / 1000;
  if (s < 1) return "now";
  if (s < 60) return `${Math.floor(s)} s ago`;
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  return s < 86400 ? `${Math.floor(s / 3600)} h ago` : `${Math.floor(s / 86400)} days ago`;
}

function alarms() {
  const found = [];
  for (const camera of state.cameras) {
    if (camera.failure) found.push(["Camera", camera.failure, "grave"]);
    if (camera.drift && camera.drift.alarm) found.push(["Drift", camera.drift.alarm.text, ""]);
  }
  for (const [name, sink] of Object.entries(state.sinks)) {
    if (sink.dropped) found.push(["Output", `${name} has dropped ${count(sink.dropped)} records`, "grave"]);
    else if (sink.waiting > 1000) found.push(["Output", `${count(sink.waiting)} records wait for ${name}`, ""]);
  }
  if (state.journal_failures) found.push(["Journal", `the disk refused ${count(state.journal_failures)} lines`, "grave"]);
  return found.sort((a, b) => b[2].length - a[2].length); // grave ones first
}

let shownAlarms = "";
function showAlarms(found) {
  const text = JSON.stringify(found);
  if (text === shownAlarms) return;
  shownAlarms = text;
  byId("alarms").replaceChildren(...found.map(([kind, words, className]) => {
    const item = make("p", className);
    item.append(make("b", "", kind), make("span", "", words));
    return item;
  }));
}

function showTables() {
  byId("read-only").hidden = state.can_change;
  byId("no-audit").hidden = state.audit.length > 0 || !state.can_change;
  const row = (cells, firstNumber) => {
    const line = make("tr");
    cells.forEach((cell, i) => line.append(make("td", i >= firstNumber ? "number" : "", cell)));
    return line;
  };
  const shown = (value) => (typeof value === "number" && !Number.isInteger(value) ? number(value) : String(value ?? "–"));
  byId("audit").replaceChildren(...state.audit.map((entry) => {
    const day = new Date(entry.time_ms).toLocaleDateString("en-CA");
    return row([`${day} ${clock(entry.time_ms)}`, entry.camera, entry.what, shown(entry.old), shown(entry.new), entry.address], 9);
  }));
  byId("sinks").replaceChildren(...Object.entries(state.sinks).map(([name, sink]) =>
    row([name, ...["written", "waiting", "failed", "dropped"].map((key) => count(sink[key] ?? 0))], 1)));
}

function show() {
  document.title = state.name;
  put(byId("name"), state.name);
  put(byId("ready"), state.ready ? "READY" : "NOT READY");
  byId("ready").className = `pill ${state.ready ? "is-ready" : "is-not"}`;
  const parts = state.cameras.reduce((sum, camera) => sum + Object.values(camera.counts).reduce((a, b) => a + b, 0), 0);
  put(byId("total"), `${count(parts)} parts`);
  const minutes = Math.floor(state.uptime_s / 60), hours = Math.floor(minutes / 60);
  put(byId("uptime"), `running for ${hours >= 48 ? `${Math.floor(hours / 24)} days` : hours ? `${hours} h ${minutes % 60} min` : `${minutes} min`}`);
  put(byId("clock"), clock(state.time_ms));
  byId("cameras").className = state.cameras.length > 4 ? "many crowd" : state.cameras.length > 1 ? "many" : "";
  for (const camera of state.cameras) {
    if (!views.has(camera.name)) views.set(camera.name, new CameraView(camera.name));
    views.get(camera.name).update(camera, state.time_ms);
  }
  showTables();
}

const change = {
  dialog: byId("change"),

  open(name) {
    const camera = state.cameras.find((each) => each.name === name), dialog = this.dialog;
    this.camera = camera;
    put(find(dialog, ".camera-name"), name);
    put(find(dialog, ".problem"), "");
    const scores = camera.last.filter((row) => row.score !== null).map((row) => row.score);
    const threshold = camera.threshold ?? 0;
    const low = Math.min(0, threshold * 2, ...scores), high = Math.max(threshold * 2, ...scores.map((s) => s * 1.1), 1e-3);
    const slider = find(dialog, ".slider"), exact = find(dialog, ".exact");
    slider.min = low; slider.max = high; slider.step = (high - low) / 400;
    slider.value = threshold; exact.value = threshold;
    slider.disabled = exact.disabled = camera.threshold === null;
    slider.oninput = () => { exact.value = Number(slider.value).toPrecision(4); this.effect(scores); };
    exact.oninput = () => { slider.value = exact.value; this.effect(scores); };
    find(dialog, ".recipe").replaceChildren(...camera.recipes.map((bundle, i) => {
      const option = make("option", "", `${i}: ${bundle ?? "…"}`);
      option.value = i;
      option.selected = i === camera.recipe;
      return option;
    }));
    find(dialog, ".baseline").checked = false;
    find(dialog, ".password").value = "";
    this.effect(scores);
    dialog.showModal();
  },

  effect(scores) {
    const value = Number(find(this.dialog, ".exact").value), ng = (limit) => scores.filter((score) => score >= limit).length;
    put(find(this.dialog, ".effect"), scores.length
      ? `Of the last ${scores.length} scored parts, ${ng(value)} would be NG; with ${number(this.camera.threshold)} it is ${ng(this.camera.threshold)}.`
      : "No scores yet to show the effect on.");
  },

  async apply() {
    const dialog = this.dialog, camera = this.camera.name, password = find(dialog, ".password").value;
    const value = Number(find(dialog, ".exact").value), index = Number(find(dialog, ".recipe").value);
    try {
      if (this.camera.threshold !== null && value !== this.camera.threshold) {
        await send("api/threshold", { camera, value, password });
        this.camera.threshold = value;
      }
      if (index !== this.camera.recipe) {
        await send("api/recipe", { camera, index, password });
        this.camera.recipe = index;
      }
      if (find(dialog, ".baseline").checked) await send("api/baseline", { camera, password });
      dialog.close();
    } catch (error) {
      put(find(dialog, ".problem"), error.message);
    }
    find(dialog, ".password").value = "";
  },
};
find(change.dialog, "form").addEventListener("submit", (event) => { event.preventDefault(); change.apply(); });
find(change.dialog, ".cancel").addEventListener("click", () => change.dialog.close());

let lostSince = null;
repeat(async () => {
  try {
    state = await (await ask("api/state")).json();
    lostSince = null;
    document.body.classList.remove("is-stale");
    show();
    showAlarms(alarms());
  } catch (error) {
    if (error.status === 401) return;
    if (error.status === undefined && !(error instanceof TypeError)) throw error;
    lostSince = lostSince || Date.now();
    document.body.classList.add("is-stale");
    showAlarms([["No connection", `the line has not answered since ${clock(lostSince)}: what is shown is old`, "grave"]]);
  }
}, STATE_MS);
