"""Replay: images that are stored, delivered at planned moments or one for each trigger."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from edgead.errors import LineError
from edgead.line.interfaces import Shot

AHEAD = 4  # images that are decoded before they are due
MAX_RATE_HZ = 100_000.0


def check_pacing(rate_hz: float | None, jitter_ms: float) -> None:
    """Raises LineError for a rate or a jitter that cannot be; the message names the key."""
    if rate_hz is not None and not (rate_hz == 0 or 1e-3 <= rate_hz <= MAX_RATE_HZ):
        raise LineError(
            f"rate_hz is {rate_hz:g}, expected 0.001 to {MAX_RATE_HZ:g}, or 0 for as fast as possible"
        )
    if not 0 <= jitter_ms <= 60_000:
        raise LineError(f"jitter_ms is {jitter_ms:g}, expected 0 to 60000")
    if jitter_ms and rate_hz == 0:
        raise LineError("jitter_ms needs a rate: set rate_hz, or leave out jitter_ms")


def offsets_ns(rate_hz: float, jitter_ms: float, seed: int) -> Iterator[int]:
    """Planned moments after the start, without end.

    Number i is i / rate_hz plus a delay, uniform between 0 and jitter_ms, but never before number i - 1.
    The moments do not depend on when the images before were taken: delays do not add up.
    """
    chance = random.Random(seed)
    latest_ns = 0
    for index in itertools.count():
        delay_ns = chance.uniform(0, jitter_ms) * 1e6
        latest_ns = max(latest_ns, round(index * 1e9 / rate_hz + delay_ns))
        yield latest_ns


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A stored image: as `Shot`, without the times."""

    image: np.ndarray | None
    origin: str
    pixels: str = "rgb"
    problem: str = ""


class Replay:
    """A `Source` of stored images; a thread decodes them ahead, so that this does not disturb the rate.

    The trigger of an image is the planned moment, also where the line takes the image later.
    """

    def __init__(
        self,
        images: Iterable[Stored],
        *,
        rate_hz: float = 0.0,
        jitter_ms: float = 0.0,
        seed: int = 0,
        is_triggered: bool = False,
        count: float = math.inf,
    ) -> None:
        """
        Args:
            images: Reads one with each step, in a thread of its own.
            rate_hz: 0 is as fast as the images are taken.
            is_triggered: One image for each `fire` instead.
            count: How many images there are: `fire` refuses more.
        """
        self._images, self._rate_hz, self._jitter_ms, self._seed = images, rate_hz, jitter_ms, seed
        self._is_triggered, self._fires_left = is_triggered, count
        self._lock = threading.Lock()
        self._fired: SimpleQueue[int] = SimpleQueue()  # moments
        self._ready: SimpleQueue[Stored | Exception | None] = SimpleQueue()  # None: the end
        self._room = threading.Semaphore(AHEAD - 1)
        self._closed = threading.Event()
        self._counts = {"images": 0, "unreadable": 0}

    def shots(self) -> Iterator[Shot]:
        """See `Source`."""
        threading.Thread(target=self._decode, name="decode ahead", daemon=True).start()
        moments: Iterator[int] | None = None
        for frame_id in itertools.count():
            stored = self._ready.get()
            if isinstance(stored, Exception):
                raise LineError(f"the images cannot be read any further: {stored!r}") from stored
            if moments is None:  # only now begins the schedule: the first image took its time
                moments = self._moments_ns()
            if stored is None or (trigger_ns := next(moments, None)) is None:
                return
            self._room.release()
            self._counts["images" if stored.image is not None else "unreadable"] += 1
            yield Shot(
                stored.image,
                trigger_ns,
                stored.origin,
                pixels=stored.pixels,
                frame_id=frame_id,
                problem=stored.problem,
            )

    def fire(self) -> None:
        """See `Source`."""
        moment_ns = time.monotonic_ns()
        if not self._is_triggered:
            raise LineError("this source runs by itself: it cannot be triggered")
        with self._lock:
            if self._closed.is_set():
                raise LineError("the source is closed: it cannot be triggered")
            if self._fires_left < 1:
                raise LineError("all images were delivered: it cannot be triggered again")
            self._fires_left -= 1
            self._fired.put(moment_ns)

    def counters(self) -> Mapping[str, int]:
        """See `Source`."""
        return dict(self._counts)

    def close(self) -> None:
        """See `Source`."""
        self._closed.set()
        self._room.release()
        self._ready.put(None)
        self._fired.put(0)

    def _decode(self) -> None:
        try:
            for stored in self._images:
                self._ready.put(stored)
                self._room.acquire()
                if self._closed.is_set():
                    return
        except Exception as error:
            self._ready.put(error)
        self._ready.put(None)

    def _moments_ns(self) -> Iterator[int]:
        """Waits for each planned moment, and gives it; ends when the source is closed."""
        if self._is_triggered:
            while (moment_ns := self._fired.get()) and not self._closed.is_set():
                yield moment_ns
        elif not self._rate_hz:
            while not self._closed.is_set():
                yield time.monotonic_ns()
        else:
            start_ns = time.monotonic_ns()
            for offset_ns in offsets_ns(self._rate_hz, self._jitter_ms, self._seed):
                if self._closed.wait(max(0, start_ns + offset_ns - time.monotonic_ns()) / 1e9):
                    return
                yield start_ns + offset_ns
