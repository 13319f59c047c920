"""GigE Vision cameras (GenICam) through Aravis.

Aravis (0.8) and PyGObject come from the system, not from PyPI:

- Debian, Ubuntu: `apt install gir1.2-aravis-0.8 python3-gi`. A virtual environment of the system's
  Python sees them if it was made with `python3 -m venv --system-site-packages`.
- With another Python, or without that option: `apt install gir1.2-aravis-0.8 gcc pkg-config
  libgirepository1.0-dev libcairo2-dev`, then `pip install "PyGObject<3.52"`.

`arv-tool-0.8` (package aravis-tools) lists the cameras. `arv-fake-gv-camera-0.8 -i 127.0.0.1` is a
simulated camera that speaks the real protocol; the tests run against it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from edgead.errors import LineError
from edgead.line.interfaces import Shot, Source
from edgead.line.sources.frame_stamps import LONGEST_AGE_NS, DeviceClock, FrameIds
from edgead.line.sources.live import Live

logger = logging.getLogger(__name__)

# GenICam's PFNC: name -> number, `Shot.pixels`, bytes per pixel
PIXEL_FORMATS = {
    "Mono8": (0x01080001, "mono", 1),
    "BayerGR8": (0x01080008, "bayer-gr", 1),
    "BayerRG8": (0x01080009, "bayer-rg", 1),
    "BayerGB8": (0x0108000A, "bayer-gb", 1),
    "BayerBG8": (0x0108000B, "bayer-bg", 1),
    "RGB8": (0x02180014, "rgb", 3),
    "BGR8": (0x02180015, "bgr", 3),
}
_BY_NUMBER = {number: (pixels, n_bytes) for number, pixels, n_bytes in PIXEL_FORMATS.values()}
_WAIT_US = 100_000
_FIRST_FRAME_S = 5.0
_STATISTICS = ("n_failures", "n_underruns", "n_missing_frames", "n_missing_packets", "n_resent_packets")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A GigE Vision (GenICam) camera through Aravis, with numbered frames.

    Attributes:
        device: Name as `arv-tool-0.8` prints it, or IP address; None: the first camera that answers.
        pixel_format: Mono8, BayerRG8, BayerGR8, BayerGB8, BayerBG8, RGB8 or BGR8; None: as the camera
            is set.
        exposure_us: None: as the camera is set.
        gain: In the camera's unit, mostly dB; None: as the camera is set.
        trigger: "free" (the camera runs by itself), "software" (on each trigger of the line), or the
            name of an input of the camera, such as "Line1", whose rising edge is the trigger.
        rate_hz: Frames per second of a camera that runs by itself; None: as the camera is set.
        packet_size_bytes: For example 8000 in a network with jumbo frames; None: as the camera is set,
            less if the network cannot carry it.
        buffers: Frames that may wait in the transport.
        retention_ms: How long a frame may be incomplete; later ones wait behind it.
    """

    device: str | None = None
    pixel_format: str | None = None
    exposure_us: float | None = None
    gain: float | None = None
    trigger: str = "free"
    rate_hz: float | None = None
    packet_size_bytes: int | None = None
    buffers: int = 8
    retention_ms: float = 100.0

    def __post_init__(self) -> None:
        if self.pixel_format is not None and self.pixel_format not in PIXEL_FORMATS:
            raise LineError(
                f"pixel_format is {self.pixel_format!r}, expected {', '.join(PIXEL_FORMATS)}"
            )
        for name, value, least, most in (
            ("exposure_us", self.exposure_us, 0.01, 1e9),
            ("rate_hz", self.rate_hz, 1e-3, 1e5),
            ("packet_size_bytes", self.packet_size_bytes, 220, 16_404),
            ("buffers", self.buffers, 2, 1000),
            ("retention_ms", self.retention_ms, 1, 10_000),
        ):
            if value is not None and not least <= value <= most:
                raise LineError(f"{name} is {value:g}, expected {least:g} to {most:g}")
        if self.gain is not None and not math.isfinite(self.gain):
            raise LineError(f"gain is {self.gain}, expected a number")
        if not self.trigger:
            raise LineError('trigger is empty, expected "free", "software" or an input such as "Line1"')
        if self.rate_hz is not None and self.trigger != "free":
            raise LineError('rate_hz goes with trigger = "free" only: leave one of them out')


def open_source(config: Config, *, camera: str) -> Source:
    """Connects, sets the camera up and starts it.

    Raises:
        LineError: There is no Aravis, no such camera, another program uses it, or it refuses a setting.
    """
    return Live(camera, lambda: _Connection(config, f"camera {camera}"))


class _Connection:
    """See `Connection`. The camera's features are used under a lock: Aravis does not guard them."""

    def __init__(self, config: Config, name: str) -> None:
        self._aravis, self._glib_error = _aravis(name)
        self._name, self._origin = name, config.device or "the first camera"
        self._lock, self._lost = threading.Lock(), threading.Event()
        self._camera: Any = None
        self._stream: Any = None
        self._ids = FrameIds(name)
        self._clock = DeviceClock()
        self._arrival_ns = 0
        self._speaks_until_s = math.inf  # by then a camera that runs by itself should have sent a frame
        self._fired: SimpleQueue[int | None] = SimpleQueue()  # moments; None: the end
        self._failed: SimpleQueue[Shot] = SimpleQueue()
        self._firing: threading.Thread | None = None
        try:
            self._open(config.device)
            self._set_up(config)
            self._start(config)
        except BaseException:
            self.close()
            raise

    def grab(self) -> Iterator[Shot]:
        while not self._failed.empty():
            yield self._failed.get()
        buffer = self._stream.timeout_pop_buffer(_WAIT_US)
        if buffer is not None:
            self._speaks_until_s = math.inf
            shots = self._shots_of(buffer)
            self._reuse(buffer)
            yield from shots
        elif time.monotonic() > self._speaks_until_s:
            self._speaks_until_s = math.inf
            logger.warning(
                "%s: no frame has come for %g s though the camera runs by itself: name its IP address "
                "as device, and see that no firewall stands between",
                self._name,
                _FIRST_FRAME_S,
            )
        # Not by the signal control-lost: the thread that gives it holds the camera meanwhile. If we let
        # go of the camera then, that thread ends the camera, waits for itself, and GLib aborts.
        elif not self._camera.get_device().is_controller():
            self._lost.set()
            raise LineError(f"{self._name}: {self._origin} does not answer any more")
        self._read_clock()

    def fire(self) -> None:
        if self._firing is None:
            raise LineError(f'{self._name} is not set up to be triggered: write trigger = "software"')
        if self._lost.is_set():
            raise LineError(f"{self._name}: {self._origin} does not answer: it cannot be triggered now")
        self._fired.put(time.monotonic_ns())

    def counters(self) -> Mapping[str, int]:
        counts = {"id_resets": self._ids.resets}
        for name in _STATISTICS:
            counts[name.replace("n_", "transport_", 1)] = self._stream.get_info_uint64_by_name(name)
        return counts

    def close(self) -> None:
        was_lost = self._lost.is_set()
        self._lost.set()
        self._fired.put(None)
        if self._firing is not None:
            self._firing.join()
        if self._stream is not None and not was_lost:
            with suppress(self._glib_error):
                self._camera.stop_acquisition()
        self._stream = None
        self._camera = None  # the last reference: gives the camera free for others

    def _open(self, device: str | None) -> None:
        with self._explained(f"device {device or '(any)'}"):
            self._camera = self._aravis.Camera.new(device)
            parts = (self._camera.get_vendor_name(), self._camera.get_model_name())
            self._origin = " ".join((*parts, self._camera.get_device_serial_number()))
        if not self._camera.is_gv_device():
            raise LineError(
                f"{self._name}: {self._origin} is not a GigE Vision camera: write the IP address of one"
                " as device"
            )
        if not self._camera.get_device().is_controller():
            raise LineError(
                f"{self._name}: {self._origin} is in use by another program: stop that first"
            )

    def _set_up(self, config: Config) -> None:
        # No name but self._camera for it: an exception keeps names alive, and with them the camera.
        with self._explained("acquisition mode"):
            self._camera.set_acquisition_mode(self._aravis.AcquisitionMode.CONTINUOUS)
        if config.pixel_format is not None:
            with self._explained(f"pixel_format {config.pixel_format}"):
                self._camera.set_pixel_format_from_string(config.pixel_format)
        with self._explained("pixel format"):
            if self._camera.get_pixel_format() not in _BY_NUMBER:
                given, known = self._camera.get_pixel_format_as_string(), ", ".join(PIXEL_FORMATS)
                raise LineError(
                    f"{self._name}: the camera is set to {given}, which is not supported: set"
                    f" pixel_format to one of {known}"
                )
        self._set_trigger(config.trigger)
        auto_off = self._aravis.Auto.OFF
        if config.exposure_us is not None:
            with self._explained("exposure_us"):
                if self._camera.is_exposure_auto_available():
                    self._camera.set_exposure_time_auto(auto_off)
                self._check_range(
                    "exposure_us", config.exposure_us, self._camera.get_exposure_time_bounds()
                )
                self._camera.set_exposure_time(config.exposure_us)
        if config.gain is not None:
            with self._explained("gain"):
                if self._camera.is_gain_auto_available():
                    self._camera.set_gain_auto(auto_off)
                self._check_range("gain", config.gain, self._camera.get_gain_bounds())
                self._camera.set_gain(config.gain)
        if config.rate_hz is not None:
            with self._explained("rate_hz"):
                self._check_range("rate_hz", config.rate_hz, self._camera.get_frame_rate_bounds())
                self._camera.set_frame_rate(config.rate_hz)
        if config.packet_size_bytes is not None:
            with self._explained("packet_size_bytes"):
                self._camera.gv_set_packet_size(config.packet_size_bytes)

    def _set_trigger(self, trigger: str) -> None:
        with self._explained(f"trigger {trigger}"):
            if trigger == "free":
                self._camera.clear_triggers()
                return
            names = self._camera.dup_available_trigger_sources()
            sources = {"software" if name == "Software" else name: name for name in names}
            if trigger not in sources:
                known = ", ".join(["free", *sorted(sources)])
                raise LineError(f"{self._name}: trigger {trigger}: the camera knows {known}")
            self._camera.set_trigger(sources[trigger])

    def _check_range(self, key: str, value: float, bounds: tuple[float, float]) -> None:
        """Because cameras cut to their range without a word."""
        least, most = bounds
        if not least <= value <= most:
            raise LineError(f"{self._name}: {key} is {value:g}, the camera takes {least:g} to {most:g}")

    def _start(self, config: Config) -> None:
        with self._explained("start"):
            extended = "GevGVSPExtendedIDMode"
            is_extended = (
                self._camera.is_feature_available(extended) and self._camera.get_string(extended) == "On"
            )
            if is_extended:
                self._ids.bits = 64
            self._clock.find(self._camera)
            self._read_clock()
            self._stream = self._camera.create_stream(None, None)
            self._stream.set_property("frame-retention", round(config.retention_ms * 1000))
            payload_bytes = self._camera.get_payload()
            for _ in range(config.buffers):
                self._reuse(self._aravis.Buffer.new_allocate(payload_bytes))
            self._camera.start_acquisition()
        if config.trigger == "free":
            self._speaks_until_s = time.monotonic() + _FIRST_FRAME_S
        if config.trigger == "software":
            self._firing = threading.Thread(
                target=self._fire_all, name=f"fire {self._name}", daemon=True
            )
            self._firing.start()

    def _reuse(self, buffer: Any) -> None:
        """Aravis leaves what the last frame wrote here if the first packet of the next one is lost."""
        buffer.set_frame_id(0)
        buffer.set_system_timestamp(0)
        self._stream.push_buffer(buffer)

    def _read_clock(self) -> None:
        if not self._clock.is_due or self._lost.is_set():
            return
        try:
            with self._lock:
                self._clock.read(self._camera)
        except self._glib_error as error:
            logger.warning("%s: no exposure times: %s", self._name, error.message)
            self._clock.is_known = False  # for this connection

    def _fire_all(self) -> None:
        """In a thread of its own, because it takes seconds if the camera does not answer."""
        while (moment_ns := self._fired.get()) is not None:
            problem = "the camera was lost before it was triggered"
            if not self._lost.is_set():
                try:
                    with self._lock:
                        self._camera.software_trigger()
                    continue
                except self._glib_error as error:
                    problem = f"the software trigger failed: {error.message}"
            # The moment tells of which trigger it was: images of those before may be under way.
            self._failed.put(Shot(None, moment_ns, self._origin, exposure_ns=moment_ns, problem=problem))

    def _shots_of(self, buffer: Any) -> list[Shot]:
        """The frame in a buffer, after those that are missing before it. The image is a copy."""
        statuses = self._aravis.BufferStatus
        status = buffer.get_status()
        if status in (statuses.ABORTED, statuses.CLEARED):  # we stopped the camera
            return []
        is_whole = status == statuses.SUCCESS
        number = buffer.get_frame_id()
        if not is_whole and number == 0:  # not even its number arrived
            number = self._ids.next()
        now_ns = time.monotonic_ns()
        if first_packet_ns := buffer.get_system_timestamp():
            # Somebody may have set the clock since.
            now_ns -= min(max(time.time_ns() - first_packet_ns, 0), LONGEST_AGE_NS)
        self._arrival_ns = max(self._arrival_ns, now_ns)
        shots = [
            Shot(
                None,
                self._arrival_ns,
                self._origin,
                frame_id=missing,
                problem=f"frame {missing} was lost on its way from the camera",
            )
            for missing in ([] if number is None else self._ids.missing_before(number))
        ]
        image, pixels = None, "mono"
        which = "a frame" if number is None else f"frame {number}"
        problem = f"{which} did not arrive whole: {status.value_nick}"
        exposure_ns = None
        if is_whole:
            image, pixels, problem = self._image(buffer)
            exposure_ns = self._clock.host_ns(buffer.get_timestamp(), self._arrival_ns)
        shot = Shot(image, self._arrival_ns, self._origin, pixels, exposure_ns, number, problem)
        return [*shots, shot]

    def _image(self, buffer: Any) -> tuple[np.ndarray | None, str, str]:
        """Image, pixels, problem."""
        if buffer.get_payload_type() != self._aravis.BufferPayloadType.IMAGE:
            kind = buffer.get_payload_type().value_nick
            return None, "mono", f"the camera sends {kind}, not plain images: switch off its chunk mode"
        if (number := buffer.get_image_pixel_format()) not in _BY_NUMBER:
            return None, "mono", f"the camera sends the pixel format {number:#010x}, not supported"
        pixels, pixel_bytes = _BY_NUMBER[number]
        height_px, row_bytes = buffer.get_image_height(), buffer.get_image_width() * pixel_bytes
        stride_bytes = row_bytes + buffer.get_image_padding()[0]
        data = buffer.get_data()
        if len(data) < stride_bytes * height_px:
            short = f"the camera sends {len(data)} bytes for {height_px} rows of {stride_bytes} bytes"
            return None, "mono", short
        rows = np.frombuffer(data, np.uint8, stride_bytes * height_px)
        image = rows.reshape(height_px, stride_bytes)[:, :row_bytes]
        return image if pixel_bytes == 1 else image.reshape(height_px, -1, pixel_bytes), pixels, ""

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._glib_error as error:
            raise LineError(f"{self._name}: {what}: {error.message}") from None


def _aravis(name: str) -> tuple[Any, Any]:
    """Aravis, and the class of its errors, which have a `message`."""
    try:
        import gi

        gi.require_version("Aravis", "0.8")
        from gi.repository import Aravis, GLib
    except (ImportError, ValueError) as error:  # ValueError: no Aravis, or of another version
        raise LineError(
            f"{name}: Aravis 0.8 for Python is missing ({error}): apt install gir1.2-aravis-0.8"
            " python3-gi, and make the virtual environment with --system-site-packages"
        ) from error
    return Aravis, GLib.Error
