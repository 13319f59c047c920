"""A line without cameras for the tests of metrics and status page, with real statistics."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from edgead.errors import LineError
from edgead.line.statistics import Statistics
from edgead.line.verdicts import Record, Verdict

START_NS = 1_790_000_000_000_000_000


class StandIn:
    """Implements `Controls`."""

    def __init__(self, cameras: tuple[str, ...] = ("top", "side"), baseline: int = 500) -> None:
        self.cameras = cameras
        self.statistics = Statistics(baseline)
        self.thresholds: dict[str, float | None] = dict.fromkeys(cameras, 0.5)
        self.recipes = dict.fromkeys(cameras, 0)
        self.sinks: dict[str, dict[str, Any]] = {
            "results": {"waiting": 3, "written": 120, "failed": 1, "dropped": 0}
        }
        self.failures: dict[str, str | None] = dict.fromkeys(cameras)
        self._lock = threading.Lock()

    def trigger(self, camera: str, tag: int | None = None) -> int:
        raise LineError(f"camera {camera}: its images are its triggers")

    def select_recipe(self, camera: str, index: int) -> None:
        if camera not in self.cameras or not 0 <= index <= 1:
            raise LineError(f"camera {camera} has no recipe {index}: 0 to 1")
        self.recipes[camera] = index

    def set_threshold(self, camera: str, value: float) -> None:
        if camera not in self.cameras or not math.isfinite(value):
            raise LineError(f"camera {camera}: threshold {value!r}, expected a finite number")
        with self._lock:
            self.thresholds[camera] = value

    def state(self) -> dict[str, Any]:
        return {
            "name": "press 4",
            "ready": True,
            "uptime_s": 4321.0,
            "journal_failures": 0,
            "cameras": {
                name: {
                    "recipe": self.recipes[name],
                    "recipes": ["bottle", "jar"],
                    "threshold": self.thresholds[name],
                    "deadline_ms": 40.0,
                    "queue": 1,
                    "open_parts": 2,
                    "source": {"frames": 130, "missing_frames": 2},
                    "failure": self.failures[name],
                }
                for name in self.cameras
            },
            "sinks": self.sinks,
        }


def make_record(part_id: int, **given: Any) -> Record:
    """An OK part of the first camera, one per second, with whatever else is given."""
    fields: dict[str, Any] = dict(
        part_id=part_id,
        camera="top",
        verdict=Verdict.OK,
        reject=False,
        reason="score 0.2 < threshold 0.5",
        source="top.png",
        trigger_ns=START_NS + part_id * 1_000_000_000,
        total_ms=12.0,
        score=0.2,
        threshold=0.5,
        bundle="bottle",
        wait_ms=2.0,
        infer_ms=9.0,
    )
    return Record(**fields | given)


def history(
    controls: StandIn, parts: int, *, shift: float = 0.0, seed: int = 0, period_s: float = 1.0
) -> list[Record]:
    """Adds plausible parts to the statistics, all cameras in turn; `shift` moves the last third.

    Returns:
        The records.
    """
    rng = np.random.default_rng(seed)
    records = []
    for part_id in range(1, parts + 1):
        camera = controls.cameras[part_id % len(controls.cameras)]
        score = 0.22 + 0.05 * rng.gamma(2) + (shift if part_id > parts * 2 / 3 else 0.0)
        given: dict[str, Any] = {"infer_ms": 9 + rng.gamma(2, 0.8), "wait_ms": 0.5 + rng.gamma(1.5, 1.0)}
        given["total_ms"] = given["infer_ms"] + given["wait_ms"] + 0.3
        kind = rng.random()
        if kind < 0.03:
            score += 0.6
        if kind > 0.99:
            late = {"score": None, "threshold": None, "infer_ms": None, "total_ms": 40.0}
            given |= late | {"verdict": Verdict.LATE, "reason": "no answer 40 ms after the trigger"}
        elif kind > 0.985:
            given |= {"verdict": Verdict.NOT_INSPECTED, "score": None, "threshold": None}
            given["reason"] = (
                "black: mean brightness 2.1 of 255, this bundle's images have 88 to 131, limit 62"
            )
        elif kind > 0.982:
            given |= {"verdict": Verdict.ERROR, "score": None, "threshold": None}
            given["reason"] = "BackendError: the device was lost"
        else:
            is_bad = score >= 0.5
            given |= {"score": score, "verdict": Verdict.NG if is_bad else Verdict.OK}
            given["reason"] = f"score {score:.4g} {'>=' if is_bad else '<'} threshold 0.5"
        given["reject"] = given["verdict"] is not Verdict.OK
        time_ns = START_NS + round(part_id * period_s * 1e9)
        record = make_record(part_id, camera=camera, trigger_ns=time_ns, **given)
        controls.statistics.add(record)
        records.append(record)
    return records
