"""One camera's parts between trigger and verdict: each gets exactly one, in the order of the triggers.

No threads and no clock in here: callers hold a lock and say what time it is (`time.monotonic_ns()`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from edgead.line.verdicts import Verdict


@dataclass(frozen=True, slots=True)
class Decision:
    """What was said about a part, and when."""

    verdict: Verdict
    reason: str
    at_ns: int
    score: float | None = None
    threshold: float | None = None
    start_ns: int | None = None  # of the inference
    end_ns: int | None = None


@dataclass(slots=True)
class Part:
    """A trigger that was accepted."""

    part_id: int
    trigger_ns: int
    deadline_ns: int
    tag: int | None = None
    unix_offset_ns: int = 0  # from the times here to those since 1970, when it was opened
    recipe: int = 0
    bundle: str = ""
    origin: str = ""
    frame_id: int | None = None
    exposure_ns: int | None = None
    region: np.ndarray | None = None  # uint8 [H, W, 3] RGB, if a sink wants to see it
    anomaly_map: np.ndarray | None = None
    decision: Decision | None = None


class Ledger:
    """Open parts of one camera.

    A decision at or after the deadline is LATE, whoever makes it and whenever `expire` is called: the
    verdict does not depend on how threads are scheduled.
    """

    def __init__(self, deadline_ms: float) -> None:
        self._deadline_ns = round(deadline_ms * 1e6)
        self._parts: OrderedDict[int, Part] = OrderedDict()  # not yet released, in the order of triggers
        self._last_trigger_ns = 0

    def __len__(self) -> int:
        """Parts that were not released yet."""
        return len(self._parts)

    @property
    def next_deadline_ns(self) -> float:
        """Of the oldest part without a verdict; infinite if there is none."""
        undecided = (part.deadline_ns for part in self._parts.values() if part.decision is None)
        return next(undecided, math.inf)

    def open(self, part_id: int, trigger_ns: int, *, tag: int | None = None) -> Part:
        """Accepts a trigger. A trigger that claims to be older than the one before is taken as its twin.

        Otherwise a part could have to wait for the verdict of one whose deadline is later than its own.
        """
        trigger_ns = max(trigger_ns, self._last_trigger_ns)
        self._last_trigger_ns = trigger_ns
        part = Part(part_id, trigger_ns, trigger_ns + self._deadline_ns, tag)
        self._parts[part_id] = part
        return part

    def decide(self, part: Part, decision: Decision) -> bool:
        """Says what is said of a part; False if its verdict stands already, or if it is LATE now."""
        if part.decision is not None:
            return False
        if decision.at_ns >= part.deadline_ns:
            self._set_late(part, decision.at_ns)
            return False
        part.decision = decision
        return True

    def expire(self, now_ns: int) -> None:
        """Says LATE of all whose deadline has come."""
        for part in self._parts.values():
            if part.deadline_ns > now_ns:
                return  # deadlines grow with the triggers
            if part.decision is None:
                self._set_late(part, now_ns)

    def abandon(self, reason: str, now_ns: int) -> None:
        """Says ERROR of all that have no verdict yet: the line ends."""
        self.expire(now_ns)
        for part in self._parts.values():
            if part.decision is None:
                part.decision = Decision(Verdict.ERROR, reason, now_ns)

    def release(self) -> list[Part]:
        """Hands out the parts with a verdict up to the oldest without one, in the order of triggers."""
        released = []
        while self._parts:
            part = next(iter(self._parts.values()))
            if part.decision is None:
                break
            self._parts.popitem(last=False)
            released.append(part)
        return released

    def _set_late(self, part: Part, now_ns: int) -> None:
        limit_ms = self._deadline_ns / 1e6
        part.decision = Decision(
            Verdict.LATE, f"no answer within {limit_ms:g} ms of the trigger", now_ns
        )
