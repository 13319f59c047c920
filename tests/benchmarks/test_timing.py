"""Timing of callables: who is called how often, in which order, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgead.benchmarks.results_file import fresh_process, table, write_results
from edgead.benchmarks.timing import Timing, interleave


def test_functions_take_turns_and_warm_up_calls_do_not_count() -> None:
    calls: list[str] = []
    timings = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1, block=3
    )
    assert "".join(calls) == "ab" + ("aaaa" + "bbbb") * 2
    assert {name: timing.calls for name, timing in timings.items()} == {"a": 6, "b": 6}


def test_percentiles() -> None:
    timing = Timing.of([float(value) for value in range(1, 102)])
    assert (timing.p50, timing.p90, timing.p99, timing.max, timing.calls) == (51, 91, 100, 101, 101)
    assert timing.to_dict()["p50"] == 51


def test_results_carry_machine_and_date(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    write_results(path, "name", {"x": 1})
    record = json.loads(path.read_text())
    assert record["benchmark"] == "name" and record["x"] == 1
    assert record["machine"]["cpu"]["model"] and record["utc"].endswith("+00:00")


def test_table_is_markdown() -> None:
    assert table(("a", "b"), [(1, 2)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_fresh_process_reads_the_last_line_and_shows_failures() -> None:
    import sys

    assert fresh_process([sys.executable, "-c", "print('noise'); print('{\"p50\": 2}')"]) == {"p50": 2}
    with pytest.raises(RuntimeError, match="boom"):
        fresh_process([sys.executable, "-c", "raise SystemExit('boom')"])
