"""One contract for all back ends, the choice between them, and the replay of the golden samples."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead import BackendError, Bundle
from edgead.bundle import Golden
from edgead.manifest import Calibration, InputSpec, OutputSpec, Threshold
from edgead.runtime import BACKENDS, Backend, Flip, TensorSpec, open_backend, replay

# Against a NumPy reference in float64 on values up to 1.5. float32: a few roundings of 6e-8. bfloat16
# keeps 8 bits: the graph subtracts numbers near 1, rounded to 4e-3 each, and multiplies by up to 2.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2}
CALIBRATION = np.array([2.0, 1.0, -0.05], np.float32)


# The contract of a back end: test_tensorrt.py and test_torch_cuda.py run it, too, with a `backend` of
# their own.
CPU_BACKENDS = ("onnxruntime", "openvino")


def need(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module", params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[Backend]:
    need(request.param)
    opened = open_backend(Bundle.open(tiny_bundle), request.param, threads=1)
    yield opened
    opened.close()


def run(
    backend: Backend, images: np.ndarray, calibration: np.ndarray = CALIBRATION
) -> tuple[np.ndarray, np.ndarray]:
    outputs = backend.infer({"image": images, "calibration": calibration})
    assert set(outputs) == {"score", "anomaly_map"}
    return outputs["score"], outputs["anomaly_map"]


def test_names_and_specs(backend: Backend) -> None:
    assert backend.name in BACKENDS
    assert backend.precision in ("fp32", "bf16", "fp16")
    assert backend.inputs == {
        "image": TensorSpec("image", "uint8", (None, 64, 64, 3)),
        "calibration": TensorSpec("calibration", "float32", (3,)),
    }
    assert backend.outputs == {
        "score": TensorSpec("score", "float32", (None,)),
        "anomaly_map": TensorSpec("anomaly_map", "float32", (None, 64, 64)),
    }


@pytest.mark.parametrize("batch", [1, 3])
def test_agrees_with_numpy(batch: int, backend: Backend, tiny: Any) -> None:
    images = tiny.frames(batch, spots=True, seed=5)
    scores, maps = run(backend, images)
    expected_scores, expected_maps = tiny.reference(images)
    assert scores.dtype == maps.dtype == np.float32
    assert scores.shape == (batch,) and maps.shape == (batch, 64, 64)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=TOLERANCE[backend.precision])
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=TOLERANCE[backend.precision])
    assert np.ptp(expected_maps) > 0.5  # the comparison says something


def test_the_calibration_is_an_input(backend: Backend, tiny: Any) -> None:
    images = tiny.frames(2, spots=True)
    for values in ((0.5, 0.0, 0.25), (0.0, 3.0, 0.0)):
        scores, _ = run(backend, images, np.array(values, np.float32))
        expected, _ = tiny.reference(images, values)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE[backend.precision])


def test_a_batch_gives_what_its_images_give(backend: Backend, tiny: Any) -> None:
    images = np.concatenate([tiny.frames(2, spots=False), tiny.frames(3, spots=True)])
    scores, maps = run(backend, images)
    for index in range(len(images)):
        score, anomaly_map = run(backend, images[index : index + 1])
        assert score[0] == pytest.approx(scores[index], abs=1e-6)
        np.testing.assert_allclose(anomaly_map[0], maps[index], rtol=0, atol=1e-6)


def test_results_stay_as_they_are(backend: Backend, tiny: Any) -> None:
    scores, maps = run(backend, tiny.frames(1, spots=True))
    kept = scores.copy(), maps.copy()
    run(backend, tiny.frames(1, spots=False, seed=9))
    assert np.array_equal(scores, kept[0]) and np.array_equal(maps, kept[1])


@pytest.mark.parametrize(
    "view",
    [
        lambda images: images[:, ::-1, ::-1],
        lambda images: np.asfortranarray(images),
        lambda images: np.repeat(images, 2, axis=2)[:, :, ::2],
        lambda images: np.lib.stride_tricks.as_strided(images, writeable=False),
    ],
    ids=["negative strides", "Fortran order", "every second pixel", "read-only"],
)
def test_any_memory_layout(
    view: Callable[[np.ndarray], np.ndarray], backend: Backend, tiny: Any
) -> None:
    odd = view(tiny.frames(2, spots=True))
    scores, maps = run(backend, odd)
    plain_scores, plain_maps = run(backend, np.ascontiguousarray(odd))
    assert np.array_equal(scores, plain_scores) and np.array_equal(maps, plain_maps)


def test_any_thread_may_call(backend: Backend, tiny: Any) -> None:
    images = tiny.frames(8, spots=True)
    expected = [run(backend, image[None])[0][0] for image in images]
    assert len({*map(float, expected)}) == 8  # a score of another thread's image would show

    def work(index: int) -> list[float]:
        return [float(run(backend, images[index : index + 1])[0][0]) for _ in range(50)]

    with ThreadPoolExecutor(8) as pool:
        for index, scores in enumerate(pool.map(work, range(8))):
            assert scores == pytest.approx([expected[index]] * 50, abs=1e-6)


GOOD = np.zeros((2, 64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": GOOD}, "expected ['calibration', 'image']"),
        ({"image": GOOD, "calibration": CALIBRATION, "mask": GOOD}, "got the inputs"),
        ({"picture": GOOD, "calibration": CALIBRATION}, "got the inputs"),
        (
            {"image": GOOD.astype(np.float32), "calibration": CALIBRATION},
            "image is float32 [2, 64, 64, 3], expected",
        ),
        (
            {"image": GOOD, "calibration": CALIBRATION.astype(np.float64)},
            "calibration is float64 [3], expected",
        ),
        ({"image": GOOD, "calibration": CALIBRATION.astype(">f4")}, "calibration is >f4"),
        ({"image": GOOD[0], "calibration": CALIBRATION}, "expected image uint8 [N, 64, 64, 3]"),
        ({"image": GOOD[:, :32], "calibration": CALIBRATION}, "image is uint8 [2, 32, 64, 3]"),
        ({"image": GOOD[..., :1], "calibration": CALIBRATION}, "image is uint8 [2, 64, 64, 1]"),
        ({"image": GOOD, "calibration": CALIBRATION[:2]}, "calibration is float32 [2]"),
        ({"image": GOOD.tolist(), "calibration": CALIBRATION}, "image is list"),
        ({"image": GOOD[:0], "calibration": CALIBRATION}, "the batch is empty"),
    ],
)
def test_wrong_inputs(inputs: dict[str, Any], message: str, backend: Backend) -> None:
    with pytest.raises(BackendError) as caught:
        backend.infer(inputs)
    assert message in str(caught.value)
    run(backend, GOOD)  # still usable


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_close(name: str, tiny_bundle: Path) -> None:
    need(name)
    backend = open_backend(Bundle.open(tiny_bundle), name, threads=1)
    run(backend, GOOD)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        run(backend, GOOD)


def test_two_at_once(backend: Backend, tiny: Any, tmp_path: Path) -> None:
    other_calibration = dataclasses.replace(tiny.manifest.calibration, values=(1.0, 0.0, 0.0))
    other_bundle = Bundle.open(tiny.write(tmp_path / "other.edgead", calibration=other_calibration))
    other = open_backend(other_bundle, backend.name, threads=1)
    images = tiny.frames(1, spots=True)
    before = run(backend, images)
    assert not np.array_equal(run(other, images, np.array([1, 0, 0], np.float32))[1], before[1])
    other.close()
    after = run(backend, images)
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


# --- graphs that do not fit their manifest


@pytest.mark.parametrize("name", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"side_px": 32}, {}, "[N, 32, 32, 3]"),
        ({"batch": 1}, {}, "the graph's inputs are image uint8 [1, 64, 64, 3]"),
        ({"score": "skore"}, {}, "the graph's outputs are"),
        ({}, {"values": (1.0, 2.0)}, "calibration float32 [2]"),
        (b"", {}, "refuses the graph"),
        (b"not a graph", {}, "refuses the graph"),
    ],
    ids=["size", "fixed batch", "output name", "calibration", "empty", "no ONNX"],
)
def test_wrong_graph(
    name: str,
    model: Any,
    changes: dict[str, Any],
    message: str,
    tiny: Any,
    make_tiny_model: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    need(name)
    graph = model if isinstance(model, bytes) else make_tiny_model(**model)
    calibration = tiny.manifest.calibration
    if changes:
        calibration = Calibration(**changes, names=("a", "b"), meaning="x")
    path = tmp_path / "wrong.edgead"
    bundle = Bundle.open(tiny.write(path, model=graph or b"\0", calibration=calibration))
    with pytest.raises(BackendError) as caught:
        open_backend(bundle, name, threads=1)
    assert message in str(caught.value)


def test_another_input_size_is_fine_if_both_agree(
    tiny: Any, make_tiny_model: Callable[..., bytes], tmp_path: Path
) -> None:
    images = tiny.frames(1, spots=True)[:, :32, :32]
    path = tiny.write(
        tmp_path / "small.edgead",
        model=make_tiny_model(32),
        golden=Golden(images, *tiny.reference(images)),
        input=InputSpec(height=32, width=32),
        outputs={"score": OutputSpec(shape=("N",)), "anomaly_map": OutputSpec(shape=("N", 32, 32))},
    )
    bundle = Bundle.open(path)
    for name in CPU_BACKENDS:
        need(name)
        assert replay(open_backend(bundle, name, threads=1), bundle).ok


# --- choice


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_wrong_number_of_threads(threads: Any, tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="threads is"):
        open_backend(Bundle.open(tiny_bundle), threads=threads)


def test_unknown_name(tiny_bundle: Path) -> None:
    with pytest.raises(
        BackendError, match=f"'tensorflow' is unknown; choose one of auto, {', '.join(BACKENDS)}"
    ):
        open_backend(Bundle.open(tiny_bundle), "tensorflow")


def test_auto_takes_openvino_where_it_agrees(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need("openvino")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"auto uses OpenVINO on x86 only, this is {platform.machine()}")
    with caplog.at_level(logging.INFO, "edgead.runtime"):
        assert open_backend(Bundle.open(tiny_bundle), threads=1).name == "openvino"
    assert "back end openvino" in caplog.text and "on all 4 golden samples" in caplog.text


def test_auto_avoids_openvino_where_a_verdict_differs(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need("openvino")
    golden = tiny.golden
    wrong = Golden(golden.images, golden.scores[[0, 1, 2, 0]], golden.maps)  # sample 3 has a spot
    bundle = Bundle.open(tiny.write(tmp_path / "wrong.edgead", golden=wrong))
    with caplog.at_level(logging.INFO, "edgead.runtime"):
        assert open_backend(bundle, threads=1).name == "onnxruntime"
    assert "1 of 4 verdicts differ" in caplog.text
    assert open_backend(bundle, "openvino", threads=1).name == "openvino"  # asked for by name: that one


def run_without(package: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in which a package cannot be imported."""
    block = f"import sys; sys.modules[{package!r}] = None\n"
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


OPEN = """
import sys
from edgead import Bundle, BackendError
from edgead.runtime import open_backend
bundle = Bundle.open(sys.argv[1])
try:
    print(open_backend(bundle, sys.argv[2], threads=1).name)
except BackendError as error:
    print("BackendError:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_signals_after_another_thread_closed_a_backend(name: str, tiny_bundle: Path) -> None:
    """As a line does that took over a new bundle and is then told to stop."""
    need(name)
    code = (
        "import gc, os, signal, sys, threading\n"
        "from edgead import Bundle\n"
        "from edgead.runtime import open_backend\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('told to stop', flush=True))\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        "def renew(held):\n"
        "    new = open_backend(bundle, sys.argv[2], threads=1)\n"
        "    held.pop().close()\n"
        "    gc.collect()\n"
        "    held.append(new)\n"
        "held = [open_backend(bundle, sys.argv[2], threads=1)]\n"
        "for _ in range(2):\n"
        "    thread = threading.Thread(target=renew, args=(held,))\n"
        "    thread.start(); thread.join()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "held.pop().close()\n"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle), name]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "told to stop\n" * 2), ended.stderr


def test_without_openvino(tiny_bundle: Path) -> None:
    assert run_without("openvino", OPEN, tiny_bundle, "auto").stdout.strip() == "onnxruntime"
    asked = run_without("openvino", OPEN, tiny_bundle, "openvino").stdout
    assert (
        asked.startswith("BackendError: back end openvino cannot be imported") and "pip install" in asked
    )


def test_a_folder_that_has_openvinos_name(tiny_bundle: Path) -> None:
    """Python takes it for a package where the real one is not installed."""
    folder = (
        "from importlib.util import module_from_spec; from importlib.machinery import ModuleSpec;"
        " sys.modules['openvino'] = module_from_spec(ModuleSpec('openvino', None, is_package=True))\n"
    )
    assert run_without("nothing", folder + OPEN, tiny_bundle, "auto").stdout.strip() == "onnxruntime"


@pytest.mark.parametrize(
    ("package", "name"),
    [("openvino", "openvino"), ("torch", "torch-cuda"), ("onnx", "torch-cuda"), ("onnxruntime",) * 2],
)
def test_a_broken_library_is_a_reason_and_no_end(
    package: str, name: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Packages raise anything when they are imported: here what one made for NumPy 1 says on NumPy 2."""
    if name == "torch-cuda":
        need("torch")
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AttributeError('no attribute bool')")
    first = f"sys.path.insert(0, {str(tmp_path)!r})\n"
    asked = run_without("nothing", first + OPEN, tiny_bundle, name).stdout
    assert asked.startswith("BackendError") and "cannot be imported (no attribute bool)" in asked
    if package == "openvino":
        assert run_without("nothing", first + OPEN, tiny_bundle, "auto").stdout.strip() == "onnxruntime"


def test_auto_passes_over_a_back_end_that_fails_in_its_own_way(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need("openvino")

    def infer(*_: object) -> None:
        raise TypeError("half updated")

    monkeypatch.setattr(
        "edgead.runtime._why_not", lambda name: "" if name in CPU_BACKENDS else "not now"
    )
    monkeypatch.setattr("edgead.runtime.openvino.OpenVinoBackend.infer", infer)
    with caplog.at_level(logging.INFO, "edgead.runtime"):
        assert open_backend(Bundle.open(tiny_bundle), threads=1).name == "onnxruntime"
    assert "not openvino: it failed (TypeError: half updated)" in caplog.text


def test_without_onnxruntime(tiny_bundle: Path) -> None:
    need("openvino")
    assert run_without("onnxruntime", OPEN, tiny_bundle, "openvino").stdout.strip() == "openvino"
    asked = run_without("onnxruntime", OPEN, tiny_bundle, "onnxruntime").stdout
    assert (
        asked.startswith("BackendError: back end onnxruntime cannot be imported")
        and "pip install" in asked
    )


# --- replay


def test_replay_of_an_agreeing_back_end(backend: Backend, tiny: Any, tiny_bundle: Path) -> None:
    result = replay(backend, Bundle.open(tiny_bundle))
    assert result.ok and result.flips == () and result.images == 4
    assert 0 < result.score_deviation <= TOLERANCE[backend.precision]
    assert 0 < result.map_deviation <= TOLERANCE[backend.precision]
    spread = float(tiny.golden.scores.max()) - float(tiny.golden.scores.min())
    assert result.relative_score_deviation == pytest.approx(result.score_deviation / spread)
    assert result.margin == pytest.approx(np.abs(tiny.golden.scores - 0.4).min(), abs=1e-6)


def test_replay_finds_flips_and_deviations(tiny: Any, tmp_path: Path) -> None:
    golden = tiny.golden
    scores, maps = golden.scores.copy(), golden.maps.copy()
    scores[0], scores[2], maps[1, 7, 9] = 0.5, 0.3, 3.0
    path = tiny.write(tmp_path / "wrong.edgead", golden=Golden(golden.images, scores, maps))
    bundle = Bundle.open(path)
    result = replay(open_backend(bundle, "onnxruntime", threads=1), bundle)
    assert not result.ok
    assert result.flips == (Flip(0, expected=True, got=False), Flip(2, expected=False, got=True))
    assert result.score_deviation == pytest.approx(golden.scores[2] - 0.3, abs=1e-6)
    assert result.map_deviation == pytest.approx(3.0 - golden.maps[1, 7, 9], abs=1e-6)
    assert result.margin == pytest.approx(0.1)


class Constant:
    """A back end that always answers the same; only what `replay` needs."""

    def __init__(self, score: float, value: float) -> None:
        self.score, self.value = score, value

    def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "score": np.full(1, self.score, np.float32),
            "anomaly_map": np.full((1, 64, 64), self.value, np.float32),
        }


@pytest.mark.parametrize(("score", "value"), [(np.nan, 0.0), (np.inf, 0.0), (0.0, np.nan)])
def test_replay_of_numbers_that_are_not_finite_is_never_ok(
    score: float, value: float, tiny_bundle: Path
) -> None:
    result = replay(Constant(score, value), Bundle.open(tiny_bundle))  # type: ignore[arg-type]
    assert not result.ok
    assert np.inf in (result.score_deviation, result.map_deviation)


def test_a_threshold_above_all_scores_does_not_make_the_check_blind(tiny: Any, tmp_path: Path) -> None:
    """5 % of 30 would be as much as the largest golden score: this back end sees nothing at all."""
    high = Threshold(value=30.0, basis="set by hand")
    bundle = Bundle.open(tiny.write(tmp_path / "high.edgead", threshold=high))
    largest = float(tiny.golden.scores.max())
    result = replay(Constant(0.0, 0.0), bundle)  # type: ignore[arg-type]
    assert not result.ok and result.tolerance == pytest.approx(0.05 * largest, rel=0.1)
    assert (result.threshold, result.calibration) == (30.0, (2.0, 1.0, -0.05))


def test_wrong_maps_are_a_fault_even_with_the_right_verdicts(tiny: Any, tmp_path: Path) -> None:
    """A map off by a tenth of the scale of the scores; rounding in bf16 makes less than a hundredth."""
    golden = tiny.golden
    off = 0.1 * max(float(np.ptp(golden.scores)), tiny.manifest.threshold.value)
    wrong = Golden(golden.images, golden.scores, golden.maps + off)
    path = tiny.write(tmp_path / "x.edgead", golden=wrong)
    bundle = Bundle.open(path)
    result = replay(open_backend(bundle, "onnxruntime"), bundle)
    assert not result.flips and not result.ok


def test_replay_without_spread_or_deviation(tiny: Any, tmp_path: Path) -> None:
    images = tiny.golden.images[:1]
    golden = Golden(images, np.array([0.25], np.float32), np.zeros((1, 64, 64), np.float32))
    bundle = Bundle.open(tiny.write(tmp_path / "one.edgead", golden=golden))
    assert replay(Constant(0.25, 0.0), bundle).relative_score_deviation == 0  # type: ignore[arg-type]
    assert replay(Constant(0.26, 0.0), bundle).relative_score_deviation == np.inf  # type: ignore[arg-type]


def test_replay_compares_with_the_threshold_as_the_detector_does(tiny: Any, tmp_path: Path) -> None:
    """In float64: a threshold just above the float32 score must not be rounded down to it."""
    score = float(np.float32(0.1))
    golden = Golden(
        tiny.golden.images[:1], np.array([score], np.float32), np.zeros((1, 64, 64), np.float32)
    )
    threshold = Threshold(value=np.nextafter(score, 1.0), basis="x")
    bundle = Bundle.open(tiny.write(tmp_path / "edge.edgead", golden=golden, threshold=threshold))
    # A wrong rounding makes the golden score anomalous, and every good score a flip.
    assert replay(Constant(score / 2, 0.0), bundle).flips == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(("off", "flips"), [(0.009, 0), (0.011, 1)])
def test_a_threshold_beside_a_golden_score_forgives_rounding_and_no_more(
    tiny: Any, tmp_path: Path, off: float, flips: int
) -> None:
    """As `set_threshold` and `recalibrate` may put it. Spread of the golden scores: 1."""
    scores = np.array([0.0, 0.5, 1.0], np.float32)
    golden = Golden(tiny.golden.images[:3], scores, np.zeros((3, 64, 64), np.float32))
    threshold = Threshold(value=float(np.nextafter(np.float32(0.5), np.float32(1))), basis="x")
    bundle = Bundle.open(tiny.write(tmp_path / "edge.edgead", golden=golden, threshold=threshold))
    answers = iter([0.0, 0.5 + off, 1.0])

    class Rounding(Constant):
        def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.score = next(answers)
            return super().infer(inputs)

    result = replay(Rounding(0.0, 0.0), bundle)  # type: ignore[arg-type]
    assert len(result.flips) == flips and result.ok == (flips == 0)
    assert result.rounded == 1 - flips and bool(result.near) == result.ok
