"""From frame to verdict: the tiny graph in ONNX Runtime is exact enough to compare with NumPy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgead
from edgead import BackendError, Bundle, BundleError, DataError, Detector, EdgeADError
from edgead.errors import CudaError
from edgead.image import resize
from edgead.manifest import RESIZE_IN_GRAPH, InputSpec


@pytest.fixture
def detector(tiny_bundle: Path) -> Iterator[Detector]:
    with edgead.load(tiny_bundle, backend="onnxruntime", threads=1) as loaded:
        yield loaded


def test_scores_and_verdicts(detector: Detector, tiny: Any) -> None:
    frames = [*tiny.frames(2, spots=False, seed=7), *tiny.frames(2, spots=True, seed=8)]
    scores, maps = tiny.reference(np.stack(frames))
    for frame, score, anomaly_map, spot in zip(
        frames, scores, maps, (False, False, True, True), strict=True
    ):
        result = detector(frame)
        assert result.score == pytest.approx(float(score), abs=2e-6)
        np.testing.assert_allclose(result.anomaly_map, anomaly_map, rtol=0, atol=2e-6)
        assert result.is_anomalous is spot and result.threshold == 0.4
    assert (detector.backend, detector.precision, detector.manifest.name) == (
        "onnxruntime",
        "fp32",
        "blob",
    )


def test_a_result_outlives_later_calls_and_the_detector(detector: Detector, tiny: Any) -> None:
    first, second = tiny.frames(1, spots=True)[0], tiny.frames(1, spots=False)[0]
    result = detector(first)
    kept = result.anomaly_map.copy()
    detector(second)
    first[:] = 0
    detector.close()
    assert np.array_equal(result.anomaly_map, kept)


def test_frames_of_another_size_are_resized_on_the_host(detector: Detector, tiny: Any) -> None:
    frame = np.kron(tiny.frames(1, spots=True)[0], np.ones((3, 2, 1), np.uint8))[:, 5:]
    assert frame.shape == (192, 123, 3)
    assert detector(frame).score == detector(resize(frame, 64, 64)).score


def test_colour_order_grey_and_memory_layout(detector: Detector, tiny: Any) -> None:
    frame = tiny.frames(1, spots=True)[0]
    expected = detector(frame).score
    assert detector(np.ascontiguousarray(frame[..., ::-1]), color="bgr").score == expected
    assert detector(np.asfortranarray(frame)).score == expected
    grey = frame[..., 1]
    assert (
        detector(grey).score
        == detector(grey[..., None]).score
        == detector(np.stack([grey] * 3, -1)).score
    )


def test_a_graph_that_resizes_accepts_one_size(tiny: Any, tmp_path: Path) -> None:
    path = tiny.write(
        tmp_path / "b.edgead", input=InputSpec(height=64, width=64, resize=RESIZE_IN_GRAPH)
    )
    detector = edgead.load(path, backend="onnxruntime", threads=1)
    detector(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(DataError, match=r"480x640 px .* for frames of 64x64 px"):
        detector(np.zeros((480, 640, 3), np.uint8))


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((64, 64, 3)),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((0, 64, 3), np.uint8),
        [[1, 2], [3, 4]],
        None,
    ],
)
def test_what_is_not_a_frame(frame: Any, detector: Detector) -> None:
    with pytest.raises(DataError):
        detector(frame)
    with pytest.raises(DataError, match="frame 1: "):
        detector.predict_batch([np.zeros((64, 64, 3), np.uint8), frame])


# --- batches


@pytest.mark.parametrize("count", [0, 1, 16, 17, 40])
def test_a_batch_gives_what_single_calls_give(count: int, detector: Detector, tiny: Any) -> None:
    frames = list(tiny.frames(count, spots=True))
    results = detector.predict_batch(frames)
    assert len(results) == count
    for frame, result in zip(frames, results, strict=True):
        assert result.score == pytest.approx(detector(frame).score, abs=1e-6)
        assert result.elapsed_ms > 0


def test_a_batch_may_be_a_generator_of_mixed_sizes(detector: Detector, tiny: Any) -> None:
    frame = tiny.frames(1, spots=True)[0]
    frames = [frame, frame[:50], frame[..., 0], np.repeat(frame, 3, axis=0)]
    results = detector.predict_batch(frame for frame in frames)
    assert [result.score for result in results] == pytest.approx(
        [detector(frame).score for frame in frames]
    )
    stacked = detector.predict_batch(np.stack([frame, frame]))
    assert [result.score for result in stacked] == pytest.approx([detector(frame).score] * 2)


def test_a_batch_holds_few_frames_at_once(detector: Detector) -> None:
    alive: set[int] = set()
    most = 0

    class Frame(np.ndarray):
        def __del__(self) -> None:
            alive.discard(id(self))

    def frames() -> Iterator[np.ndarray]:
        nonlocal most
        for _ in range(80):
            frame = np.zeros((64, 64, 3), np.uint8).view(Frame)
            alive.add(id(frame))
            most = max(most, len(alive))
            yield frame

    assert len(detector.predict_batch(frames())) == 80
    assert most <= 2  # the one being inspected and the one being made


def test_the_time_of_the_generator_is_not_counted(detector: Detector) -> None:
    def slow() -> Iterator[np.ndarray]:
        for _ in range(2):
            time.sleep(0.05)
            yield np.zeros((64, 64, 3), np.uint8)

    start = time.perf_counter()
    results = detector.predict_batch(slow())
    total_ms = (time.perf_counter() - start) * 1e3
    assert sum(result.elapsed_ms for result in results) <= total_ms - 100


def test_one_frame_is_not_a_batch(detector: Detector) -> None:
    for array in (np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)):
        with pytest.raises(DataError, match="for one frame call the detector itself"):
            detector.predict_batch(array)


# --- threshold


def test_the_threshold_is_live(detector: Detector, tiny: Any) -> None:
    frame = tiny.frames(1, spots=True)[0]
    score = detector(frame).score
    detector.threshold = score
    assert detector(frame).is_anomalous and detector(frame).threshold == score
    detector.threshold = np.nextafter(score, 2)
    assert not detector(frame).is_anomalous
    assert not detector.predict_batch([frame])[0].is_anomalous
    assert detector.manifest.threshold.value == 0.4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "high", None, [1.0]])
def test_the_threshold_must_be_finite(value: Any, detector: Detector) -> None:
    with pytest.raises(ValueError, match="expected a finite number") as caught:
        detector.threshold = value
    assert isinstance(caught.value, EdgeADError)
    assert detector.threshold == 0.4


# --- failures


@pytest.mark.parametrize("sign", [1, -1], ids=["score and map", "map alone"])
def test_numbers_that_are_not_finite_give_no_verdict(sign: int, tiny: Any, tmp_path: Path) -> None:
    """A calibration near the largest float32 overflows in the graph where there is a spot."""
    calibration = replace(tiny.manifest.calibration, values=(3e38 * sign, 3e38 * sign, 2.5e38 * sign))
    path = tiny.write(tmp_path / "overflow.edgead", calibration=calibration)
    with edgead.load(path, backend="onnxruntime", threads=1) as detector:
        with pytest.raises(BackendError, match="there is no verdict"):
            detector(tiny.frames(1, spots=True)[0])
        frames = [*tiny.frames(18, spots=False), *tiny.frames(1, spots=True)]
        with pytest.raises(BackendError, match="frame 18: .*there is no verdict"):
            detector.predict_batch(frames)


def test_a_failing_device_in_a_batch(tiny_bundle: Path) -> None:
    """An error of CUDA has a code and cannot be made of a text alone."""

    class Lost:
        name, precision = "lost", "fp32"

        def infer(self, inputs: object) -> None:
            raise CudaError("cuLaunchKernel failed: reset the GPU", "CUDA_ERROR_LAUNCH_FAILED")

    lost = Detector(Bundle.open(tiny_bundle), Lost())  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="predict_batch: frame 0: cuLaunchKernel failed") as caught:
        lost.predict_batch([np.zeros((64, 64, 3), np.uint8)])
    assert isinstance(caught.value.__cause__, CudaError)


def test_a_closed_detector(tiny_bundle: Path, tiny: Any) -> None:
    frame = tiny.frames(1, spots=False)[0]
    with edgead.load(tiny_bundle, backend="onnxruntime", threads=1) as detector:
        detector(frame)
    detector.close()
    with pytest.raises(BackendError, match="closed"):
        detector(frame)
    with pytest.raises(BackendError, match="closed"):
        detector.predict_batch([frame])


def test_load_names_what_is_wrong(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="none.edgead"):
        edgead.load(tmp_path / "none.edgead")
    with pytest.raises(BackendError, match="unknown"):
        edgead.load(tiny_bundle, backend="cpu")


# --- threads


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_eight_threads_give_what_one_gives(backend: str, tiny: Any, tiny_bundle: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    frames = [*tiny.frames(16, spots=True), *tiny.frames(16, spots=False)]
    with edgead.load(tiny_bundle, backend=backend, threads=1) as detector:
        expected = [detector(frame) for frame in frames]
        start = threading.Barrier(8)

        def work(offset: int) -> list[edgead.Result]:
            start.wait()
            order = frames[offset:] + frames[:offset]
            results = (
                [detector(frame) for frame in order] if offset % 2 else detector.predict_batch(order)
            )
            return results[len(frames) - offset :] + results[: len(frames) - offset]

        with ThreadPoolExecutor(8) as pool:
            for results in pool.map(work, range(8)):
                for result, single in zip(results, expected, strict=True):
                    assert result.score == pytest.approx(single.score, abs=1e-6)
                    np.testing.assert_allclose(result.anomaly_map, single.anomaly_map, rtol=0, atol=1e-6)


def test_closing_while_others_call(tiny: Any, tiny_bundle: Path) -> None:
    detector = edgead.load(tiny_bundle, backend="onnxruntime", threads=1)
    frame = tiny.frames(1, spots=False)[0]
    called = threading.Event()

    def work() -> str:
        while True:
            try:
                detector(frame)
                called.set()
            except BackendError as error:
                return str(error)

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work) for _ in range(4)]
        assert called.wait(30)
        detector.close()
        assert all("closed" in worker.result(30) for worker in workers)


def test_what_the_package_offers() -> None:
    assert edgead.__version__.count(".") == 2
    for name in edgead.__all__:
        assert getattr(edgead, name) is not None and name in dir(edgead)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        edgead.laod  # noqa: B018


def test_a_detector_does_not_keep_the_file_in_memory(tiny_bundle: Path) -> None:
    detector = edgead.load(tiny_bundle, backend="onnxruntime", threads=1)
    assert not any(isinstance(value, Bundle | bytes) for value in vars(detector).values())
    detector.close()
