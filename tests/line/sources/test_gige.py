"""Against the simulated camera of Aravis, which speaks GigE Vision over UDP.

Its image tells its settings and the number of the frame: a pixel of Mono8 is (x + y + frame id) mod 255,
times 1 + gain + log10(exposure_us / 10000).
"""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgead.errors import LineError
from edgead.line.interfaces import Shot, Source
from edgead.line.pixels import to_rgb
from edgead.line.sources.gige import PIXEL_FORMATS, Config, open_source

LIMIT_S = 20.0
ADDRESS = ("127.0.0.1", 3956)  # the port of GigE Vision
SIDE_PX = 512
STRAIGHT = {"exposure_us": 10_000.0, "gain": 0.0}  # pixels times 1
PROGRAM = "arv-fake-gv-camera-0.8"

FakeCamera = Callable[..., "subprocess.Popen[bytes]"]


def is_free() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(ADDRESS)
        except OSError:
            return False
    return True


def wait_for(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
    end_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def program() -> str:
    gi = pytest.importorskip("gi", reason="PyGObject is not installed (apt install python3-gi)")
    try:
        gi.require_version("Aravis", "0.8")
    except ValueError:
        pytest.skip("Aravis is not installed (apt install gir1.2-aravis-0.8)")
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"{PROGRAM} is not installed (apt install aravis-tools)")
    return PROGRAM


@pytest.fixture
def fake_camera(program: str) -> Iterator[FakeCamera]:
    """Starts simulated cameras, one after the other: there is one port for them."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> subprocess.Popen[bytes]:
        if not wait_for(is_free):
            pytest.skip("another program runs a camera at 127.0.0.1:3956")
        started.append(subprocess.Popen([program, "-i", ADDRESS[0], "-s", "T1", *options]))
        assert wait_for(lambda: not is_free())
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def config(**settings: object) -> Config:
    return Config(**{"device": ADDRESS[0], **settings})  # type: ignore[arg-type]


def open_camera(**settings: object) -> Source:
    return open_source(config(**settings), camera="top")


def take(count: int, **settings: object) -> list[Shot]:
    source = open_camera(**settings)
    try:
        return list(itertools.islice(source.shots(), count))
    finally:
        source.close()


def ramp(frame_id: int) -> np.ndarray:
    return np.add.outer(np.arange(SIDE_PX), np.arange(SIDE_PX) + frame_id) % 255


def steps(shots: list[Shot]) -> set[int]:
    """Differences of the frame ids, over the end of the counter."""
    ids = [shot.frame_id for shot in shots]
    return {(b - a) % 65535 for a, b in zip(ids, ids[1:], strict=False)}


def test_frames_whole_in_order_and_numbered(fake_camera: FakeCamera) -> None:
    fake_camera()
    # The simulated camera begins near 65400: these go over the end of the counter.
    source = open_camera(pixel_format="Mono8", rate_hz=100.0, **STRAIGHT)
    shots = []
    for shot in source.shots():
        assert shot.trigger_ns <= time.monotonic_ns()
        shots.append(shot)
        if shot.frame_id is not None and 20 < shot.frame_id < 1000:
            break
    source.close()
    assert steps(shots) == {1}
    assert shots[0].frame_id > 65000
    for shot in shots:
        assert (shot.pixels, shot.problem, shot.origin) == ("mono", "", "Aravis Fake T1")
        assert shot.exposure_ns is None  # it does not tell its time
        np.testing.assert_array_equal(shot.image, ramp(shot.frame_id))
    stamps = [shot.trigger_ns for shot in shots]
    assert stamps == sorted(stamps)
    counters = source.counters()
    assert counters["frames"] >= len(shots)
    for name in ("lost_frames", "id_resets", "reconnects", "transport_failures", "transport_underruns"):
        assert counters[name] == 0, name


def test_colours_are_those_that_the_camera_saw(fake_camera: FakeCamera) -> None:
    fake_camera()
    (rgb,) = take(1, pixel_format="RGB8", **STRAIGHT)
    assert rgb.image.shape == (SIDE_PX, SIDE_PX, 3) and to_rgb(rgb) is rgb.image
    palette = np.zeros((255, 3))
    palette[ramp(rgb.frame_id)] = rgb.image
    assert len(np.unique(palette, axis=0)) > 200
    # Not BayerRG8 and BayerBG8, which the simulated camera (of Aravis 0.8.26) takes for each other: its
    # BayerRG8 begins with blue. test_pixels.py has all four.
    for name in ("BayerGR8", "BayerGB8"):
        (shot,) = take(1, pixel_format=name, **STRAIGHT)
        assert shot.image.shape == (SIDE_PX, SIDE_PX)
        error = np.abs(to_rgb(shot)[1:-1, 1:-1] - palette[ramp(shot.frame_id)][1:-1, 1:-1])
        # Interpolation of smooth colours; only where the ramp begins anew the colours jump.
        assert np.median(error) <= 1 and np.percentile(error, 95) <= 8, name


@pytest.mark.parametrize("name", ["Mono8", "BayerRG8", "BayerGR8", "BayerGB8", "BayerBG8", "RGB8"])
def test_pixel_formats(fake_camera: FakeCamera, name: str) -> None:
    fake_camera()
    (shot,) = take(1, pixel_format=name)
    assert shot.pixels == PIXEL_FORMATS[name][1]
    assert to_rgb(shot).shape == (SIDE_PX, SIDE_PX, 3)


def test_exposure_and_gain_reach_the_camera(fake_camera: FakeCamera) -> None:
    fake_camera()
    (shot,) = take(1, pixel_format="Mono8", exposure_us=1000.0, gain=1.0)  # times 1 + 1 - 1
    np.testing.assert_array_equal(shot.image, ramp(shot.frame_id))
    (shot,) = take(1, pixel_format="Mono8", exposure_us=100_000.0, gain=0.0)  # times 1 + 0 + 1
    np.testing.assert_array_equal(shot.image, np.minimum(2 * ramp(shot.frame_id), 255))


def test_each_software_trigger_gives_one_frame(fake_camera: FakeCamera) -> None:
    fake_camera()
    source = open_camera(trigger="software", packet_size_bytes=8000)
    shots: list[Shot] = []
    thread = threading.Thread(target=lambda: shots.extend(source.shots()), daemon=True)
    thread.start()
    time.sleep(0.3)
    assert shots == []
    for number in range(1, 6):
        source.fire()
        assert wait_for(lambda number=number: len(shots) == number)
    time.sleep(0.3)
    assert len(shots) == 5 and steps(shots) == {1}
    assert all(shot.image is not None for shot in shots)
    source.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    with pytest.raises(LineError, match="top"):
        source.fire()


def test_a_camera_that_waits_for_an_input_sends_nothing_by_itself(fake_camera: FakeCamera) -> None:
    fake_camera()
    source = open_camera(trigger="Line0")
    shots: list[Shot] = []
    threading.Thread(target=lambda: shots.extend(source.shots()), daemon=True).start()
    time.sleep(0.5)
    assert shots == []
    with pytest.raises(LineError, match='write trigger = "software"'):
        source.fire()
    source.close()
    assert take(1, trigger="free")[0].image is not None


def test_frames_that_lost_packets_are_shots_without_image(fake_camera: FakeCamera) -> None:
    fake_camera("--gvsp-lost-ratio=2")  # of 1000 packets; a frame has some 190: one in three is hit
    shots = take(60, pixel_format="Mono8", rate_hz=50.0, retention_ms=20.0, **STRAIGHT)
    assert steps(shots) == {1}
    lost = [shot for shot in shots if shot.image is None]
    # 60 frames, each hit with probability 0.3: outside of 1 to 59 with a probability below 1e-9.
    assert 0 < len(lost) < 60
    for shot in shots:
        if shot.image is None:
            assert str(shot.frame_id) in shot.problem
        else:
            np.testing.assert_array_equal(shot.image, ramp(shot.frame_id))


def test_frames_of_which_nothing_arrives_are_missed_by_their_number(fake_camera: FakeCamera) -> None:
    fake_camera("--gvsp-lost-ratio=900")
    # 18 packets a frame: of one in seven (0.9 ** 18), nothing arrives.
    source = open_camera(rate_hz=50.0, packet_size_bytes=16_000, retention_ms=20.0)
    shots = list(itertools.islice(source.shots(), 80))
    source.close()
    # Nobody knows the number of the first ones, of which the first packet was lost.
    numbered = [*itertools.dropwhile(lambda shot: shot.frame_id is None, shots)]
    assert len(numbered) > 20 and steps(numbered) == {1}
    problems = [shot.problem for shot in shots]
    assert any("was lost on its way" in problem for problem in problems)
    assert any("did not arrive whole" in problem for problem in problems)
    assert source.counters()["lost_frames"] >= 80


def test_it_connects_again_when_the_camera_was_off(fake_camera: FakeCamera) -> None:
    process = fake_camera()
    source = open_camera(pixel_format="Mono8", rate_hz=20.0, **STRAIGHT)
    shots: list[Shot] = []
    thread = threading.Thread(target=lambda: shots.extend(source.shots()), daemon=True)
    thread.start()
    assert wait_for(lambda: len(shots) >= 5)
    process.kill()
    process.wait()
    before = len(shots)
    # It was off for a moment, and has forgotten its settings and who controls it.
    fake_camera()
    assert wait_for(lambda: len(shots) >= before + 5), source.counters()
    assert source.counters()["reconnects"] == 1
    again = [shot for shot in shots[-5:] if shot.image is not None]
    assert len(again) == 5 and steps(again) == {1}
    np.testing.assert_array_equal(again[-1].image, ramp(again[-1].frame_id))
    source.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_triggers_that_do_not_reach_the_camera_are_answered(fake_camera: FakeCamera) -> None:
    process = fake_camera()
    source = open_camera(trigger="software")
    shots: list[Shot] = []
    threading.Thread(target=lambda: shots.extend(source.shots()), daemon=True).start()
    process.kill()
    process.wait()
    before_ns = time.monotonic_ns()
    source.fire()
    assert wait_for(lambda: len(shots) == 1)
    assert shots[0].image is None and "trigger" in shots[0].problem
    assert before_ns <= shots[0].trigger_ns == shots[0].exposure_ns  # so it takes no other part
    ended = threading.Event()
    threading.Thread(target=lambda: (source.close(), ended.set()), daemon=True).start()
    assert ended.wait(LIMIT_S / 4)  # a camera that is gone does not hold it up


def test_a_camera_is_not_let_go_of_while_its_loss_is_told(fake_camera: FakeCamera) -> None:
    """Aravis tells of it in a thread that holds the camera, and that the end of the camera waits for: if
    that thread is the last to hold it, GLib aborts the process."""
    process = fake_camera()
    code = (
        "import sys, threading, time\n"
        "from edgead.line.sources.gige import Config, open_source\n"
        "source, told = open_source(Config(device=sys.argv[1]), camera='top'), threading.Event()\n"
        "device = source._connection._camera.get_device()\n"
        "device.connect('control-lost', lambda *_: (time.sleep(5), told.set()))\n"
        "del device\n"
        "threading.Thread(target=lambda: list(source.shots()), daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "while source._connection is not None: time.sleep(0.01)\n"
        "print('told', told.wait(10), flush=True)\n"
        "time.sleep(1)\n"  # enough for an abort
        "print('alive')\n"
    )
    command = [sys.executable, "-c", code, ADDRESS[0]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            process.kill()
            process.wait()
            output, _ = child.communicate(timeout=3 * LIMIT_S)
        finally:
            child.kill()
    assert (child.returncode, output) == (0, "told True\nalive\n")


def test_it_lets_go_of_the_camera(fake_camera: FakeCamera) -> None:
    fake_camera()
    for _ in range(3):
        source = open_camera()
        source.close()
        source.close()
    source = open_camera()
    with pytest.raises(LineError, match="in use by another program"):
        open_camera()
    source.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pixel_format": "BGR8"}, "pixel_format BGR8"),
        ({"exposure_us": 1.0}, "exposure_us is 1, the camera takes 10 to 1e"),
        ({"gain": 11.0}, "gain is 11, the camera takes 0 to 10"),
        ({"trigger": "Line7"}, "trigger Line7: the camera knows free, Line0, software"),
    ],
)
def test_what_the_camera_cannot_do_is_refused(
    fake_camera: FakeCamera, settings: dict, words: str
) -> None:
    fake_camera()
    with pytest.raises(LineError, match=f"camera top: {words}") as caught:
        open_camera(**settings)
    assert take(1)[0].image is not None  # the camera is free again
    assert caught.value.__traceback__ is not None  # although somebody keeps the exception


def test_a_camera_set_to_pixels_that_are_not_supported_says_so(fake_camera: FakeCamera) -> None:
    fake_camera()
    from gi.repository import Aravis

    camera = Aravis.Camera.new(ADDRESS[0])
    camera.set_pixel_format_from_string("Mono16")
    del camera
    with pytest.raises(LineError, match="set to Mono16, .*pixel_format to one of Mono8"):
        open_camera()


def test_a_camera_without_gige_vision_is_refused(program: str) -> None:
    from gi.repository import Aravis

    Aravis.enable_interface("Fake")  # cameras in the process itself
    try:
        with pytest.raises(LineError, match="Aravis Fake 1 is not a GigE Vision camera.*IP address"):
            open_camera(device="Fake_1")
    finally:
        Aravis.disable_interface("Fake")


def test_a_camera_that_is_not_there_is_refused(program: str) -> None:
    if not wait_for(is_free):
        pytest.skip("another program runs a camera at 127.0.0.1:3956")
    with pytest.raises(LineError, match="camera top: device 127.0.0.1"):
        open_camera()


def test_the_clock_of_the_camera_gives_the_exposure(fake_camera: FakeCamera, tmp_path: Path) -> None:
    """The simulated camera stamps the time of day on its frames, and cannot be asked for it. Here its
    description says that it can, and gives an answer that is 8 s ahead."""
    from gi.repository import Aravis, Gio

    # Not asked of the camera: that text has no end, and PyGObject reads on behind it.
    assert Aravis.Camera  # Aravis is loaded on first use, and its resources with it
    path = "/org/aravis/arv-fake-camera.xml"
    description = Gio.resources_lookup_data(path, Gio.ResourceLookupFlags.NONE).get_data().decode()
    latched_ns = time.time_ns() + 8_000_000_000
    nodes = f"""
        <Command Name="TimestampLatch" NameSpace="Standard">
            <pValue>TestRegister</pValue><CommandValue>1</CommandValue>
        </Command>
        <Integer Name="TimestampLatchValue" NameSpace="Standard"><Value>{latched_ns}</Value></Integer>
    """
    assert "TestRegister" in description
    changed = description.replace("</RegisterDescription>", f"{nodes}</RegisterDescription>")
    (tmp_path / "camera.xml").write_text(changed)
    fake_camera("--genicam", str(tmp_path / "camera.xml"))
    before_ns = time.monotonic_ns()
    shots = take(3, rate_hz=50.0)
    after_ns = time.monotonic_ns()
    for shot in shots:
        assert shot.exposure_ns is not None
        # So frames seem to be 8 s older than they are, less what has passed since the answer was fixed.
        assert 0 < shot.trigger_ns - shot.exposure_ns <= 8_000_000_000 + (after_ns - before_ns)
    differences = np.diff([shot.exposure_ns for shot in shots])
    assert (differences > 0).all()


def test_without_aravis_it_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['gi'] = None\n"  # as if it were not there
        "from edgead.line.sources.gige import Config, open_source\n"
        "try: open_source(Config(), camera='top')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("LineError camera top: Aravis 0.8 for Python is missing")
    assert "apt install gir1.2-aravis-0.8" in done.stdout


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"pixel_format": "Mono12"}, "pixel_format"),
        ({"exposure_us": 0.0}, "exposure_us"),
        ({"exposure_us": float("nan")}, "exposure_us"),
        ({"gain": float("inf")}, "gain"),
        ({"trigger": ""}, "trigger"),
        ({"trigger": "software", "rate_hz": 10.0}, "rate_hz"),
        ({"rate_hz": 0.0}, "rate_hz"),
        ({"packet_size_bytes": 10}, "packet_size_bytes"),
        ({"buffers": 1}, "buffers"),
        ({"retention_ms": 0.0}, "retention_ms"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, key: str) -> None:
    with pytest.raises(LineError, match=key):
        Config(**settings)
