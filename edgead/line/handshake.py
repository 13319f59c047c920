"""Trigger, result, acknowledgement: what a PLC and a camera of the line tell each other, on any bus.

The PLC writes `Inputs`, the line answers with `Outputs`:

    line                     PLC
    ready = 1           ->
                        <-   recipe, tag, then trigger = 1
    ready = 0, busy = 1 ->          (or refused = 1: this trigger opened no part)
                        <-   trigger = 0
    verdict, reject, score, part_id, tag,
    then busy = 0,
    results_ready = 1   ->
                        <-   ack = 1, when it has read them
    results_ready = 0,
    verdict = 0         ->
                        <-   ack = 0
    ready = 1           ->

The part is inspected by the recipe that stands there when its trigger rises, whoever has selected
another since; if there is no such recipe the trigger is refused.

A result is held until it is acknowledged; results that come meanwhile wait in their order, and each is
shown once, while ack is 0. A camera whose images are its triggers shows its results in the same way. A
trigger while `ready` is 0 is inspected nonetheless, because the part passes anyway, and counted.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edgead.errors import LineError
from edgead.line.verdicts import Record, Verdict

logger = logging.getLogger(__name__)

VERDICT_CODES = {
    Verdict.OK: 1,
    Verdict.NG: 2,
    Verdict.LATE: 3,
    Verdict.ERROR: 4,
    Verdict.NOT_INSPECTED: 5,
}

_LARGEST_FLOAT32 = 3.4e38


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the PLC writes.

    Attributes:
        trigger: A rising edge opens a part.
        ack: The result that is shown was read.
        tag: The PLC's number of the part, 32 bits; comes back with the result.
        recipe: A rising trigger, or a change, selects the recipe of this index for the parts triggered
            from then on.
        heartbeat: Any value that changes while the PLC runs.
    """

    trigger: bool = False
    ack: bool = False
    tag: int = 0
    recipe: int = 0
    heartbeat: int = 0


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the PLC reads. From `verdict` to `tag` all is 0 while `results_ready` is.

    Attributes:
        ready: The line runs and takes a trigger now.
        busy: Triggered parts have no result yet.
        results_ready: The result below is valid, until it is acknowledged.
        refused: The trigger that is still high opened no part: the camera is not triggered by the PLC,
            there is no such recipe, or the line is starting or stopping.
        overflow: Results were lost because too many waited; until those that wait are acknowledged.
        reject: Whether the part is to be rejected.
        has_score: The model gave a score in time.
        verdict: 1 OK, 2 NG, 3 LATE, 4 ERROR, 5 NOT_INSPECTED.
        score: 0 without `has_score`.
        part_id: The line's number of the part, its lower 32 bits.
        tag: As given with the trigger; 0 without.
        recipe: Index of the recipe that is in force.
        errors: Triggers and recipes that were refused and results that were lost, in total.
        heartbeat: Counts up while the line is alive.
    """

    ready: bool
    busy: bool
    results_ready: bool
    refused: bool
    overflow: bool
    reject: bool
    has_score: bool
    verdict: int
    score: float
    part_id: int
    tag: int
    recipe: int
    errors: int
    heartbeat: int


class Handshake:
    """The line's side of the handshake for one camera. Does no input or output; not thread-safe.

    Attributes:
        counts: What happened so far, by name.
        is_plc_missing: The PLC's heartbeat has stood still for too long.
    """

    def __init__(
        self,
        camera: str,
        *,
        trigger: Callable[[int], int],
        select_recipe: Callable[[int], None],
        recipe: int = 0,
        queue: int = 1000,
        plc_timeout_s: float | None = None,
    ) -> None:
        """Begins with all inputs 0, but for the recipe in force; the line is ready when `beat` says so.

        Args:
            camera: Its name, for messages.
            trigger: Takes a tag, opens a part, returns its id, or raises LineError.
            select_recipe: Takes an index, or raises LineError.
            recipe: Index of the recipe in force.
            queue: Results that wait at most; after that the oldest is lost.
            plc_timeout_s: After which a heartbeat that stands still counts as missing; None: never.
        """
        self.counts = dict.fromkeys(
            (
                "triggers",
                "triggers_not_ready",
                "triggers_refused",
                "recipes_refused",
                "results_shown",
                "results_acknowledged",
                "results_lost",
                "plc_losses",
            ),
            0,
        )
        self.is_plc_missing = False
        self._camera, self._trigger, self._select_recipe = camera, trigger, select_recipe
        self._queue, self._plc_timeout_s = queue, plc_timeout_s
        self._inputs = Inputs(recipe=recipe)
        self._open: set[int] = set()  # parts that the PLC triggered
        self._waiting: deque[Record] = deque()
        self._shown: Record | None = None
        self._refused = self._overflow = False
        self._recipe, self._is_line_ready, self._heartbeat = recipe, False, 0
        self._plc_alive_s: float | None = None  # when its heartbeat changed last

    @property
    def inputs(self) -> Inputs:
        """As written last."""
        return self._inputs

    @property
    def outputs(self) -> Outputs:
        """What the PLC is to read now."""
        shown, inputs = self._shown, self._inputs
        is_idle = not (self._open or shown or inputs.trigger or inputs.ack)  # without ack nothing waits
        names = ("triggers_refused", "recipes_refused", "results_lost")
        return Outputs(
            ready=is_idle and self._is_line_ready,
            busy=bool(self._open),
            results_ready=shown is not None,
            refused=self._refused,
            overflow=self._overflow,
            reject=shown is not None and shown.reject,
            has_score=shown is not None and shown.score is not None,
            verdict=0 if shown is None else VERDICT_CODES[shown.verdict],
            score=0.0 if shown is None or shown.score is None else _float32(shown.score),
            part_id=0 if shown is None else shown.part_id & 0xFFFFFFFF,
            tag=0 if shown is None or shown.tag is None else shown.tag & 0xFFFFFFFF,
            recipe=self._recipe,
            errors=sum(self.counts[name] for name in names),
            heartbeat=self._heartbeat,
        )

    def set_inputs(self, inputs: Inputs, *, now_s: float) -> None:
        """Takes what the PLC wrote at `now_s`, monotonic time: recipe first, then ack, then trigger."""
        was_ready = self.outputs.ready
        before, self._inputs = self._inputs, inputs
        if inputs.heartbeat != before.heartbeat:
            self._plc_alive_s = now_s
            if self.is_plc_missing:
                self.is_plc_missing = False
                logger.info("camera %s: the PLC's heartbeat is back", self._camera)
        if inputs.recipe != before.recipe:
            self._change_recipe()
        if inputs.ack and self._shown is not None:
            self._shown = None
            self.counts["results_acknowledged"] += 1
            self._overflow = self._overflow and bool(self._waiting)
        if inputs.trigger and not before.trigger:
            self._open_part(was_ready=was_ready)
        elif not inputs.trigger:
            self._refused = False
        self._show_next()

    def add(self, record: Record) -> None:
        """Takes a result of this camera, triggered by the PLC or not."""
        self._open.discard(record.part_id)
        if len(self._waiting) >= self._queue:
            self._waiting.popleft()
            self.counts["results_lost"] += 1
            if not self._overflow:
                logger.error("camera %s: the PLC leaves %d results unread", self._camera, self._queue)
            self._overflow = True
        self._waiting.append(record)
        self._show_next()

    def beat(self, *, now_s: float, is_line_ready: bool, recipe: int) -> None:
        """Once in a while, at monotonic time `now_s`: how the line is, and a look at the PLC."""
        self._heartbeat += 1
        self._is_line_ready, self._recipe = is_line_ready, recipe
        if self._plc_alive_s is None:
            self._plc_alive_s = now_s
        timeout_s = self._plc_timeout_s
        if timeout_s is None or self.is_plc_missing or now_s - self._plc_alive_s <= timeout_s:
            return
        self.is_plc_missing = True
        self.counts["plc_losses"] += 1
        logger.error("camera %s: no heartbeat of the PLC for %g s", self._camera, timeout_s)

    def _open_part(self, *, was_ready: bool) -> None:
        try:
            self._select()  # again: somebody else may have selected another since
            part_id = self._trigger(self._inputs.tag)
        except LineError as error:
            self._refused = True
            self.counts["triggers_refused"] += 1
            logger.warning("camera %s: trigger refused: %s", self._camera, error)
            return
        self._open.add(part_id)
        self.counts["triggers"] += 1
        self.counts["triggers_not_ready"] += not was_ready

    def _change_recipe(self) -> None:
        try:
            self._select()
        except LineError as error:
            self.counts["recipes_refused"] += 1
            logger.warning("camera %s: recipe refused: %s", self._camera, error)

    def _select(self) -> None:
        self._select_recipe(self._inputs.recipe)
        self._recipe = self._inputs.recipe

    def _show_next(self) -> None:
        if self._shown is None and self._waiting and not self._inputs.ack:
            self._shown = self._waiting.popleft()
            self.counts["results_shown"] += 1


def _float32(value: float) -> float:
    """What fits into 32 bits."""
    return max(-_LARGEST_FLOAT32, min(value, _LARGEST_FLOAT32)) if math.isfinite(value) else 0.0
