"""Faults to order: a file says what goes wrong and when, and these wrappers make it so.

Sources, sinks and models are the real ones; they only meet a bad day.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import operator
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from edgead.errors import BackendError, LineError
from edgead.line.interfaces import Picture, Shot, Sink, Source
from edgead.line.tables import Tables
from edgead.line.verdicts import Record
from edgead.runtime.backend import Backend, Slot, TensorSpec

Kind = Literal[
    "jitter",
    "burst",
    "lost",
    "duplicate",
    "unplug",
    "dark",
    "slow-sink",
    "dead-sink",
    "model-error",
    "model-hang",
    "kill",
]
KINDS: tuple[str, ...] = get_args(Kind)
OF_CAMERAS = ("jitter", "burst", "lost", "duplicate", "unplug", "dark")
OF_SINKS = ("slow-sink", "dead-sink")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The table [[fault]]: something that goes wrong.

    Attributes:
        kind: jitter: images come up to `ms` late. burst: `count` images come at once. lost: images do
            not come, only their numbers. duplicate: the image of before comes again. unplug: no images,
            all are lost. dark: the lamp is off. slow-sink: each write takes `ms`. dead-sink: writes
            fail. model-error: inferences fail. model-hang: an inference takes `ms`. kill: the process
            is killed at once, and started again.
        name: Of the camera or the sink; all of them if not given.
        share: Of the images, writes or inferences in that time which it hits, 0 to 1.
        at_s: From this second of the simulation on.
        for_s: For this long; until the end if not given. A kill, and a burst, is at `at_s` and then
            again after each `for_s`.
    """

    kind: Kind
    name: str | None = None
    share: float = 1.0
    ms: float = 100.0
    count: int = 10
    at_s: float = 0.0
    for_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise LineError(f"share is {self.share:g}, expected more than 0, up to 1")
        for key in ("ms", "at_s"):
            if not 0 <= getattr(self, key) <= 1e7:
                raise LineError(f"{key} is {getattr(self, key):g}, expected 0 or more")
        if self.for_s is not None and self.for_s <= 0:
            raise LineError(f"for_s is {self.for_s:g}, expected more than 0")
        if self.count < 1:
            raise LineError(f"count is {self.count}, expected 1 or more")

    def is_on(self, now_s: float) -> bool:
        """Whether it goes on at this second of the simulation."""
        return self.at_s <= now_s and (self.for_s is None or now_s < self.at_s + self.for_s)


def load_faults(path: Path, cameras: set[str], sinks: set[str]) -> tuple[tuple[Fault, ...], int]:
    """Reads a file of faults; returns them and the seed for what is random.

    Raises:
        LineError: What is wrong, with its line.
    """
    tables = Tables(path)
    seed = tables.data.get("seed", 0)
    listed = tables.data.get("fault", [])
    for unknown in tables.data.keys() - {"seed", "fault"}:
        raise tables.error((unknown,), f"no key {unknown!r} is known here, only seed and [[fault]]")
    if not isinstance(seed, int) or not isinstance(listed, list):
        raise LineError(f"{path}: expected seed = NUMBER and tables [[fault]]")
    faults = []
    for index, table in enumerate(listed):
        fault = tables.build(Fault, table, ("fault", index))
        known = cameras if fault.kind in OF_CAMERAS else sinks if fault.kind in OF_SINKS else set()
        if fault.name is not None and fault.name not in known:
            names = ", ".join(sorted(known)) or "none that has a name"
            raise tables.error(
                ("fault", index, "name"), f"{fault.kind} of {fault.name!r}: known are {names}"
            )
        faults.append(fault)
    return tuple(faults), seed


class Day:
    """The faults of one simulation, and what time it is in it.

    Attributes:
        hits: How often each kind of fault struck, in this process.
    """

    def __init__(self, faults: tuple[Fault, ...], seed: int, start_ns: int) -> None:
        """`start_ns` is the `time.monotonic_ns()` of its begin, also over restarts of the process."""
        self._faults, self._start_ns = faults, start_ns
        self.hits = dict.fromkeys(KINDS, 0)
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def now_s(self) -> float:
        """Seconds since the begin."""
        return (time.monotonic_ns() - self._start_ns) / 1e9

    def random(self) -> float:
        """Evenly from 0 to 1."""
        with self._lock:
            return self._random.random()

    def strikes(self, kind: str, name: str | None = None) -> Fault | None:
        """The fault of this kind that strikes now, if there is one; it is counted."""
        with self._lock:
            for fault in self._faults:
                if fault.kind != kind or not fault.is_on(self.now_s):
                    continue
                if fault.name not in (None, name) or self._random.random() >= fault.share:
                    continue
                self.hits[kind] += 1
                return fault
        return None

    def starts(self, kind: str, name: str | None = None) -> Iterator[tuple[float, Fault]]:
        """Moments from now on, in seconds from the begin, at which a fault of this kind begins."""
        each = (
            _moments(fault)
            for fault in self._faults
            if fault.kind == kind and fault.name in (None, name)
        )
        merged = heapq.merge(*each, key=operator.itemgetter(0))
        return itertools.dropwhile(lambda start: start[0] < self.now_s, merged)

    def kill_when_due(self) -> None:
        """Kills this process when the next fault of this kind begins; returns at once."""
        due_s, _ = next(self.starts("kill"), (math.inf, None))
        if due_s < math.inf:
            wait = threading.Timer(due_s - self.now_s, os.kill, (os.getpid(), signal.SIGKILL))
            wait.daemon = True
            wait.start()


def _moments(fault: Fault) -> Iterator[tuple[float, Fault]]:
    if fault.for_s is None:
        yield fault.at_s, fault
        return
    for turn in itertools.count():
        yield fault.at_s + turn * fault.for_s, fault


class FaultySource:
    """A source with the faults of its camera."""

    def __init__(self, source: Source, camera: str, day: Day) -> None:
        self._source, self._camera, self._day = source, camera, day

    def shots(self) -> Iterator[Shot]:
        """The source's, late, in heaps, lost, doubled, or dark."""
        day, camera = self._day, self._camera
        before: Shot | None = None
        held: list[Shot] = []
        bursts = day.starts("burst", camera)
        moment, burst = next(bursts, (math.inf, None))
        for shot in self._source.shots():
            if fault := day.strikes("jitter", camera):
                time.sleep(day.random() * fault.ms / 1e3)
            shot = self._spoil(shot, before)
            before = shot if shot.image is not None else before
            if burst is not None and day.now_s >= moment:
                held.append(shot)
                if len(held) < burst.count:
                    continue
                day.hits["burst"] += 1
                now_ns = time.monotonic_ns()
                yield from (dataclasses.replace(one, trigger_ns=now_ns) for one in held)
                held = []
                while moment <= day.now_s:
                    moment, burst = next(bursts, (math.inf, None))
                continue
            yield shot
        yield from held

    def _spoil(self, shot: Shot, before: Shot | None) -> Shot:
        day, camera = self._day, self._camera
        if day.strikes("unplug", camera) or day.strikes("lost", camera):
            return dataclasses.replace(shot, image=None, problem="the image was lost (simulated)")
        if shot.image is None:
            return shot
        if before is not None and day.strikes("duplicate", camera):
            return dataclasses.replace(shot, image=before.image)
        if day.strikes("dark", camera):
            return dataclasses.replace(shot, image=shot.image // 64)
        return shot

    def fire(self) -> None:
        self._source.fire()

    def counters(self) -> Mapping[str, int]:
        return self._source.counters()

    def close(self) -> None:
        self._source.close()


class FaultySink:
    """A sink with its faults."""

    def __init__(self, sink: Sink, name: str, day: Day) -> None:
        self._sink, self._name, self._day = sink, name, day
        self.wants_pictures = sink.wants_pictures

    def write(self, record: Record, picture: Picture | None) -> None:
        self._hinder()
        self._sink.write(record, picture)

    def write_late(self, record: Record) -> None:
        self._hinder()
        self._sink.write_late(record)

    def knows(self, part_id: int) -> bool:
        return self._sink.knows(part_id)

    def counters(self) -> Mapping[str, int]:
        return self._sink.counters()

    def close(self) -> None:
        self._sink.close()

    def _hinder(self) -> None:
        if fault := self._day.strikes("slow-sink", self._name):
            time.sleep(fault.ms / 1e3)
        if self._day.strikes("dead-sink", self._name):
            raise OSError("no connection (simulated)")


class FaultyBackend:
    """A back end whose inferences fail or hang."""

    def __init__(self, backend: Backend, day: Day) -> None:
        self._backend, self._day = backend, day
        self.name, self.precision, self.max_batch = backend.name, backend.precision, backend.max_batch
        self.inputs: dict[str, TensorSpec] = backend.inputs
        self.outputs: dict[str, TensorSpec] = backend.outputs

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._backend.infer(inputs)

    def open_slot(self, batch: int = 1) -> Slot:
        return _FaultySlot(self._backend.open_slot(batch), self._day)

    def close(self) -> None:
        self._backend.close()


class _FaultySlot:
    def __init__(self, slot: Slot, day: Day) -> None:
        self._slot, self._day = slot, day
        self.images = slot.images

    def calibrate(self, values: np.ndarray) -> None:
        self._slot.calibrate(values)

    def launch(self, count: int = 1) -> None:
        self._slot.launch(count)

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        if fault := self._day.strikes("model-hang"):
            time.sleep(fault.ms / 1e3)
        if self._day.strikes("model-error"):
            raise BackendError("the device has fallen off the bus (simulated)")
        return self._slot.wait()

    def close(self) -> None:
        self._slot.close()
