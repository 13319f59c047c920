"""MQTT against a real broker (mosquitto) on loopback."""

from __future__ import annotations

import datetime
import getpass
import ipaddress
import json
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("paho.mqtt.client", reason="the extra edgead[line] is not installed")

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import PacketTypes, Properties

from edgead.errors import LineError
from edgead.line.sinks import mqtt
from edgead.line.sinks.mqtt import Config, MqttSink, open_sink
from edgead.line.verdicts import Record, Verdict

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="the broker mosquitto is not installed")

Make = Callable[..., Record]
Wait = Callable[..., None]


class Broker:
    """A mosquitto that keeps its sessions over `kill -9`."""

    def __init__(self, folder: Path, port: int, *settings: str) -> None:
        self.port, self.folder = port, folder / "broker"
        self.folder.mkdir()
        lines = [
            f"listener {port} 127.0.0.1",
            "persistence true",
            f"persistence_location {self.folder}/",
            "autosave_interval 0",
            "max_queued_messages 0",
            f"user {getpass.getuser()}",
            *(settings or ("allow_anonymous true",)),
        ]
        (self.folder / "conf").write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert MOSQUITTO is not None
        with (self.folder / "log").open("ab") as log:
            command = [MOSQUITTO, "-v", "-c", str(self.folder / "conf")]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)
        end_s = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() < end_s and self.process.poll() is None, (
                    "mosquitto did not start"
                )
                time.sleep(0.02)
            else:
                break

    def save(self, wait_for: Wait) -> None:
        """Writes its sessions to the disk."""
        assert self.process is not None
        self.process.send_signal(signal.SIGUSR1)
        wait_for((self.folder / "mosquitto.db").is_file)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Subscriber:
    """Keeps its session, so that the broker keeps messages for it while it is away."""

    def __init__(self, port: int, topic: str) -> None:
        self.messages: list[tuple[str, bytes, bool]] = []  # topic, payload, retained
        self.is_subscribed = threading.Event()
        self.client = Client(
            CallbackAPIVersion.VERSION2, client_id="receiver", protocol=5, manual_ack=False
        )
        self.client.reconnect_delay_set(1, 1)
        self.client.on_message = self._keep
        self.client.on_subscribe = lambda *_: self.is_subscribed.set()
        self.client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self.client.connect("127.0.0.1", port, clean_start=False, properties=properties)
        self.client.loop_start()
        assert self.is_subscribed.wait(20)

    def _keep(self, _: Any, __: Any, message: MQTTMessage) -> None:
        self.messages.append((message.topic, message.payload, message.retain))

    @property
    def parts(self) -> list[int]:
        return [
            json.loads(payload)["part_id"] for _, payload, _ in self.messages if payload.startswith(b"{")
        ]

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def make_broker(tmp_path: Path, free_port: int) -> Iterator[Callable[..., Broker]]:
    brokers = []

    def make(*settings: str) -> Broker:
        brokers.append(Broker(tmp_path, free_port, *settings))
        return brokers[-1]

    yield make
    for broker in brokers:
        broker.kill()


@pytest.fixture
def make_sink(tmp_path: Path, free_port: int, controls: Any) -> Iterator[Callable[..., MqttSink]]:
    sinks = []

    def make(**given: Any) -> MqttSink:
        fields = {"host": "127.0.0.1", "port": free_port, "queue_file": tmp_path / "queue", **given}
        sinks.append(open_sink(Config(**fields), controls=controls))
        return sinks[-1]

    yield make
    for sink in sinks:
        sink.close()


@pytest.fixture(autouse=True)
def quick_reconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "RECONNECT_S", (1, 1))  # a second is paho's least


@needs_broker
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_records_late_results_and_status(
    make_broker: Callable[..., Broker],
    make_sink: Callable[..., MqttSink],
    make_record: Make,
    free_port: int,
    wait_for: Wait,
    version: str,
) -> None:
    make_broker().start()
    receiver = Subscriber(free_port, "edgead/#")
    sink = make_sink(version=version)
    for part_id in range(1, 51):
        sink.write(make_record(part_id, camera="top" if part_id % 2 else "side"), None)
    sink.write_late(make_record(7, verdict=Verdict.LATE, score=0.9))
    wait_for(lambda: len(receiver.parts) == 51)
    wait_for(lambda: sink.counters()["queued"] == 0)
    assert receiver.parts == [*range(1, 51), 7]
    records = [message for message in receiver.messages if message[1].startswith(b"{")]
    assert [topic for topic, _, _ in records[:3]] == [
        f"edgead/press 4/{c}" for c in ("top", "side", "top")
    ]
    assert records[-1][0] == "edgead/press 4/top/late" and json.loads(records[-1][1])["late"] is True
    assert Record.from_dict(json.loads(records[0][1])) == make_record(1)
    counters = sink.counters()
    assert (counters["published"], counters["connected"], counters["queue_dropped"]) == (51, 1, 0)
    assert sink.knows(50) and not sink.knows(51)
    sink.close()
    wait_for(lambda: receiver.messages[-1][1] == b"offline")
    status = [(topic, payload) for topic, payload, _ in receiver.messages if b"line" in payload[:8]]
    assert status == [("edgead/press 4/status", b"online"), ("edgead/press 4/status", b"offline")]
    receiver.close()


@needs_broker
def test_a_broker_that_is_killed_and_restarted_gets_everything_once(
    make_broker: Callable[..., Broker],
    make_sink: Callable[..., MqttSink],
    make_record: Make,
    free_port: int,
    wait_for: Wait,
) -> None:
    broker = make_broker()
    broker.start()
    receiver = Subscriber(free_port, "edgead/#")
    broker.save(wait_for)
    sink = make_sink()
    for part_id in range(500):
        sink.write(make_record(part_id), None)
        if part_id == 100:  # while records are under way
            wait_for(lambda: len(receiver.parts) > 20)
            broker.kill()
        if part_id == 400:
            broker.start()
        time.sleep(0.001)
    wait_for(lambda: len(set(receiver.parts)) == 500)
    wait_for(lambda: sink.counters()["queued"] == 0)
    counts = Counter(receiver.parts)
    assert sorted(counts) == list(range(500)), "none is lost"
    # The one record that was under way when the broker was killed may come again: the broker may have
    # passed it on and not have said so any more, and QoS 1 then has it sent again.
    twice = [part_id for part_id, count in counts.items() if count > 1]
    assert len(twice) <= 1 and sum(counts.values()) <= 501
    first_seen = list(dict.fromkeys(receiver.parts))
    assert first_seen == sorted(first_seen), "in order"
    assert sink.counters()["connections"] == 2 and sink.counters()["published"] == 500
    receiver.close()


@needs_broker
def test_a_killed_process_leaves_its_records_to_the_next(
    make_broker: Callable[..., Broker],
    make_sink: Callable[..., MqttSink],
    tmp_path: Path,
    free_port: int,
    wait_for: Wait,
) -> None:
    make_broker().start()
    receiver = Subscriber(free_port, "edgead/#")
    script = textwrap.dedent("""
        import os, signal, sys, time
        from pathlib import Path
        from edgead.line.sinks.mqtt import Config, MqttSink
        from edgead.line.verdicts import Record, Verdict

        config = Config(host="127.0.0.1", port=int(sys.argv[1]), queue_file=Path(sys.argv[2]))
        sink = MqttSink(config, line="press 4")
        for part_id in range(200):
            sink.write(Record(part_id, "top", Verdict.OK, False, "r", "s", 1, 1.0), None)
        while sink.counters()["published"] < 50:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    command = [sys.executable, "-c", script, str(free_port), str(tmp_path / "queue")]
    assert subprocess.run(command, timeout=20).returncode == -signal.SIGKILL
    wait_for(
        lambda: ("edgead/press 4/status", b"offline", False) in receiver.messages, "for the last will"
    )
    assert 50 <= len(receiver.parts) < 200
    sink = make_sink()
    assert all(sink.knows(part_id) for part_id in range(200))
    wait_for(lambda: sink.counters()["queued"] == 0)
    wait_for(lambda: len(set(receiver.parts)) == 200)
    assert list(dict.fromkeys(receiver.parts)) == list(range(200))
    assert len(receiver.parts) <= 201, "at most the one that was under way comes twice"
    receiver.close()


@needs_broker
def test_no_broker_at_start_is_no_error_and_a_warning(
    make_broker: Callable[..., Broker],
    make_sink: Callable[..., MqttSink],
    make_record: Make,
    free_port: int,
    wait_for: Wait,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    sink = make_sink(queue_max=5)
    for part_id in range(8):
        sink.write(make_record(part_id), None)
    wait_for(lambda: "cannot be reached" in caplog.text)
    assert "refused" in caplog.text and "records wait in" in caplog.text
    assert sink.counters()["queued"] == 5 and sink.counters()["queue_dropped"] == 3
    sink.close()  # and another process goes on
    make_broker().start()
    receiver = Subscriber(free_port, "edgead/#")
    sink = make_sink()
    wait_for(lambda: receiver.parts == [3, 4, 5, 6, 7])
    receiver.close()


@needs_broker
def test_the_password_comes_from_the_environment_or_a_file(
    make_broker: Callable[..., Broker],
    make_sink: Callable[..., MqttSink],
    make_record: Make,
    tmp_path: Path,
    wait_for: Wait,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    passwords = tmp_path / "passwords"
    mosquitto_passwd = shutil.which("mosquitto_passwd")
    if mosquitto_passwd is None:
        pytest.skip("mosquitto_passwd is not installed")
    subprocess.run([mosquitto_passwd, "-c", "-b", str(passwords), "line", "s3cret"], check=True)
    make_broker("allow_anonymous false", f"password_file {passwords}").start()
    sink = make_sink(username="line", password="wrong")
    sink.write(make_record(1), None)
    wait_for(lambda: "refuses the connection" in caplog.text)
    assert sink.counters()["queued"] == 1 and "wrong" not in caplog.text
    sink.close()
    monkeypatch.setenv("BROKER_PASSWORD", "s3cret")
    sink = make_sink(username="line", password_env="BROKER_PASSWORD")
    wait_for(lambda: sink.counters()["published"] == 1)
    sink.close()
    (tmp_path / "secret").write_text("s3cret\n")
    sink = make_sink(username="line", password_file=tmp_path / "secret")
    sink.write(make_record(2), None)
    wait_for(lambda: sink.counters()["published"] == 1)
    sink.close()
    with pytest.raises(LineError, match="password_env names the variable NO_SUCH"):
        make_sink(username="line", password_env="NO_SUCH")
    with pytest.raises(LineError, match="password_file .*absent"):
        make_sink(username="line", password_file=tmp_path / "absent")


@needs_broker
def test_tls_verifies_the_broker(
    make_broker: Callable[..., Broker],
    make_sink: Callable[..., MqttSink],
    make_record: Make,
    tmp_path: Path,
    wait_for: Wait,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("cryptography", reason="makes the certificate")
    certificate, key = _make_certificate(tmp_path)
    make_broker("allow_anonymous true", f"certfile {certificate}", f"keyfile {key}").start()
    sink = make_sink(tls=True)
    sink.write(make_record(1), None)
    wait_for(lambda: "certificate verify failed" in caplog.text)
    assert sink.counters()["connected"] == 0
    sink.close()
    sink = make_sink(tls=True, ca_file=certificate)
    wait_for(lambda: sink.counters()["published"] == 1)
    sink.close()
    with pytest.raises(LineError, match="ca_file: there is no file"):
        make_sink(tls=True, ca_file=tmp_path / "absent")
    with pytest.raises(LineError, match="cannot be used"):
        make_sink(tls=True, ca_file=key)


@needs_broker
def test_a_broker_that_does_not_take_a_record_keeps_it_waiting(
    make_broker: Callable[..., Broker],
    make_sink: Callable[..., MqttSink],
    make_record: Make,
    tmp_path: Path,
    wait_for: Wait,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(mqtt, "_REFUSED_PAUSE_S", 0.1)
    rights = tmp_path / "rights"
    rights.write_text("topic readwrite edgead/+/status\n")
    broker = make_broker("allow_anonymous true", f"acl_file {rights}")
    broker.start()
    sink = make_sink()
    sink.write(make_record(1), None)
    wait_for(lambda: sink.counters()["refused"] >= 2)
    assert (
        sink.counters()["queued"] == 1 and caplog.text.count("does not take them: Not authorized") == 1
    )
    rights.write_text("topic readwrite edgead/#\n")
    assert broker.process is not None
    broker.process.send_signal(signal.SIGHUP)
    wait_for(lambda: sink.counters()["published"] == 1)
    wait_for(lambda: "takes records again" in caplog.text)


def test_close_ends_within_a_second_while_it_connects(make_sink: Callable[..., MqttSink]) -> None:
    """To an address that never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        sink = make_sink(port=silent.getsockname()[1])
        time.sleep(0.05)
        start_s = time.monotonic()
        sink.close()
        sink.close()
        assert time.monotonic() - start_s < 10
        assert not sink._sender.is_alive()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host": "mqtt://broker"}, "host"),
        ({"host": "a" * 70}, "host"),
        ({"port": 0}, "port"),
        ({"version": "3"}, "version"),
        ({"topic": "edgead/{plant}"}, "topic"),
        ({"topic": "edgead/#"}, "topic"),
        ({"topic": ""}, "topic"),
        ({"password": "a", "password_env": "B"}, "one of password_env, password_file and password"),
        ({"tls": True, "cert_file": Path("a")}, "cert_file and key_file"),
        ({"ca_file": Path("a")}, "tls = true"),
        ({"queue_max": 0}, "queue_max"),
        ({"window": 0}, "window"),
        ({"keepalive_s": 0}, "keepalive_s"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(LineError, match=words):
        Config(**{"host": "broker", "queue_file": Path("q"), **given})


def test_a_camera_named_status_is_refused(tmp_path: Path, controls: Any) -> None:
    controls.cameras = ("status",)
    with pytest.raises(LineError, match="camera named status"):
        open_sink(Config(host="broker", queue_file=tmp_path / "q"), controls=controls)


def _make_certificate(folder: Path) -> tuple[Path, Path]:
    """One that signs itself, for 127.0.0.1, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "cert.pem", folder / "key.pem"
