"""What cameras stamp on their frames: numbers and times."""

from __future__ import annotations

import logging
import time
from typing import Any

logger = logging.getLogger(__name__)

LONGEST_GAP = 1000  # frames; a longer one is taken for a camera that counts anew
LONGEST_AGE_NS = 10_000_000_000  # of a frame when it is taken
_TICKS = "GevTimestampTickFrequency"
_CLOCK_PERIOD_NS = 10_000_000_000  # a quartz drifts by less than 1 ms in this time
_SLOWEST_READ_NS = 3_000_000  # half of it and that drift are less than `awaiting.CLOCK_ERROR_NS`
_READ_AGAIN_NS = 1_000_000_000


def missing_between(previous: int, current: int, *, bits: int) -> int:
    """How many frames are missing between two that came one after the other.

    Args:
        bits: Of the camera's counter: 16 (GigE Vision 1) or 64. After its highest number comes 1.
    """
    return (current - previous - 1) % (2**bits - 1)


def number_after(previous: int, steps: int, *, bits: int) -> int:
    """The number of the frame that is `steps` after another."""
    return (previous + steps - 1) % (2**bits - 1) + 1


class FrameIds:
    """Finds the gaps in the numbers of the frames.

    Attributes:
        bits: Of the camera's counter; it becomes 64 with the first number that needs them.
        resets: How often the camera counted anew.
    """

    def __init__(self, name: str) -> None:
        self.bits, self.resets = 16, 0
        self._name = name
        self._previous: int | None = None

    def next(self) -> int | None:
        """The number that is due; None before the first frame."""
        return None if self._previous is None else number_after(self._previous, 1, bits=self.bits)

    def missing_before(self, current: int) -> list[int]:
        """Numbers between the last frame and this one."""
        if current >= 2**16:
            self.bits = 64
        previous, self._previous = self._previous, current
        if previous is None:
            return []
        count = missing_between(previous, current, bits=self.bits)
        if count > LONGEST_GAP:
            logger.warning("%s: frame %d came after %d: it counts anew", self._name, current, previous)
            self.resets += 1
            return []
        return [number_after(previous, step, bits=self.bits) for step in range(1, count + 1)]


class DeviceClock:
    """Maps the camera's clock to the host's, where the camera can say what time it is.

    Attributes:
        is_known: Whether it can; nobody else may set it but to False.
    """

    def __init__(self) -> None:
        self.is_known = False
        self._latch = self._value = ""
        self._ticks_hz = 1_000_000_000
        self._offset_ns = 0
        self._is_read = False
        self._due_ns = 0

    def find(self, camera: Any) -> None:
        """Looks for the features of an `Aravis.Camera` that tell its time."""
        for latch, value in (
            ("TimestampLatch", "TimestampLatchValue"),  # in ns, as Aravis gives those of frames
            ("GevTimestampControlLatch", "GevTimestampValue"),  # in ticks
        ):
            if camera.is_feature_available(latch) and camera.is_feature_available(value):
                self.is_known, self._latch, self._value = True, latch, value
                if latch.startswith("Gev") and camera.is_feature_available(_TICKS):
                    self._ticks_hz = camera.get_integer(_TICKS) or self._ticks_hz
                return

    @property
    def is_due(self) -> bool:
        """Whether it is time to read it."""
        return self.is_known and time.monotonic_ns() >= self._due_ns

    def read(self, camera: Any) -> None:
        """Compares the clocks; they agree within half the time that the camera takes to answer.

        An answer that was slow (a command that was sent again) is not used: exposure times tell to which
        part an image belongs.
        """
        before_ns = time.monotonic_ns()
        camera.execute_command(self._latch)
        after_ns = time.monotonic_ns()
        if after_ns - before_ns > _SLOWEST_READ_NS:
            self._due_ns = after_ns + _READ_AGAIN_NS
            return
        device_ns = camera.get_integer(self._value) * 1_000_000_000 // self._ticks_hz
        self._offset_ns = (before_ns + after_ns) // 2 - device_ns
        self._is_read, self._due_ns = True, after_ns + _CLOCK_PERIOD_NS

    def host_ns(self, device_ns: int, arrival_ns: int) -> int | None:
        """The camera's time in `time.monotonic_ns()`; None if not known.

        A time after the arrival or long before it is not believed: cameras differ in what they count.
        """
        host_ns = device_ns + self._offset_ns
        is_known = self.is_known and self._is_read
        return host_ns if is_known and 0 <= arrival_ns - host_ns <= LONGEST_AGE_NS else None
