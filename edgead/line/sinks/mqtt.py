"""MQTT: records are stored in a queue on the disk first and published from there.

Each record is one message of JSON with QoS 1 on a topic of its camera; what came too late is on the
topic .../late below it. On the topic of the line's status there is a retained "online" or "offline"; the
broker says "offline" by itself (last will) when the line goes away without a word.

While the broker is away records stay in the queue, also over restarts; they leave it in their order,
each when the broker has acknowledged it. QoS 1 means at least once: what was under way when a connection
broke or the process was killed is sent again (with the DUP flag in the first case). At most `window`
records are under way; with the default of 1 a receiver sees at most the last record twice. Each message
carries its part_id, by which receivers can tell.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgead.errors import LineError
from edgead.line.interfaces import Controls, Picture
from edgead.line.sinks.disk_queue import DiskQueue
from edgead.line.verdicts import Record

if TYPE_CHECKING:
    from paho.mqtt.client import Client
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

logger = logging.getLogger(__name__)

VERSIONS = ("5", "3.1.1")
RECONNECT_S = (1, 30)
_TURN_S = 1.0  # the sender also looks after the disk this often
_REFUSED_PAUSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Publishes each record to an MQTT broker, through a queue on the disk.

    Attributes:
        host: Of the broker.
        queue_file: The queue; its folder is made if need be.
        port: Of the broker; usually 8883 with TLS.
        topic: With {line} and {camera} in it. The status is where {camera} is replaced by "status".
        version: Of the protocol: "5" or "3.1.1".
        username: If the broker asks for one.
        password_env: Environment variable that holds the password.
        password_file: File whose first line is the password.
        password: The password in clear; better give one of the two above.
        tls: Whether to encrypt, and to verify the broker's certificate.
        ca_file: Certificate of the authority that signed the broker's, if the system does not know it.
        cert_file: Own certificate, if the broker asks for one; `key_file` is its key.
        client_id: As the broker knows this line; one of its own for each start if empty.
        keepalive_s: How often the connection is checked.
        queue_max: Records that wait at most; after that the oldest is lost, and counted.
        window: Records that are under way at most. More are quicker over slow connections.
    """

    host: str
    queue_file: Path
    port: int = 1883
    topic: str = "edgead/{line}/{camera}"
    version: str = "5"
    username: str = ""
    password_env: str = ""
    password_file: Path | None = None
    password: str = ""
    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    client_id: str = ""
    keepalive_s: int = 10
    queue_max: int = 100_000
    window: int = 1

    def __post_init__(self) -> None:
        if not self.host or "://" in self.host:
            raise LineError(f"host is {self.host!r}, expected a name or an address without mqtt://")
        try:
            self.host.encode("idna")
        except UnicodeError as error:
            raise LineError(f"host is {self.host!r}, which is no name of a computer: {error}") from error
        if not 1 <= self.port <= 65535:
            raise LineError(f"port is {self.port}, expected 1 to 65535")
        if self.version not in VERSIONS:
            raise LineError(f'version is {self.version!r}, expected "5" or "3.1.1"')
        try:
            topic = self.topic.format(line="l", camera="c")
        except (KeyError, IndexError, ValueError):
            topic = ""
        if not topic or set(topic) & set("+#\0") or topic.startswith("$"):
            raise LineError(
                f"topic is {self.topic!r}, expected text like edgead/{{line}}/{{camera}} without + and #"
            )
        if bool(self.password_env) + bool(self.password_file) + bool(self.password) > 1:
            raise LineError("give one of password_env, password_file and password")
        if (self.cert_file is None) != (self.key_file is None):
            raise LineError("cert_file and key_file belong together: give both or none")
        if not self.tls and (self.ca_file or self.cert_file):
            raise LineError("ca_file and cert_file are for TLS: write tls = true")
        if not 1 <= self.keepalive_s <= 65535:
            raise LineError(f"keepalive_s is {self.keepalive_s}, expected 1 to 65535")
        if self.queue_max < 1:
            raise LineError(f"queue_max is {self.queue_max}, expected at least 1")
        if not 1 <= self.window <= 100:
            raise LineError(f"window is {self.window}, expected 1 to 100")


def open_sink(config: Config, *, controls: Controls) -> MqttSink:
    """Opens the queue and begins to connect. A broker that is away is no error: records wait.

    Raises:
        LineError: The queue cannot be opened, the password or a certificate cannot be read, or paho-mqtt
            is not installed.
    """
    try:
        import paho.mqtt.client  # noqa: F401
    except ImportError as error:
        raise LineError('MQTT needs the library paho-mqtt: pip install "edgead[line]"') from error
    if "status" in controls.cameras and "{camera}" in config.topic:
        raise LineError(
            "topic: the camera named status would share its topic with the status of the line"
        )
    return MqttSink(config, line=str(controls.state()["name"]))


class MqttSink:
    """Implements `edgead.line.interfaces.Sink`.

    Threads: the outlet's stores records; paho's talks to the broker; the sender hands records to paho
    and takes them off the queue. paho's calls back under locks of its own, so it only leaves notes.
    """

    wants_pictures = False

    def __init__(self, config: Config, *, line: str) -> None:
        self._config, self._line = config, line
        self._queue = DiskQueue(config.queue_file, config.queue_max)
        self._wake = threading.Event()
        self._acknowledged: deque[tuple[int, ReasonCode]] = deque()  # message id, answer
        self._under_way: dict[int, int] = {}  # message id -> seq
        self._connected = self._ends = False
        self._troubles: set[str] = set()  # that were logged since the last record was acknowledged
        self._published = self._refused = self._connections = 0
        self._resume_s = 0.0
        try:
            self._client = self._make_client()
        except Exception:
            self._queue.close()
            raise
        self._sender = threading.Thread(
            target=self._send, name=f"edgead mqtt {config.host}", daemon=True
        )
        self._client.connect_async(config.host, config.port, config.keepalive_s)
        self._client.loop_start()
        self._sender.start()

    def write(self, record: Record, picture: Picture | None) -> None:
        """Stores the record."""
        self._queue.add(record, is_late=False)
        self._wake.set()

    def write_late(self, record: Record) -> None:
        """Stores a result that came too late."""
        self._queue.add(record, is_late=True)
        self._wake.set()

    def knows(self, part_id: int) -> bool:
        """Whether the record is in the queue, or among the last 100,000 that left it."""
        return self._queue.knows(part_id)

    def counters(self) -> dict[str, int]:
        """connected: 1 or 0. queued: waiting on the disk. queue_dropped: lost since too many waited.

        published: acknowledged by the broker. refused: times that it did not take a record.
        """
        return {
            "connected": int(self._connected),
            "connections": self._connections,
            "queued": self._queue.count,
            "queue_dropped": self._queue.dropped,
            "published": self._published,
            "refused": self._refused,
        }

    def close(self) -> None:
        """Sends what it can for half a second, says "offline", and closes the queue."""
        if self._ends:
            return
        end_s = time.monotonic() + 0.5
        while self._connected and self._queue.count and time.monotonic() < end_s:
            time.sleep(0.01)
        self._ends = True
        self._wake.set()
        self._sender.join(0.3)
        if self._connected:
            self._client.publish(self._status_topic, "offline", qos=1, retain=True)
        self._client.disconnect()
        # loop_stop waits for the thread, which may be in the middle of an attempt to connect
        stopper = threading.Thread(target=self._client.loop_stop, daemon=True)
        stopper.start()
        stopper.join(0.3)
        self._queue.close()

    # --- the broker

    @property
    def _status_topic(self) -> str:
        name = self._topic("status", is_late=False)
        return name if "{camera}" in self._config.topic else f"{name}/status"

    def _topic(self, camera: str, *, is_late: bool) -> str:
        name = self._config.topic.format(line=_level(self._line), camera=_level(camera))
        return f"{name}/late" if is_late else name

    def _make_client(self) -> Client:
        from paho.mqtt.client import Client, MQTTv5, MQTTv311
        from paho.mqtt.enums import CallbackAPIVersion

        config = self._config

        def _file(key: str) -> str | None:
            path: Path | None = getattr(config, key)
            if path is not None and not path.is_file():
                raise LineError(f"{key}: there is no file {path}")
            return None if path is None else str(path)

        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=config.client_id or f"edgead-{secrets.token_hex(6)}",
            protocol=MQTTv5 if config.version == "5" else MQTTv311,
        )
        if config.username:
            client.username_pw_set(config.username, _password(config))
        if config.tls:
            ca, cert, key = map(_file, ("ca_file", "cert_file", "key_file"))
            try:
                client.tls_set(ca, cert, key)
            except (OSError, ValueError) as error:  # an SSLError is an OSError
                raise LineError(f"ca_file, cert_file, key_file: cannot be used: {error}") from error
        client.will_set(self._status_topic, "offline", qos=1, retain=True)
        client.max_inflight_messages_set(config.window + 1)  # and the status
        client.reconnect_delay_set(*RECONNECT_S)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        return client

    def _on_connect(self, client: Client, _: Any, __: Any, reason: ReasonCode, ___: Any) -> None:
        if reason.is_failure:
            self._say_away(f"refuses the connection: {reason}")
            return
        self._connected = True
        self._connections += 1
        client.publish(self._status_topic, "online", qos=1, retain=True)
        self._wake.set()

    def _on_connect_fail(self, *_: Any) -> None:
        self._say_away(f"cannot be reached ({sys.exc_info()[1]})")  # paho is in its except clause

    def _on_disconnect(self, _: Client, __: Any, ___: Any, reason: ReasonCode, ____: Any) -> None:
        self._connected = False
        if not self._ends:
            self._say_away(f"has gone away: {reason}")

    def _on_publish(self, _: Client, __: Any, number: int, reason: ReasonCode, ___: Properties) -> None:
        self._acknowledged.append((number, reason))
        self._wake.set()

    def _say_away(self, what: str) -> None:
        if what not in self._troubles:
            logger.warning("%s %s; records wait in %s", self._broker, what, self._config.queue_file)
        self._troubles.add(what)

    @property
    def _broker(self) -> str:
        return f"MQTT broker {self._config.host}:{self._config.port}"

    # --- the sender

    def _send(self) -> None:
        next_turn_s, has_failed = time.monotonic() + _TURN_S, False
        while not self._ends:
            self._wake.wait(_TURN_S)
            self._wake.clear()
            try:
                self._take_acknowledged()
                if not self._ends:
                    self._hand_over()
                if time.monotonic() >= next_turn_s:
                    next_turn_s = time.monotonic() + _TURN_S
                    self._queue.sync()
                has_failed = False
            except Exception as error:
                if not has_failed:
                    logger.error(
                        "%s: %s", self._broker, error, exc_info=not isinstance(error, LineError)
                    )
                has_failed = True
                time.sleep(0.1)

    def _take_acknowledged(self) -> None:
        while self._acknowledged:
            number, reason = self._acknowledged[0]
            seq = self._under_way.get(number)
            if seq is not None and reason.is_failure:
                self._refused += 1
                self._resume_s = time.monotonic() + _REFUSED_PAUSE_S
                self._say_away(f"does not take them: {reason}")
            elif seq is not None:
                self._queue.remove(seq)
                self._published += 1
                if self._troubles:
                    logger.info("%s takes records again", self._broker)
                    self._troubles.clear()
            self._under_way.pop(number, None)
            self._acknowledged.popleft()

    def _hand_over(self) -> None:
        room = self._config.window - len(self._under_way)
        if not self._connected or room <= 0 or time.monotonic() < self._resume_s:
            return
        for seq, camera, is_late, payload in self._queue.next(room, set(self._under_way.values())):
            topic = self._topic(camera, is_late=is_late)
            self._under_way[self._client.publish(topic, payload, qos=1).mid] = seq


def _password(config: Config) -> str | None:
    if config.password_env:
        password = os.environ.get(config.password_env)
        if password is None:
            raise LineError(f"password_env names the variable {config.password_env}, which is not set")
        return password
    if config.password_file is not None:
        try:
            return config.password_file.read_text("utf-8").partition("\n")[0]
        except (OSError, UnicodeDecodeError) as error:
            raise LineError(f"password_file {config.password_file}: {error}") from error
    return config.password or None


def _level(name: str) -> str:
    """One level of a topic."""
    return "".join("_" if character in "+#/\0" else character for character in name)
