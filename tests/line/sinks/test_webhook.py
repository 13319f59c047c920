"""The webhook, against a real HTTP server on loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edgead.errors import LineError
from edgead.line.outlet import Outlet
from edgead.line.sinks.webhook import Config, Webhook, open_sink
from edgead.line.verdicts import Record, Verdict

Make = Callable[..., Record]


class Server(ThreadingHTTPServer):
    """Answers with the next of `statuses`, then with 204."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/parts?line=4"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((f"{self.command} {self.path}", dict(self.headers), body))
        status = self.server.statuses.pop(0) if self.server.statuses else 204
        if status == 0:  # no answer
            self.close_connection = True
            return
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def opened(url: str, **given: Any) -> Webhook:
    return open_sink(Config(url=url, **given), controls=None)  # type: ignore[arg-type]


def test_each_record_is_a_post(
    server: Server, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANT_TOKEN", " abc\n")
    sink = opened(server.url, token_env="PLANT_TOKEN")
    record = make_record(7, source="Prüfling.png")
    sink.write(record, None)
    sink.write_late(make_record(7, verdict=Verdict.LATE))
    sink.close()
    (what, headers, body), (_, late_headers, late_body) = server.requests
    assert what == "POST /parts?line=4"
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Bearer abc"
    assert headers["Idempotency-Key"] == "7" and late_headers["Idempotency-Key"] == "7-late"
    assert Record.from_dict(json.loads(body)) == record
    assert json.loads(late_body)["late"] is True and "late" not in json.loads(body)
    assert sink.knows(123) and sink.counters() == {"rejected": 0}


@pytest.mark.parametrize("status", [500, 503, 408, 429, 302, 0])
def test_what_may_go_well_later_is_an_error(server: Server, make_record: Make, status: int) -> None:
    sink = opened(server.url)
    server.statuses = [status]
    with pytest.raises(LineError, match="/elsewhere" if status == 302 else "127.0.0.1"):
        sink.write(make_record(1), None)
    sink.write(make_record(1), None)
    assert [what for what, _, _ in server.requests] == ["POST /parts?line=4"] * 2
    assert sink.counters() == {"rejected": 0}


@pytest.mark.parametrize("status", [400, 401, 404, 410, 422])
def test_what_the_server_refuses_for_good_is_counted(
    server: Server, make_record: Make, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    sink = opened(server.url)
    server.statuses = [status] * 3
    for part_id in range(4):
        sink.write(make_record(part_id), None)
    assert sink.counters() == {"rejected": 3} and len(server.requests) == 4
    assert caplog.text.count(f"refuses record 0: {status}") == 1 and "record 1" not in caplog.text


def test_behind_an_outlet_all_arrive_in_order(server: Server, make_record: Make) -> None:
    sink = opened(server.url)
    server.statuses = [204, 503, 204, 500, 0, 204]
    way = Outlet(sink, name="webhook", reopen=lambda: sink)
    for part_id in range(5):
        way.put(make_record(part_id), None)
    assert way.close(20) == 0
    keys = [headers["Idempotency-Key"] for _, headers, _ in server.requests]
    assert keys == ["0", "1", "1", "2", "2", "2", "3", "4"]


def test_a_server_that_says_nothing_runs_into_the_timeout(make_record: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sink = opened(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout_s=0.1)
        with pytest.raises(LineError, match="timed out"):
            sink.write(make_record(1), None)


def test_a_server_that_talks_nonsense_is_an_error(make_record: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"220 ready\r\n")

        threading.Thread(target=answer, daemon=True).start()
        sink = opened(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=20)
        with pytest.raises(LineError, match="127.0.0.1"):
            sink.write(make_record(1), None)


def test_no_server_is_an_error_of_the_write_not_of_the_start(free_port: int, make_record: Make) -> None:
    sink = opened(f"http://127.0.0.1:{free_port}/")
    with pytest.raises(LineError, match="refused"):
        sink.write(make_record(1), None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"url": "file:///etc/passwd"}, "url"),
        ({"url": "ftp://host/"}, "url"),
        ({"url": "host/path"}, "url"),
        ({"url": "http://"}, "url"),
        ({"url": "http://host:port/"}, "url"),
        ({"url": "http://host/a b"}, "url"),
        ({"url": "http://host/\r\nX: y"}, "url"),
        ({"url": "http://me:pw@host/"}, "token_env"),
        ({"url": "http://host/", "timeout_s": 0.0}, "timeout_s"),
        ({"url": "http://host/", "ca_file": Path("a")}, "ca_file"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(LineError, match=words) as caught:
        Config(**given)
    assert "pw" not in str(caught.value)


def test_a_token_or_certificate_that_is_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PLANT_TOKEN", raising=False)
    with pytest.raises(LineError, match="PLANT_TOKEN, which is not set"):
        opened("https://host/", token_env="PLANT_TOKEN")
    monkeypatch.setenv("PLANT_TOKEN", "a\nb")
    with pytest.raises(LineError, match="no token"):
        opened("https://host/", token_env="PLANT_TOKEN")
    with pytest.raises(LineError, match="ca_file"):
        opened("https://host/", ca_file=tmp_path / "absent")
