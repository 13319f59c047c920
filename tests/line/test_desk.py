from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgead.errors import LineError
from edgead.line import journal
from edgead.line.assembly import open_sink
from edgead.line.recipe import SinkConfig
from tests.line.conftest import (
    BAD,
    GOOD,
    Bench,
    Start,
    Stuck,
    camera_state,
    gated,
    image,
    wait_for,
)


def test_times_are_right_after_the_clock_was_set(bench: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board without a battery starts a year behind."""
    right_ns = time.time_ns
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: right_ns() - 365 * 86400 * 10**9)
        here = bench()
        here.sources["top"].send(image())
        assert abs(here.records(1)[0]["trigger_ns"] - right_ns()) > 300 * 86400e9
    here.sources["top"].send(image())
    assert abs(here.records(2)[1]["trigger_ns"] - time.time_ns()) < 60e9


def test_a_new_process_goes_on_where_the_last_one_was_killed(
    bench: Start, gate: threading.Event, tmp_path: Path
) -> None:
    """The journal as a crash leaves it: two parts open, and the last verdict not in the results."""
    gate.clear()
    here = bench(open_model=gated(gate))
    for _ in range(3):
        here.sources["top"].send(image())
    wait_for(lambda: camera_state(here, "open_parts") == 3)
    shutil.copytree(tmp_path / "journal", tmp_path / "copy")
    gate.set()
    here.records(3)
    here.line.stop(0.5)
    shutil.rmtree(tmp_path / "journal")
    shutil.copytree(tmp_path / "copy", tmp_path / "journal")
    here.results.unlink()

    again = bench()
    again.sources["top"].send(image())
    records = again.records(4)
    assert [(r["part_id"], r["verdict"]) for r in records] == [
        (1, "ERROR"),
        (2, "ERROR"),
        (3, "ERROR"),
        (4, "OK"),
    ]
    assert records[0]["reason"] == "the line went down before its answer"


class Keeper(Stuck):
    """A sink that is down until it is told otherwise; `got` outlives it."""

    def __init__(self, got: list[int], *, is_up: bool, keeps: bool) -> None:
        self._got, self._is_up, self._keeps = got, is_up, keeps

    def write(self, record: Any, picture: object) -> None:
        if not self._is_up:
            raise LineError("down")
        self._got.append(record.part_id)

    def knows(self, part_id: int) -> bool:
        return not self._keeps or part_id in self._got


@pytest.mark.parametrize(
    ("kind", "keeps", "expected"),
    [
        ("mqtt", True, list(range(1, 62))),
        ("webhook", False, list(range(1, 62))),
        ("modbus", False, [61]),  # a PLC must not get old parts
    ],
)
def test_a_sink_that_was_down_at_the_stop_gets_all_at_the_next_start(
    bench: Start, monkeypatch: pytest.MonkeyPatch, kind: str, keeps: bool, expected: list[int]
) -> None:
    """Also more than the journal keeps of itself."""
    monkeypatch.setattr(journal, "SEGMENT_PARTS", 10)
    got: list[int] = []

    def start(*, is_up: bool) -> Bench:
        return bench(
            {"top": {"queue": 100}},
            sinks=(SinkConfig("other one", kind, None),),
            sink=lambda config, controls: (
                Keeper(got, is_up=is_up, keeps=keeps)
                if config.kind == kind
                else open_sink(config, controls)
            ),
        )

    here = start(is_up=False)
    for _ in range(60):
        here.sources["top"].send(image())
    here.records(60)
    assert here.line.stop(0.2) == {"results": 0, "other one": 60}
    here = start(is_up=True)
    here.sources["top"].send(image())
    here.records(61)
    wait_for(lambda: got == expected)
    here.line.stop(0.2)
    again = start(is_up=True)
    again.line.stop(0.2)
    assert got == expected  # once


def test_the_plc_triggers_and_images_find_their_parts(bench: Start) -> None:
    here = bench({"top": {"trigger": "plc"}})
    source = here.sources["top"]
    source.send(image())  # nobody asked for this one
    wait_for(lambda: camera_state(here, "source")["unexpected"] == 1)
    moments_ns = []
    for part_id, tag in enumerate((70, 71, 72), 1):
        assert here.line.trigger("top", tag=tag) == part_id
        moments_ns.append(time.monotonic_ns())
        time.sleep(0.01)
    source.send(image(BAD), exposure_ns=moments_ns[0])
    source.send(None, problem="lost")
    source.send(image(GOOD), exposure_ns=moments_ns[2])
    records = here.records(3)
    assert [(r["tag"], r["verdict"]) for r in records] == [(70, "NG"), (71, "NOT_INSPECTED"), (72, "OK")]
    assert source.fired == 3


def test_a_trigger_whose_image_never_comes_is_late_and_takes_no_image_of_another(bench: Start) -> None:
    here = bench({"top": {"trigger": "plc", "deadline_ms": 50.0, "image_timeout_ms": 100.0}})
    here.line.trigger("top", tag=1)
    assert here.verdicts(1) == ["LATE"]
    time.sleep(0.12)
    here.line.trigger("top", tag=2)
    here.sources["top"].send(image(BAD))
    assert [(r["tag"], r["verdict"]) for r in here.records(2)] == [(1, "LATE"), (2, "NG")]


def test_a_trigger_that_the_camera_ignores_costs_one_part_where_exposures_are_known(
    bench: Start,
) -> None:
    """Parts overlap: images come after the next trigger. Each third part is bad."""
    here = bench({"top": {"trigger": "plc"}})
    before_ns = None
    for tag in range(1, 13):
        here.line.trigger("top", tag=tag)
        moment_ns = time.monotonic_ns()
        if before_ns is not None and tag - 1 != 4:
            color = BAD if (tag - 1) % 3 == 0 else GOOD
            here.sources["top"].send(image(color, seed=tag), exposure_ns=before_ns)
        before_ns = moment_ns
        time.sleep(0.02)
    here.sources["top"].send(image(BAD), exposure_ns=before_ns)
    verdicts = ["NG" if tag % 3 == 0 else "OK" for tag in range(1, 13)]
    verdicts[3] = "NOT_INSPECTED"
    assert here.verdicts(12) == verdicts
    assert here.records(12)[3]["reason"] == "its image never came"
    assert camera_state(here, "source")["missing_images"] == 1


def test_no_part_gets_the_image_of_another_where_exposures_are_not_known(bench: Start) -> None:
    """The camera ignores trigger 3. Each third part is bad: shifted by one, a bad one would be OK."""
    here = bench({"top": {"trigger": "plc", "deadline_ms": 2000.0, "image_timeout_ms": 300.0}})
    source = here.sources["top"]
    for tag in range(1, 31):
        fired = source.fired
        here.line.trigger("top", tag=tag)
        if tag != 3 and source.fired > fired:
            source.send(image(BAD if tag % 3 == 0 else GOOD, seed=tag))
        time.sleep(0.03)
    records = here.records(30)
    truth = ["NG" if tag % 3 == 0 else "OK" for tag in range(1, 31)]
    assert all(r["verdict"] in (true, "NOT_INSPECTED") for r, true in zip(records, truth, strict=True))
    assert [r["verdict"] for r in records[:2]] == truth[:2]
    assert [r["verdict"] for r in records[-5:]] == truth[-5:]  # it finds back, however fast they come
    unsure = [r["reason"] for r in records if "could be that of another part" in r["reason"]]
    assert len(unsure) == 2 and source.fired < 30
