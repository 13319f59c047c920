"""The handshake with a PLC, without any field bus."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgead.errors import LineError
from edgead.line.handshake import VERDICT_CODES, Handshake, Inputs
from edgead.line.verdicts import Record, Verdict


def record(part_id: int, verdict: Verdict = Verdict.OK, **given: object) -> Record:
    fields = {"camera": "top", "reject": verdict != Verdict.OK, "reason": "", "source": ""}
    return Record(part_id=part_id, verdict=verdict, trigger_ns=0, total_ms=1.0, **{**fields, **given})  # type: ignore[arg-type]


class Line:
    """Opens parts, or not."""

    def __init__(self) -> None:
        self.opened: list[tuple[int, int]] = []  # part id, tag
        self.refuses = False
        self.recipe = 0

    def trigger(self, tag: int) -> int:
        if self.refuses:
            raise LineError("stopping")
        self.opened.append((len(self.opened) + 1, tag))
        return len(self.opened)

    def select_recipe(self, index: int) -> None:
        if index > 2:
            raise LineError("no such recipe")
        self.recipe = index


def handshake(line: Line, **given: float) -> Handshake:
    made = Handshake("top", trigger=line.trigger, select_recipe=line.select_recipe, **given)  # type: ignore[arg-type]
    assert not made.outputs.ready
    made.beat(now_s=0.0, is_line_ready=True, recipe=made.outputs.recipe)
    return made


class Plc:
    """Writes one bit after the other."""

    def __init__(self, station: Handshake) -> None:
        self.station, self.inputs = station, station.inputs

    def write(self, **changes: object) -> None:
        self.inputs = replace(self.inputs, **changes)  # type: ignore[arg-type]
        self.station.set_inputs(self.inputs, now_s=0.0)


def test_the_handshake_of_one_part_step_by_step() -> None:
    line = Line()
    station = handshake(line)
    plc = Plc(station)
    assert station.outputs.ready and not station.outputs.busy
    plc.write(tag=0xFFFF_FFFF)
    plc.write(trigger=True)
    assert line.opened == [(1, 0xFFFF_FFFF)]
    outputs = station.outputs
    assert (outputs.ready, outputs.busy, outputs.results_ready) == (False, True, False)
    plc.write(trigger=False)
    assert not station.outputs.ready
    station.add(record(1, Verdict.NG, score=0.75, threshold=0.5, tag=0xFFFF_FFFF))
    outputs = station.outputs
    assert (outputs.ready, outputs.busy, outputs.results_ready) == (False, False, True)
    assert (outputs.verdict, outputs.reject, outputs.part_id, outputs.tag) == (2, True, 1, 0xFFFF_FFFF)
    assert (outputs.has_score, outputs.score) == (True, 0.75)
    plc.write(ack=True)
    outputs = station.outputs
    assert (outputs.ready, outputs.results_ready) == (False, False)
    assert (outputs.verdict, outputs.reject, outputs.part_id, outputs.tag) == (0, False, 0, 0)
    plc.write(ack=False)
    assert station.outputs.ready
    assert station.outputs.errors == 0


def test_ready_waits_for_the_trigger_to_fall() -> None:
    station = handshake(Line())
    plc = Plc(station)
    plc.write(trigger=True)
    station.add(record(1))
    plc.write(ack=True)
    plc.write(ack=False)
    assert not station.outputs.ready, "no edge can come while the trigger is high"
    plc.write(trigger=False)
    assert station.outputs.ready


def test_a_trigger_that_stays_high_opens_one_part() -> None:
    line = Line()
    plc = Plc(handshake(line))
    for heartbeat in range(5):
        plc.write(trigger=True, heartbeat=heartbeat)
    assert len(line.opened) == 1


@pytest.mark.parametrize(("verdict", "code"), [(v, c) for v, c in VERDICT_CODES.items()])
def test_each_verdict_has_its_code(verdict: Verdict, code: int) -> None:
    station = handshake(Line())
    station.add(record(2**32 + 5, verdict))
    outputs = station.outputs
    assert outputs.verdict == code and outputs.part_id == 5
    assert outputs.has_score is False and outputs.score == 0.0 and outputs.tag == 0


@pytest.mark.parametrize(
    ("score", "shown"), [(1e300, 3.4e38), (-1e300, -3.4e38), (float("nan"), 0.0), (0.5, 0.5)]
)
def test_scores_fit_into_32_bits(score: float, shown: float) -> None:
    station = handshake(Line())
    station.add(record(1, score=score))
    assert station.outputs.score == shown


def test_a_refused_trigger_says_so_while_it_is_high_and_results_still_come() -> None:
    line = Line()
    line.refuses = True
    station = handshake(line)
    plc = Plc(station)
    plc.write(trigger=True)
    outputs = station.outputs
    assert (outputs.refused, outputs.busy, outputs.errors) == (True, False, 1)
    plc.write(trigger=False)
    assert not station.outputs.refused and station.outputs.ready
    station.add(record(9))
    assert station.outputs.results_ready and station.outputs.part_id == 9


def test_a_trigger_while_it_is_not_ready_is_inspected_and_counted() -> None:
    line = Line()
    station = handshake(line)
    plc = Plc(station)
    for tag in (1, 2):
        plc.write(trigger=True, tag=tag)
        plc.write(trigger=False)
    assert [tag for _, tag in line.opened] == [1, 2]
    assert station.counts["triggers"] == 2 and station.counts["triggers_not_ready"] == 1
    station.add(record(1))
    assert station.outputs.busy and station.outputs.results_ready, "one is read, one is still inspected"
    station.add(record(2))
    assert station.outputs.part_id == 1 and not station.outputs.busy


def test_results_that_nobody_reads_are_lost_in_sight(caplog: pytest.LogCaptureFixture) -> None:
    station = handshake(Line(), queue=3)
    plc = Plc(station)
    for part_id in range(10):
        station.add(record(part_id))
    assert station.outputs.overflow and station.outputs.errors == 6
    assert caplog.text.count("unread") == 1, "logged once"
    shown = []
    while station.outputs.results_ready:
        assert station.outputs.overflow, "until the last that waited was read"
        shown.append(station.outputs.part_id)
        plc.write(ack=True)
        plc.write(ack=False)
    assert shown == [0, 7, 8, 9], "the one that is shown stays"
    assert not station.outputs.overflow and station.outputs.ready


def test_recipes_by_index() -> None:
    line = Line()
    line.recipe = 1
    station = handshake(line, recipe=1)
    plc = Plc(station)
    plc.write(heartbeat=1)  # with recipe 1, which is in force
    assert line.recipe == 1
    plc.write(recipe=2, trigger=True)
    assert line.recipe == 2 and station.outputs.recipe == 2
    plc.write(recipe=7)
    assert line.recipe == 2 and station.outputs.recipe == 2
    assert station.counts["recipes_refused"] == 1 and station.outputs.errors == 1
    station.beat(now_s=1.0, is_line_ready=True, recipe=0)  # somebody else has changed it
    assert station.outputs.recipe == 0


def test_the_recipe_of_a_trigger_is_the_plcs() -> None:
    line = Line()
    plc = Plc(handshake(line))
    plc.write(recipe=1, trigger=True)
    plc.write(trigger=False)
    line.recipe = 0  # somebody else selects it
    plc.write(trigger=True)
    assert line.recipe == 1 and len(line.opened) == 2
    plc.write(trigger=False)
    plc.write(recipe=7)
    plc.write(trigger=True)
    outputs = plc.station.outputs
    assert (len(line.opened), outputs.refused, outputs.recipe) == (2, True, 1)
    assert plc.station.counts["recipes_refused"] == plc.station.counts["triggers_refused"] == 1
    plc.write(trigger=False)
    plc.write(recipe=2, trigger=True)
    assert len(line.opened) == 3 and line.recipe == 2 and not plc.station.outputs.refused


def test_the_line_that_is_not_ready_shows_that() -> None:
    station = handshake(Line())
    station.beat(now_s=1.0, is_line_ready=False, recipe=0)
    assert not station.outputs.ready and station.outputs.heartbeat == 2
    station.beat(now_s=2.0, is_line_ready=True, recipe=0)
    assert station.outputs.ready and station.outputs.heartbeat == 3


def test_a_plc_whose_heartbeat_stands_still_is_missed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    station = handshake(Line(), plc_timeout_s=2.0)

    def beat(now_s: float) -> bool:
        station.beat(now_s=now_s, is_line_ready=True, recipe=0)
        return station.is_plc_missing

    assert [beat(now_s) for now_s in (1.0, 2.0)] == [False, False]
    station.set_inputs(Inputs(heartbeat=1), now_s=2.5)
    assert [beat(now_s) for now_s in (4.5, 4.6, 30.0)] == [False, True, True]
    assert station.counts["plc_losses"] == 1 and caplog.text.count("no heartbeat") == 1
    station.set_inputs(Inputs(heartbeat=2), now_s=31.0)
    assert not station.is_plc_missing and "is back" in caplog.text
    assert beat(40.0) and station.counts["plc_losses"] == 2


def test_without_a_timeout_no_plc_is_missed() -> None:
    station = handshake(Line())
    for now_s in (0.0, 1e6):
        station.beat(now_s=now_s, is_line_ready=True, recipe=0)
    assert not station.is_plc_missing


QUEUE = 4


class AnyPlc(RuleBasedStateMachine):
    """A PLC that does what it likes, and a line that answers in any order and time."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line()
        self.station = handshake(self.line, queue=QUEUE)
        self.plc = Plc(self.station)
        self.unanswered: list[int] = []
        self.added: list[int] = []  # all results, in order
        self.seen: list[int] = []  # as the PLC saw them: when results_ready rose
        self.foreign = 10_000
        self.was_shown = False

    def _look(self) -> None:
        outputs = self.station.outputs
        if outputs.results_ready and not self.was_shown:
            self.seen.append(outputs.part_id)
        self.was_shown = outputs.results_ready

    def _write(self, **changes: object) -> None:
        before = len(self.line.opened)
        self.plc.write(**changes)
        self.unanswered += [part_id for part_id, _ in self.line.opened[before:]]
        self._look()

    @rule(value=st.booleans(), tag=st.integers(0, 2**32 - 1))
    def trigger(self, value: bool, tag: int) -> None:
        before, was_high = len(self.line.opened), self.plc.inputs.trigger
        self._write(trigger=value, tag=tag)
        rises, is_refused = value and not was_high, self.line.refuses or self.plc.inputs.recipe > 2
        assert len(self.line.opened) - before == (rises and not is_refused)
        assert not rises or self.station.outputs.refused == is_refused

    @rule(value=st.booleans())
    def acknowledge(self, value: bool) -> None:
        self._write(ack=value)

    @rule(index=st.integers(0, 4))
    def recipe(self, index: int) -> None:
        self._write(recipe=index)
        assert self.station.outputs.recipe == self.line.recipe

    @rule(changes=st.fixed_dictionaries({"trigger": st.booleans(), "ack": st.booleans()}))
    def everything_at_once(self, changes: dict[str, bool]) -> None:
        self._write(**changes)

    @rule(refuses=st.booleans())
    def line_stops_or_starts(self, refuses: bool) -> None:
        self.line.refuses = refuses

    @precondition(lambda self: self.unanswered)
    @rule(verdict=st.sampled_from(list(Verdict)))
    def answer(self, verdict: Verdict) -> None:
        self._add(self.unanswered.pop(0), verdict)

    @rule()
    def result_of_an_image_that_was_its_own_trigger(self) -> None:
        self.foreign += 1
        self._add(self.foreign, Verdict.OK)

    def _add(self, part_id: int, verdict: Verdict) -> None:
        self.added.append(part_id)
        self.station.add(record(part_id, verdict))
        self._look()

    @rule(is_ready=st.booleans())
    def beat(self, is_ready: bool) -> None:
        before = self.station.outputs.heartbeat
        self.station.beat(now_s=1.0, is_line_ready=is_ready, recipe=self.line.recipe)
        assert self.station.outputs.heartbeat == before + 1

    @invariant()
    def ready_means_that_nothing_is_open(self) -> None:
        outputs, inputs = self.station.outputs, self.plc.inputs
        assert outputs.busy == bool(self.unanswered)
        if outputs.ready:
            assert not (outputs.busy or outputs.results_ready or outputs.overflow)
            assert not (inputs.trigger or inputs.ack)

    @invariant()
    def a_result_shows_as_a_whole_or_not_at_all(self) -> None:
        outputs = self.station.outputs
        assert outputs.results_ready == (outputs.verdict > 0) == (outputs.part_id > 0)
        assert not (outputs.results_ready and self.plc.inputs.ack)

    @invariant()
    def nothing_is_shown_twice_or_out_of_order_and_what_is_lost_is_counted(self) -> None:
        assert len(set(self.seen)) == len(self.seen)
        positions = [self.added.index(part_id) for part_id in self.seen]
        assert positions == sorted(positions)
        counts = self.station.counts
        assert counts["results_shown"] == len(self.seen)
        waiting = len(self.added) - len(self.seen) - counts["results_lost"]
        assert 0 <= waiting <= QUEUE
        if not self.plc.inputs.ack:
            assert self.was_shown or not waiting

    def teardown(self) -> None:
        """A well-behaved PLC then gets all the rest."""
        while self.unanswered:
            self.answer(Verdict.OK)
        self._write(trigger=False, ack=False)
        while self.station.outputs.results_ready:
            self._write(ack=True)
            self._write(ack=False)
        self.station.beat(now_s=2.0, is_line_ready=True, recipe=0)
        assert self.station.outputs.ready
        assert len(self.seen) + self.station.counts["results_lost"] == len(self.added)


TestAnyPlc = AnyPlc.TestCase
TestAnyPlc.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
