"""Where verdicts leave: on the disk first, then to everybody, in the order of the triggers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from edgead.line.awaiting import NEVER_CAME, UNSURE
from edgead.line.camera import Camera
from edgead.line.interfaces import Picture, Shot
from edgead.line.journal import Journal
from edgead.line.ledger import Decision, Part
from edgead.line.outlet import Outlet
from edgead.line.statistics import Statistics
from edgead.line.verdicts import Record, Verdict

logger = logging.getLogger(__name__)


class Desk:
    """Opens parts and gives out their records. Callers hold the line's lock.

    Attributes:
        outlets: Of the sinks, by name.
        wants_pictures: Whether one of them does.
    """

    def __init__(self, journal: Journal, reject: tuple[str, ...]) -> None:
        self.statistics = Statistics()
        self.outlets: Mapping[str, Outlet] = {}
        self.wants_pictures = False
        self._journal = journal
        self._reject = frozenset(Verdict(verdict) for verdict in reject)

    def begin(self, outlets: Mapping[str, Outlet]) -> None:
        """Parts that a crash left open become ERROR, and sinks get the last records that they lack."""
        self.outlets = outlets
        self.wants_pictures = any(outlet.wants_pictures for outlet in outlets.values())
        past = self._journal.past
        errors = []
        for trigger in past.open_triggers:
            record = Record(
                part_id=trigger.part_id,
                camera=trigger.camera,
                verdict=Verdict.ERROR,
                reject=Verdict.ERROR in self._reject,
                reason="the line went down before its answer",
                source="",
                trigger_ns=trigger.trigger_ns,
                total_ms=max(time.time_ns() - trigger.trigger_ns, 0) / 1e6,
                tag=trigger.tag,
            )
            self._journal.verdict(record)
            self.statistics.add(record)
            errors.append(record)
        if past.open_triggers:
            logger.warning("%d parts were open when the line went down: ERROR", len(past.open_triggers))
        for outlet in outlets.values():
            for record in [*outlet.missed(past.records), *errors]:
                outlet.put(record, None)
        past.records.clear()  # they may be many
        self._journal.lacking = lambda: max((o.waiting for o in outlets.values()), default=0)

    def open(self, camera: Camera, trigger_ns: int, tag: int | None, bundle: str) -> Part:
        """Accepts a trigger."""
        offset_ns = time.time_ns() - time.monotonic_ns()  # anew: somebody may set the clock
        part_id = self._journal.trigger(camera.name, trigger_ns + offset_ns, tag)
        part = camera.ledger.open(part_id, trigger_ns, tag=tag)
        part.unix_offset_ns = offset_ns
        part.recipe, part.bundle = camera.recipe, bundle
        return part

    def match(self, camera: Camera, shot: Shot) -> Part | None:
        """The part that an image belongs to which the PLC asked for; None: it is thrown away."""
        part, given_up = camera.awaiting.match(shot, time.monotonic_ns())
        camera.counts["unexpected"] += part is None
        for reason, parts in given_up.items():
            self._give_up(camera, parts, reason)
        if given_up[UNSURE]:
            logger.error(
                "camera %s: an image came while parts %s waited, and does not say when it was exposed: "
                "none of them gets it, and the camera is not triggered until no image can be under way",
                camera.name,
                ", ".join(str(other.part_id) for other in given_up[UNSURE]),
            )
        return part

    def give_up_overdue(self, camera: Camera, now_ns: int) -> None:
        """Also where no image comes at all."""
        self._give_up(camera, camera.awaiting.overdue(now_ns), NEVER_CAME)

    def give_up_awaited(self, camera: Camera, reason: str) -> None:
        """No image that the PLC asked for comes any more."""
        self._give_up(camera, camera.awaiting.clear(), reason)

    def _give_up(self, camera: Camera, parts: list[Part], reason: str) -> None:
        camera.counts["missing_images"] += len(parts)
        for part in parts:
            self.decide(camera, part, Verdict.NOT_INSPECTED, reason)

    def decide(self, camera: Camera, part: Part, verdict: Verdict, reason: str) -> None:
        """Says something that no model said."""
        camera.ledger.decide(part, Decision(verdict, reason, time.monotonic_ns()))
        self.release(camera)

    def answer(self, camera: Camera, part: Part, decision: Decision) -> None:
        """Says what a model said; if that is too late it is written down beside."""
        in_time = camera.ledger.decide(part, decision)
        self.release(camera)
        if not in_time:
            camera.counts["late_results"] += 1
            record = self._record(camera, part, decision, Verdict.LATE)
            self._journal.late(record)
            for outlet in self.outlets.values():
                outlet.put_late(record)

    def release(self, camera: Camera) -> None:
        """Gives out the records of all parts that have a verdict and whose predecessors do."""
        for part in camera.ledger.release():
            assert part.decision is not None
            record = self._record(camera, part, part.decision, part.decision.verdict)
            self._journal.verdict(record)
            self.statistics.add(record)
            picture = None if part.region is None else Picture(part.region, part.anomaly_map)
            for outlet in self.outlets.values():
                outlet.put(record, picture if outlet.wants_pictures else None)

    def state(self) -> dict[str, Any]:
        """Counters of the journal and of the sinks, for `Controls.state`; any thread."""
        return {
            "journal_failures": self._journal.failures,
            "sinks": {name: dict(outlet.counters()) for name, outlet in self.outlets.items()},
        }

    def close(self, timeout_s: float) -> dict[str, int]:
        """Ends sinks and journal; returns how many records each sink could not write any more."""
        end_s = time.monotonic() + timeout_s
        left = {
            name: outlet.close(max(end_s - time.monotonic(), 0.1))
            for name, outlet in self.outlets.items()
        }
        self._journal.close()
        return left

    def _record(self, camera: Camera, part: Part, decision: Decision, verdict: Verdict) -> Record:
        start_ns, end_ns, offset_ns = decision.start_ns, decision.end_ns, part.unix_offset_ns
        exposure_ns = part.exposure_ns
        return Record(
            part_id=part.part_id,
            camera=camera.name,
            verdict=verdict,
            reject=verdict in self._reject,
            reason=decision.reason,
            source=part.origin,
            trigger_ns=part.trigger_ns + offset_ns,
            total_ms=(decision.at_ns - part.trigger_ns) / 1e6,
            score=decision.score,
            threshold=decision.threshold,
            frame_id=part.frame_id,
            tag=part.tag,
            recipe=part.recipe,
            bundle=part.bundle,
            exposure_ns=None if exposure_ns is None else exposure_ns + offset_ns,
            wait_ms=None if start_ns is None else (start_ns - part.trigger_ns) / 1e6,
            infer_ms=None if start_ns is None or end_ns is None else (end_ns - start_ns) / 1e6,
        )
