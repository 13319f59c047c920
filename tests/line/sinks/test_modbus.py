"""The Modbus/TCP server, with the client of pymodbus over loopback."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("pymodbus", minversion="3.13", reason="the extra edgead[line] is not installed")

from pymodbus.client import ModbusTcpClient

from edgead.errors import LineError
from edgead.line.sinks.modbus import Config, open_sink
from edgead.line.sinks.plc import PlcSink
from edgead.line.verdicts import Record, Verdict

READY, BUSY, RESULTS, REJECT, HAS_SCORE, REFUSED, OVERFLOW = (1 << place for place in range(7))
Make = Callable[..., Record]
Wait = Callable[..., None]


class Plc:
    """One camera's registers, as a PLC program uses them."""

    def __init__(self, port: int, first: int = 0) -> None:
        self.client = ModbusTcpClient("127.0.0.1", port=port)
        assert self.client.connect()
        self.first = first

    def write(self, address: int, *values: int) -> None:
        answer = self.client.write_registers(self.first + address, list(values))
        assert not answer.isError(), answer

    def read(self) -> dict[str, Any]:
        answer = self.client.read_input_registers(self.first + 10, count=11)
        assert not answer.isError(), answer
        names = ("status", "verdict", "part_id", "tag", "score", "recipe", "errors", "heartbeat")
        return dict(
            zip(names, struct.unpack(">HHIIfHHH", struct.pack(">11H", *answer.registers)), strict=True)
        )

    def close(self) -> None:
        self.client.close()


@pytest.fixture
def sink(controls: Any, free_port: int) -> Iterator[PlcSink]:
    opened = open_sink(
        Config(port=free_port, heartbeat_s=0.02, plc_timeout_s=0.5, queue=3), controls=controls
    )
    yield opened
    opened.close()
    opened.close()


@pytest.fixture
def plc(sink: PlcSink, free_port: int) -> Iterator[Plc]:
    opened = Plc(free_port)
    yield opened
    opened.close()


def test_a_plc_that_lost_its_power_is_noticed(
    plc: Plc, free_port: int, keeps_alive: Callable[[int], bool], wait_for: Wait
) -> None:
    assert plc.read()
    wait_for(lambda: keeps_alive(free_port))  # while data is under way it is another timer


def test_twenty_parts(sink: PlcSink, plc: Plc, controls: Any, make_record: Make, wait_for: Wait) -> None:
    verdicts = list(Verdict)
    for part_id in range(1, 21):
        wait_for(lambda: plc.read()["status"] == READY)
        tag = 0xABCD_0000 + part_id
        plc.write(2, tag >> 16, tag & 0xFFFF)
        plc.write(0, 1)
        assert plc.read()["status"] == BUSY, "the answer to the trigger shows already"
        assert controls.triggers[-1] == ("top", tag, part_id)
        plc.write(0, 0)
        verdict = verdicts[part_id % 5]
        score = part_id / 64 if verdict in (Verdict.OK, Verdict.NG) else None
        sink.write(
            make_record(part_id, verdict=verdict, reject=verdict != Verdict.OK, score=score, tag=tag),
            None,
        )
        wait_for(lambda: plc.read()["status"] & RESULTS)
        shown = plc.read()
        assert shown["status"] == RESULTS | (REJECT if verdict != Verdict.OK else 0) | (
            HAS_SCORE if score is not None else 0
        )
        assert shown["verdict"] == verdicts.index(verdict) + 1
        assert (shown["part_id"], shown["tag"], shown["score"]) == (part_id, tag, score or 0.0)
        plc.write(0, 2)
        assert plc.read()["status"] == 0 and plc.read()["verdict"] == 0
        plc.write(0, 0)
    counters = sink.counters()
    assert counters["triggers"] == counters["results_acknowledged"] == 20
    assert counters["triggers_not_ready"] == 0
    assert sink.knows(123456)


def test_one_request_can_hold_recipe_tag_and_trigger(plc: Plc, controls: Any, wait_for: Wait) -> None:
    plc.write(0, 1, 2, 0, 77, 1)
    assert controls.recipes["top"] == 2 and controls.triggers == [("top", 77, 1)]
    assert plc.read()["recipe"] == 2
    plc.write(1, 9)
    assert controls.recipes["top"] == 2 and plc.read()["recipe"] == 2 and plc.read()["errors"] == 1
    controls.recipes["top"] = 1  # by somebody else
    wait_for(lambda: plc.read()["recipe"] == 1)


def test_a_camera_that_is_not_triggered_by_the_plc_shows_its_results(
    sink: PlcSink, controls: Any, make_record: Make, free_port: int, wait_for: Wait
) -> None:
    side = Plc(free_port, first=100)
    side.write(0, 1)
    assert side.read()["status"] & REFUSED and not controls.triggers
    side.write(0, 0)
    for part_id in range(1, 7):
        sink.write(make_record(part_id, camera="side"), None)
    sink.write_late(make_record(1, camera="side"))
    wait_for(lambda: side.read()["errors"] == 3)  # the refused trigger, two lost results
    seen = []
    while side.read()["status"] & RESULTS:
        assert side.read()["status"] & OVERFLOW
        seen.append(side.read()["part_id"])
        side.write(0, 2)
        side.write(0, 0)
    assert seen == [1, 4, 5, 6] and not side.read()["status"] & OVERFLOW
    side.close()


def test_heartbeats_both_ways(
    sink: PlcSink, plc: Plc, controls: Any, wait_for: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    first = plc.read()["heartbeat"]
    wait_for(lambda: plc.read()["heartbeat"] != first)
    wait_for(lambda: sink.counters()["plc_missing"] == 2)  # both cameras: nobody wrote one
    assert "no heartbeat of the PLC" in caplog.text
    plc.write(4, 1)
    assert sink.counters()["plc_missing"] == 1
    controls.is_ready = False
    wait_for(lambda: not plc.read()["status"] & READY)


def test_a_plc_that_goes_away_finds_its_result_again(
    sink: PlcSink, plc: Plc, make_record: Make, free_port: int, wait_for: Wait
) -> None:
    plc.write(0, 1)
    wait_for(lambda: sink.counters()["clients"] == 1)
    plc.close()
    wait_for(lambda: sink.counters()["clients"] == 0)
    sink.write(make_record(1, tag=5), None)
    again = Plc(free_port)
    wait_for(lambda: again.read()["status"] & RESULTS)
    assert again.read()["part_id"] == 1 and again.read()["tag"] == 5
    again.write(0, 2)
    again.write(0, 0)
    assert again.read()["status"] == READY
    again.close()


@pytest.mark.parametrize(
    ("address", "values"),
    [
        (5, [1]),
        (9, [1]),
        (4, [1, 1]),
        (10, [1]),
        (20, [1]),
        (21, [1]),
        (99, [1]),
        (200, [1]),
        (65535, [1]),
    ],
)
def test_other_registers_are_refused(plc: Plc, address: int, values: list[int]) -> None:
    assert plc.client.write_registers(address, values).exception_code == 2
    assert plc.read()["status"] == READY


def test_other_functions_are_refused(plc: Plc) -> None:
    assert plc.client.write_coil(0, True).exception_code == 1
    assert plc.client.read_discrete_inputs(0).exception_code == 1
    assert plc.client.read_input_registers(0, count=11).exception_code == 2
    assert plc.client.write_register(0, 1).exception_code == 0
    assert plc.client.mask_write_register(address=0, and_mask=0xFFFE, or_mask=0).exception_code == 0
    assert plc.client.read_holding_registers(0, count=5).registers == [0] * 5


def test_requests_that_do_not_wait_for_answers_are_all_done(
    sink: PlcSink, controls: Any, free_port: int
) -> None:
    def request(number: int, address: int, value: int) -> bytes:
        return struct.pack(">HHHBBHH", number, 0, 6, 1, 6, address, value)

    requests = [request(2 * index + edge, 0, edge) for index in range(10) for edge in (1, 0)]
    with socket.create_connection(("127.0.0.1", free_port), timeout=20) as client:
        whole = b"".join(requests)
        for piece in (whole[:5], whole[5:31], whole[31:200], whole[200:]):
            client.sendall(piece)
            time.sleep(0.01)  # so that they arrive one by one; it works either way
        received = b""
        while len(received) < len(whole):
            received += client.recv(4096)
    assert received == whole, "each is answered by its echo, in order"
    assert len(controls.triggers) == 10


def test_what_is_no_modbus_ends_the_connection_only(plc: Plc, free_port: int) -> None:
    with socket.create_connection(("127.0.0.1", free_port), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert client.recv(100) == b""
    assert plc.read()["status"] == READY


def test_a_port_in_use_or_an_unknown_host_is_refused_at_start(
    sink: PlcSink, controls: Any, free_port: int
) -> None:
    with pytest.raises(LineError, match=f"port {free_port} of 127.0.0.1 is in use"):
        open_sink(Config(port=free_port), controls=controls)
    with pytest.raises(LineError, match=r"host is '192\.0\.2\.1'"):
        open_sink(Config(port=free_port, host="192.0.2.1"), controls=controls)


def test_the_port_is_free_again_after_close(controls: Any, free_port: int) -> None:
    for _ in range(2):
        sink = open_sink(Config(port=free_port), controls=controls)
        plc = Plc(free_port)
        assert plc.read()["status"] == READY
        sink.close()
        plc.close()
    with pytest.raises(LineError, match="has ended"):
        sink.write(Record(1, "top", Verdict.OK, False, "", "", 0, 0.0), None)


@pytest.mark.parametrize(
    "given", [{"port": 0}, {"port": 65536}, {"queue": 0}, {"heartbeat_s": 0.0}, {"plc_timeout_s": 0.0}]
)
def test_bad_settings_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(LineError, match=next(iter(given))):
        Config(**given)
