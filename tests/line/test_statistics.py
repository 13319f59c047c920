"""Statistics of the line: counts, latencies, drift, last records."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.line.statistics import EDGES_MS, Histogram, Statistics
from edgead.line.verdicts import Record, Verdict


def record(part_id: int = 1, **changes: object) -> Record:
    fields: dict[str, object] = dict(
        part_id=part_id,
        camera="left",
        verdict=Verdict.OK,
        reject=False,
        reason="below the threshold",
        source="left.png",
        trigger_ns=1_700_000_000_000_000_000 + part_id * 1_000_000_000,
        total_ms=12.0,
        score=0.2,
        threshold=0.5,
        bundle="bottle",
        wait_ms=2.0,
        infer_ms=9.0,
    )
    return Record(**fields | changes)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=400))
def test_percentiles_are_right_to_a_bucket(values_ms: list[float]) -> None:
    histogram = Histogram()
    for value_ms in values_ms:
        histogram.add(value_ms)
    assert histogram.max_ms == max(values_ms) and sum(histogram.counts) == len(values_ms)
    for percent in (50, 99, 99.9):
        true_ms = float(np.quantile(values_ms, percent / 100, method="inverted_cdf"))
        got_ms = histogram.percentile(percent)
        assert got_ms is not None and got_ms <= max(values_ms)
        if 0.1 < true_ms <= EDGES_MS[-1]:  # a bucket ends 12.2 % above where it begins
            assert true_ms / 1.1221 <= got_ms <= true_ms * 1.1221


def test_no_latency_no_percentile() -> None:
    assert Histogram().to_dict() == {"count": 0, "p50": None, "p99": None, "p99_9": None, "max": None}


def test_counts_and_latencies() -> None:
    statistics = Statistics()
    statistics.add(record(1))
    statistics.add(record(2, verdict=Verdict.NG, reject=True, score=0.9))
    late = {"verdict": Verdict.LATE, "reject": True, "score": None, "infer_ms": None, "total_ms": 50.0}
    statistics.add(record(3, **late))
    statistics.add(record(4, verdict=Verdict.NOT_INSPECTED, reject=True, score=None, total_ms=0.01))
    statistics.add(record(5, verdict=Verdict.ERROR, reject=True, score=None, total_ms=1e7))
    statistics.add(record(6, camera="right"))
    left = statistics.snapshot()["left"]
    assert left["counts"] == {"OK": 1, "NG": 1, "LATE": 1, "ERROR": 1, "NOT_INSPECTED": 1}
    assert left["rejected"] == 4
    assert left["latency_ms"]["total"]["count"] == 3, "of answered parts"
    assert left["latency_ms"]["total"]["max"] == 50.0
    assert left["latency_ms"]["infer"]["count"] == 2 and left["latency_ms"]["wait"]["count"] == 3
    assert sum(left["histogram"]["counts"]) == 3
    assert len(left["histogram"]["counts"]) == len(left["histogram"]["edges_ms"]) + 1
    assert [part["part_id"] for part in left["last"]] == [1, 2, 3, 4, 5]
    assert statistics.counts()["right"]["OK"] == 1


def test_last_records_are_bounded() -> None:
    statistics = Statistics()
    for part_id in range(200):
        statistics.add(record(part_id))
    assert [last.part_id for last in statistics.last("left")] == list(range(150, 200))
    assert statistics.last("nobody") == []


def test_drift_of_ok_scores_with_advice() -> None:
    rng = np.random.default_rng(0)
    statistics = Statistics(baseline=100)
    scores = [*rng.normal(0.2, 0.02, 300), *rng.normal(0.26, 0.02, 100)]
    for part_id, score in enumerate(scores):
        statistics.add(record(part_id, score=float(score)))
        statistics.add(record(part_id, verdict=Verdict.NG, score=0.9))  # never drifts the OK scores
    drift = statistics.drift("left")
    assert drift is not None
    assert drift["alarm"]["direction"] == "up"
    assert drift["alarm"]["since_ns"] / 1e9 == pytest.approx(1.7e9 + 300, abs=12)
    assert drift["alarm"]["text"].startswith("left: scores of OK parts have risen since ")
    assert "(median 0.2" in drift["alarm"]["text"] and "edgead recalibrate" in drift["alarm"]["text"]
    assert drift["baseline"]["scores"] == drift["baseline"]["of"] == 100
    assert drift["baseline"]["median"] == pytest.approx(0.2, abs=0.01)
    assert (
        sum(row[1] for row in drift["windows"]["ok"])
        == sum(row[1] for row in drift["windows"]["ng"])
        == 400
    )
    statistics.reset_baseline("left")
    drift = statistics.drift("left", with_windows=False)
    assert drift is not None and drift["alarm"] is None and drift["baseline"]["scores"] == 0
    assert "windows" not in drift
    statistics.reset_baseline("nobody")
    assert statistics.drift("nobody") is None


def test_each_model_has_a_baseline_of_its_own() -> None:
    """Scores of another bundle lie on another scale: its arrival is no drift."""
    statistics = Statistics(baseline=50)
    for part_id in range(200):
        statistics.add(record(part_id, score=0.2))
    for part_id in range(200, 400):
        statistics.add(record(part_id, score=7.0, recipe=1, bundle="jar"))
    drift = statistics.drift("left")
    assert drift is not None
    assert (drift["bundle"], drift["alarm"], drift["baseline"]["median"]) == ("jar", None, 7.0)
    statistics.add(record(400, score=0.2))
    drift = statistics.drift("left")
    assert drift is not None and drift["baseline"]["median"] == 0.2
    for recipe in range(100):
        statistics.add(record(recipe, recipe=recipe))
    assert len(statistics._cameras["left"].scores) <= 16


def test_late_and_senseless_scores_are_left_out() -> None:
    statistics = Statistics()
    statistics.add(record(1, verdict=Verdict.LATE, score=0.3))
    statistics.add(record(2, score=float("nan")))
    statistics.add(record(3, score=float("inf"), verdict=Verdict.NG))
    assert statistics.drift("left") is None


def test_json_holds_a_snapshot() -> None:
    statistics = Statistics(baseline=5)
    assert statistics.snapshot() == {}
    for part_id in range(50):
        statistics.add(record(part_id, score=float(part_id)))
    snapshot = statistics.snapshot()
    assert json.loads(json.dumps(snapshot, allow_nan=False)) == snapshot


def test_many_threads() -> None:
    statistics = Statistics()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            statistics.snapshot()
            statistics.reset_baseline("left")

    def write() -> None:
        for part_id in range(3000):
            statistics.add(record(part_id))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(4)]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert statistics.counts()["left"]["OK"] == 12_000


def test_time_of_one_record(capsys: pytest.CaptureFixture[str]) -> None:
    """Says how long it takes; a busy machine must not fail it."""
    records = [record(part_id, score=part_id % 97 / 97) for part_id in range(5000)]
    statistics = Statistics()
    times_us = []
    for part in records:
        start_ns = time.perf_counter_ns()
        statistics.add(part)
        times_us.append((time.perf_counter_ns() - start_ns) / 1e3)
    middle_us, slow_us = np.quantile(times_us, (0.5, 0.99))
    with capsys.disabled():
        print(f"\nStatistics.add: median {middle_us:.1f} us, p99 {slow_us:.1f} us")
