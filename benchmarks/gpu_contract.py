"""Does a back end keep the contract of `edgead.runtime.backend` on this machine?

Every answer is compared with ONNX Runtime's on the same graph. The frames differ so much from each other
that a mixed-up result is far outside of the tolerance, which the first check proves.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from edgead.benchmarks.gpu_bench import Bench
from edgead.errors import BackendError
from edgead.runtime import Backend
from edgead.runtime.backend import ANOMALY_MAP, CALIBRATION, IMAGE, SCORE
from edgead.runtime.ort import OrtBackend

TOLERANCE = 0.02  # of the range of the map values; FP16 rounds by a tenth of that, a mix-up is beyond it
FRAMES = 5
ROUNDS = 10


class _Broken(Exception):
    """A check found something else than the contract says."""


def contract(bench: Bench) -> dict[str, Any]:
    """Runs all checks; one that fails does not keep the others from running."""
    with bench.open(bench.effort.batches) as backend:
        checks = _Checks(bench, backend)
        found = {name: _run(check) for name, check in checks.all().items()}
    found["closed"] = _run(checks.closed)
    return {
        "ok": all(item["ok"] for item in found.values()),
        "reference": "ONNX Runtime on the CPU, the same graph",
        "tolerance_of_map_range": TOLERANCE,
        "checks": found,
    }


def _run(check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"ok": True, "detail": check()}
    except Exception as error:  # also what a back end must not raise: that is a finding
        return {"ok": False, "detail": f"{type(error).__name__}: {error}"}


class _Checks:
    def __init__(self, bench: Bench, backend: Backend) -> None:
        self.backend, self.calibration = backend, bench.calibration
        self.most = FRAMES if backend.max_batch is None else min(FRAMES, backend.max_batch)
        frame = bench.bundle.manifest.input
        rng = np.random.default_rng(0)
        # Blocks of 8 px: their maps differ as maps of noise would not.
        coarse = rng.integers(0, 256, (FRAMES, -(-frame.height // 8), -(-frame.width // 8), 3), np.uint8)
        fine = coarse.repeat(8, axis=1).repeat(8, axis=2)
        self.frames = np.ascontiguousarray(fine[:, : frame.height, : frame.width])
        self.other = (self.calibration * 1.5).astype(np.float32)
        reference = OrtBackend(bench.bundle)
        self.maps = reference.infer(self._feed(self.frames))[ANOMALY_MAP]
        self.other_maps = reference.infer(self._feed(self.frames, self.other))[ANOMALY_MAP]
        reference.close()
        self.range = float(np.ptp(self.maps))
        self.slot: Any = None

    def all(self) -> dict[str, Callable[[], str]]:
        names = (
            "frames_differ", "batch_1", "batch_n", "padded_batch", "non_contiguous",
            "calibration_is_an_input", "results_belong_to_the_caller", "wrong_inputs", "threads",
            "slots_interleaved", "slot_calibration", "slot_partly_filled",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def _feed(self, images: np.ndarray, calibration: np.ndarray | None = None) -> dict[str, np.ndarray]:
        return {IMAGE: images, CALIBRATION: self.calibration if calibration is None else calibration}

    def _compare(self, scores: np.ndarray, maps: np.ndarray, expected: np.ndarray) -> float:
        """Largest deviation of a map value, of the range; the scores must be the maps' maxima."""
        if maps.shape != expected.shape or scores.shape != (len(expected),):
            raise _Broken(f"scores {scores.shape} and maps {maps.shape}, expected maps {expected.shape}")
        found = float(np.abs(maps - expected).max()) / self.range
        by_score = float(np.abs(scores - expected.max(axis=(1, 2))).max()) / self.range
        if not max(found, by_score) <= TOLERANCE:  # also NaN
            raise _Broken(f"deviates by {found:.3g} (scores {by_score:.3g}), allowed is {TOLERANCE}")
        return found

    def _infer(self, images: np.ndarray, expected: np.ndarray) -> float:
        outputs = self.backend.infer(self._feed(images))
        return self._compare(outputs[SCORE], outputs[ANOMALY_MAP], expected)

    def frames_differ(self) -> str:
        pairs = [(a, b) for a in range(FRAMES) for b in range(a)]
        least = min(float(np.abs(self.maps[a] - self.maps[b]).max()) for a, b in pairs) / self.range
        if least <= 2 * TOLERANCE:
            raise _Broken(f"maps of different frames differ by {least:.3g} only: nothing is proven")
        return f"maps of different frames differ by at least {least:.3g} of the range"

    def batch_1(self) -> str:
        found = [self._infer(self.frames[i : i + 1], self.maps[i : i + 1]) for i in range(FRAMES)]
        return f"{FRAMES} frames, largest deviation {max(found):.2g}"

    def batch_n(self) -> str:
        if self.most < 2:
            raise _Broken("the back end takes single images only")
        found = [self._infer(self.frames[:n], self.maps[:n]) for n in (2, min(4, self.most))]
        return f"batches of 2 and {min(4, self.most)}, largest deviation {max(found):.2g}"

    def padded_batch(self) -> str:
        sizes = [n for n in (3, 5) if n <= self.most]
        if not sizes:
            raise _Broken("the back end does not take batches of 3")
        found = [self._infer(self.frames[-n:], self.maps[-n:]) for n in sizes]
        return f"batches of {sizes}, largest deviation {max(found):.2g}"

    def non_contiguous(self) -> str:
        n = min(2, self.most)
        wide = np.zeros((n, *self.frames.shape[1:3], 6), np.uint8)
        wide[..., ::2] = self.frames[:n]
        fortran = np.asfortranarray(self.frames[:n])
        backwards = np.ascontiguousarray(self.frames[:n, :, ::-1])[:, :, ::-1]
        views = (wide[..., ::2], fortran, backwards)
        if any(view.flags["C_CONTIGUOUS"] for view in views):
            raise _Broken("a view is contiguous")
        return f"3 views, largest deviation {max(self._infer(v, self.maps[:n]) for v in views):.2g}"

    def calibration_is_an_input(self) -> str:
        outputs = self.backend.infer(self._feed(self.frames[:1], self.other))
        found = self._compare(outputs[SCORE], outputs[ANOMALY_MAP], self.other_maps[:1])
        changed = float(np.abs(self.other_maps[:1] - self.maps[:1]).max()) / self.range
        back = self._infer(self.frames[:1], self.maps[:1])
        if changed <= 2 * TOLERANCE:
            raise _Broken(f"another calibration changes the reference by {changed:.2g} only")
        return f"other values deviate by {found:.2g}, the first ones again by {back:.2g}"

    def results_belong_to_the_caller(self) -> str:
        first = self.backend.infer(self._feed(self.frames[:1]))
        before = first[ANOMALY_MAP].copy()
        self.backend.infer(self._feed(self.frames[1:2]))
        if not np.array_equal(before, first[ANOMALY_MAP]):
            raise _Broken("a later call changed an earlier result")
        return "a later call leaves them alone"

    def wrong_inputs(self) -> str:
        good = self._feed(self.frames[:1])
        wrong = {
            "dtype": {**good, IMAGE: good[IMAGE].astype(np.float32)},
            "size": {**good, IMAGE: good[IMAGE][:, :-1]},
            "no batch axis": {**good, IMAGE: good[IMAGE][0]},
            "empty batch": {**good, IMAGE: good[IMAGE][:0]},
            "calibration shape": {**good, CALIBRATION: self.calibration[:-1]},
            "calibration dtype": {**good, CALIBRATION: self.calibration.astype(np.float64)},
            "missing": {IMAGE: good[IMAGE]},
            "unknown": {**good, "more": self.calibration},
            "no array": {**good, IMAGE: good[IMAGE].tolist()},
        }
        if self.backend.max_batch is not None:
            count = self.backend.max_batch + 1
            wrong["batch too large"] = {**good, IMAGE: good[IMAGE].repeat(count, axis=0)}
        for name, feed in wrong.items():
            _refused(name, lambda feed=feed: self.backend.infer(feed))  # type: ignore[misc]
        self._infer(self.frames[:1], self.maps[:1])
        return f"{len(wrong)} kinds are refused, the back end goes on"

    def threads(self) -> str:
        def work(index: int) -> float:
            frame = index % FRAMES
            return self._infer(self.frames[frame : frame + 1], self.maps[frame : frame + 1])

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(work, range(4 * ROUNDS)))
        return f"{len(found)} calls from 4 threads, largest deviation {max(found):.2g}"

    def slots_interleaved(self) -> str:
        slots = [self.backend.open_slot() for _ in range(3)]
        found = []
        try:
            for turn in range(ROUNDS):
                chosen = [(turn + index) % FRAMES for index in range(len(slots))]
                for slot, frame in zip(slots, chosen, strict=True):
                    np.copyto(slot.images[0], self.frames[frame])
                    slot.launch()
                for slot, frame in reversed(list(zip(slots, chosen, strict=True))):
                    found.append(self._compare(*slot.wait(), self.maps[frame : frame + 1]))
        finally:
            for slot in slots:
                slot.close()
        slots[0].close()
        _refused("launch in a closed slot", slots[0].launch)
        return f"3 slots, {len(found)} results, largest deviation {max(found):.2g}"

    def slot_calibration(self) -> str:
        one, two = self.backend.open_slot(), self.backend.open_slot()
        try:
            one.calibrate(self.other)
            for slot in (one, two):
                np.copyto(slot.images[0], self.frames[0])
                slot.launch()
            self._compare(*one.wait(), self.other_maps[:1])
            self._compare(*two.wait(), self.maps[:1])
        finally:
            one.close()
            two.close()
        return "each slot has its own"

    def slot_partly_filled(self) -> str:
        room = min(4, self.most)
        slot = self.backend.open_slot(room)
        try:
            slot.images[:] = self.frames[:room]
            for count in range(1, room + 1):
                slot.launch(count)
                self._compare(*slot.wait(), self.maps[:count])
            _refused("more than the slot holds", lambda: slot.launch(room + 1))
        finally:
            slot.close()
        return f"1 to {room} of {room} images"

    def closed(self) -> str:
        self.backend.close()
        _refused("infer after close", lambda: self.backend.infer(self._feed(self.frames[:1])))
        _refused("open_slot after close", self.backend.open_slot)
        return "closing twice is harmless, use after it is refused"


def _refused(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except BackendError:
        return
    raise _Broken(f"{what}: was not refused")
