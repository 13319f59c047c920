"""An OPC UA server for the handshake with a PLC (see `edgead.line.handshake`).

Nodes of the namespace urn:edgead:line, in the folder edgead of the objects, a folder for each camera.
Their identifiers are strings such as "top.In.Trigger" for a camera named top.

    In.Trigger     Boolean     written by the PLC: a rising edge opens a part
    In.Ack         Boolean     the result was read
    In.Tag         UInt32      the PLC's number of the part
    In.Recipe      UInt16      index of the recipe
    In.Heartbeat   UInt16      heartbeat of the PLC

    Out.Ready      Boolean     written by the line
    Out.Busy       Boolean
    Out.ResultsReady Boolean
    Out.Refused    Boolean     the trigger that is still high opened no part
    Out.Overflow   Boolean     results were lost
    Out.Reject     Boolean
    Out.HasScore   Boolean
    Out.Verdict    UInt16      1 OK, 2 NG, 3 LATE, 4 ERROR, 5 NOT_INSPECTED; 0 while no result is ready
    Out.Score      Float
    Out.PartId     UInt32      lower 32 bits
    Out.Tag        UInt32      tag of the part
    Out.Recipe     UInt16      index of the recipe in force
    Out.Errors     UInt32      refused triggers and recipes, and lost results
    Out.Heartbeat  UInt16      heartbeat of the line, modulo 65536

A result is whole when Out.ResultsReady rises: it is the last that is written. Nodes that one request
writes count together. Values must have the type of their node. The server has no encryption and no
passwords.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgead.errors import LineError
from edgead.line.handshake import Inputs, Outputs
from edgead.line.interfaces import Controls
from edgead.line.sinks.plc import PlcConfig, PlcSink, Write, keep_alive

if TYPE_CHECKING:
    from asyncua import ua
    from asyncua.common.callback import ServerItemCallback

logger = logging.getLogger(__name__)

NAMESPACE = "urn:edgead:line"
INPUTS = {  # field of Inputs -> name and type of the node
    "trigger": ("Trigger", "Boolean"),
    "ack": ("Ack", "Boolean"),
    "tag": ("Tag", "UInt32"),
    "recipe": ("Recipe", "UInt16"),
    "heartbeat": ("Heartbeat", "UInt16"),
}
OUTPUTS = {  # field of Outputs -> name and type of the node
    "ready": ("Ready", "Boolean"),
    "busy": ("Busy", "Boolean"),
    "results_ready": ("ResultsReady", "Boolean"),
    "refused": ("Refused", "Boolean"),
    "overflow": ("Overflow", "Boolean"),
    "reject": ("Reject", "Boolean"),
    "has_score": ("HasScore", "Boolean"),
    "verdict": ("Verdict", "UInt16"),
    "score": ("Score", "Float"),
    "part_id": ("PartId", "UInt32"),
    "tag": ("Tag", "UInt32"),
    "recipe": ("Recipe", "UInt16"),
    "errors": ("Errors", "UInt32"),
    "heartbeat": ("Heartbeat", "UInt16"),
}
_SIGNALS = ("ready", "results_ready")  # first to fall, last to rise
_MASKS = {"UInt16": 0xFFFF, "UInt32": 0xFFFFFFFF}


@dataclass(frozen=True, kw_only=True)
class Config(PlcConfig):
    """OPC UA server: trigger, result and acknowledgement for a PLC."""

    port: int = 4840


def open_sink(config: Config, *, controls: Controls) -> PlcSink:
    """Starts the server, which takes a second or more.

    Raises:
        LineError: The port is in use or not allowed, or asyncua is not installed.
    """
    try:
        import asyncua  # noqa: F401
    except ImportError as error:
        raise LineError('OPC UA needs the library asyncua: pip install "edgead[line]"') from error
    return PlcSink(config, OpcUaServer(config, controls.cameras), controls)


class OpcUaServer:
    """Implements `edgead.line.sinks.plc.PlcServer`."""

    def __init__(self, config: Config, cameras: tuple[str, ...]) -> None:
        self._config, self._cameras = config, cameras
        self._inputs: dict[str, Inputs] = {}
        self._shown: dict[str, Outputs] = {}
        self._places: dict[ua.NodeId, tuple[str, str]] = {}  # node -> camera, field of Inputs
        self._nodes: dict[tuple[str, str], ua.NodeId] = {}  # camera, field of Outputs -> node

    @property
    def clients(self) -> int:
        """See `PlcServer`."""
        return len(self._server.bserver.clients) if self._server.bserver else 0

    async def start(self, write: Write, inputs: Mapping[str, Inputs]) -> None:
        """See `PlcServer`."""
        from asyncua import Server, ua
        from asyncua.common.callback import CallbackType

        self._write, self._inputs = write, dict(inputs)
        self._server = server = Server()
        await server.init()
        server.set_endpoint(f"opc.tcp://{self._config.host}:{self._config.port}/edgead")
        server.set_server_name("edgead")
        server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        server.set_identity_tokens([ua.AnonymousIdentityToken])
        index = await server.register_namespace(NAMESPACE)
        root = await server.nodes.objects.add_folder(_node_id("edgead", index), f"{index}:edgead")
        for camera in self._cameras:
            folder = await root.add_folder(_node_id(camera, index), f"{index}:{camera}")
            place = await folder.add_folder(_node_id(f"{camera}.In", index), f"{index}:In")
            for field, (name, kind) in INPUTS.items():
                node_id = _node_id(f"{camera}.In.{name}", index)
                variant = _variant(kind, getattr(self._inputs[camera], field))
                node = await place.add_variable(node_id, f"{index}:{name}", variant)
                await node.set_writable()
                self._places[node_id] = (camera, field)
            place = await folder.add_folder(_node_id(f"{camera}.Out", index), f"{index}:Out")
            for field, (name, kind) in OUTPUTS.items():
                node_id = _node_id(f"{camera}.Out.{name}", index)
                await place.add_variable(node_id, f"{index}:{name}", _variant(kind, 0))
                self._nodes[camera, field] = node_id
        server.subscribe_server_callback(CallbackType.PostWrite, self._take)
        try:
            await server.start()
        except OSError as error:
            raise LineError(f"port {self._config.port}: {error.strerror or error}") from error
        assert server.bserver is not None
        keep_alive(server.bserver._server)

    async def show(self, camera: str, outputs: Outputs) -> None:
        """See `PlcServer`."""
        before = self._shown.get(camera)
        changed = [
            field
            for field in OUTPUTS
            if before is None or getattr(outputs, field) != getattr(before, field)
        ]
        falling = [field for field in changed if field in _SIGNALS and not getattr(outputs, field)]
        rising = [field for field in changed if field in _SIGNALS and getattr(outputs, field)]
        values = [field for field in changed if field not in _SIGNALS]
        await self._set(camera, outputs, (*falling, *values, *rising))
        self._shown[camera] = outputs

    async def stop(self) -> None:
        """See `PlcServer`."""
        await self._server.stop()

    async def _set(self, camera: str, outputs: Outputs, fields: Iterable[str]) -> None:
        from asyncua import ua

        for field in fields:
            variant = _variant(OUTPUTS[field][1], getattr(outputs, field))
            value = ua.DataValue(variant)
            await self._server.write_attribute_value(self._nodes[camera, field], value)

    async def _take(self, event: ServerItemCallback, _: Any) -> None:
        """After each request to write: what it has changed counts together."""
        if not event.is_external:
            return
        changes: dict[str, dict[str, Any]] = {}
        for written, status in zip(
            event.request_params.NodesToWrite, event.response_params, strict=True
        ):
            place = self._places.get(written.NodeId)
            if place is not None and status.is_good() and written.Value.Value is not None:
                camera, field = place
                value = written.Value.Value.Value
                if type(value) is type(getattr(self._inputs[camera], field)):
                    changes.setdefault(camera, {})[field] = value
                else:  # asyncua lets arrays of the right type pass
                    logger.error(
                        "camera %s: In.%s is no single value: %.60r is not taken",
                        camera,
                        INPUTS[field][0],
                        value,
                    )
        for camera, values in changes.items():
            self._inputs[camera] = inputs = replace(self._inputs[camera], **values)
            try:
                await self._write(camera, inputs)
            except Exception:
                logger.exception("camera %s: what the PLC wrote", camera)


def _node_id(name: str, namespace: int) -> ua.NodeId:
    from asyncua import ua

    return ua.NodeId(ua.String(name), ua.Int16(namespace))


def _variant(kind: str, value: float) -> ua.Variant:
    from asyncua import ua

    if kind == "Boolean":
        value = bool(value)
    elif kind in _MASKS:
        value = int(value) & _MASKS[kind]
    return ua.Variant(value, ua.VariantType[kind])
