"""The seats of an executor: slots, who has them, and who waits for one."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from edgead.runtime.backend import Slot


class Seat:
    """Room for one frame. A back end that is opened again brings a new slot; the seat stays.

    Attributes:
        slot: Of the back end in use.
        image: uint8 [H, W, 3], to be written by whoever has the seat.
    """

    def __init__(self, slot: Slot) -> None:
        self.take_slot(slot)
        self.image = self._target

    def take_slot(self, slot: Slot) -> None:
        """Until the next launch, `image` stays what it was: somebody may be writing to it."""
        self.slot = slot
        self._target = slot.images[0]

    def launch(self) -> None:
        """Launches what is in `image`, in the slot in use. Raises what the slot raises."""
        if self.image is not self._target:
            np.copyto(self._target, self.image)
            self.image = self._target
        self.slot.launch()


class Seats:
    """The free seats. Threads that find none wait in turn, so that no camera is left behind.

    Every method is called with the lock held.
    """

    def __init__(self, lock: threading.Lock, seats: list[Seat]) -> None:
        self.capacity = len(seats)
        self._lock = lock
        self._free = list(seats)
        self._turns: deque[threading.Condition] = deque()

    def take(self, wait_s: float, check_open: Callable[[], None]) -> Seat | None:
        """Returns a seat, or None if there was none for `wait_s`; raises what `check_open` raises."""
        check_open()
        if self._free and not self._turns:
            return self._free.pop()
        if wait_s <= 0:
            return None
        turn = threading.Condition(self._lock)
        self._turns.append(turn)
        try:
            return self._free.pop() if self._comes_up(turn, wait_s, check_open) else None
        finally:
            self._turns.remove(turn)
            self._wake_first()

    def vacate(self, seat: Seat) -> None:
        """Takes a seat back."""
        self._free.append(seat)
        self._wake_first()

    def wake_all(self) -> None:
        """Lets all that wait call `check_open`."""
        for turn in self._turns:
            turn.notify()

    def _comes_up(
        self, turn: threading.Condition, wait_s: float, check_open: Callable[[], None]
    ) -> bool:
        end_s = time.monotonic() + wait_s
        while not (self._free and self._turns[0] is turn):
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            turn.wait(None if left_s == math.inf else min(left_s, threading.TIMEOUT_MAX))
            check_open()
        return True

    def _wake_first(self) -> None:
        if self._free and self._turns:
            self._turns[0].notify()
