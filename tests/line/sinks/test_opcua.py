"""The OPC UA server, with the client of asyncua over loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("asyncua", reason="the extra edgead[line] is not installed")

from asyncua import ua
from asyncua.sync import Client, ThreadLoop

from edgead.errors import LineError
from edgead.line.sinks.opcua import INPUTS, NAMESPACE, OUTPUTS, Config, open_sink
from edgead.line.sinks.plc import PlcSink
from edgead.line.verdicts import Record, Verdict

Make = Callable[..., Record]
Wait = Callable[..., None]


class Plc:
    """One camera's nodes, as a PLC program uses them."""

    def __init__(self, port: int, camera: str = "top") -> None:
        loop = ThreadLoop()
        loop.daemon = True  # a test that fails must not keep pytest from ending
        loop.start()
        self.client = Client(f"opc.tcp://127.0.0.1:{port}/edgead", timeout=20, tloop=loop)
        self.client.connect()
        self.namespace, self.camera = self.client.get_namespace_index(NAMESPACE), camera

    def node(self, name: str) -> Any:
        return self.client.get_node(ua.NodeId(f"{self.camera}.{name}", self.namespace))

    def write(self, **values: Any) -> None:
        nodes = [self.node(f"In.{INPUTS[field][0]}") for field in values]
        kinds = [ua.VariantType[INPUTS[field][1]] for field in values]
        variants = [ua.Variant(value, kind) for value, kind in zip(values.values(), kinds, strict=True)]
        self.client.write_values(nodes, variants)

    def read(self) -> dict[str, Any]:
        nodes = [self.node(f"Out.{name}") for name, _ in OUTPUTS.values()]
        return dict(zip(OUTPUTS, self.client.read_values(nodes), strict=True))

    def close(self) -> None:
        self.client.disconnect()
        self.client.tloop.stop()

    def vanish(self) -> None:
        """Ends the connection without a word."""

        async def disconnect() -> None:
            self.client.aio_obj.disconnect_socket()

        self.client.tloop.post(disconnect())
        self.client.tloop.stop()


@pytest.fixture
def sink(controls: Any, free_port: int) -> Iterator[PlcSink]:
    opened = open_sink(
        Config(port=free_port, heartbeat_s=0.05, plc_timeout_s=0.5, queue=3), controls=controls
    )
    yield opened
    opened.close()


@pytest.fixture
def plc(sink: PlcSink, free_port: int) -> Iterator[Plc]:
    opened = Plc(free_port)
    yield opened
    opened.close()


def test_twenty_parts_with_recipes_and_heartbeats(
    sink: PlcSink, plc: Plc, controls: Any, make_record: Make, wait_for: Wait
) -> None:
    verdicts = list(Verdict)
    first = plc.read()["heartbeat"]
    for part_id in range(1, 21):
        wait_for(lambda: plc.read()["ready"])
        tag, recipe = 0xABCD_0000 + part_id, part_id % 3
        plc.write(trigger=True, tag=tag, recipe=recipe, heartbeat=part_id)
        outputs = plc.read()
        assert (outputs["ready"], outputs["busy"], outputs["results_ready"]) == (False, True, False)
        assert controls.triggers[-1] == ("top", tag, part_id)
        assert controls.recipes["top"] == outputs["recipe"] == recipe
        plc.write(trigger=False)
        verdict = verdicts[part_id % 5]
        score = part_id / 64 if verdict in (Verdict.OK, Verdict.NG) else None
        record = make_record(
            part_id, verdict=verdict, reject=verdict != Verdict.OK, score=score, tag=tag
        )
        sink.write(record, None)
        wait_for(lambda: plc.read()["results_ready"])
        outputs = plc.read()
        assert outputs["verdict"] == verdicts.index(verdict) + 1
        assert (outputs["part_id"], outputs["tag"]) == (part_id, tag)
        assert (outputs["has_score"], outputs["score"]) == (score is not None, score or 0.0)
        assert outputs["reject"] == (verdict != Verdict.OK) and not outputs["busy"]
        plc.write(ack=True)
        outputs = plc.read()
        assert (outputs["results_ready"], outputs["verdict"], outputs["ready"]) == (False, 0, False)
        plc.write(ack=False)
    wait_for(lambda: plc.read()["heartbeat"] != first)
    plc.write(recipe=9)
    assert plc.read()["recipe"] == 2 and plc.read()["errors"] == 1
    counters = sink.counters()
    assert counters["triggers"] == counters["results_acknowledged"] == 20
    assert counters["clients"] == 1
    wait_for(lambda: sink.counters()["plc_missing"] == 2)


def test_a_subscriber_sees_whole_results_and_a_plc_that_goes_away_finds_them_again(
    sink: PlcSink, plc: Plc, make_record: Make, free_port: int, wait_for: Wait
) -> None:
    risen = threading.Event()

    class Handler:
        def datachange_notification(self, node: Any, value: bool, data: Any) -> None:
            if value:
                risen.set()

    subscription = plc.client.create_subscription(10, Handler())
    subscription.subscribe_data_change(plc.node("Out.ResultsReady"))
    plc.write(trigger=True, tag=5)
    sink.write(make_record(1, tag=5), None)
    assert risen.wait(20)
    assert plc.read()["part_id"] == 1 and plc.read()["verdict"] == 1
    second = Plc(free_port)
    wait_for(lambda: sink.counters()["clients"] == 2)
    second.vanish()
    wait_for(lambda: sink.counters()["clients"] == 1)
    third = Plc(free_port)
    assert third.read()["results_ready"] and third.read()["tag"] == 5
    third.write(trigger=False, ack=True)
    third.write(ack=False)
    assert third.read()["ready"]
    third.close()


def test_a_plc_that_lost_its_power_is_noticed(
    plc: Plc, free_port: int, keeps_alive: Callable[[int], bool], wait_for: Wait
) -> None:
    wait_for(lambda: keeps_alive(free_port))  # while data is under way it is another timer


def test_arrays_are_not_taken(
    sink: PlcSink, plc: Plc, controls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name, values in (
        ("Tag", ua.Variant([1, 2], ua.VariantType.UInt32)),
        ("Recipe", ua.Variant([0, 1], ua.VariantType.UInt16)),
        ("Trigger", ua.Variant([True], ua.VariantType.Boolean)),
    ):
        plc.node(f"In.{name}").write_value(ua.DataValue(values))
        assert f"In.{name} is no single value" in caplog.records[-1].message
    assert not controls.triggers
    plc.write(trigger=True, tag=3)
    assert controls.triggers == [("top", 3, 1)] and plc.read()["busy"]


def test_a_camera_that_fails_does_not_stop_the_heartbeat_of_the_next(
    sink: PlcSink, plc: Plc, controls: Any, free_port: int, wait_for: Wait
) -> None:
    state = controls.state
    controls.state = lambda: {**state(), "cameras": {"side": {"recipe": 1}}}  # nothing of the first
    side = Plc(free_port, "side")
    wait_for(lambda: side.read()["recipe"] == 1)
    stands_still, goes_on = plc.read()["heartbeat"], side.read()["heartbeat"]
    wait_for(lambda: side.read()["heartbeat"] >= goes_on + 3)
    assert plc.read()["heartbeat"] <= stands_still + 1
    side.close()


def test_other_cameras_bad_types_and_outputs(
    sink: PlcSink, plc: Plc, controls: Any, make_record: Make, free_port: int, wait_for: Wait
) -> None:
    with pytest.raises(ua.UaStatusCodeError):
        plc.node("Out.Ready").write_value(True)
    with pytest.raises(ua.UaStatusCodeError):
        plc.node("In.Nothing").write_value(True)
    with pytest.raises(ua.UaStatusCodeError):
        plc.node("In.Trigger").write_value(1, ua.VariantType.Int64)
    assert not controls.triggers
    side = Plc(free_port, "side")
    side.write(trigger=True)
    assert side.read()["refused"] and side.read()["errors"] == 1
    side.write(trigger=False)
    for part_id in range(1, 6):
        sink.write(make_record(part_id, camera="side"), None)
    wait_for(lambda: side.read()["overflow"])
    seen = []
    while side.read()["results_ready"]:
        seen.append(side.read()["part_id"])
        side.write(ack=True)
        side.write(ack=False)
    assert seen == [1, 3, 4, 5]
    side.close()
    with pytest.raises(LineError, match=f"port {free_port} of 127.0.0.1 is in use"):
        open_sink(Config(port=free_port), controls=controls)
