"""What has happened on the line since it started: verdicts, latencies, scores."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque
from datetime import datetime
from typing import Any

from edgead.line.drift import BASELINE, LIMIT, Cusum, Window, Windows
from edgead.line.verdicts import Record, Verdict

STAGES = ("wait", "infer", "total")
# Upper ends of the latency buckets in ms: 20 per decade, 0.1 ms to 10 s; above them there is one more.
EDGES_MS = tuple(0.1 * 10 ** (step / 20) for step in range(101))

_ANSWERED = (Verdict.OK, Verdict.NG, Verdict.LATE)
_LAST_RECORDS = 50
_MAX_MODELS = 16  # whose drift a camera remembers: recipe and bundle


class Histogram:
    """Counts of latencies in fixed buckets, their sum, and the exact longest one."""

    def __init__(self) -> None:
        self.counts = [0] * (len(EDGES_MS) + 1)
        self.sum_ms = self.max_ms = 0.0

    def add(self, value_ms: float) -> None:
        self.counts[bisect_left(EDGES_MS, value_ms)] += 1
        self.sum_ms += value_ms
        if value_ms > self.max_ms:
            self.max_ms = value_ms

    def copy(self) -> Histogram:
        other = Histogram()
        other.counts, other.sum_ms, other.max_ms = self.counts.copy(), self.sum_ms, self.max_ms
        return other

    def percentile(self, percent: float) -> float | None:
        """In ms, right to the width of a bucket, 12 %; None without any."""
        total = sum(self.counts)
        wanted, below = total * percent / 100, 0
        for index, count in enumerate(self.counts):
            if count and below + count >= wanted:
                low = EDGES_MS[index - 1] if index else 0.0
                high = EDGES_MS[index] if index < len(EDGES_MS) else self.max_ms
                return min(low + (high - low) * (wanted - below) / count, self.max_ms)
            below += count
        return None

    def to_dict(self) -> dict[str, Any]:
        """Count, percentiles and longest in ms."""
        return {
            "count": sum(self.counts),
            "p50": self.percentile(50),
            "p99": self.percentile(99),
            "p99_9": self.percentile(99.9),
            "max": self.max_ms if any(self.counts) else None,
        }


class _Scores:
    """Of one camera with one recipe and bundle."""

    def __init__(self, baseline: int) -> None:
        self.ok, self.ng = Windows(), Windows()
        self.cusum = Cusum(baseline)

    def add(self, score: float, is_ok: bool, time_ns: int) -> None:
        (self.ok if is_ok else self.ng).add(score, time_ns)
        if is_ok:
            self.cusum.add(score, time_ns)


class _Camera:
    def __init__(self) -> None:
        self.counts = dict.fromkeys(Verdict, 0)
        self.rejected = 0
        self.latency = {stage: Histogram() for stage in STAGES}
        self.last: deque[Record] = deque(maxlen=_LAST_RECORDS)
        self.scores: dict[tuple[int, str], _Scores] = {}
        self.current: tuple[int, str] | None = None  # key of the scores that came last


class Statistics:
    """Fed with every record; any thread."""

    def __init__(self, baseline: int = BASELINE) -> None:
        """`baseline` is the number of OK scores of a camera and model that drift is measured against."""
        self._baseline = baseline
        self._lock = threading.Lock()
        self._cameras: dict[str, _Camera] = {}

    def add(self, record: Record) -> None:
        """Takes one record, in microseconds (`tests/line/test_statistics.py` prints how many)."""
        with self._lock:
            camera = self._cameras.get(record.camera)
            if camera is None:
                camera = self._cameras[record.camera] = _Camera()
            camera.counts[record.verdict] += 1
            camera.rejected += record.reject
            camera.last.append(record)
            if record.verdict not in _ANSWERED:
                return
            latency = camera.latency
            latency["total"].add(record.total_ms)
            if record.wait_ms is not None:
                latency["wait"].add(record.wait_ms)
            if record.infer_ms is not None:
                latency["infer"].add(record.infer_ms)
            if (
                record.score is not None
                and record.verdict is not Verdict.LATE
                and math.isfinite(record.score)
            ):
                self._scores(camera, record).add(
                    record.score, record.verdict is Verdict.OK, record.trigger_ns
                )

    def _scores(self, camera: _Camera, record: Record) -> _Scores:
        key = record.recipe, record.bundle
        camera.current = key
        scores = camera.scores.get(key)
        if scores is None:
            if len(camera.scores) >= _MAX_MODELS:
                del camera.scores[next(iter(camera.scores))]
            scores = camera.scores[key] = _Scores(self._baseline)
        return scores

    def reset_baseline(self, camera: str) -> None:
        """The next OK scores of the camera's current recipe are a new baseline; an alarm ends."""
        with self._lock:
            known = self._cameras.get(camera)
            if known is not None and known.current is not None:
                known.scores[known.current].cusum.reset()

    def new_bundle(self, camera: str, recipe: int) -> None:
        """Scores of this recipe are those of another bundle from now on: drift is measured anew."""
        with self._lock:
            if known := self._cameras.get(camera):
                for (index, _), scores in known.scores.items():
                    if index == recipe:
                        scores.cusum.reset()

    def latencies(self) -> dict[str, dict[str, Histogram]]:
        """Copies of the histograms by camera and stage."""
        with self._lock:
            return {
                name: {stage: histogram.copy() for stage, histogram in camera.latency.items()}
                for name, camera in self._cameras.items()
            }

    def counts(self) -> dict[str, dict[str, int]]:
        """Parts by camera and verdict."""
        with self._lock:
            return {
                name: {verdict.value: count for verdict, count in camera.counts.items()}
                for name, camera in self._cameras.items()
            }

    def last(self, camera: str) -> list[Record]:
        """The last 50 records of a camera, the newest last."""
        with self._lock:
            known = self._cameras.get(camera)
            return [] if known is None else list(known.last)

    def drift(self, camera: str, *, with_windows: bool = True) -> dict[str, Any] | None:
        """Scores of the camera's current recipe; None before the first.

        {"recipe", "bundle", "baseline": {"scores", "of", "median"}, "sums": [up, down], "limit",
        "alarm": None or {"direction", "since_ns", "text"}, "now": {"ok": quantiles of the last 100,
        "ng": likewise}, "windows": {"ok": [[start_ns, count, *quantiles], ...], "ng": likewise}}; the
        quantiles are 5 %, 50 % and 95 %.
        """
        with self._lock:
            known = self._cameras.get(camera)
            if known is None or known.current is None:
                return None
            recipe, bundle = known.current
            scores = known.scores[known.current]
            cusum = scores.cusum
            have, want = cusum.baseline_scores
            windows = {"ok": scores.ok.copy(), "ng": scores.ng.copy()}
            direction, since_ns, median, sums = cusum.direction, cusum.since_ns, cusum.median, cusum.sums
        now = {name: recent for name, kind in windows.items() if (recent := kind.recent)}
        alarm = None
        if direction:
            alarm = {
                "direction": direction,
                "since_ns": since_ns,
                "text": _advice(camera, direction, since_ns, median or 0.0, now["ok"][1]),
            }
        drift: dict[str, Any] = {
            "recipe": recipe,
            "bundle": bundle,
            "baseline": {"scores": have, "of": want, "median": median},
            "sums": list(sums),
            "limit": LIMIT,
            "alarm": alarm,
            "now": {name: list(quantiles) for name, quantiles in now.items()},
        }
        if with_windows:
            drift["windows"] = {n: [_row(window) for window in w.all()] for n, w in windows.items()}
        return drift

    def snapshot(self) -> dict[str, Any]:
        """All of one moment; JSON can hold it.

        {camera: {"counts": {verdict: n}, "rejected", "latency_ms": {stage: {"count", "p50", "p99",
        "p99_9", "max"}}, "histogram": {"edges_ms", "counts"}, "drift": as from `drift`, "last": [record,
        ...]}}. Latencies are those of answered parts: OK, NG and LATE; the histogram is of their total.
        """
        with self._lock:
            cameras = {
                name: (
                    {verdict.value: count for verdict, count in camera.counts.items()},
                    camera.rejected,
                    {stage: histogram.copy() for stage, histogram in camera.latency.items()},
                )
                for name, camera in self._cameras.items()
            }
        return {
            name: {
                "counts": counts,
                "rejected": rejected,
                "latency_ms": {stage: histogram.to_dict() for stage, histogram in latency.items()},
                "histogram": {"edges_ms": list(EDGES_MS), "counts": latency["total"].counts},
                "drift": self.drift(name),
                "last": [record.to_dict() for record in self.last(name)],
            }
            for name, (counts, rejected, latency) in cameras.items()
        }


def _row(window: Window) -> list[float]:
    return [window.start_ns, window.count, window.low, window.middle, window.high]


def _advice(camera: str, direction: str, since_ns: int, median: float, now: float) -> str:
    since = datetime.fromtimestamp(since_ns / 1e9).astimezone().strftime("%Y-%m-%d %H:%M")
    word = "risen" if direction == "up" else "fallen"
    return (
        f"{camera}: scores of OK parts have {word} since {since} (median {median:.3g} at first,"
        f" {now:.3g} now): check lamp, lens and material; if the parts are good, collect images of them"
        " and run edgead recalibrate"
    )
