"""Metrics for Prometheus: what the line counts, at http://HOST:PORT/metrics.

The figures are taken from the line at the moment they are asked for. Latencies are in seconds, as is the
custom there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from edgead.errors import LineError
from edgead.line.interfaces import Controls, Picture
from edgead.line.statistics import EDGES_MS, STAGES, Histogram
from edgead.line.verdicts import Record, Verdict

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric

SILENCE_S = 10.0  # of a client; then its connection is closed, and the thread ends that waits for it

_EVERY = 4  # of the fine buckets: 5 per decade are enough here
_EDGES_S = tuple(f"{edge_ms / 1000:.6g}" for edge_ms in EDGES_MS[::_EVERY])
_QUANTILES = ("0.05", "0.5", "0.95")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serves the counters of the line to Prometheus.

    Attributes:
        host: Address to listen on; "0.0.0.0" is all of this machine's. Whoever reaches it can read.
        port: Port to listen on; 0 takes a free one.
    """

    host: str = "127.0.0.1"
    port: int = 9108

    def __post_init__(self) -> None:
        if not self.host:
            raise LineError('host is empty, expected an address such as "127.0.0.1"')
        if not 0 <= self.port <= 65535:
            raise LineError(f"port is {self.port}, expected 0 to 65535")


def open_sink(config: Config, *, controls: Controls) -> Metrics:
    """Starts the server.

    Raises:
        LineError: prometheus-client is not installed, or the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise LineError(
            'metrics need the package prometheus-client: pip install "edgead[line]"'
        ) from error
    registry = CollectorRegistry()
    registry.register(_Collector(controls))
    try:
        server, _ = start_http_server(config.port, config.host, registry)
    except OSError as error:
        raise LineError(
            f"metrics cannot listen on {config.host}:{config.port}: {error.strerror}; choose another"
            " port, or end the program that holds it"
        ) from error

    class Handler(server.RequestHandlerClass):  # type: ignore[name-defined]
        timeout = SILENCE_S

        def handle(self) -> None:
            with suppress(TimeoutError):
                super().handle()

    server.RequestHandlerClass = Handler
    return Metrics(server)


class Metrics:
    """The server; records need not be written to it, the line's statistics have them.

    Attributes:
        port: It listens on this one.
        wants_pictures: No.
    """

    wants_pictures = False

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self._is_closed = False
        self.port = server.server_port

    def write(self, record: Record, picture: Picture | None) -> None:
        """Does nothing."""

    def write_late(self, record: Record) -> None:
        """Does nothing."""

    def knows(self, part_id: int) -> bool:
        """It keeps nothing."""
        return True

    def counters(self) -> Mapping[str, int]:
        """None."""
        return {}

    def close(self) -> None:
        """Ends the server."""
        if not self._is_closed:
            self._is_closed = True
            self._server.shutdown()
            self._server.server_close()


class _Collector:
    """Makes the metrics at the moment they are asked for."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls

    def collect(self) -> Iterator[Metric]:
        state = self._controls.state()
        yield from _of_line(state)
        yield from self._of_cameras(state["cameras"])
        yield from self._of_parts()
        yield from self._of_scores()

    def _of_cameras(self, cameras: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        for key, name, text, factor in (
            ("open_parts", "edgead_open_parts", "Parts without a verdict.", 1),
            ("queue", "edgead_queue_depth", "Images that wait for the model.", 1),
            ("deadline_ms", "edgead_deadline_seconds", "From the trigger.", 1e-3),
            ("threshold", "edgead_threshold", "Of the current recipe.", 1),
            ("recipe", "edgead_recipe", "Index of the current recipe.", 1),
        ):
            family = GaugeMetricFamily(name, text, labels=["camera"])
            for camera, values in cameras.items():
                if values.get(key) is not None:  # a bundle that is being loaded has no threshold
                    family.add_metric([camera], values[key] * factor)
            yield family

    def _of_parts(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        parts = CounterMetricFamily("edgead_parts", "Verdicts.", labels=["camera", "verdict"])
        counts = self._controls.statistics.counts()
        for camera in self._controls.cameras:
            for verdict in Verdict:
                count = counts.get(camera, {}).get(verdict.value, 0)
                parts.add_metric([camera, verdict.value], count)
        yield parts
        latencies = self._controls.statistics.latencies()
        text = "Of parts with OK, NG or LATE: wait (trigger to inference), infer, total."
        family = HistogramMetricFamily("edgead_latency_seconds", text, labels=["camera", "stage"])
        for camera in self._controls.cameras:
            stages = latencies.get(camera, {})
            for stage in STAGES:
                histogram = stages.get(stage, Histogram())
                family.add_metric([camera, stage], _buckets(histogram), histogram.sum_ms / 1000)
        yield family

    def _of_scores(self) -> Iterator[Metric]:
        from prometheus_client.core import GaugeMetricFamily

        scores = GaugeMetricFamily(
            "edgead_score", "Quantiles of the last 100 scores.", labels=["camera", "verdict", "quantile"]
        )
        evidence = GaugeMetricFamily(
            "edgead_score_drift",
            "CUSUM of OK scores in standard deviations; above edgead_score_drift_limit it is an alarm.",
            labels=["camera", "direction"],
        )
        limit = GaugeMetricFamily(
            "edgead_score_drift_limit", "See edgead_score_drift.", labels=["camera"]
        )
        alarm = GaugeMetricFamily(
            "edgead_score_drift_alarm", "1: the OK scores drift.", labels=["camera", "direction"]
        )
        for camera in self._controls.cameras:
            drift = self._controls.statistics.drift(camera, with_windows=False)
            if drift is None:
                continue
            for name, values in drift["now"].items():
                for quantile, value in zip(_QUANTILES, values, strict=True):
                    scores.add_metric([camera, name.upper(), quantile], value)
            limit.add_metric([camera], drift["limit"])
            direction = drift["alarm"]["direction"] if drift["alarm"] else ""
            for name, value in zip(("up", "down"), drift["sums"], strict=True):
                evidence.add_metric([camera, name], value)
                alarm.add_metric([camera, name], float(direction == name))
        yield from (scores, evidence, limit, alarm)


def _of_line(state: Mapping[str, Any]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily, UnknownMetricFamily

    yield GaugeMetricFamily("edgead_ready", "1: triggers are inspected.", value=float(state["ready"]))
    yield GaugeMetricFamily("edgead_uptime_seconds", "Since the start.", value=state["uptime_s"])
    # Unknown, because what sources and sinks report rises in most cases, but not in all.
    sinks = UnknownMetricFamily("edgead_sink", "What a sink reports.", labels=["sink", "counter"])
    sources = UnknownMetricFamily(
        "edgead_source", "What a source reports.", labels=["camera", "counter"]
    )
    for name, values in state["sinks"].items():
        _add_numbers(sinks, name, values)
    for name, camera in state["cameras"].items():
        _add_numbers(sources, name, camera.get("source", {}))
    yield from (sinks, sources)


def _add_numbers(family: Any, name: str, values: Mapping[str, Any]) -> None:
    for counter, value in values.items():
        if isinstance(value, (int, float)):
            family.add_metric([name, counter], float(value))


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Cumulative counts by upper end."""
    up_to = list(accumulate(histogram.counts))
    return [*zip(_EDGES_S, up_to[::_EVERY], strict=True), ("+Inf", up_to[-1])]
