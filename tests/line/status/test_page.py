"""The status page over real HTTP: who may read, who may change, and what hostile clients get."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgead.errors import LineError
from edgead.line.interfaces import Picture
from edgead.line.sinks.status import Config, StatusPage, open_sink
from edgead.line.status import pictures, server
from edgead.line.verdicts import Verdict
from tests.line.conftest_status import StandIn, history, make_record

PASSWORD, TOKEN = "a good password", "0123456789abcdef"
CHANGE = {"X-EdgeAD": "1", "Content-Type": "application/json"}
LIMIT_S = 20.0


class Reply:
    def __init__(self, reply: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = reply.status, reply.headers, reply.read()

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


def call(page: StatusPage, method: str, path: str, data: object = None, **headers: str) -> Reply:
    """`headers` may name any header with underscores for dashes; Host is the right one by default."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=LIMIT_S)
    try:
        body = None if data is None else json.dumps(data)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        return Reply(connection.getresponse())
    finally:
        connection.close()


def change(page: StatusPage, path: str, **data: object) -> Reply:
    data = {"camera": "top", "password": PASSWORD} | data
    return call(page, "POST", path, data, **{k.replace("-", "_"): v for k, v in CHANGE.items()})


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def picture(value: int = 100, *, side_px: int = 200, spot: float | None = None) -> Picture:
    image = np.full((side_px, side_px, 3), value, np.uint8)
    anomaly_map = None
    if spot is not None:
        anomaly_map = np.full((20, 20), 0.1, np.float32)
        anomaly_map[5:10, 5:10] = spot
    return Picture(image, anomaly_map)


def decoded(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


@pytest.fixture
def controls() -> StandIn:
    return StandIn(baseline=100)


@pytest.fixture
def make_page(controls: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StatusPage]]:
    monkeypatch.delenv("EDGEAD_STATUS_TOKEN", raising=False)
    monkeypatch.setenv("EDGEAD_STATUS_PASSWORD", PASSWORD)
    opened = []

    def make(**given: object) -> StatusPage:
        opened.append(open_sink(Config(**{"port": 0} | given), controls=controls))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for page in opened:
        page.close()


@pytest.fixture
def page(make_page: Callable[..., StatusPage]) -> StatusPage:
    return make_page()


# What it shows


def test_the_page_and_its_files(page: StatusPage) -> None:
    for path, start in (
        ("/", "<!doctype html>"),
        ("/page.js", '"use strict"'),
        ("/charts.js", '"use strict"'),
    ):
        reply = call(page, "GET", path)
        assert reply.status == 200 and reply.text.startswith(start)
        assert "http://" not in reply.text.replace("http://www.w3.org/2000/svg", ""), "works offline"
        assert "https://" not in reply.text
        policy = reply.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["X-Frame-Options"] == "DENY"
    html = call(page, "GET", "/").text
    assert "<style" not in html and "style=" not in html and "onclick" not in html, (
        "the policy forbids them"
    )


def test_state(page: StatusPage, controls: StandIn) -> None:
    history(controls, 400)
    page.write(make_record(401, verdict=Verdict.NG, reject=True, score=0.9), picture(spot=0.9))
    state = call(page, "GET", "/api/state").json()
    assert (state["name"], state["ready"], state["can_change"]) == ("press 4", True, True)
    top = state["cameras"][0]
    assert (top["name"], top["threshold"], top["deadline_ms"], top["recipes"]) == (
        "top",
        0.5,
        40,
        ["bottle", "jar"],
    )
    assert sum(top["counts"].values()) == 200
    assert top["latency_ms"]["count"] > 150 and top["latency_ms"]["max"] == 40
    assert len(top["last"]) == 40 and top["last"][-1]["part_id"] == 400
    assert top["drift"]["baseline"]["scores"] == 100
    assert [ng["part_id"] for ng in state["ng"]] == [401]
    assert state["sinks"]["results"]["written"] == 120
    charts = call(page, "GET", "/api/charts?camera=side").json()
    assert sum(charts["histogram"]["counts"]) > 150
    assert sum(row[1] for row in charts["drift"]["windows"]["ok"]) > 100
    assert call(page, "GET", "/api/charts?camera=other").status == 404


def test_senseless_scores_are_no_json(page: StatusPage, controls: StandIn) -> None:
    controls.statistics.add(make_record(1, score=float("nan")))
    assert call(page, "GET", "/api/state").json()["cameras"][0]["last"][0]["score"] is None


def test_live_picture_latest_wins(page: StatusPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LIVE_PERIOD_S", 0.0)
    assert call(page, "GET", "/live.jpg?camera=top").status == 204
    for part_id in range(1, 6):
        page.write(make_record(part_id, score=0.2), picture(40 * part_id))
    reply = call(page, "GET", "/live.jpg?camera=top&after=0")
    assert reply.headers["X-Number"] == "5" and json.loads(reply.headers["X-Part"])["part_id"] == 5
    assert decoded(reply.body).mean() == pytest.approx(200, abs=3)
    assert call(page, "GET", "/live.jpg?camera=top&after=5").status == 204, "no newer one"
    assert call(page, "GET", "/live.jpg?camera=side&after=0").status == 204
    page.write(make_record(6), None)
    assert call(page, "GET", "/live.jpg?camera=top&after=5").status == 204


def test_live_picture_with_and_without_heat(page: StatusPage) -> None:
    page.write(make_record(1, verdict=Verdict.NG, score=0.9), picture(100, spot=0.9))
    with_heat = decoded(call(page, "GET", "/live.jpg?camera=top").body).astype(int)
    without = decoded(call(page, "GET", "/live.jpg?camera=top&heat=0").body).astype(int)
    assert np.abs(without - 100).max() < 4
    assert np.abs(with_heat[120:] - 100).max() < 4, "below the threshold the image shows unchanged"
    red, _, blue = with_heat[75, 75]
    assert red > blue + 40


def test_a_picture_is_encoded_once_for_all_and_not_more_often_than_5_times_a_second(
    page: StatusPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "LIVE_PERIOD_S", 3600.0)
    encoded = []
    encode = pictures._encode
    monkeypatch.setattr(pictures, "_encode", lambda *given: encoded.append(1) or encode(*given))
    page.write(make_record(1), picture(50))
    assert not encoded, "nobody looks"
    replies = [call(page, "GET", "/live.jpg?camera=top&after=0") for _ in range(3)]
    page.write(make_record(2), picture(60))
    replies += [call(page, "GET", "/live.jpg?camera=top&after=0")]
    assert [reply.headers["X-Number"] for reply in replies] == ["1"] * 4
    assert call(page, "GET", "/live.jpg?camera=top&after=1").status == 204, "the next one is not due"
    assert len(encoded) == 1


def test_large_pictures_are_shrunk(page: StatusPage) -> None:
    page.write(make_record(1), Picture(np.zeros((500, 3000, 3), np.uint8), None))
    assert decoded(call(page, "GET", "/live.jpg?camera=top").body).shape == (107, 640, 3)


def test_a_broken_heat_map_leaves_the_image(page: StatusPage) -> None:
    page.write(make_record(1), Picture(picture().image, np.full((4, 4), np.nan, np.float32)))
    assert decoded(call(page, "GET", "/live.jpg?camera=top").body).shape == (200, 200, 3)


def test_ng_pictures_are_downloaded_without_loss(page: StatusPage) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    page.write(make_record(7, verdict=Verdict.NG, score=0.9, camera="side"), Picture(image, None))
    reply = call(page, "GET", "/ng/original.png?part=7")
    assert reply.headers["Content-Type"] == "image/png"
    assert reply.headers["Content-Disposition"] == 'attachment; filename="part-7-side-original.png"'
    assert np.array_equal(decoded(reply.body), image)
    assert call(page, "GET", "/ng/heat.jpg?part=7").headers["Content-Type"] == "image/jpeg"
    assert "Content-Disposition" not in call(page, "GET", "/ng/small.jpg?part=7").headers


def test_only_the_last_16_ng_pictures_are_kept(
    page: StatusPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part_id in range(1, 41):
        verdict = Verdict.NG if part_id % 2 else Verdict.OK
        page.write(make_record(part_id, verdict=verdict), picture(side_px=10))
    kept = [ng["part_id"] for ng in call(page, "GET", "/api/state").json()["ng"]]
    assert kept == list(range(39, 8, -2))
    assert call(page, "GET", "/ng/original.png?part=7").status == 404
    monkeypatch.setattr(pictures, "NG_BYTES", 1000)  # each has 300
    page.write(make_record(41, verdict=Verdict.NG), picture(side_px=10))
    assert [ng["part_id"] for ng in call(page, "GET", "/api/state").json()["ng"]] == [41, 39, 37]
    page.write(make_record(43, verdict=Verdict.NG), picture(side_px=100))
    assert [ng["part_id"] for ng in call(page, "GET", "/api/state").json()["ng"]] == [43]


# Changes


def test_a_change_with_the_password(
    page: StatusPage, controls: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reply = change(page, "/api/threshold", value=0.62)
    assert reply.status == 200 and controls.thresholds["top"] == 0.62
    assert change(page, "/api/recipe", index=1).status == 200 and controls.recipes["top"] == 1
    (first, second) = reply.json()["audit"][0], call(page, "GET", "/api/state").json()["audit"][0]
    assert {k: first[k] for k in ("camera", "what", "old", "new", "address")} == {
        "camera": "top", "what": "threshold", "old": 0.5, "new": 0.62, "address": "127.0.0.1"
    }  # fmt: skip
    assert abs(first["time_ms"] / 1000 - time.time()) < 60
    assert (second["what"], second["old"], second["new"]) == ("recipe", 0, 1)
    assert "camera top: threshold from 0.5 to 0.62 by 127.0.0.1" in caplog.text
    assert PASSWORD not in caplog.text


def test_a_new_drift_baseline(page: StatusPage, controls: StandIn) -> None:
    history(controls, 600, shift=0.2)
    assert controls.statistics.drift("top")["alarm"]  # type: ignore[index]
    assert change(page, "/api/baseline").status == 200
    assert controls.statistics.drift("top")["alarm"] is None  # type: ignore[index]


@pytest.mark.parametrize(
    "password", ["wrong", "", None, 1, ["a good password"], PASSWORD + " ", "\ud800"]
)
def test_a_wrong_password_changes_nothing(page: StatusPage, controls: StandIn, password: object) -> None:
    reply = change(page, "/api/threshold", value=0.9, password=password)
    assert (reply.status, reply.text) == (403, "wrong password")
    assert controls.thresholds["top"] == 0.5 and not call(page, "GET", "/api/state").json()["audit"]


def test_guessing_has_to_wait(page: StatusPage, controls: StandIn) -> None:
    assert [change(page, "/api/threshold", value=0.9, password="x").status for _ in range(6)] == [
        403
    ] * 5 + [429]
    reply = change(page, "/api/threshold", value=0.9)
    assert reply.status == 429 and reply.headers["Retry-After"] == "60", "even with the right one"
    assert controls.thresholds["top"] == 0.5


def test_without_a_password_it_is_read_only(
    make_page: Callable[..., StatusPage], controls: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEAD_STATUS_PASSWORD")
    page = make_page()
    assert call(page, "GET", "/api/state").json()["can_change"] is False
    for password in ("", None, "x"):
        reply = change(page, "/api/threshold", value=0.9, password=password)
        assert (reply.status, reply.text) == (403, "this page is read-only: no password is set")
    assert controls.thresholds["top"] == 0.5


@pytest.mark.parametrize(
    ("path", "data", "status", "words"),
    [
        ("/api/threshold", {"value": "0.4"}, 400, "finite number"),
        ("/api/threshold", {"value": True}, 400, "finite number"),
        ("/api/threshold", {"value": float("nan")}, 400, "finite number"),
        ("/api/threshold", {"value": float("inf")}, 400, "finite number"),
        ("/api/threshold", {"value": 10**400}, 400, "finite number"),
        ("/api/threshold", {}, 400, "finite number"),
        ("/api/recipe", {"index": 5}, 400, "has no recipe 5"),
        ("/api/recipe", {"index": 1.0}, 400, "integer"),
        ("/api/recipe", {"index": 0, "camera": "other"}, 404, "no such camera"),
        ("/api/recipe", {"index": 0, "camera": ["top"]}, 404, "no such camera"),
        ("/api/other", {}, 404, "no such page"),
    ],
)
def test_changes_that_make_no_sense(
    page: StatusPage, controls: StandIn, path: str, data: dict[str, object], status: int, words: str
) -> None:
    reply = change(page, path, **data)
    assert reply.status == status and words in reply.text
    assert controls.thresholds["top"] == 0.5 and not call(page, "GET", "/api/state").json()["audit"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 4000, b'"x"', b"null"])
def test_bodies_that_are_no_object(page: StatusPage, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=LIMIT_S)
    connection.request("POST", "/api/threshold", body, CHANGE)
    assert connection.getresponse().status == 400
    connection.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"X_EdgeAD": "1", "Origin": "http://evil.example"},
        {"X_EdgeAD": "1", "Origin": "null"},
        {"X_EdgeAD": "1", "Sec_Fetch_Site": "cross-site"},
        {"X_EdgeAD": "1", "Sec_Fetch_Site": "same-site"},
        {},
        {"Content_Type": "text/plain"},
    ],
)
def test_other_sites_cannot_post(page: StatusPage, controls: StandIn, headers: dict[str, str]) -> None:
    """What a browser sends for a form or a script of another site, even with the right password."""
    data = {"camera": "top", "value": 0.9, "password": PASSWORD}
    assert call(page, "POST", "/api/threshold", data, **headers).status == 403
    assert controls.thresholds["top"] == 0.5


def test_the_page_itself_can_post(page: StatusPage, controls: StandIn) -> None:
    headers = {
        "X_EdgeAD": "1",
        "Origin": f"http://127.0.0.1:{page.port}",
        "Sec_Fetch_Site": "same-origin",
    }
    data = {"camera": "top", "value": 0.9, "password": PASSWORD}
    assert call(page, "POST", "/api/threshold", data, **headers).status == 200
    assert controls.thresholds["top"] == 0.9


def test_no_permission_for_other_origins(page: StatusPage) -> None:
    reply = call(page, "OPTIONS", "/api/threshold", Origin="http://evil.example")
    assert reply.status == 501 and "Access-Control-Allow-Origin" not in reply.headers


# Who may read


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "a@127.0.0.1", "[::1"]
)
def test_other_host_names_are_refused(page: StatusPage, host: str) -> None:
    """A site whose name points to 127.0.0.1 (DNS rebinding) gets nothing."""
    for path in ("/", "/api/state", "/live.jpg?camera=top"):
        assert call(page, "GET", path, Host=host).status == 421
    assert call(page, "POST", "/api/threshold", {}, Host=host, X_EdgeAD="1").status == 421


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "LOCALHOST:{port}", "[::1]:{port}", "10.1.2.3:8080"]
)
def test_own_names_and_addresses_are_served(page: StatusPage, host: str) -> None:
    assert call(page, "GET", "/api/state", Host=host.format(port=page.port)).status == 200


def test_beyond_this_machine_a_token_is_needed(make_page: Callable[..., StatusPage]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "line.example"):
        with pytest.raises(
            LineError, match=f"host is {host}, which other machines reach, and there is no token"
        ):
            make_page(host=host)


def test_with_a_token_nothing_is_shown_without_it(
    make_page: Callable[..., StatusPage], controls: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEAD_STATUS_TOKEN", TOKEN)
    page = make_page(host="0.0.0.0")
    page.write(make_record(1, verdict=Verdict.NG), picture())
    paths = ("/api/state", "/api/charts?camera=top", "/live.jpg?camera=top", "/ng/original.png?part=1")
    for path in paths:
        assert call(page, "GET", path).status == 401
        assert call(page, "GET", path, Cookie=f"edgead-{page.port}={'0' * 64}").status == 401
        assert call(page, "GET", path, Authorization=f"Bearer {TOKEN}").status == 200
        assert call(page, "GET", path, Authorization=f"Basic {TOKEN}").status == 401
    assert change(page, "/api/threshold", value=0.9).status == 401, "the password is not enough"
    assert controls.thresholds["top"] == 0.5
    assert call(page, "GET", "/").status == 200, "asks for the token"

    assert call(page, "POST", "/api/login", {"token": "wrong"}, X_EdgeAD="1").status == 401
    assert call(page, "POST", "/api/login", {"token": TOKEN}).status == 403, "without the header"
    reply = call(page, "POST", "/api/login", {"token": TOKEN}, X_EdgeAD="1")
    assert reply.status == 200
    cookie, _, rest = reply.headers["Set-Cookie"].partition(";")
    assert "HttpOnly" in rest and "SameSite=Strict" in rest and TOKEN not in cookie
    for path in paths:
        assert call(page, "GET", path, Cookie=f"other=1; {cookie}").status == 200
    data = {"camera": "top", "value": 0.9, "password": PASSWORD}
    assert call(page, "POST", "/api/threshold", data, X_EdgeAD="1", Cookie=cookie).status == 200
    other = make_page(host="0.0.0.0")
    assert call(other, "GET", "/api/state", Cookie=cookie).status == 401, "of another line"


def test_guessing_the_token_has_to_wait(make_page: Callable[..., StatusPage]) -> None:
    page = make_page(token=TOKEN)
    guess = [call(page, "GET", "/api/state", Authorization=f"Bearer {i}").status for i in range(7)]
    assert guess == [401] * 5 + [429] * 2
    assert call(page, "POST", "/api/login", {"token": TOKEN}, X_EdgeAD="1").status == 429


def test_ipv6(make_page: Callable[..., StatusPage]) -> None:
    try:
        page = make_page(host="::1")
    except LineError:
        pytest.skip("this machine has no IPv6")
    connection = http.client.HTTPConnection("::1", page.port, timeout=LIMIT_S)
    connection.request("GET", "/api/state")
    assert connection.getresponse().status == 200
    connection.close()


# Hostile clients


@pytest.mark.parametrize(
    "path",
    [
        *("/../../../../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/page.html", "//etc/passwd"),
        *("/page.html", "/server.py", "/ng/../site.py", "/ng/original.png/../../site.py", "/ng/"),
        *("/ng/other.png?part=1", "/page.js/", "/PAGE.JS", "/.", "/api", "/api/state/", "/live.jpg/.."),
        *("/\x00", "/%00"),
    ],
)
def test_only_fixed_paths_are_served(page: StatusPage, path: str) -> None:
    with socket.create_connection(("127.0.0.1", page.port), LIMIT_S) as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = connection.makefile("rb").read()
    assert answer.split(b" ")[1] in (b"404", b"400"), answer[:200]
    assert b"root:" not in answer and b"import" not in answer


@pytest.mark.parametrize(
    "query", ["part=x", "part=-1", "part=1e3", "part=" + "9" * 30, "part=../1", "", "part=%31%00"]
)
def test_part_numbers_that_are_none(page: StatusPage, query: str) -> None:
    assert call(page, "GET", f"/ng/original.png?{query}").status == 404


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60))
def test_no_path_breaks_it(page: StatusPage, path: str) -> None:
    assert call(page, "GET", "/" + path).status in (200, 204, 400, 404)


def raw(page: StatusPage, request: bytes) -> bytes:
    """The whole answer to these bytes; the server has to hang up by itself."""
    with socket.create_connection(("127.0.0.1", page.port), LIMIT_S) as connection:
        connection.sendall(request)
        return connection.makefile("rb").read()


HEAD = b"POST /api/threshold HTTP/1.1\r\nHost: localhost\r\nX-EdgeAD: 1\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (HEAD + b"Content-Length: 5000\r\n\r\n", 413),
        (HEAD + b"Content-Length: 99999999999999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 0x10\r\n\r\n", 400),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 411),
        (HEAD + b"\r\n", 411),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 411),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n", 413),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
        (b"GET /?" + b"a=1&" * 50 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    ],
)
def test_too_large_and_malformed_requests(page: StatusPage, request_bytes: bytes, status: int) -> None:
    assert raw(page, request_bytes).split(b" ")[1] == str(status).encode()
    assert call(page, "GET", "/api/state").status == 200


def test_slow_clients_are_hung_up_on(page: StatusPage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that drips bytes, one that says nothing, and one that never sends the body it promised."""
    monkeypatch.setattr(server, "REQUEST_S", 0.5)
    drips, silent, owes = (socket.create_connection(("127.0.0.1", page.port), LIMIT_S) for _ in range(3))
    owes.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    with drips, silent, owes:
        end_s = time.monotonic() + LIMIT_S
        with pytest.raises(OSError):
            while time.monotonic() < end_s:
                drips.sendall(b"G")
                time.sleep(0.05)
        assert silent.makefile("rb").read() == b"" and owes.makefile("rb").read() == b""
    assert call(page, "GET", "/api/state").status == 200


def test_too_many_connections(page: StatusPage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond the limit get 503 at once; when others have gone, it serves again."""
    held = [
        socket.create_connection(("127.0.0.1", page.port), LIMIT_S)
        for _ in range(server.MAX_CONNECTIONS)
    ]
    try:
        wait_for(lambda: page._server._server._free._value == 0)  # type: ignore[attr-defined]
        with socket.create_connection(("127.0.0.1", page.port), LIMIT_S) as extra:
            assert extra.makefile("rb").read().startswith(b"HTTP/1.1 503 ")
    finally:
        for connection in held:
            connection.close()

    def serves() -> bool:
        try:
            return call(page, "GET", "/api/state").status == 200
        except OSError:
            return False

    wait_for(serves)


def test_one_connection_for_many_requests(page: StatusPage) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=LIMIT_S)
    connection.connect()
    first = connection.sock
    for _ in range(20):
        connection.request("GET", "/api/state")
        assert connection.getresponse().read() and connection.sock is first
    connection.close()


def test_a_client_that_does_not_read_delays_nobody(
    page: StatusPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "LIVE_PX", 4000)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    page.write(make_record(1, verdict=Verdict.NG), Picture(noise, None))
    with socket.create_connection(("127.0.0.1", page.port), LIMIT_S) as deaf:
        deaf.sendall(b"GET /ng/original.png?part=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert call(page, "GET", "/live.jpg?camera=top").status == 200


def test_an_error_inside_is_not_told(
    page: StatusPage,
    controls: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(controls, "state", lambda: {}["secret"])
    reply = call(page, "GET", "/api/state")
    assert (reply.status, reply.text) == (500, "an error, see the log of the line")
    assert "KeyError" in caplog.text


# The sink


def test_close_ends_server_and_connections(page: StatusPage) -> None:
    before = threading.active_count()
    idle = socket.create_connection(("127.0.0.1", page.port), LIMIT_S)
    wait_for(lambda: threading.active_count() > before)
    page.close()
    page.close()
    assert idle.makefile("rb").read() == b""
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", page.port), 5)
    wait_for(lambda: threading.active_count() < before)


def test_it_can_be_opened_again_on_the_same_port(make_page: Callable[..., StatusPage]) -> None:
    first = make_page()
    assert call(first, "GET", "/").status == 200
    first.close()
    assert call(make_page(port=first.port), "GET", "/").status == 200


def test_a_port_in_use(page: StatusPage, make_page: Callable[..., StatusPage]) -> None:
    with pytest.raises(
        LineError, match=f"cannot listen on 127.0.0.1:{page.port}: .* in use; choose another port"
    ):
        make_page(port=page.port)


def test_it_keeps_nothing(page: StatusPage) -> None:
    page.write_late(make_record(1))
    assert page.wants_pictures and page.knows(1) and page.counters() == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"host": ""}, "host is empty"),
        ({"port": -1}, "port is -1"),
        ({"token": "short"}, "token has 5 characters, expected 16 or more"),
    ],
)
def test_values_that_cannot_be(given: dict[str, object], message: str) -> None:
    with pytest.raises(LineError, match=message):
        Config(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("variable", ["EDGEAD_STATUS_TOKEN", "EDGEAD_STATUS_PASSWORD"])
def test_short_secrets_are_refused(
    make_page: Callable[..., StatusPage], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "short")
    with pytest.raises(LineError, match=f"the environment variable {variable} has 5 characters"):
        make_page()
