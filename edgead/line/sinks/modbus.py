"""A Modbus/TCP server for the handshake with a PLC (see `edgead.line.handshake`).

Register map. The first camera of the recipe file begins at address 0, which many PLCs call 40001, the
second at 100, and so on. Any unit id is answered. Numbers of 32 bits have their high word first.

    address    meaning                            written by the PLC
    0          bit 0 trigger, bit 1 ack
    1          index of the recipe
    2, 3       tag, 32 bits
    4          heartbeat of the PLC

    address    meaning                            written by the line
    10         bit 0 ready, 1 busy, 2 results ready, 3 reject, 4 score is valid, 5 trigger refused,
               6 results were lost
    11         verdict: 1 OK, 2 NG, 3 LATE, 4 ERROR, 5 NOT_INSPECTED; 0 while no result is ready
    12, 13     part id, lower 32 bits
    14, 15     tag of the part
    16, 17     score, float32
    18         index of the recipe in force
    19         refused triggers and recipes, and lost results, modulo 65536
    20         heartbeat of the line, modulo 65536

The PLC reads with function 3 or 4 and writes with 6, 16, 22 or 23. Recipe and tag are written before the
trigger, or together with it in one request. A request for any other address gets the exception code 2,
another function the code 1. Modbus has no passwords.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgead.errors import LineError
from edgead.line.handshake import Inputs, Outputs
from edgead.line.interfaces import Controls
from edgead.line.sinks.plc import PlcConfig, PlcSink, Write, keep_alive

if TYPE_CHECKING:
    from pymodbus.constants import ExcCodes
    from pymodbus.server import ModbusTcpServer

CAMERA_STEP = 100
INPUT_COUNT = 5
FIRST_OUTPUT = 10
OUTPUT_COUNT = 11
FUNCTIONS = (3, 4, 6, 16, 22, 23)
_HEADER_BYTES = 6  # transaction, protocol = 0, number of bytes that follow
_LONGEST_REQUEST_BYTES = 254


@dataclass(frozen=True, kw_only=True)
class Config(PlcConfig):
    """Modbus/TCP server: trigger, result and acknowledgement for a PLC.

    Attributes:
        port: PLCs expect 502, which needs root or CAP_NET_BIND_SERVICE.
    """

    port: int = 502


def open_sink(config: Config, *, controls: Controls) -> PlcSink:
    """Starts the server.

    Raises:
        LineError: The port is in use or not allowed, or pymodbus is not installed.
    """
    try:
        from pymodbus.simulator import DataType  # noqa: F401
    except ImportError as error:
        raise LineError('Modbus needs pymodbus 3.13 or later: pip install "edgead[line]"') from error
    return PlcSink(config, ModbusServer(config, controls.cameras), controls)


class ModbusServer:
    """Implements `edgead.line.sinks.plc.PlcServer`."""

    def __init__(self, config: Config, cameras: tuple[str, ...]) -> None:
        self.clients = 0
        self._config, self._cameras = config, cameras
        self._shown: dict[str, list[int]] = {}  # output registers by camera

    async def start(self, write: Write, inputs: Mapping[str, Inputs]) -> None:
        """See `PlcServer`."""
        from pymodbus.constants import ExcCodes
        from pymodbus.simulator import DataType, SimData, SimDevice

        self._write, self._unknown_function = write, ExcCodes.ILLEGAL_FUNCTION
        blocks = []
        for index, camera in enumerate(self._cameras):
            first = index * CAMERA_STEP
            registers = [0, inputs[camera].recipe, 0, 0, 0]
            blocks.append(SimData(first, values=registers, datatype=DataType.REGISTERS))
            blocks.append(
                SimData(
                    first + FIRST_OUTPUT,
                    values=[0] * OUTPUT_COUNT,
                    datatype=DataType.REGISTERS,
                    readonly=True,
                )
            )
        self._server = _server_class()(
            SimDevice(id=0, simdata=blocks, action=self._act),  # 0: any unit id
            address=(self._config.host, self._config.port),
            trace_connect=self._count_clients,
        )
        try:
            await self._server.serve_forever(background=True)
        except RuntimeError as error:
            raise LineError(f"port {self._config.port}: {error}") from error
        keep_alive(self._server.transport)

    async def show(self, camera: str, outputs: Outputs) -> None:
        """See `PlcServer`."""
        self._shown[camera] = _to_registers(outputs)

    async def stop(self) -> None:
        """See `PlcServer`."""
        await self._server.shutdown()

    def _count_clients(self, is_connected: bool) -> None:
        self.clients += 1 if is_connected else -1

    async def _act(
        self,
        function: int,
        start: int,
        address: int,
        count: int,
        registers: list[int],
        values: list[int] | list[bool] | None,
    ) -> ExcCodes | None:
        """pymodbus calls it for each request, after it has refused unknown and read-only addresses.

        Args:
            registers: All of the server, from address `start` = 0 on.
            values: To be written; None for a request to read.
        """
        if function not in FUNCTIONS:
            return self._unknown_function
        first = address // CAMERA_STEP * CAMERA_STEP
        if values is not None:
            registers[address : address + count] = [int(value) for value in values]
            inputs = _from_registers(registers[first : first + INPUT_COUNT])
            await self._write(self._cameras[first // CAMERA_STEP], inputs)
        outputs = self._shown[self._cameras[first // CAMERA_STEP]]
        registers[first + FIRST_OUTPUT : first + FIRST_OUTPUT + OUTPUT_COUNT] = outputs
        return None


def _server_class() -> type[ModbusTcpServer]:
    """pymodbus loses requests that a client sends before it has the answer to the one before.

    A lost request could be a trigger. So each connection gets its requests one after the other.
    """
    from pymodbus.server import ModbusTcpServer
    from pymodbus.server.requesthandler import ServerRequestHandler

    class Connection(ServerRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._received, self._is_busy = bytearray(), False

        def data_received(self, data: bytes) -> None:
            self._received += data
            self._take_next()

        def server_send(self, pdu: Any, addr: Any) -> None:
            super().server_send(pdu, addr)
            self._is_busy = False
            self._take_next()

        def _take_next(self) -> None:
            while not self._is_busy and len(self._received) >= _HEADER_BYTES:
                _, protocol, count = struct.unpack_from(">HHH", self._received)
                if protocol or not 2 <= count <= _LONGEST_REQUEST_BYTES:
                    self.close()
                    return
                end = _HEADER_BYTES + count
                if len(self._received) < end:
                    return
                request = bytes(self._received[:end])
                del self._received[:end]
                self._is_busy = True
                super().data_received(request)
                self._is_busy = self._is_busy and self.last_pdu is not None

    class Server(ModbusTcpServer):
        def callback_new_connection(self) -> ServerRequestHandler:
            return Connection(self, self.trace_packet, self.trace_pdu, self.trace_connect)

    return Server


def _from_registers(registers: list[int]) -> Inputs:
    control, recipe, tag_high, tag_low, heartbeat = registers
    return Inputs(
        trigger=bool(control & 1),
        ack=bool(control & 2),
        tag=tag_high << 16 | tag_low,
        recipe=recipe,
        heartbeat=heartbeat,
    )


def _to_registers(outputs: Outputs) -> list[int]:
    bits = (
        outputs.ready,
        outputs.busy,
        outputs.results_ready,
        outputs.reject,
        outputs.has_score,
        outputs.refused,
        outputs.overflow,
    )
    packed = struct.pack(
        ">HHIIfHHH",
        sum(bit << place for place, bit in enumerate(bits)),
        outputs.verdict,
        outputs.part_id,
        outputs.tag,
        outputs.score,
        outputs.recipe & 0xFFFF,
        outputs.errors & 0xFFFF,
        outputs.heartbeat & 0xFFFF,
    )
    return list(struct.unpack(f">{OUTPUT_COUNT}H", packed))
