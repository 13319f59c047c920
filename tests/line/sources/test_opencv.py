from __future__ import annotations

import http.server
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import pytest

from edgead.errors import LineError
from edgead.line.interfaces import Shot, Source
from edgead.line.pixels import to_rgb
from edgead.line.sources import opencv
from edgead.line.sources.opencv import Config, open_source

LIMIT_S = 20.0
GREY_STEP = 8


class MjpegServer(http.server.ThreadingHTTPServer):
    """Streams JPEG images as IP cameras do, 50 per second; the grey level counts them."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), MjpegHandler)
        self.is_off, self.is_stalled = threading.Event(), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class MjpegHandler(http.server.BaseHTTPRequestHandler):
    server: MjpegServer

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in itertools.count():
            frame = np.full((48, 64), GREY_STEP * number % 256, np.uint8)
            jpeg = cv2.imencode(".jpg", frame)[1].tobytes()
            part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
            try:
                self.wfile.write(part + jpeg + b"\r\n")
            except OSError:
                return
            while self.server.is_stalled.is_set() and not self.server.is_off.is_set():
                time.sleep(0.01)
            if self.server.is_off.wait(0.02):
                return

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def mjpeg_server(port: int = 0) -> Iterator[MjpegServer]:
    server = MjpegServer(port)
    try:
        yield server
    finally:
        server.is_off.set()
        server.shutdown()
        server.server_close()


def url(server: MjpegServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/stream.mjpg"


class Taker:
    """Takes the shots of a source in a thread, as the line does."""

    def __init__(self, source: Source) -> None:
        self.source, self.shots, self.moments_ns = source, list[Shot](), list[int]()
        self.thread = threading.Thread(target=self._take, daemon=True)
        self.thread.start()

    def _take(self) -> None:
        for shot in self.source.shots():
            self.moments_ns.append(time.monotonic_ns())
            self.shots.append(shot)

    def wait_for_more(self, count: int) -> None:
        wanted = len(self.shots) + count
        wait_for(lambda: len(self.shots) >= wanted)

    def close(self) -> None:
        self.source.close()
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()


def wait_for(condition) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def test_frames_of_a_stream_over_http() -> None:
    with mjpeg_server() as server:
        taker = Taker(open_source(Config(device=url(server), width_px=64, height_px=48), camera="top"))
        taker.wait_for_more(20)
        taker.close()
    assert all(shot.image is not None for shot in taker.shots), taker.shots[0].problem
    for shot, moment_ns in zip(taker.shots, taker.moments_ns, strict=False):
        assert shot.origin == url(server)
        assert shot.trigger_ns <= moment_ns
        rgb = to_rgb(shot)
        assert rgb.shape == (48, 64, 3)
        assert int(rgb.max()) - int(rgb.min()) <= 2  # a flat grey, however JPEG rounds it
    stamps = [shot.trigger_ns for shot in taker.shots]
    assert stamps == sorted(stamps)
    levels = [round(float(to_rgb(shot).mean()) / GREY_STEP) for shot in taker.shots]
    # In order, none twice; the last level may round up to the first.
    assert all((b - a) % 32 == 1 for a, b in zip(levels, levels[1:], strict=False))
    counters = taker.source.counters()
    assert counters["frames"] >= len(taker.shots)
    assert {
        key: counters[key] for key in ("lost_frames", "overflows", "reconnects", "read_failures")
    } == {
        "lost_frames": 0,
        "overflows": 0,
        "reconnects": 0,
        "read_failures": 0,
    }


def test_it_connects_again_when_the_camera_is_back() -> None:
    with mjpeg_server() as server:
        port = server.server_address[1]
        taker = Taker(open_source(Config(device=url(server)), camera="top"))
        taker.wait_for_more(5)
    wait_for(lambda: taker.source.counters()["read_failures"] == 1)
    time.sleep(0.5)  # some attempts in vain
    count = len(taker.shots)
    assert taker.thread.is_alive()
    with mjpeg_server(port):
        taker.wait_for_more(5)
        counters = taker.source.counters()
        taker.close()
    assert count >= 5
    assert (counters["reconnects"], counters["read_failures"]) == (1, 1)
    # FFmpeg gives what it looked at while connecting at once: on a busy machine an image may be lost.
    assert counters["frames"] + counters["lost_frames"] >= count + 5


def test_a_stream_that_stalls_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opencv, "_TIMEOUT_MS", 300)
    with mjpeg_server() as server:
        taker = Taker(open_source(Config(device=url(server)), camera="top"))
        taker.wait_for_more(2)
        server.is_stalled.set()
        wait_for(lambda: taker.source.counters()["read_failures"] >= 1)
        server.is_stalled.clear()
        taker.wait_for_more(5)
        assert taker.source.counters()["reconnects"] >= 1
        taker.close()


def test_close_does_not_wait_for_a_camera_that_is_gone() -> None:
    with mjpeg_server() as server:
        taker = Taker(open_source(Config(device=url(server)), camera="top"))
        taker.wait_for_more(1)
    taker.close()
    taker.source.close()


def test_a_camera_that_cannot_be_reached_is_refused() -> None:
    with mjpeg_server() as server:
        address = url(server)
    for device in (address, "97", "/dev/video97"):
        with pytest.raises(LineError, match="camera top: device .*cannot be opened"):
            open_source(Config(device=device), camera="top")


def test_a_camera_with_another_size_is_refused() -> None:
    with mjpeg_server() as server, pytest.raises(LineError, match="64 x 48 px; width_px is 1920"):
        open_source(Config(device=url(server), width_px=1920), camera="top")


def test_it_cannot_be_triggered() -> None:
    with mjpeg_server() as server:
        source = open_source(Config(device=url(server)), camera="top")
        with pytest.raises(LineError, match="cannot be triggered"):
            source.fire()
        source.close()


def test_passwords_stay_out_of_errors() -> None:
    with mjpeg_server() as server:
        address = url(server).replace("http://", "http://operator:secret@")
    with pytest.raises(LineError, match="127.0.0.1") as caught:
        open_source(Config(device=address), camera="top")
    assert "secret" not in str(caught.value) and "operator" not in str(caught.value)


PIPELINE = (
    "videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=50/1 ! videoconvert !"
    " video/x-raw,format=BGR ! appsink max-buffers=1 drop=true sync=false"
)


def test_a_pipeline_without_gstreamer_says_what_to_do() -> None:
    if cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        pytest.skip("this OpenCV has GStreamer")
    with pytest.raises(LineError, match="built without GStreamer: use the OpenCV of Debian"):
        open_source(Config(device=PIPELINE), camera="top")


def test_a_pipeline() -> None:
    if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
        pytest.skip("this OpenCV was built without GStreamer")
    taker = Taker(open_source(Config(device=PIPELINE, width_px=64), camera="top"))
    taker.wait_for_more(10)
    taker.close()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"device": "webcam"}, "device"),
        ({"device": ""}, "device"),
        ({"device": "0", "width_px": 0}, "width_px"),
        ({"device": "0", "height_px": -1}, "height_px"),
        ({"device": "0", "fps_hz": 0.0}, "fps_hz"),
        ({"device": "0", "fps_hz": float("nan")}, "fps_hz"),
        ({"device": "rtsp://127.0.0.1/a", "fps_hz": 5.0}, "fps_hz"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, key: str) -> None:
    with pytest.raises(LineError, match=key):
        Config(**settings)
