"""The metrics sink, scraped over HTTP and read with Prometheus's own parser."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from edgead.errors import LineError
from edgead.line.verdicts import Verdict
from tests.line.conftest_status import StandIn, history, make_record

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from edgead.line.sinks import metrics as module  # noqa: E402
from edgead.line.sinks.metrics import Config, Metrics, open_sink  # noqa: E402

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def controls() -> StandIn:
    return StandIn(baseline=100)


@pytest.fixture
def metrics(controls: StandIn) -> Iterator[Metrics]:
    sink = open_sink(Config(port=0), controls=controls)
    yield sink
    sink.close()


def scrape(metrics: Metrics) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    assert sum(len(family.samples) for family in families) == len(samples), "no sample twice"
    return samples


def get(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_before_the_first_part_all_counters_are_zero(metrics: Metrics) -> None:
    samples = scrape(metrics)
    for camera in ("top", "side"):
        for verdict in Verdict:
            assert get(samples, "edgead_parts_total", camera=camera, verdict=verdict.value) == 0
        assert get(samples, "edgead_latency_seconds_count", camera=camera, stage="total") == 0
    assert not any(name.startswith("edgead_score") for name, _ in samples)
    assert not any(name.startswith(("python_", "process_")) for name, _ in samples), "its own registry"


def test_a_client_that_says_nothing_is_let_go(
    controls: StandIn, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.05)
    sink = open_sink(Config(port=0), controls=controls)
    with socket.create_connection(("127.0.0.1", sink.port), timeout=20) as silent:
        assert silent.recv(1) == b""
    assert scrape(sink) and capfd.readouterr().err == ""
    sink.close()


def test_counters_and_state(metrics: Metrics, controls: StandIn) -> None:
    controls.statistics.add(make_record(1))
    controls.statistics.add(make_record(2))
    controls.statistics.add(make_record(3, camera="side", verdict=Verdict.NG, reject=True, score=0.9))
    controls.statistics.add(make_record(4, verdict=Verdict.NOT_INSPECTED, reject=True, score=None))
    controls.thresholds["side"] = None  # its bundle is being loaded
    samples = scrape(metrics)
    assert get(samples, "edgead_parts_total", camera="top", verdict="OK") == 2
    assert get(samples, "edgead_parts_total", camera="top", verdict="NOT_INSPECTED") == 1
    assert get(samples, "edgead_parts_total", camera="side", verdict="NG") == 1
    assert get(samples, "edgead_ready") == 1
    assert get(samples, "edgead_uptime_seconds") == 4321
    assert get(samples, "edgead_open_parts", camera="top") == 2
    assert get(samples, "edgead_queue_depth", camera="top") == 1
    assert get(samples, "edgead_deadline_seconds", camera="side") == pytest.approx(0.04)
    assert get(samples, "edgead_threshold", camera="top") == 0.5
    assert ("edgead_threshold", frozenset({("camera", "side")})) not in samples
    assert get(samples, "edgead_sink", sink="results", counter="waiting") == 3
    assert get(samples, "edgead_source", camera="top", counter="missing_frames") == 2


def test_latency_histogram_by_stage(metrics: Metrics, controls: StandIn) -> None:
    totals_ms = np.random.default_rng(0).gamma(3, 5, 500)
    for part_id, total_ms in enumerate(totals_ms.tolist()):
        controls.statistics.add(make_record(part_id, total_ms=total_ms, infer_ms=9.0, wait_ms=None))
    controls.statistics.add(make_record(501, total_ms=60_000.0))
    samples = scrape(metrics)
    ends = sorted(
        float(dict(labels)["le"])
        for name, labels in samples
        if name == "edgead_latency_seconds_bucket" and {("camera", "top"), ("stage", "total")} <= labels
    )
    assert ends[0] == 1e-4 and ends[-2:] == [10, float("inf")] and len(ends) == 27
    for end_s in ends:
        text = "+Inf" if np.isinf(end_s) else f"{end_s:.6g}"
        found = [
            value
            for (name, labels), value in samples.items()
            if name == "edgead_latency_seconds_bucket"
            and {("camera", "top"), ("stage", "total")} <= labels
            and float(dict(labels)["le"]) == end_s
        ]
        expected = np.count_nonzero(totals_ms <= end_s * 1000) + np.isinf(end_s)
        assert found == [expected], text
    total_s = get(samples, "edgead_latency_seconds_sum", camera="top", stage="total")
    assert total_s == pytest.approx(totals_ms.sum() / 1000 + 60)
    assert get(samples, "edgead_latency_seconds_count", camera="top", stage="infer") == 501
    assert get(samples, "edgead_latency_seconds_count", camera="top", stage="wait") == 1


def test_scores_and_drift_alarm(metrics: Metrics, controls: StandIn) -> None:
    history(controls, 600)
    samples = scrape(metrics)
    low, middle, high = (
        get(samples, "edgead_score", camera="top", verdict="OK", quantile=q)
        for q in ("0.05", "0.5", "0.95")
    )
    assert 0.2 < low < middle < high < 0.5
    assert get(samples, "edgead_score_drift_alarm", camera="top", direction="up") == 0
    history(controls, 300, shift=0.12, seed=1)
    samples = scrape(metrics)
    assert get(samples, "edgead_score_drift_alarm", camera="top", direction="up") == 1
    assert get(samples, "edgead_score_drift_alarm", camera="top", direction="down") == 0
    evidence = get(samples, "edgead_score_drift", camera="top", direction="up")
    assert evidence > get(samples, "edgead_score_drift_limit", camera="top")


def test_names_of_cameras_may_hold_anything(controls: StandIn) -> None:
    odd = 'left "2"\\\n}'
    controls = StandIn(cameras=(odd,))
    controls.statistics.add(make_record(1, camera=odd))
    sink = open_sink(Config(port=0), controls=controls)
    try:
        assert get(scrape(sink), "edgead_parts_total", camera=odd, verdict="OK") == 1
    finally:
        sink.close()


def test_the_sink_keeps_nothing(metrics: Metrics) -> None:
    metrics.write(make_record(1), None)
    metrics.write_late(make_record(1))
    assert metrics.knows(1) and not metrics.wants_pictures and not metrics.counters()
    metrics.close()
    metrics.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", metrics.port), timeout=5)


def test_it_can_be_opened_again_on_the_same_port(metrics: Metrics, controls: StandIn) -> None:
    scrape(metrics)
    metrics.close()
    again = open_sink(Config(port=metrics.port), controls=controls)
    scrape(again)
    again.close()


def test_a_port_in_use_is_refused(metrics: Metrics, controls: StandIn) -> None:
    with pytest.raises(LineError, match=f"metrics cannot listen on 127.0.0.1:{metrics.port}: .* in use"):
        open_sink(Config(port=metrics.port), controls=controls)


@pytest.mark.parametrize(
    ("given", "message"), [({"port": 70000}, "port is 70000"), ({"host": ""}, "host is")]
)
def test_values_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(LineError, match=message):
        Config(**given)  # type: ignore[arg-type]
