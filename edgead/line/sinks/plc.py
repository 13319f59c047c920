"""What the sinks for PLCs share: a server in an event loop of its own, and a handshake per camera."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Protocol

from edgead.errors import LineError
from edgead.line.handshake import Handshake, Inputs, Outputs
from edgead.line.interfaces import Controls, Picture
from edgead.line.verdicts import Record

logger = logging.getLogger(__name__)

Write = Callable[[str, Inputs], Awaitable[None]]

START_S = 60.0  # an OPC UA server takes seconds on a small board
STOP_S = 0.8


@dataclass(frozen=True, kw_only=True)
class PlcConfig:
    """Settings that every server for a PLC has.

    Attributes:
        host: Address to listen at. There are no passwords: whoever reaches it can trigger the line.
        port: To listen at.
        queue: Results of a camera that wait at most to be acknowledged.
        heartbeat_s: Period of the heartbeat of the line.
        plc_timeout_s: After how long a heartbeat of the PLC that stands still is logged and counted.
    """

    host: str = "127.0.0.1"
    port: int
    queue: int = 1000
    heartbeat_s: float = 0.5
    plc_timeout_s: float | None = None

    def __post_init__(self) -> None:
        """Raises LineError for a value that cannot be."""
        if not 1 <= self.port <= 65535:
            raise LineError(f"port is {self.port}, expected 1 to 65535")
        if self.queue < 1:
            raise LineError(f"queue is {self.queue}, expected at least 1")
        if not 0.01 <= self.heartbeat_s <= 60:
            raise LineError(f"heartbeat_s is {self.heartbeat_s:g}, expected 0.01 to 60")
        if self.plc_timeout_s is not None and not self.plc_timeout_s > 0:
            raise LineError(f"plc_timeout_s is {self.plc_timeout_s:g}, expected more than 0")


class PlcServer(Protocol):
    """Puts inputs and outputs on a bus. All calls but `clients` come from one event loop."""

    @property
    def clients(self) -> int:
        """How many are connected."""
        ...

    async def start(self, write: Write, inputs: Mapping[str, Inputs]) -> None:
        """Listens. Calls `write` with all inputs of a camera whenever a client has written some.

        Args:
            inputs: What they are at first, by camera.

        Raises:
            LineError: It cannot.
        """
        ...

    async def show(self, camera: str, outputs: Outputs) -> None:
        """Lets clients read `outputs` from now on; never called twice at a time."""
        ...

    async def stop(self) -> None:
        """Stops listening."""
        ...


class PlcSink:
    """Implements `edgead.line.interfaces.Sink`: shows each record to the PLC, one after the other."""

    wants_pictures = False

    def __init__(self, config: PlcConfig, server: PlcServer, controls: Controls) -> None:
        """Starts the server.

        Raises:
            LineError: The port is in use, or not allowed.
        """
        _check_port(config.host, config.port)
        if not config.host.startswith("127.") and config.host not in ("::1", "localhost"):
            logger.warning("%s:%d: whoever reaches it can trigger the line", config.host, config.port)
        self._config, self._server, self._controls = config, server, controls
        self._handshakes = {camera: self._handshake(camera) for camera in controls.cameras}
        self._loop = asyncio.new_event_loop()
        self._ends = asyncio.Event()
        self._showing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"edgead port {config.port}", daemon=True)
        self._thread.start()
        try:
            self._started.result(START_S)
        except FutureTimeoutError:
            self.close()
            raise LineError(f"port {config.port}: the server did not start in {START_S:g} s") from None

    def write(self, record: Record, picture: Picture | None) -> None:
        """Puts the record into the queue of results that the PLC reads."""
        handshake = self._handshakes[record.camera]

        def add() -> None:
            handshake.add(record)
            task = self._loop.create_task(self._show(record.camera))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        try:
            self._loop.call_soon_threadsafe(add)
        except RuntimeError as error:
            raise LineError(f"port {self._config.port}: the server has ended") from error

    def write_late(self, record: Record) -> None:
        """The PLC got its LATE in time; there is nothing to add."""

    def knows(self, part_id: int) -> bool:
        """Always: what a PLC has read before a crash cannot be told."""
        return True

    def counters(self) -> dict[str, int]:
        """clients: connected now. plc_missing: cameras whose PLC heartbeat stands still now.

        The others add up over the cameras: see `Handshake.counts`.
        """
        counts: Counter[str] = Counter()
        for handshake in self._handshakes.values():
            counts.update(handshake.counts)
        missing = sum(handshake.is_plc_missing for handshake in self._handshakes.values())
        return {"clients": self._server.clients, "plc_missing": missing, **counts}

    def close(self) -> None:
        """Stops the server."""
        try:
            self._loop.call_soon_threadsafe(self._ends.set)
        except RuntimeError:
            return  # closed before
        self._thread.join(1.0)

    def _handshake(self, camera: str) -> Handshake:
        controls, config = self._controls, self._config
        return Handshake(
            camera,
            trigger=lambda tag: controls.trigger(camera, tag),
            select_recipe=lambda index: controls.select_recipe(camera, index),
            recipe=controls.state()["cameras"][camera]["recipe"],
            queue=config.queue,
            plc_timeout_s=config.plc_timeout_s,
        )

    # --- in the event loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception:
            logger.exception("port %d: the server has ended", self._config.port)
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.close()

    async def _serve(self) -> None:
        try:
            inputs = {camera: handshake.inputs for camera, handshake in self._handshakes.items()}
            await self._server.start(self._write, inputs)
            await self._beat()
        except Exception as error:
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        while not self._ends.is_set():
            try:
                await asyncio.wait_for(self._ends.wait(), self._config.heartbeat_s)
            except asyncio.TimeoutError:
                try:
                    await self._beat()
                except Exception:  # the heartbeats stand still, which is what the PLC looks at
                    logger.exception("port %d: heartbeat", self._config.port)
        try:
            await asyncio.wait_for(self._server.stop(), STOP_S)
        except asyncio.TimeoutError:
            pass  # it has closed its port first; the rest goes with the loop

    async def _beat(self) -> None:
        state = self._controls.state()
        for camera, handshake in self._handshakes.items():
            try:
                handshake.beat(
                    now_s=time.monotonic(),
                    is_line_ready=bool(state["ready"]),
                    recipe=state["cameras"][camera]["recipe"],
                )
                await self._show(camera)
            except Exception:  # that of the next camera goes on
                logger.exception("port %d: heartbeat of camera %s", self._config.port, camera)

    async def _write(self, camera: str, inputs: Inputs) -> None:
        self._handshakes[camera].set_inputs(inputs, now_s=time.monotonic())
        await self._show(camera)

    async def _show(self, camera: str) -> None:
        async with self._showing:  # what is newest when its turn comes, never something older
            await self._server.show(camera, self._handshakes[camera].outputs)


def keep_alive(server: Any) -> None:
    """Lets connections end whose other end is gone: a PLC that lost its power says nothing.

    Args:
        server: An `asyncio.Server`; what it accepts inherits the setting.
    """
    for listening in server.sockets:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":  # elsewhere after two hours
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10)):
                listening.setsockopt(socket.IPPROTO_TCP, option, value)


def _check_port(host: str, port: int) -> None:
    """The servers' own errors do not say which port, or why."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LineError(
                f"port {port} of {host} is in use: end what uses it, or give another"
            ) from error
        if error.errno == errno.EACCES:
            raise LineError(
                f"port {port}: below 1024 needs root or CAP_NET_BIND_SERVICE; allow it, or give another"
            ) from error
        raise LineError(
            f"host is {host!r}, which is no address of this machine: {error.strerror or error}"
        ) from error
