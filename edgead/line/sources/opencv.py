"""Live cameras through OpenCV: V4L2, RTSP and HTTP streams, GStreamer pipelines.

Streams by URL go through FFmpeg, which is in every OpenCV wheel. For low latency with RTSP, put this
into the environment of the line:

    OPENCV_FFMPEG_CAPTURE_OPTIONS="rtsp_transport;tcp|fflags;nobuffer|flags;low_delay"

GStreamer is not in the wheels of PyPI; it is in the OpenCV of Debian, Ubuntu and JetPack. A pipeline
ends in an appsink that keeps one frame and drops older ones; otherwise frames queue up, and verdicts
are late:

    v4l2src device=/dev/video0 ! image/jpeg,width=1280,height=720,framerate=30/1 ! jpegdec !
        videoconvert ! video/x-raw,format=BGR ! appsink max-buffers=1 drop=true sync=false

    rtspsrc location=rtsp://192.168.1.20/stream latency=50 ! rtph264depay ! h264parse ! avdec_h264 !
        videoconvert ! video/x-raw,format=BGR ! appsink max-buffers=1 drop=true sync=false

For RTSP, the URL is the better choice: if the camera is away when such a pipeline is opened again,
OpenCV's GStreamer (4.6, 4.10) sometimes never returns.

Frames that such a queue, a driver or a network drops leave no trace. Where every image is a part, take a
camera that numbers its frames (gige).
"""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import cv2

from edgead.errors import LineError
from edgead.line.interfaces import Shot, Source
from edgead.line.sources.live import Live

logger = logging.getLogger(__name__)

_TIMEOUT_MS = 5000  # OpenCV's own are 30 s


@dataclass(frozen=True, kw_only=True)
class Config:
    """A camera or stream that OpenCV can open; each frame is one trigger.

    Attributes:
        device: Number of a camera ("0"), "/dev/video0", URL (rtsp://, http://), or GStreamer pipeline.
        width_px: Of the frames; None: as the camera has it. Refused if the camera gives another.
        height_px: Likewise.
        fps_hz: Frames per second to ask the camera for.
    """

    device: str
    width_px: int | None = None
    height_px: int | None = None
    fps_hz: float | None = None

    def __post_init__(self) -> None:
        _api(self.device)
        for name, value in (("width_px", self.width_px), ("height_px", self.height_px)):
            if value is not None and not 1 <= value <= 65535:
                raise LineError(f"{name} is {value}, expected 1 to 65535")
        if self.fps_hz is None:
            return
        if not (math.isfinite(self.fps_hz) and self.fps_hz > 0):
            raise LineError(f"fps_hz is {self.fps_hz:g}, expected a number above 0")
        if _api(self.device) in (cv2.CAP_FFMPEG, cv2.CAP_GSTREAMER):
            raise LineError(
                "fps_hz is for cameras by number or /dev/video0: set the rate in the stream instead"
            )


def open_source(config: Config, *, camera: str) -> Source:
    """Connects and takes a first frame.

    Raises:
        LineError: There is no such camera, it gives no frame or one of another size, or there is a
            pipeline, but no GStreamer in this OpenCV.
    """
    return Live(camera, lambda: _Connection(config, f"camera {camera}"))


class _Connection:
    """See `Connection`."""

    def __init__(self, config: Config, name: str) -> None:
        self._name, self._origin = name, _without_password(config.device)
        self._read_failures = 0
        self._first: Shot | None = None
        self._capture = _open(config, name)
        try:
            self._first = next(self.grab())
            _check_size(config, self._first, name)
        except BaseException:
            self._capture.release()
            raise

    def grab(self) -> Iterator[Shot]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        is_grabbed = self._capture.grab()
        arrival_ns = time.monotonic_ns()  # decoding follows
        if not is_grabbed:
            self._read_failures += 1
            raise LineError(f"{self._name}: device {self._origin} gives no frames")
        is_decoded, frame = self._capture.retrieve()
        if is_decoded:
            yield Shot(frame, arrival_ns, self._origin, pixels="bgr" if frame.ndim == 3 else "mono")
        else:
            self._read_failures += 1
            yield Shot(None, arrival_ns, self._origin, problem="a frame arrived that cannot be decoded")

    def fire(self) -> None:
        raise LineError(f"{self._name}: cameras of the kind opencv cannot be triggered")

    def counters(self) -> Mapping[str, int]:
        return {"read_failures": self._read_failures}

    def close(self) -> None:
        self._capture.release()


def _api(device: str) -> int:
    """By which of OpenCV's back ends a device is opened. Raises LineError if it is none."""
    if " ! " in device:
        return cv2.CAP_GSTREAMER
    if "://" in device:
        return cv2.CAP_FFMPEG
    if device.isdecimal() or device.startswith("/dev/"):
        return cv2.CAP_V4L2 if sys.platform == "linux" else cv2.CAP_ANY
    raise LineError(
        f'device is {device!r}, expected the number of a camera ("0"), "/dev/video0", a URL (rtsp://, http://)'
        " or a GStreamer pipeline (v4l2src ! ... ! appsink)"
    )


def _open(config: Config, name: str) -> cv2.VideoCapture:
    api = _api(config.device)
    if api == cv2.CAP_GSTREAMER and not cv2.videoio_registry.hasBackend(api):
        raise LineError(
            f"{name}: device is a GStreamer pipeline, but this OpenCV ({cv2.__version__}) was built"
            " without GStreamer: use the OpenCV of Debian, Ubuntu or JetPack, or a URL or /dev/video0"
        )
    if api in (cv2.CAP_FFMPEG, cv2.CAP_GSTREAMER):
        limits = [
            cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
            _TIMEOUT_MS,
            cv2.CAP_PROP_READ_TIMEOUT_MSEC,
            _TIMEOUT_MS,
        ]
        capture = cv2.VideoCapture(config.device, api, limits)
    else:
        capture = cv2.VideoCapture(
            int(config.device) if config.device.isdecimal() else config.device, api
        )
    if not capture.isOpened():
        raise LineError(
            f"{name}: device {_without_password(config.device)} cannot be opened: check that it is"
            " there, switched on, and not in use by another program"
        )
    if api not in (cv2.CAP_FFMPEG, cv2.CAP_GSTREAMER):
        _set_up(capture, config, name)
    return capture


def _set_up(capture: cv2.VideoCapture, config: Config, name: str) -> None:
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    for prop, value in (
        (cv2.CAP_PROP_FRAME_WIDTH, config.width_px),
        (cv2.CAP_PROP_FRAME_HEIGHT, config.height_px),
        (cv2.CAP_PROP_FPS, config.fps_hz),
    ):
        if value is not None:
            capture.set(prop, value)
    given_hz = capture.get(cv2.CAP_PROP_FPS)
    if config.fps_hz is not None and abs(given_hz - config.fps_hz) > 0.01 * config.fps_hz:
        logger.warning("%s: fps_hz is %g, the camera gives %g", name, config.fps_hz, given_hz)


def _check_size(config: Config, first: Shot, name: str) -> None:
    if first.image is None:
        raise LineError(f"{name}: device {first.origin}: {first.problem}")
    height_px, width_px = first.image.shape[:2]
    if (config.width_px or width_px, config.height_px or height_px) != (width_px, height_px):
        raise LineError(
            f"{name}: the frames are {width_px} x {height_px} px; width_px is {config.width_px} and"
            f" height_px {config.height_px}: set a size that the camera has"
        )


def _without_password(device: str) -> str:
    """For people and logs."""
    return re.sub(r"//[^/@\s]*@", "//", re.sub(r"\b(user-pw|user-id)=\S+", r"\1=...", device))
