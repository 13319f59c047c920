"""The TensorRT back end over the fake driver and the fake TensorRT: everything of ours runs for real."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgead
from edgead import BackendError, Bundle
from edgead.errors import CudaError, EngineError
from edgead.flavour import open_flavour
from edgead.runtime import open_backend, replay
from edgead.runtime.cuda import open_device
from edgead.runtime.tensorrt import TensorRTBackend
from tests import fake_tensorrt

# The contracts of all back ends, with the fixture `backend` of this file.
from tests.runtime.test_backends import (  # noqa: F401
    test_a_batch_gives_what_its_images_give,
    test_agrees_with_numpy,
    test_any_memory_layout,
    test_names_and_specs,
    test_replay_of_an_agreeing_back_end,
    test_results_stay_as_they_are,
    test_the_calibration_is_an_input,
    test_wrong_inputs,
)
from tests.runtime.test_slots import (  # noqa: F401
    test_a_batch_that_no_slot_has,
    test_a_closed_slot_keeps_its_arrays,
    test_a_count_that_does_not_fit,
    test_a_slot_gives_what_infer_gives,
    test_nothing_to_wait_for,
    test_one_thread_launches_and_another_waits,
    test_slots_do_not_share_anything,
)

FLAVOURS = ("tensorrt", "tensorrt-rtx")
CALIBRATION = np.array([2.0, 1.0, -0.05], np.float32)


@pytest.fixture(params=FLAVOURS)
def trt(
    request: pytest.FixtureRequest,
    fake_cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Any:
    """The fake TensorRT of one flavour, importable, with an engine cache of its own."""
    module = fake_tensorrt.make(request.param, fake_cuda.library)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("EDGEAD_CACHE", str(tmp_path / "engines"))
    fake_cuda.set_device(name="Fake GPU", major=8, minor=6)
    return module


REAL = [pytest.param(f"real {name}", marks=pytest.mark.gpu) for name in FLAVOURS]


@pytest.fixture(params=["fake tensorrt", "fake tensorrt-rtx", *REAL])
def backend(
    request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """For the contracts: over the fake driver, and over a real GPU where there is one."""
    from edgead.engines.prepare import prepare_engine

    kind, name = request.param.split()
    monkeypatch.setenv("EDGEAD_CACHE", str(tmp_path / "engines"))
    if kind == "fake":
        fake_cuda = request.getfixturevalue("fake_cuda")
        module = fake_tensorrt.make(name, fake_cuda.library)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        fake_cuda.set_device(name="Fake GPU", major=8, minor=6)
    bundle = Bundle.open(tiny_bundle)
    try:
        flavour, device = open_flavour(name), open_device()
    except BackendError:
        pytest.skip(f"needs an NVIDIA GPU and {name}")
    plan = prepare_engine(bundle, flavour, device.info, batches=(1, 2, 5)).plan
    opened = TensorRTBackend(bundle, flavour, device, plan)
    yield opened
    opened.close()


@pytest.fixture
def opened(trt: Any, tiny_bundle: Path) -> Any:
    """Function that makes a back end for these batch sizes; closed at the end of the test."""
    made = []

    def open_for(batches: tuple[int, ...] = (1,), **options: Any) -> TensorRTBackend:
        from edgead.engines.prepare import prepare_engine

        bundle, device = Bundle.open(tiny_bundle), open_device()
        flavour = open_flavour(trt.__name__.replace("_", "-"))
        plan = prepare_engine(bundle, flavour, device.info, batches=batches).plan
        made.append(TensorRTBackend(bundle, flavour, device, plan, **options))
        return made[-1]

    yield open_for
    for backend in made:
        backend.close()
    trt.engines.clear()
    gc.collect()


def infer(backend: Any, images: np.ndarray, calibration: np.ndarray = CALIBRATION) -> tuple[Any, Any]:
    outputs = backend.infer({"image": images, "calibration": calibration})
    return outputs["score"], outputs["anomaly_map"]


def check(backend: Any, images: np.ndarray, tiny: Any, calibration: np.ndarray = CALIBRATION) -> None:
    """Scores and maps are those of NumPy in float64, up to float32 rounding."""
    scores, maps = infer(backend, images, calibration)
    expected_scores, expected_maps = tiny.reference(images, tuple(map(float, calibration)))
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=2e-6)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"cuda_graph": False}], ids=["graph", "no graph"])
@pytest.mark.parametrize("integrated", [False, True], ids=["discrete", "integrated"])
def test_every_batch_up_to_the_largest(
    options: dict[str, Any], integrated: bool, opened: Any, tiny: Any, fake_cuda: Any
) -> None:
    fake_cuda.set_device(name="Fake GPU", major=8, minor=6, integrated=integrated)
    backend = opened((1, 4, 6), **options)
    assert (backend.max_batch, backend.batches, backend.precision) == (6, (1, 4, 6), "fp32")
    for batch in (3, 1, 6, 2, 4, 5, 1):
        check(backend, tiny.frames(batch, spots=True, seed=batch), tiny)
    assert fake_cuda.pageable_copies == 0


def test_a_padded_batch_shows_nothing_of_the_batch_before(opened: Any, tiny: Any) -> None:
    backend = opened((4,))
    check(backend, tiny.frames(4, spots=True, seed=1), tiny)
    scores, maps = infer(backend, tiny.frames(2, spots=False, seed=2))
    assert scores.shape == (2,) and maps.shape == (2, 64, 64)
    check(backend, tiny.frames(3, spots=False, seed=3), tiny)


def test_a_launch_is_one_graph(opened: Any, trt: Any, tiny: Any, fake_cuda: Any) -> None:
    backend = opened()
    infer(backend, tiny.frames(1, spots=True))
    fake_cuda.clear_log()
    infer(backend, tiny.frames(1, spots=True))
    calls = [name for name in fake_cuda.log() if not name.startswith("cuCtx")]
    if trt.__name__ == "tensorrt":
        assert [name for name in calls if "Launch" in name] == ["cuGraphLaunch"]
        assert not any("Memcpy" in name for name in calls)
    else:  # TensorRT for RTX captures by itself: copies around its launch
        assert sum("Memcpy" in name for name in calls) == 2
    assert not any("Alloc" in name or "Create" in name or "Register" in name for name in calls)


def test_rtx_is_told_to_capture_its_kernels(opened: Any, trt: Any) -> None:
    backend = opened()
    slot = backend.open_slot()
    context = slot._contexts[1]
    if trt.__name__ == "tensorrt":
        assert context.config == trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        assert slot._graphs
        return
    config, strategies = context.config, trt.DynamicShapesKernelSpecializationStrategy
    assert config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert config._allocation == trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    assert config._cache is backend.open_slot()._contexts[1].config._cache is not None
    assert not slot._graphs
    plain = opened(cuda_graph=False).open_slot()._contexts[1].config  # but for the graph the same
    assert plain.cuda_graph_strategy == trt.CudaGraphStrategy.DISABLED
    assert plain.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER


def test_slots_are_independent(opened: Any, tiny: Any, fake_cuda: Any) -> None:
    backend = opened((1, 3))
    slots = [backend.open_slot(batch) for batch in (1, 3, 2)]
    fake_cuda.delay_us = 2000
    frames = [tiny.frames(len(slot.images), spots=True, seed=7 + i) for i, slot in enumerate(slots)]
    for slot, images in zip(slots, frames, strict=True):
        slot.images[:] = images
        slot.launch(len(images))
    for slot, images in reversed(list(zip(slots, frames, strict=True))):
        scores, maps = slot.wait()
        expected_scores, expected_maps = tiny.reference(images)
        np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=2e-6)
        np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=2e-6)
    images = slots[0].images
    slots[0].close()
    slots[0].close()
    images[:] = 7  # the array outlives the slot
    with pytest.raises(BackendError, match="closed"):
        slots[0].launch()
    check(backend, tiny.frames(1, spots=True), tiny)


def test_from_many_threads(opened: Any, tiny: Any) -> None:
    backend = opened()
    frames = tiny.frames(8, spots=True, seed=3)
    expected, _ = tiny.reference(frames)
    got = np.zeros(8, np.float32)

    def work(index: int) -> None:
        for _ in range(5):
            got[index] = infer(backend, frames[index : index + 1])[0][0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: infer(b, np.zeros((5, 64, 64, 3), np.uint8)), "--batch 1,4,5"),
        (lambda b: b.open_slot(5), "built for batches of 1,4"),
        (lambda b: b.open_slot(0), "batch of 0"),
        (lambda b: b.open_slot(1).launch(2), "room for 1 to 1"),
        (lambda b: b.open_slot(2).launch(0), "room for 1 to 2"),
        (lambda b: b.open_slot(1).wait(), "nothing was launched"),
        (lambda b: infer(b, np.zeros((1, 32, 64, 3), np.uint8)), "expected image uint8 [N, 64, 64, 3]"),
        (lambda b: infer(b, np.zeros((1, 64, 64, 3), np.float32)), "image is float32"),
        (lambda b: b.open_slot(1).calibrate(np.zeros(1, np.float32)), "calibrate: got float32 [1]"),
        (lambda b: b.open_slot(1).calibrate(np.zeros(3)), "calibrate: got float64 [3]"),
    ],
)
def test_wrong_calls(call: Callable[[Any], Any], message: str, opened: Any, tiny: Any) -> None:
    backend = opened((1, 4))
    with pytest.raises(BackendError) as caught:
        call(backend)
    assert message in str(caught.value)
    check(backend, tiny.frames(1, spots=True), tiny)


def test_a_calibration_that_was_not_copied_is_copied_by_the_next_call(
    opened: Any, fake_cuda: Any
) -> None:
    slot = opened().open_slot(1)
    slot.launch()
    before = float(slot.wait()[0][0])
    other = np.array([1.0, 0.0, 0.25], np.float32)
    fake_cuda.fail("cuMemcpyHtoDAsync", 1, OUT_OF_MEMORY)
    with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
        slot.calibrate(other)
    slot.calibrate(other)
    slot.launch()
    assert float(slot.wait()[0][0]) != before


def test_close(opened: Any) -> None:
    backend = opened()
    slot = backend.open_slot()
    backend.close()
    backend.close()
    images = np.zeros((1, 64, 64, 3), np.uint8)
    for call in (lambda: infer(backend, images), backend.open_slot, slot.launch):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_what_is_dropped_without_close_is_closed(
    trt: Any, tiny: Any, tiny_bundle: Path, fake_cuda: Any
) -> None:
    """As in a notebook: `detector = edgead.load(...)` again and again."""
    from edgead.engines.prepare import prepare_engine

    bundle, flavour = Bundle.open(tiny_bundle), open_flavour(name_of(trt))
    for _ in range(3):
        device = open_device()
        backend = TensorRTBackend(
            bundle, flavour, device, prepare_engine(bundle, flavour, device.info).plan
        )
        check(backend, tiny.frames(1, spots=True), tiny)
        trt.engines.clear()
        del backend, device
        gc.collect()
        end_s = time.monotonic() + 20
        while fake_cuda.count("contexts"):  # another thread does it
            assert time.monotonic() < end_s
            time.sleep(0.01)
        assert not fake_cuda.leaks()


# --- engines that do not fit


def test_an_engine_of_another_bundle(
    trt: Any, tiny: Any, tiny_bundle: Path, make_tiny_model: Any, tmp_path: Path
) -> None:
    flavour = open_flavour(trt.__name__.replace("_", "-"))
    profile = {"image": ((1, 32, 32, 3),) * 3}
    header = fake_tensorrt.Profile()
    header.shapes = profile
    plan = fake_tensorrt._version_header(trt.__version__, [header]) + make_tiny_model(32)
    with pytest.raises(EngineError, match="was not built from this bundle.*32, 32"):
        TensorRTBackend(Bundle.open(tiny_bundle), flavour, open_device(), plan)


def test_bytes_that_are_no_engine(trt: Any, tiny_bundle: Path) -> None:
    flavour = open_flavour(trt.__name__.replace("_", "-"))
    with pytest.raises(EngineError, match="magic tag does not match"):
        TensorRTBackend(Bundle.open(tiny_bundle), flavour, open_device(), b"nonsense")


# --- faults of the device


OUT_OF_MEMORY, DEVICE_UNAVAILABLE, NO_DEVICE, ILLEGAL_ADDRESS, LAUNCH_FAILED = 2, 46, 100, 700, 719


def test_out_of_memory_at_any_allocation_leaks_nothing(opened: Any, fake_cuda: Any, tiny: Any) -> None:
    backend = opened()
    for nth in range(1, 20):
        fake_cuda.fail("cuMemAlloc", nth, OUT_OF_MEMORY)
        try:
            slot = backend.open_slot()
        except CudaError as error:
            assert error.code == "CUDA_ERROR_OUT_OF_MEMORY" and "memory" in str(error)
            assert fake_cuda.count("allocations") == fake_cuda.count("registrations") == 0
            assert fake_cuda.count("streams") == fake_cuda.count("execs") == 0
        else:
            assert nth > 1, "no allocation failed"
            fake_cuda.clear_faults()
            slot.close()
            check(backend, tiny.frames(1, spots=True), tiny)
            return
    raise AssertionError("a slot makes more than 20 allocations")


def test_a_failed_capture_is_ended_and_raised(opened: Any, trt: Any, fake_cuda: Any, tiny: Any) -> None:
    if trt.__name__ != "tensorrt":
        pytest.skip("TensorRT for RTX captures by itself")
    backend = opened()
    fake_cuda.fail("cuLaunchHostFunc", 3, LAUNCH_FAILED)  # two runs before, the third is captured
    with pytest.raises(EngineError, match="could not be started"):
        backend.open_slot()
    assert fake_cuda.count("graphs") == fake_cuda.count("streams") == 0
    check(backend, tiny.frames(1, spots=True), tiny)


@pytest.mark.parametrize("call", ["cuGraphLaunch", "cuStreamSynchronize"])
def test_a_sticky_error_is_clear_and_a_new_back_end_works(
    call: str, opened: Any, trt: Any, fake_cuda: Any, tiny: Any
) -> None:
    if trt.__name__ != "tensorrt" and call == "cuGraphLaunch":
        pytest.skip("TensorRT for RTX launches its graph by itself")
    backend = opened()
    images = backend.open_slot().images
    fake_cuda.fail(call, 1, ILLEGAL_ADDRESS, sticky=True)
    with pytest.raises(CudaError) as caught:
        infer(backend, tiny.frames(1, spots=True))
    assert caught.value.code == "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(BackendError):
        infer(backend, tiny.frames(1, spots=True))
    backend.close()  # resets the context
    images[:] = 3  # host memory is still there
    check(opened(), tiny.frames(1, spots=True), tiny)


# --- the whole way: load, build, prove, cache


def name_of(trt: Any) -> str:
    return str(trt.__name__.replace("_", "-"))


def test_load_builds_once_and_verifies(trt: Any, tiny_bundle: Path, tiny: Any, tmp_path: Path) -> None:
    with edgead.load(tiny_bundle, backend=name_of(trt)) as detector:
        assert (detector.backend, trt.builds) == (name_of(trt), 1)
        assert detector(tiny.frames(1, spots=True)[0]).is_anomalous
        assert trt.engines[-1].runs >= len(tiny.golden.images)
    with edgead.load(tiny_bundle, backend=name_of(trt)) as detector:
        assert trt.builds == 1
        assert not detector(tiny.frames(1, spots=False)[0]).is_anomalous
    assert len(list((tmp_path / "engines").rglob("*.engine"))) == 1


def test_an_engine_with_other_verdicts_is_refused(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    trt.bias = 1.0
    with pytest.raises(EngineError, match="refused.*2 of 4 verdicts differ"):
        edgead.load(tiny_bundle, backend=name_of(trt))
    assert list((tmp_path / "engines").rglob("*.engine")) == []
    trt.bias = 0.0
    with edgead.load(tiny_bundle, backend=name_of(trt)):
        assert trt.builds == 2


def test_auto_takes_it_and_says_why(
    trt: Any, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "edgead.runtime"):
        backend = open_backend(Bundle.open(tiny_bundle))
    assert backend.name == name_of(trt)
    assert "all 4 golden samples" in caplog.text
    backend.close()


def test_auto_passes_over_an_engine_with_other_verdicts(
    trt: Any, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trt.bias = 1.0
    with caplog.at_level(logging.INFO, "edgead.runtime"):
        backend = open_backend(Bundle.open(tiny_bundle), threads=1)
    assert backend.name in ("openvino", "onnxruntime")
    assert f"not {name_of(trt)}: it failed" in caplog.text and "2 of 4 verdicts differ" in caplog.text


def test_a_cached_engine_that_tensorrt_refuses_is_built_again(
    trt: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    edgead.load(tiny_bundle, backend=name_of(trt)).close()
    real, refusals = trt.Runtime.deserialize_cuda_engine, iter([True])

    def once_refused(self: Any, plan: bytes) -> Any:
        return None if next(refusals, False) else real(self, plan)

    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", once_refused)
    edgead.load(tiny_bundle, backend=name_of(trt)).close()
    assert trt.builds == 2 and "building it again" in caplog.text


def test_an_engine_is_not_built_again_for_want_of_memory(
    trt: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edgead.load(tiny_bundle, backend=name_of(trt)).close()
    said = "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"

    def without_memory(self: Any, plan: bytes) -> None:
        self.logger.log(fake_tensorrt.Severity.ERROR, said)

    monkeypatch.setattr(trt.Runtime, "deserialize_cuda_engine", without_memory)
    with pytest.raises(BackendError, match="cannot be loaded(.|\n)*is exhausted(.|\n)*close other GPU"):
        edgead.load(tiny_bundle, backend=name_of(trt))
    assert trt.builds == 1


def test_a_good_engine_outlives_a_start_without_memory(
    trt: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edgead.load(tiny_bundle, backend=name_of(trt)).close()
    with monkeypatch.context() as full:
        full.setattr(trt.Runtime, "deserialize_cuda_engine", lambda self, plan: None)
        full.setattr(trt.Builder, "build_serialized_network", lambda *arguments: None)
        with pytest.raises(EngineError, match="building the engine for sm86 failed"):
            edgead.load(tiny_bundle, backend=name_of(trt))
    builds = trt.builds
    edgead.load(tiny_bundle, backend=name_of(trt)).close()
    assert trt.builds == builds


def test_tensorrt_that_cannot_start(
    trt: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its bindings make a TypeError of CUDA libraries that are newer than the driver."""
    edgead.load(tiny_bundle, backend=name_of(trt)).close()

    def fail(self: Any, logger: Any) -> None:
        logger.log(logger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt.Runtime, "__init__", fail)
    with pytest.raises(BackendError, match=r"cannot start .*nullptr.*\n.*failure with error: 35"):
        edgead.load(tiny_bundle, backend=name_of(trt))
    backend = open_backend(Bundle.open(tiny_bundle), threads=1)
    assert backend.name in ("openvino", "onnxruntime")
    backend.close()
    assert trt.builds == 1 and not list((tmp_path / "engines").rglob("*.corrupt-*"))


def test_a_new_tensorrt_version_rebuilds(
    trt: Any, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edgead.load(tiny_bundle, backend=name_of(trt)).close()
    before, trt.__version__ = trt.__version__, "99.1.2"
    with caplog.at_level(logging.WARNING):
        edgead.load(tiny_bundle, backend=name_of(trt)).close()
    assert trt.builds == 2 and f"TensorRT {before}, now 99.1.2" in caplog.text


def test_no_gpu(trt: Any, tiny_bundle: Path, fake_cuda: Any) -> None:
    fake_cuda.fail("cuInit", 1, NO_DEVICE)
    with pytest.raises(BackendError, match="no CUDA-capable|NO_DEVICE"):
        edgead.load(tiny_bundle, backend=name_of(trt))


def test_replay_over_an_engine(opened: Any, tiny_bundle: Path) -> None:
    result = replay(opened(), Bundle.open(tiny_bundle))
    assert result.ok and result.images == 4


def test_a_hundred_loads_leak_nothing(opened: Any, fake_cuda: Any, tiny: Any) -> None:
    opened().close()
    for _ in range(100):
        backend = opened()
        infer(backend, tiny.frames(1, spots=True))
        backend.close()
        assert fake_cuda.count("streams") == fake_cuda.count("allocations") == 0
        assert fake_cuda.count("registrations") == fake_cuda.count("execs") == 0


# --- the executor over it


def frames_and_scores(tiny: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    frames = np.concatenate([tiny.frames(count // 2, spots=spots, seed=11) for spots in (True, False)])
    return frames, tiny.reference(frames)[0]


def load_executor(trt: Any, bundle: Path, **options: Any) -> edgead.Executor:
    return edgead.Executor.load(bundle, backend=name_of(trt), **options)


def test_ten_thousand_frames_in_order(trt: Any, tiny_bundle: Path, tiny: Any, fake_cuda: Any) -> None:
    frames, scores = frames_and_scores(tiny, 40)
    order: list[int] = []
    with load_executor(trt, tiny_bundle, slots=3) as executor:
        allocations, memory = fake_cuda.count("cuMemAlloc"), fake_cuda.count("bytes")
        futures = []
        for number in range(10_000):
            future = executor.submit(frames[number % 40])
            future.add_done_callback(lambda _, number=number: order.append(number))
            futures.append(future)
        got = np.array([future.result(60).score for future in futures])
        assert fake_cuda.count("cuMemAlloc") == allocations and fake_cuda.count("bytes") == memory
        stats = executor.stats
    assert order == list(range(10_000))
    np.testing.assert_allclose(got, scores[np.arange(10_000) % 40], rtol=0, atol=2e-6)
    assert (stats.submitted, stats.completed, stats.failed, stats.in_flight) == (10_000, 10_000, 0, 0)
    assert fake_cuda.pageable_copies == 0


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("work:host", ILLEGAL_ADDRESS),
        ("work:copy", LAUNCH_FAILED),
        ("cuStreamSynchronize", ILLEGAL_ADDRESS),
    ],
    ids=["kernel", "copy", "wait"],
)
def test_a_fault_in_flight_loses_and_doubles_nothing(
    call: str, code: int, trt: Any, tiny_bundle: Path, tiny: Any, fake_cuda: Any
) -> None:
    frames, scores = frames_and_scores(tiny, 40)
    with load_executor(trt, tiny_bundle, slots=3) as executor:
        fake_cuda.fail(call, 17, code, sticky=True)
        futures = [executor.submit(frame) for frame in frames]
        got = np.array([future.result(60).score for future in futures])
        np.testing.assert_allclose(got, scores, rtol=0, atol=2e-6)
        stats = executor.stats
    assert (stats.completed, stats.failed, stats.recoveries) == (40, 0, 1)
    assert trt.builds == 1  # opened again from the cache


def test_a_fault_reaches_several_executors_and_ends_none(
    trt: Any, tiny_bundle: Path, tiny: Any, fake_cuda: Any
) -> None:
    """They share the GPU's context; only one of them may reset it."""
    frames, scores = frames_and_scores(tiny, 2)
    for _ in range(5):
        with contextlib.ExitStack() as stack:
            all_of_them = [
                stack.enter_context(load_executor(trt, tiny_bundle, slots=2)) for _ in range(3)
            ]
            fake_cuda.fail("work:host", 1, ILLEGAL_ADDRESS, sticky=True)
            with fake_cuda.held():
                futures = [[executor.submit(frame) for frame in frames] for executor in all_of_them]
            for ours in futures:
                got = [future.result(60).score for future in ours]
                np.testing.assert_allclose(got, scores, rtol=0, atol=2e-6)
            for executor in all_of_them:
                assert executor.submit(frames[0]).result(60).is_anomalous


def test_a_device_that_stays_lost_answers_every_frame_with_an_error(
    trt: Any, tiny_bundle: Path, tiny: Any, fake_cuda: Any
) -> None:
    frames, _ = frames_and_scores(tiny, 40)
    with load_executor(trt, tiny_bundle, slots=3) as executor:
        assert executor.submit(frames[0]).result(60).is_anomalous
        fake_cuda.fail("work:host", 1, ILLEGAL_ADDRESS)
        fake_cuda.fail("cuDevicePrimaryCtxRetain", 1, DEVICE_UNAVAILABLE, times=-1)
        with fake_cuda.held():
            futures = [executor.submit(frame) for frame in frames[:3]]
        for future in futures:
            with pytest.raises(BackendError, match="ILLEGAL_ADDRESS.*DEVICE_UNAVAILABLE"):
                future.result(60)
        with pytest.raises(BackendError, match="Load the bundle again"):
            executor.submit(frames[0])
        assert executor.stats.failed == 3


def test_a_camera_writes_into_page_locked_memory(
    trt: Any, tiny_bundle: Path, tiny: Any, fake_cuda: Any
) -> None:
    frames, scores = frames_and_scores(tiny, 4)
    with load_executor(trt, tiny_bundle, slots=2) as executor:
        leases = []
        for frame in frames:
            lease = executor.slot()
            with lease as buffer:
                buffer[:] = frame
            leases.append(lease)
        got = [lease.future.result(60).score for lease in leases]
    np.testing.assert_allclose(got, scores, rtol=0, atol=2e-6)
    assert fake_cuda.pageable_copies == 0


def test_five_hundred_executors_leave_nothing(
    trt: Any, tiny_bundle: Path, tiny: Any, fake_cuda: Any
) -> None:
    load_executor(trt, tiny_bundle).close()
    frame = tiny.frames(1, spots=True)[0]
    sizes = []
    for number in range(500):
        with load_executor(trt, tiny_bundle, slots=1) as executor:
            executor.submit(frame).result(60)
        trt.engines.clear()
        if number % 50 == 49:
            gc.collect()
            assert fake_cuda.leaks() == {}
            sizes.append(resident_kib())
    assert sizes[-1] - sizes[1] < 8 * 1024, f"grows: {sizes} KiB"


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])
