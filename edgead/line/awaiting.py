"""Which part an image belongs to that a PLC asked for. Images carry no part ids, and some never come.

An image given to the wrong part could make a bad one OK. So an image that could be that of several parts
is given to none.

No threads and no clock in here: callers hold a lock and say what time it is (`time.monotonic_ns()`).
"""

from __future__ import annotations

from collections import deque

from edgead.line.interfaces import Shot
from edgead.line.ledger import Part

CLOCK_ERROR_NS = 2_000_000  # by which the time of an exposure may be wrong
NEVER_CAME = "its image never came"
UNSURE = "its image could be that of another part"


class Awaiting:
    """Parts of one camera whose trigger was passed on to it, and whose images have not come.

    An exposure shows the part that was triggered last before it. A source that does not know when its
    images were exposed says at best when they came: such an image is given to a part if that is the
    only one that waits. Otherwise one image too few may have come, or just a slow one, and nobody can
    tell the images to come from each other: then the camera is not triggered until the last one that
    may be under way has come or counts as lost.
    """

    def __init__(self, timeout_ms: float) -> None:
        """
        Args:
            timeout_ms: From the trigger; after that an image counts as lost.
        """
        self._timeout_ns = round(timeout_ms * 1e6)
        self._parts: deque[Part] = deque()  # in the order of their triggers
        self._unsure_until_ns = 0

    def __len__(self) -> int:
        return len(self._parts)

    def is_unsure(self, now_ns: int) -> bool:
        """Whether images may be under way that cannot be told from those of new triggers."""
        return now_ns < self._unsure_until_ns

    def add(self, part: Part) -> None:
        """The camera is triggered for it."""
        self._parts.append(part)

    def remove(self, part: Part) -> None:
        """The camera was not triggered for it."""
        if part in self._parts:
            self._parts.remove(part)

    def clear(self) -> list[Part]:
        """Gives up all: no image that was asked for comes any more."""
        given_up = list(self._parts)
        self._parts.clear()
        self._unsure_until_ns = 0
        return given_up

    def overdue(self, now_ns: int) -> list[Part]:
        """Gives up those whose image counts as lost by now."""
        lost = []
        while self._parts and now_ns - self._parts[0].trigger_ns > self._timeout_ns:
            lost.append(self._parts.popleft())
        return lost

    def match(self, shot: Shot, now_ns: int) -> tuple[Part | None, dict[str, list[Part]]]:
        """Takes out what an image decides.

        Returns:
            The part that it belongs to, None if nobody can say or nobody asked for it; and, by the
            reason, the parts that will get no image.
        """
        given_up: dict[str, list[Part]] = {NEVER_CAME: self.overdue(now_ns), UNSURE: []}
        is_exposed = shot.exposure_ns is not None
        if shot.image is None:
            # The images of those before it, which it leaves alone, may still be under way. One that was
            # lost on its way does not say of which trigger it was: then all before it have come.
            before = (p for p in reversed(self._parts) if p.trigger_ns <= (shot.exposure_ns or 0))
            part = next(before if is_exposed else iter(self._parts), None)
            if part is not None:
                self._parts.remove(part)
            return part, given_up
        seen_ns = shot.trigger_ns if shot.exposure_ns is None else shot.exposure_ns
        latest_ns = seen_ns + CLOCK_ERROR_NS if is_exposed else seen_ns
        possible = [part for part in self._parts if part.trigger_ns <= latest_ns]
        if not possible:
            return None, given_up
        if len(possible) == 1 or (is_exposed and possible[-1].trigger_ns <= seen_ns):
            given_up[NEVER_CAME] += [self._parts.popleft() for _ in possible[1:]]
            return self._parts.popleft(), given_up
        last_ns = self._parts[-1].trigger_ns
        given_up[UNSURE] = self.clear()
        self._unsure_until_ns = last_ns + self._timeout_ns
        return None, given_up
