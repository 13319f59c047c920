from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgead.line.ledger import Decision, Ledger, Part
from edgead.line.verdicts import Verdict

MS = 1_000_000


def decide(ledger: Ledger, part: Part, at_ms: float, verdict: Verdict = Verdict.OK) -> bool:
    return ledger.decide(part, Decision(verdict, "said", round(at_ms * MS)))


def said(parts: list[Part]) -> list[tuple[int, str]]:
    return [(part.part_id, part.decision.verdict.value) for part in parts if part.decision]


def test_answers_leave_in_the_order_of_the_triggers() -> None:
    ledger = Ledger(deadline_ms=10)
    first, second, third = (ledger.open(number, number * MS) for number in (1, 2, 3))
    assert decide(ledger, third, 4, Verdict.NG)
    assert decide(ledger, second, 5)
    assert ledger.release() == [] and len(ledger) == 3
    assert decide(ledger, first, 6)
    assert said(ledger.release()) == [(1, "OK"), (2, "OK"), (3, "NG")]
    assert len(ledger) == 0


def test_an_answer_at_the_deadline_is_late_even_if_nobody_looked_at_the_clock() -> None:
    ledger = Ledger(deadline_ms=10)
    part = ledger.open(1, 0)
    assert not decide(ledger, part, 10)
    (late,) = ledger.release()
    assert late.decision is not None
    assert late.decision.verdict is Verdict.LATE
    assert late.decision.reason == "no answer within 10 ms of the trigger"


def test_late_is_said_at_the_deadline_and_stays() -> None:
    ledger = Ledger(deadline_ms=10)
    part = ledger.open(1, 0)
    ledger.expire(10 * MS - 1)
    assert ledger.release() == []
    ledger.expire(10 * MS)
    assert said(ledger.release()) == [(1, "LATE")]
    assert not decide(ledger, part, 11)
    assert part.decision is not None and part.decision.verdict is Verdict.LATE


def test_next_deadline_is_that_of_the_oldest_open_part() -> None:
    ledger = Ledger(deadline_ms=2.5)
    assert ledger.next_deadline_ns == float("inf")
    part = ledger.open(1, 4 * MS)
    ledger.open(2, 5 * MS)
    assert ledger.next_deadline_ns == 6.5 * MS
    decide(ledger, part, 5)
    ledger.release()
    assert ledger.next_deadline_ns == 7.5 * MS


def test_a_trigger_with_an_older_time_counts_as_simultaneous() -> None:
    ledger = Ledger(deadline_ms=1)
    ledger.open(1, 5 * MS)
    assert ledger.open(2, 3 * MS).trigger_ns == 5 * MS


def test_what_is_open_at_the_end_is_an_error() -> None:
    ledger = Ledger(deadline_ms=10)
    for number in (1, 2, 3):
        part = ledger.open(number, number * 5 * MS)
    decide(ledger, part, 16, Verdict.NG)
    ledger.abandon("the line was stopped", 16 * MS)
    assert said(ledger.release()) == [(1, "LATE"), (2, "ERROR"), (3, "NG")]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("trigger", "answer", "answer", "expire", "tick")),
        st.integers(0, 40),  # which part, or by how many ms the clock goes on
        st.sampled_from(list(Verdict)),
    ),
    max_size=80,
)


@given(ACTIONS, st.integers(1, 30))
def test_each_trigger_gets_exactly_one_verdict_in_order_and_in_time(
    actions: list[tuple[str, int, Verdict]], deadline_ms: int
) -> None:
    """Answers in any order, twice, too late, or never; the clock looked at seldom or often."""
    ledger = Ledger(deadline_ms)
    now_ms, opened, released = 0, [], []
    first_answer: dict[int, tuple[int, Verdict]] = {}
    for what, number, verdict in actions:
        if what == "tick":
            now_ms += number
        elif what == "trigger":
            opened.append(ledger.open(len(opened) + 1, now_ms * MS))
        elif what == "answer" and opened:
            part = opened[number % len(opened)]
            first_answer.setdefault(part.part_id, (now_ms, verdict))
            decide(ledger, part, now_ms, verdict)
        elif what == "expire":
            ledger.expire(now_ms * MS)
            late_before = [part for part in opened if part.deadline_ns <= now_ms * MS]
            assert all(part.decision for part in late_before)
        released += ledger.release()
    ledger.abandon("end", now_ms * MS)
    released += ledger.release()

    assert [part.part_id for part in released] == [part.part_id for part in opened]
    for part in released:
        assert part.decision is not None
        answered_ms, verdict = first_answer.get(part.part_id, (None, None))
        in_time = answered_ms is not None and answered_ms * MS < part.deadline_ns
        got = part.decision.verdict
        assert got is verdict if in_time else got in (Verdict.LATE, Verdict.ERROR)
        if got is Verdict.LATE and not in_time:
            assert part.decision.at_ns >= part.deadline_ns
