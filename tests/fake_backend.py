"""A back end that computes in a thread of its own and fails as told, and what drives an executor hard.

The number of a frame is its score and is written all over the frame, so that a verdict that is lost,
doubled, swapped with another or of a torn image shows.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from edgead import BackendError, BusyError, DataError, Executor, Result
from edgead.manifest import Calibration, InputSpec, Manifest, OutputSpec, Threshold
from edgead.runtime.backend import expected_specs

SIDE_PX, TORN = 8, -1
NOT_FINITE = 1 << 20  # the number of a frame whose score is NaN
PATIENCE_S = 30  # until something that never comes fails the test


def numbered(number: int) -> np.ndarray:
    """uint8 [8, 8, 3] that says `number`, below 2**24, everywhere."""
    frame = np.empty(SIDE_PX * SIDE_PX * 3, np.uint8)
    frame[:4] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)
    frame[4:] = (np.arange(4, len(frame)) * 31 + number) % 256
    return frame.reshape(SIDE_PX, SIDE_PX, 3)


def number_of(image: np.ndarray) -> int:
    number = int.from_bytes(image.reshape(-1)[:4].tobytes(), "little")
    return number if np.array_equal(image, numbered(number)) else TORN


def wait_until(happens: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < end_s, "it never happened"
        time.sleep(0.001)


@dataclass
class FakeDevice:
    """What the back ends of one test run on. They finish what is in flight in any order.

    Attributes:
        faults: (call, n): the n-th call, from 1, of "open", "slot", "launch", "wait" or "close" raises.
        hazard: Probability of a fault at each "launch" and "wait" of a back end that has given a result.
        is_sticky: After a fault, everything of that back end fails.
        error: What is raised.
        gate: While it is not set nothing gets finished. `pause` clears it.
        reopening: Likewise for opening a back end.
        calls: How often what was called.
        awaited: How often somebody began to wait for a slot.
        launched: The numbers of the frames in the order of their launches.
        misuse: What the caller did against the contract of `Backend` and `Slot`.
        is_open: The back ends that are open.
    """

    faults: set[tuple[str, int]] = field(default_factory=set)
    hazard: float = 0.0
    is_sticky: bool = False
    error: Callable[[str], Exception] = BackendError
    seed: int = 0

    def __post_init__(self) -> None:
        self.gate, self.reopening = threading.Event(), threading.Event()
        self.gate.set()
        self.reopening.set()
        self.calls: Counter[str] = Counter()
        self.awaited = 0
        self.launched: list[int] = []
        self.misuse: list[str] = []
        self.is_open: list[FakeBackend] = []
        self.lock = threading.Lock()
        self.random = random.Random(self.seed)
        size = InputSpec(height=SIDE_PX, width=SIDE_PX)
        self.manifest = Manifest(
            method="number",
            name="number",
            precision="fp32",
            input=size,
            outputs={
                "score": OutputSpec(shape=("N",)),
                "anomaly_map": OutputSpec(shape=("N", 2, 3)),
            },
            calibration=Calibration(values=(1.0,), names=("none",), meaning="none"),
            threshold=Threshold(value=100.0, basis="none"),
        )

    def open(self) -> FakeBackend:
        return FakeBackend(self)

    def executor(self, **options: Any) -> Executor:
        return Executor(self.manifest, self.open(), reopen=self.open, **options)

    def pause(self) -> None:
        """Clears the gate; what is in flight now stays so."""
        self.gate.clear()
        for backend in self.is_open:
            with backend.changed:
                pass

    def call(self, what: str, backend: FakeBackend) -> None:
        with self.lock:
            self.calls[what] += 1
            is_fault = (what, self.calls[what]) in self.faults
            if backend.has_given and what in ("launch", "wait"):
                is_fault |= self.random.random() < self.hazard
            backend.has_given |= what == "wait" and not is_fault
        backend.is_lost |= is_fault and self.is_sticky
        if is_fault or (backend.is_lost and what != "close"):
            raise self.error(f"{what} {self.calls[what]} failed")


class FakeBackend:
    name, precision = "fake", "fp32"
    max_batch: int | None = None

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.is_lost = self.is_closed = self.has_given = False
        assert device.reopening.wait(PATIENCE_S)
        device.call("open", self)
        self.inputs, self.outputs = expected_specs(device.manifest)
        self.in_flight: list[FakeSlot] = []
        self.changed = threading.Condition()
        self.random = random.Random(device.seed)
        self.thread = threading.Thread(target=self._compute, name="fake device", daemon=True)
        self.thread.start()
        device.is_open.append(self)

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def open_slot(self, batch: int = 1) -> FakeSlot:
        self.device.call("slot", self)
        return FakeSlot(self, batch)

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        with self.changed:
            self.changed.notify()
        self.thread.join(PATIENCE_S)
        self.device.is_open.remove(self)
        self.device.call("close", self)

    def _compute(self) -> None:
        while True:
            with self.changed:
                while not self.in_flight and not self.is_closed:
                    self.changed.wait()
                if not self.in_flight:
                    return
            if not self.device.gate.wait(PATIENCE_S):
                self.device.misuse.append("the gate was never opened")
            with self.changed:
                if not self.device.gate.is_set():
                    continue
                slot = self.in_flight.pop(self.random.randrange(len(self.in_flight)))
            slot.compute()


class FakeSlot:
    def __init__(self, backend: FakeBackend, batch: int) -> None:
        self.backend, self.device = backend, backend.device
        self.images = np.zeros((batch, SIDE_PX, SIDE_PX, 3), np.uint8)
        self.scores = np.zeros(batch, np.float32)
        self.maps = np.zeros((batch, 2, 3), np.float32)
        self.is_launched = False
        self.done = threading.Event()

    def calibrate(self, values: np.ndarray) -> None:
        raise NotImplementedError

    def launch(self, count: int = 1) -> None:
        if self.is_launched or self.backend.is_closed:
            self.device.misuse.append(f"launch: {self.is_launched=} {self.backend.is_closed=}")
        self.device.call("launch", self.backend)
        self.is_launched = True
        self.done.clear()
        self.scores[:] = self.maps[:] = TORN  # a view of before must not be in use
        self.device.launched.append(number_of(self.images[0]))
        with self.backend.changed:
            self.backend.in_flight.append(self)
            self.backend.changed.notify()

    def compute(self) -> None:
        number = number_of(self.images[0])  # read late, as a device may
        self.scores[0] = np.nan if number == NOT_FINITE else number
        self.maps[0] = number
        self.done.set()

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.is_launched or self.backend.is_closed:
            self.device.misuse.append(f"wait: {self.is_launched=} {self.backend.is_closed=}")
        self.device.awaited += 1
        if not self.done.wait(PATIENCE_S):
            self.device.misuse.append("wait: never done")
        self.is_launched = False
        self.device.call("wait", self.backend)
        return self.scores[:1], self.maps[:1]

    def close(self) -> None:
        raise NotImplementedError


def exercise(
    executor: Executor,
    *,
    frame: Callable[[int], np.ndarray],
    score: Callable[[int], float],
    count: int,
    threads: int = 8,
    tolerance: float = 0.0,
    seed: int = 0,
) -> None:
    """Submits `count` frames from many threads in every way and checks that each gets its own verdict.

    Every thread also checks that its verdicts come in the order of its frames. Some frames are submitted
    wrongly or not at all on the way, some calls find no slot; the executor must shrug it off.

    Args:
        frame: A number to its frame, of the size of the graph's input.
        score: A number to the score of its frame, +- `tolerance`.
    """
    before = executor.stats
    end_s = time.monotonic() + PATIENCE_S

    def accepted(number: int, rng: random.Random) -> Future[Result]:
        while True:
            with suppress(BusyError):
                way = rng.random()
                timeout_s = rng.choice([None, 0.0, 0.001])
                if way < 0.05:
                    with pytest.raises((DataError, BusyError)):
                        executor.submit(frame(number).astype(np.float32), timeout_s=timeout_s)
                elif way < 0.1:
                    with pytest.raises((ZeroDivisionError, BusyError)):
                        with executor.slot(timeout_s=timeout_s) as buffer:
                            buffer[:] = 77
                            raise ZeroDivisionError
                elif way < 0.5:
                    lease = executor.slot(timeout_s=timeout_s)
                    with lease as buffer:
                        buffer[:] = frame(number)
                    return lease.future
                else:
                    return executor.submit(frame(number), timeout_s=timeout_s)
            assert time.monotonic() < end_s, "no slot gets free any more"
            time.sleep(0)

    def work(first: int) -> None:
        rng = random.Random(seed * 1000 + first)
        futures: list[Future[Result]] = []
        numbers = range(first, count, threads)
        for index, number in enumerate(numbers):
            futures.append(accepted(number, rng))
            if rng.random() < 0.2:
                chosen = rng.randrange(max(0, index - 5), index + 1)
                futures[chosen].result(PATIENCE_S)
                assert all(future.done() for future in futures[:chosen])
        for number, future in zip(numbers, futures, strict=True):
            result = future.result(PATIENCE_S)
            assert abs(result.score - score(number)) <= tolerance, (number, result.score)
            assert abs(result.anomaly_map.max() - score(number)) <= tolerance

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, first) for first in range(threads)]:
            done.result()
    after = executor.stats
    assert after.submitted - before.submitted == after.completed - before.completed == count
    assert after.failed == before.failed and after.in_flight == 0
