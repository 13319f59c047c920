"""The queue and thread around a sink: nothing waits for it, nothing is lost in silence."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.errors import LineError
from edgead.line import outlet as module
from edgead.line.interfaces import Picture
from edgead.line.mark import Mark
from edgead.line.outlet import Outlet
from edgead.line.verdicts import Record, Verdict

LIMIT_S = 20.0


def record(part_id: int) -> Record:
    return Record(
        part_id=part_id,
        camera="top",
        verdict=Verdict.OK,
        reject=False,
        reason="score 0.1 < threshold 0.5",
        source="a.png",
        trigger_ns=part_id,
        total_ms=1.0,
    )


def picture() -> Picture:
    return Picture(np.zeros((4, 4, 3), np.uint8), None)


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.002)


class ListSink:
    """Keeps what it gets; `before` runs ahead of each write and may raise or block."""

    def __init__(self, before: Callable[[Record], None] = lambda record: None, *, pictures: bool = True):
        self.wants_pictures = pictures
        self.before = before
        self.parts: list[int] = []
        self.pictures: list[bool] = []
        self.late: list[int] = []
        self.threads: set[str] = set()
        self.is_closed = False

    def write(self, record: Record, picture: Picture | None) -> None:
        self.threads.add(threading.current_thread().name)
        self.before(record)
        self.parts.append(record.part_id)
        self.pictures.append(picture is not None)

    def write_late(self, record: Record) -> None:
        self.late.append(record.part_id)

    def knows(self, part_id: int) -> bool:
        return part_id in self.parts

    def counters(self) -> dict[str, int]:
        return {"kept": len(self.parts)}

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.002)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Closed until the test opens it, and at its end."""
    event = threading.Event()
    yield event
    event.set()


def outlet(sink: ListSink, **limits: int) -> Outlet:
    return Outlet(sink, name="test", reopen=lambda: sink, **limits)


def test_records_and_late_results_arrive_in_order_in_one_thread_of_the_sink() -> None:
    sink = ListSink()
    way = outlet(sink)
    for part_id in range(100):
        way.put(record(part_id), picture() if part_id % 2 else None)
    way.put_late(record(7))
    assert way.close(LIMIT_S) == 0
    assert sink.parts == list(range(100))
    assert sink.pictures == [bool(part_id % 2) for part_id in range(100)]
    assert sink.late == [7]
    assert sink.threads == {"edgead sink test"}
    assert sink.is_closed
    expected = {
        "waiting": 0,
        "written": 101,
        "failed": 0,
        "dropped": 0,
        "pictures_dropped": 0,
        "kept": 100,
    }
    assert way.counters() == expected
    way.put(record(100), None)  # too late: counted, not raised
    assert way.counters()["dropped"] == 1


def test_a_sink_that_wants_no_pictures_gets_none_and_none_are_kept() -> None:
    sink = ListSink(pictures=False)
    way = outlet(sink, pictures=1)
    for part_id in range(10):
        way.put(record(part_id), picture())
    way.close(LIMIT_S)
    assert sink.pictures == [False] * 10 and way.counters()["pictures_dropped"] == 0


def test_a_blocked_sink_delays_nobody_and_holds_few_pictures(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    sink = ListSink(lambda record: gate.wait() and None)
    way = outlet(sink, pictures=8)
    way.put(record(0), picture())
    wait_for(lambda: way.is_stalled(0.01))
    # As long as the gate is shut, the first write does not return; a put that waited for it would hang.
    for part_id in range(1, 1000):
        way.put(record(part_id), picture())
    assert way.counters()["waiting"] == 1000
    assert way.counters()["pictures_dropped"] == 999 - 8
    assert not way.is_stalled(3600)
    gate.set()
    wait_for(lambda: way.counters()["written"] == 1000)
    assert not way.is_stalled(0)
    assert sink.parts == list(range(1000))
    assert sink.pictures == [True] + [False] * (999 - 8) + [True] * 8, "the newest keep theirs"
    assert caplog.text.count("8 pictures wait") == 1, "once per burst"
    assert way.close(LIMIT_S) == 0


def test_the_oldest_records_go_when_too_many_wait(
    gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    sink = ListSink(lambda record: gate.wait() and None)
    way = outlet(sink, records=10, pictures=3)
    way.put(record(0), None)
    wait_for(lambda: way.is_stalled(0))
    for part_id in range(1, 31):
        way.put(record(part_id), picture())
    gate.set()
    assert way.close(LIMIT_S) == 0
    assert sink.parts == [0, *range(21, 31)], "the one being written is not taken away"
    assert way.counters()["dropped"] == 20 and way.counters()["written"] == 11
    assert caplog.text.count("10 records wait") == 1


def test_a_sink_that_fails_gets_all_in_order_once_it_recovers(
    quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    is_down = threading.Event()
    is_down.set()

    def fail(record: Record) -> None:
        if is_down.is_set():
            raise LineError("broker away") if record.part_id % 2 else OSError(28, "disk full")

    sink = ListSink(fail)
    way = outlet(sink)
    for part_id in range(50):
        way.put(record(part_id), None)
    wait_for(lambda: way.counters()["failed"] >= 5)
    assert sink.parts == []
    is_down.clear()
    assert way.close(LIMIT_S) == 0
    assert sink.parts == list(range(50))
    assert caplog.text.count("tried again") == 1, "once per burst"


def test_a_bug_in_a_sink_ends_neither_its_thread_nor_the_records_after(quick: None) -> None:
    def fail(record: Record) -> None:
        if record.part_id == 3:
            raise ZeroDivisionError

    sink = ListSink(fail)
    way = outlet(sink)
    for part_id in range(6):
        way.put(record(part_id), None)
    assert way.close(LIMIT_S) == 0
    assert sink.parts == [0, 1, 2, 4, 5]
    assert way.counters()["dropped"] == 1
    assert way.counters()["failed"] == module.ATTEMPTS_AT_A_BUG


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.0, 0.2, 0.6]),
    records=st.sampled_from([3, 20, 1000]),
    pictures=st.sampled_from([1, 5]),
    count=st.integers(1, 120),
)
def test_whatever_fails_each_record_is_written_once_in_order_or_counted_as_dropped(
    seed: int, share: float, records: int, pictures: int, count: int
) -> None:
    chance = random.Random(seed)

    def fail(record: Record) -> None:
        if chance.random() < share:
            raise chance.choice([LineError("x"), OSError("x"), KeyError("x")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FIRST_PAUSE_S", 0.0001)
        patch.setattr(module, "LONGEST_PAUSE_S", 0.0002)
        sink = ListSink(fail)
        way = outlet(sink, records=records, pictures=pictures)
        for part_id in range(count):
            way.put(record(part_id), picture())
        assert way.close(LIMIT_S) == 0
    counters = way.counters()
    assert sink.parts == sorted(set(sink.parts))
    assert len(sink.parts) + counters["dropped"] == count
    assert counters["written"] == len(sink.parts) and counters["waiting"] == 0
    assert sum(sink.pictures) + counters["pictures_dropped"] <= count


@pytest.mark.parametrize(
    ("known", "missed"), [([], [1, 2, 3, 4, 5]), ([3, 5], [4]), ([1, 2], [3, 4, 5]), ([5], [])]
)
def test_what_came_before_a_record_that_a_sink_has_is_not_given_again(
    known: list[int], missed: list[int]
) -> None:
    """Its files were moved by logrotate, or it has deleted the oldest for room."""
    sink = ListSink()
    sink.parts += known
    made = outlet(sink)
    assert [r.part_id for r in made.missed([record(part_id) for part_id in range(1, 6)])] == missed
    made.close(1)


def test_close_gives_up_in_time_and_says_what_is_left(gate: threading.Event) -> None:
    sink = ListSink(lambda record: gate.wait() and None)
    way = outlet(sink)
    for part_id in range(5):
        way.put(record(part_id), None)
    assert way.close(0.05) == 5
    gate.set()
    wait_for(lambda: sink.is_closed)  # the thread closes its sink when the write comes back
    assert sink.parts == [0]


def test_close_gives_up_a_sink_that_fails() -> None:
    def fail(record: Record) -> None:
        raise LineError("no")

    way = outlet(ListSink(fail))
    way.put(record(0), None)
    way.put_late(record(0))
    assert way.close(0.2) == 2
    assert way.close(0.2) == 2, "may be repeated"


@pytest.mark.parametrize("has_it", [True, False])
def test_restart_leaves_a_stuck_write_behind(gate: threading.Event, quick: None, has_it: bool) -> None:
    stuck = ListSink(lambda record: gate.wait() and None)
    fresh = ListSink()
    if has_it:
        fresh.parts.append(0)
    answers = iter([LineError("its port is still in use"), fresh])

    def reopen() -> ListSink:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    way = Outlet(stuck, name="test", reopen=reopen)
    for part_id in range(5):
        way.put(record(part_id), None)
    wait_for(lambda: way.is_stalled(0.01))
    way.restart()
    wait_for(lambda: way.counters()["written"] == 5)
    assert fresh.parts == [0, 1, 2, 3, 4], "the stuck one is written again only if it is not there"
    gate.set()
    wait_for(lambda: stuck.is_closed)
    assert stuck.parts == [0], "the old thread takes no more"
    way.put(record(5), None)
    assert way.close(LIMIT_S) == 0
    assert fresh.parts[-1] == 5 and fresh.is_closed
    assert way.counters()["written"] == 6


def test_a_sink_with_a_mark_gets_a_stuck_record_again_and_the_mark_moves_with_it(
    tmp_path: Path, gate: threading.Event, quick: None
) -> None:
    """It says that it knows everything, since it cannot tell."""
    records = [record(part_id) for part_id in range(5)]
    stuck, fresh = ListSink(lambda record: gate.wait() and None), ListSink()
    stuck.knows = fresh.knows = lambda part_id: True  # type: ignore[method-assign]
    way = Outlet(stuck, name="test", reopen=lambda: fresh, mark=Mark(tmp_path / "mark"))
    assert way.missed(records) == []  # the receiver is new
    for each in records:
        way.put(each, None)
    wait_for(lambda: way.is_stalled(0.01))
    way.restart()
    wait_for(lambda: way.counters()["written"] == 5)
    assert fresh.parts == [0, 1, 2, 3, 4]
    way.put_late(record(2))
    assert way.close(LIMIT_S) == 0
    more = [*records, record(9), record(7)]
    assert Mark(tmp_path / "mark").missed(more) == more[5:]


def test_puts_from_several_threads_lose_nothing() -> None:
    sink = ListSink()
    way = outlet(sink, records=10_000)

    def put(first: int) -> None:
        for part_id in range(first, first + 500):
            way.put(record(part_id), picture())

    threads = [threading.Thread(target=put, args=(500 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert way.close(LIMIT_S) == 0
    assert sorted(sink.parts) == list(range(2000))
    for first in range(0, 2000, 500):
        own = [part_id for part_id in sink.parts if first <= part_id < first + 500]
        assert own == sorted(own)
