"""The back end torch-cuda: on the CPU all but streams and CUDA graphs, on an NVIDIA GPU as it is."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from edgead import BackendError, Bundle  # noqa: E402
from edgead.bundle import Golden  # noqa: E402
from edgead.manifest import InputSpec, OutputSpec  # noqa: E402
from edgead.runtime import replay  # noqa: E402
from edgead.runtime.torch_cuda import TorchCudaBackend  # noqa: E402
from edgead.runtime.torch_slot import CudaQueue, HostQueue, TorchSlot, failure  # noqa: E402

# The contracts of all back ends, with the fixture `backend` of this file.
from tests.runtime.test_backends import (  # noqa: E402, F401
    test_a_batch_gives_what_its_images_give,
    test_agrees_with_numpy,
    test_any_memory_layout,
    test_results_stay_as_they_are,
    test_the_calibration_is_an_input,
    test_wrong_inputs,
)
from tests.runtime.test_slots import (  # noqa: E402, F401
    test_a_batch_that_no_slot_has,
    test_a_closed_slot_keeps_its_arrays,
    test_a_count_that_does_not_fit,
    test_a_slot_gives_what_infer_gives,
    test_nothing_to_wait_for,
    test_one_thread_launches_and_another_waits,
    test_slots_do_not_share_anything,
)

CALIBRATION = np.array([2.0, 1.0, -0.05], np.float32)  # of the tiny bundle
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, its driver and a CUDA build of PyTorch")


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str | None:
    """For the argument of the back end."""
    if request.param == "cpu":
        return "cpu"
    request.getfixturevalue("gpu")
    return None


@pytest.fixture(scope="module")
def backend(device: str | None, tiny_bundle: Path) -> Iterator[TorchCudaBackend]:
    opened = TorchCudaBackend(Bundle.open(tiny_bundle), batches=(1, 2, 5), device=device)
    yield opened
    opened.close()


def infer(backend: TorchCudaBackend, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    outputs = backend.infer({"image": images, "calibration": CALIBRATION})
    return outputs["score"], outputs["anomaly_map"]


def test_what_it_says_of_itself(backend: TorchCudaBackend) -> None:
    assert (backend.name, backend.precision, backend.max_batch) == ("torch-cuda", "fp32", 5)
    assert str(backend.inputs["image"]) == "image uint8 [N, 64, 64, 3]"
    assert str(backend.outputs["anomaly_map"]) == "anomaly_map float32 [N, 64, 64]"


def test_replay(backend: TorchCudaBackend, tiny_bundle: Path) -> None:
    result = replay(backend, Bundle.open(tiny_bundle))
    assert result.ok and result.map_deviation < 2e-6


def test_a_batch_above_the_largest(backend: TorchCudaBackend, tiny: Any) -> None:
    with pytest.raises(BackendError, match="got 6 images.* at most 5: open it with batches="):
        infer(backend, tiny.frames(6, spots=False))


def test_close(device: str | None, tiny_bundle: Path, tiny: Any) -> None:
    backend = TorchCudaBackend(Bundle.open(tiny_bundle), device=device)
    slot = backend.open_slot()
    slot.images[:] = tiny.frames(1, spots=True)
    slot.launch()
    backend.close()  # while it is in flight
    backend.close()
    for call, arguments in (
        (infer, (backend, slot.images)),
        (backend.open_slot, ()),
        (slot.launch, ()),
        (slot.wait, ()),
        (slot.calibrate, (CALIBRATION,)),
    ):
        with pytest.raises(BackendError, match="closed"):
            call(*arguments)
    slot.close()


def test_arrays_outlive_everything(device: str | None, tiny_bundle: Path, tiny: Any) -> None:
    backend = TorchCudaBackend(Bundle.open(tiny_bundle), device=device)
    slot = backend.open_slot()
    slot.images[:] = tiny.frames(1, spots=True)
    slot.launch()
    images, (scores, maps) = slot.images, slot.wait()
    backend.close()
    del backend, slot
    gc.collect()
    assert np.array_equal(images, tiny.frames(1, spots=True))
    expected_scores, expected_maps = tiny.reference(images)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=2e-6)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=2e-6)


def test_any_thread_may_infer(backend: TorchCudaBackend, tiny: Any) -> None:
    images = tiny.frames(8, spots=True, seed=11)
    expected = [infer(backend, image[None])[0][0] for image in images]
    found: dict[int, float] = {}

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = infer(backend, images[index : index + 1])[0][0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[index] for index in range(8)] == expected


def test_slots_in_threads_of_their_own(backend: TorchCudaBackend, tiny: Any) -> None:
    images = tiny.frames(6, spots=True, seed=12)
    expected = [infer(backend, image[None])[1][0] for image in images]
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            slot = backend.open_slot(2)  # also opened side by side
            for turn in range(20):
                index = (first + turn) % 5
                count = 1 + turn % 2
                slot.images[:count] = images[index : index + count]
                slot.launch(count)
                maps = slot.wait()[1]
                np.testing.assert_allclose(maps, expected[index : index + count], rtol=0, atol=2e-6)
            slot.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []


def random_bundle(tiny: Any, folder: Path, *, half: bool) -> Bundle:
    """EfficientAD-S with random weights; the golden answers are those of ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    from tests.runtime.test_onnx_torch import random_graph

    content = random_graph("s", half=half)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), np.uint8)
    answers = [session.run(None, {"image": image[None], "calibration": CALIBRATION}) for image in images]
    golden = Golden(images, *(np.concatenate(parts) for parts in zip(*answers, strict=True)))
    path = tiny.write(
        folder / "s.edgead",
        model=content,
        golden=golden,
        precision="fp16" if half else "fp32",
        input=InputSpec(height=256, width=256),
        outputs={"score": OutputSpec(shape=("N",)), "anomaly_map": OutputSpec(shape=("N", 64, 64))},
    )
    return Bundle.open(path)


@pytest.fixture(scope="module")
def efficientad(gpu: None, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In FP16."""
    return random_bundle(tiny, tmp_path_factory.mktemp("efficientad"), half=True)


# Of the range of the map, as in test_onnx_torch: 51 layers in float16 or float32.
NETWORK_TOLERANCE = {True: 3e-3, False: 1e-5}


@pytest.mark.parametrize(
    ("half", "device"),
    [(False, "cpu"), *(pytest.param(half, "cuda", marks=pytest.mark.gpu) for half in (False, True))],
    indirect=["device"],
)  # not FP16 on the CPU: that takes minutes on some, and test_onnx_torch does it once
def test_efficientad(half: bool, device: str | None, tiny: Any, tmp_path: Path) -> None:
    bundle = random_bundle(tiny, tmp_path, half=half)
    golden = bundle.golden()
    backend = TorchCudaBackend(bundle, batches=(2,), device=device)
    assert backend.precision == ("fp16" if half else "fp32") and np.ptp(golden.maps) > 0.5
    scores, maps = infer(backend, golden.images[:1])  # padded to two
    tolerance = NETWORK_TOLERANCE[half] * np.ptp(golden.maps)
    np.testing.assert_allclose(maps, golden.maps[:1], rtol=0, atol=tolerance)
    np.testing.assert_allclose(scores, golden.scores[:1], rtol=0, atol=tolerance)
    backend.close()


# --- what is refused


@pytest.mark.parametrize("batches", [(), (0,), (1, -2), (1.0,), (True,)])
def test_wrong_batches(batches: Any, tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="batches is .* expected integers"):
        TorchCudaBackend(Bundle.open(tiny_bundle), batches=batches, device="cpu")


@pytest.mark.parametrize("batch", [1.0, True, None])
def test_a_batch_that_is_no_number(batch: Any, on_cpu: TorchCudaBackend) -> None:
    with pytest.raises(BackendError, match="expected an integer from 1 to 5"):
        on_cpu.open_slot(batch)


@pytest.mark.parametrize("values", [CALIBRATION[:2], CALIBRATION.astype(np.float64), CALIBRATION[None]])
def test_a_wrong_calibration(values: np.ndarray, on_cpu: TorchCudaBackend) -> None:
    with pytest.raises(BackendError, match="calibrate: got .* expected float32"):
        on_cpu.open_slot().calibrate(values)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"side_px": 32}, "the graph's inputs are image uint8 [N, 32, 32, 3]"),
        ({"batch": 1}, "the graph's inputs are image uint8 [1, 64, 64, 3]"),
        ({"score": "skore"}, "the graph's outputs are skore"),
        (b"not a graph", "wrong.edgead: "),
    ],
)
def test_a_graph_that_is_not_the_manifests(
    model: Any, message: str, tiny: Any, make_tiny_model: Callable[..., bytes], tmp_path: Path
) -> None:
    content = model if isinstance(model, bytes) else make_tiny_model(**model)
    bundle = Bundle.open(tiny.write(tmp_path / "wrong.edgead", model=content))
    with pytest.raises(BackendError) as caught:
        TorchCudaBackend(bundle, device="cpu")
    assert message in str(caught.value)


def changed(content: bytes, edit: Callable[[Any], None]) -> bytes:
    model = onnx.load_from_string(content)
    edit(model.graph)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda graph: setattr(graph.node[5], "op_type", "Mean"), "(Mean, opset 18): the operator Mean"),
        (
            lambda graph: setattr(graph.node[-2], "op_type", "Identity"),
            "it gives {'score': (1, 64), 'anomaly_map': (1, 1, 64, 64)}, the manifest describes",
        ),
    ],
    ids=["operator", "shape"],
)
def test_a_graph_that_cannot_run(
    edit: Callable[[Any], None], message: str, tiny: Any, tmp_path: Path
) -> None:
    def with_one_input(graph: Any) -> None:
        edit(graph)
        node = graph.node[-2]
        if node.op_type == "Identity":
            del node.input[1:]

    path = tiny.write(tmp_path / "wrong.edgead", model=changed(tiny.model, with_one_input))
    with pytest.raises(BackendError) as caught:
        TorchCudaBackend(Bundle.open(path), device="cpu")
    assert str(caught.value).startswith(f"torch-cuda refuses the graph of {path}: ")
    assert message in str(caught.value)


OPEN = """
import sys
from edgead import Bundle, BackendError
from edgead.runtime.torch_cuda import TorchCudaBackend
assert "torch" not in sys.modules or sys.modules["torch"] is None
assert "onnx" not in sys.modules or sys.modules["onnx"] is None
try:
    TorchCudaBackend(Bundle.open(sys.argv[1]), device="cpu")
except BackendError as error:
    print("BackendError:", error)
"""


@pytest.mark.parametrize("package", ["torch", "onnx"])
def test_without_a_package(package: str, tiny_bundle: Path) -> None:
    block = f"import sys; sys.modules[{package!r}] = None\n"
    command = [sys.executable, "-c", block + OPEN, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("BackendError: "), done.stderr
    assert "cannot be imported" in done.stdout and f"pip install {package}" in done.stdout


def test_a_build_of_torch_without_cuda(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match="was built without CUDA: install a CUDA build"):
        TorchCudaBackend(Bundle.open(tiny_bundle))


def test_a_machine_without_a_gpu(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    with pytest.raises(BackendError, match="finds no NVIDIA GPU.* nvidia-smi"):
        TorchCudaBackend(Bundle.open(tiny_bundle))


# --- a slot on a queue that shows what happens to it


class Recorder(HostQueue):
    """Computes when it is waited for, like a GPU that is slow, or fails as told."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[str] = []
        self.pending: list[Callable[[], object]] = []
        self.fault: str | None = None
        self.prepared = 0

    def prepare(self, work: Callable[[], object]) -> Callable[[], object]:
        self.prepared += 1
        number = self.prepared

        def run() -> None:
            self.events.append(f"run {number}")
            work()

        return run

    def launch(self, work: Callable[[], object]) -> None:
        if self.fault:
            raise RuntimeError(self.fault)
        self.events.append("launch")
        self.pending.append(work)

    def wait(self) -> None:
        if self.fault:
            raise RuntimeError(self.fault)
        while self.pending:
            self.pending.pop(0)()

    def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def on_cpu(tiny_bundle: Path) -> TorchCudaBackend:
    return TorchCudaBackend(Bundle.open(tiny_bundle), batches=(1, 2, 5), device="cpu")


@pytest.fixture
def slot(recorder: Recorder, on_cpu: TorchCudaBackend, tiny: Any) -> TorchSlot:
    """Room for 4 images, over graphs for 1, 2 and 5."""
    return TorchSlot(on_cpu._programs, 4, tiny.manifest, recorder)


@pytest.mark.parametrize(("count", "graph"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_a_batch_is_padded_to_the_next_graph(
    count: int, graph: int, slot: TorchSlot, recorder: Recorder, tiny: Any
) -> None:
    images = tiny.frames(count, spots=True)
    assert slot.images.shape == (4, 64, 64, 3) and recorder.prepared == 3
    slot.images[:] = 255
    slot.images[:count] = images
    slot.launch(count)
    scores, maps = slot.wait()
    assert recorder.events == ["launch", f"run {graph}"]
    expected_scores, expected_maps = tiny.reference(images)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=2e-6)
    np.testing.assert_allclose(maps, expected_maps, rtol=0, atol=2e-6)


def test_a_launch_does_not_wait(slot: TorchSlot, recorder: Recorder, tiny: Any) -> None:
    slot.images[0] = tiny.frames(1, spots=True)[0]
    slot.launch()
    assert recorder.events == ["launch"]
    with pytest.raises(BackendError, match="in flight"):
        slot.launch()
    slot.wait()
    slot.launch()
    slot.wait()


def test_the_calibration_is_copied_when_it_changes(
    slot: TorchSlot, recorder: Recorder, tiny: Any
) -> None:
    slot.calibrate(CALIBRATION.copy())
    assert recorder.events == []
    values = np.array([1.0, 0.0, 0.5], np.float32)
    slot.calibrate(values)
    slot.calibrate(values.copy())
    assert recorder.events == ["launch"]
    values[:] = 9  # the caller's own
    slot.images[0] = tiny.frames(1, spots=True)[0]
    slot.launch()
    expected, _ = tiny.reference(slot.images[:1], (1.0, 0.0, 0.5))
    assert slot.wait()[0] == pytest.approx(expected, abs=2e-6)


def test_a_slot_is_closed_once(slot: TorchSlot, recorder: Recorder) -> None:
    slot.close()
    slot.close()
    assert recorder.events == ["close"]


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore", "take fewer slots or smaller batches"),
        ("CUDA error: out of memory\nCUDA kernel errors might", "free GPU memory"),
        ("CUDA error: no kernel image is available", "no code for this GPU"),
        ("CUDA error: an illegal memory access was encountered", "in this process, restart it"),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "EXECUTION_FAILED"),
    ],
)
def test_faults_of_the_device(fault: str, remedy: str, slot: TorchSlot, recorder: Recorder) -> None:
    recorder.fault = fault
    values = np.zeros(3, np.float32)
    for call in (slot.launch, lambda: slot.calibrate(values)):
        with pytest.raises(BackendError) as caught:
            call()
        assert fault.splitlines()[0] in str(caught.value) and remedy in str(caught.value)
        assert "might" not in str(caught.value) and "more" not in str(caught.value)
    recorder.fault = None
    slot.launch()
    recorder.fault = fault
    with pytest.raises(BackendError, match="torch-cuda: wait failed"):
        slot.wait()
    recorder.fault = None
    slot.launch()  # the slot itself is whole, and the failed calibration is not taken for set
    slot.wait()
    recorder.events.clear()
    slot.calibrate(values)
    assert recorder.events == ["launch"]


def test_a_failed_capture_says_what_broke_it() -> None:
    try:
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("capture was invalidated")
    except RuntimeError as error:
        text = str(failure("opening x.edgead", error))
    assert "invalidated (after CUDA error: operation not permitted when stream is capturing)" in text


# --- the calls that a GPU gets, as far as they can be seen without one


class FakeCuda:
    """Stands in for torch.cuda and notes every call in `calls`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current: list[str] = ["default"]
        self.is_capturing = False
        self.breaks_capture = False
        self.deals = itertools.count()

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current[0]
        self.current[0] = stream.name
        try:
            yield
        finally:
            self.current[0] = before

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, *, pool: str, stream: FakeStream, capture_error_mode: str) -> Any:
        """Leaves its stream current after an exception, as the real one may."""
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        before, self.current[0] = self.current[0], stream.name
        self.calls.append("capture")
        self.is_capturing = True
        yield
        self.is_capturing = False
        self.current[0] = before
        self.calls.append("captured")

    def work(self) -> None:
        assert self.current[0] != "default"
        if self.is_capturing and self.breaks_capture:
            raise RuntimeError("operation not permitted")
        self.calls.append("work")


class FakeStream:
    def __init__(self, cuda: FakeCuda, device: Any) -> None:
        self.cuda, self.name = cuda, f"stream on {device}"
        self.cuda_stream = 1000 + next(cuda.deals) % 32  # in turn, as PyTorch does

    def synchronize(self) -> None:
        self.cuda.calls.append("synchronize stream")


class FakeEvent:
    def __init__(self, cuda: FakeCuda, *, blocking: bool) -> None:
        assert blocking
        self.cuda = cuda

    def record(self, stream: FakeStream) -> None:
        self.cuda.calls.append(f"record on {stream.name}")

    def synchronize(self) -> None:
        self.cuda.calls.append("synchronize event")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.calls.append(f"replay on {self.cuda.current[0]}")

    def reset(self) -> None:
        self.cuda.calls.append("reset")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name, stand_in in {
        "Stream": functools.partial(FakeStream, fake),
        "Event": functools.partial(FakeEvent, fake),
        "CUDAGraph": functools.partial(FakeGraph, fake),
        "graph": fake.graph,
        "stream": fake.stream,
        "graph_pool_handle": lambda: "pool",
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return fake


def test_the_calls_of_a_queue(cuda: FakeCuda) -> None:
    queue = CudaQueue(torch.device("cuda", 0), uses_graph=True)
    work = queue.prepare(cuda.work)
    assert cuda.calls == ["work"] * 3 + ["synchronize stream", "capture", "work", "captured"]
    cuda.calls.clear()
    queue.launch(work)
    queue.wait()
    queue.close()
    queue.close()
    stream = "stream on cuda:0"
    assert cuda.calls[:3] == [f"replay on {stream}", f"record on {stream}", "synchronize event"]
    assert cuda.calls[3:] == ["synchronize stream", "reset", "synchronize stream"]
    assert cuda.current == ["default"]


def test_a_capture_that_fails_leaves_no_stream_behind(cuda: FakeCuda) -> None:
    cuda.breaks_capture = True
    queue = CudaQueue(torch.device("cuda", 0), uses_graph=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        queue.prepare(cuda.work)
    assert cuda.current == ["default"]
    queue.close()
    assert "reset" not in cuda.calls


def test_no_two_queues_share_a_stream(cuda: FakeCuda) -> None:
    """PyTorch has 32; with one for two, a capture would take in what the other one launches."""
    device = torch.device("cuda", 0)
    kept = CudaQueue(device, uses_graph=True)
    for _ in range(100):
        passing = CudaQueue(device, uses_graph=True)
        assert passing._stream.cuda_stream != kept._stream.cuda_stream
        passing.close()
    dropped = [CudaQueue(device, uses_graph=True) for _ in range(31)]
    assert len({queue._stream.cuda_stream for queue in (kept, *dropped)}) == 32
    with pytest.raises(BackendError, match="all 32 streams of PyTorch are taken.*close some"):
        CudaQueue(device, uses_graph=True)
    del dropped
    CudaQueue(device, uses_graph=True).close()
    kept.close()


def test_the_callers_settings_change_no_number(tiny: Any, tiny_bundle: Path) -> None:
    feeds = {"image": tiny.frames(1, spots=True), "calibration": CALIBRATION}

    def scores() -> np.ndarray:
        backend = TorchCudaBackend(Bundle.open(tiny_bundle), device="cpu")
        try:
            return backend.infer(feeds)["anomaly_map"]
        finally:
            backend.close()

    expected = scores()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(scores(), expected)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = scores()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_torch_has_what_a_gpu_needs() -> None:
    """The signatures of this version of PyTorch, with and without CUDA."""
    parameters = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"cuda_graph", "pool", "stream", "capture_error_mode"} <= set(parameters)
    assert "blocking" in inspect.signature(torch.cuda.Event.__new__).parameters
    flags = inspect.signature(torch.backends.cudnn.flags).parameters
    assert {"enabled", "benchmark", "deterministic", "allow_tf32"} <= set(flags)
    arguments = torch.ops.aten.cudnn_convolution_relu.default._schema.arguments
    names = [argument.name for argument in arguments]
    assert names == ["self", "weight", "bias", "stride", "padding", "dilation", "groups"]


# --- what only a GPU shows


@pytest.mark.gpu
def test_with_and_without_a_cuda_graph(gpu: None, efficientad: Bundle) -> None:
    images = efficientad.golden().images
    graph, direct = (TorchCudaBackend(efficientad, graph=graph) for graph in (True, False))
    tolerance = 2e-3 * np.ptp(efficientad.golden().maps)  # cuDNN may choose other kernels
    for image in images:
        first, second = (infer(backend, image[None])[1] for backend in (graph, direct))
        np.testing.assert_allclose(first, second, rtol=0, atol=tolerance)
    graph.close()
    direct.close()


@pytest.mark.gpu
def test_graphs_of_one_slot_share_memory_and_nothing_else(gpu: None, efficientad: Bundle) -> None:
    """Large, small, large again: a graph must not read what another one left behind."""
    backend = TorchCudaBackend(efficientad, batches=(1, 2, 3))
    slot = backend.open_slot(3)
    images = efficientad.golden().images
    expected = efficientad.golden().maps
    for count in (3, 1, 2, 3, 2, 1):
        slot.images[:count] = images[:count]
        slot.launch(count)
        _, maps = slot.wait()
        np.testing.assert_allclose(maps, expected[:count], rtol=0, atol=3e-3 * np.ptp(expected))
    backend.close()


@pytest.mark.gpu
def test_torch_is_left_as_it_was_and_memory_is_given_back(gpu: None, efficientad: Bundle) -> None:
    def flags() -> list[Any]:
        cudnn = torch.backends.cudnn
        stream = torch.cuda.current_stream()
        return [cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, stream]

    TorchCudaBackend(efficientad).close()  # what torch itself keeps from the first use on
    gc.collect()
    flags_before, bytes_before = flags(), torch.cuda.memory_allocated()
    backend = TorchCudaBackend(efficientad)
    slots = [backend.open_slot() for _ in range(3)]
    assert torch.from_numpy(slots[0].images).is_pinned()
    backend.close()
    del backend
    gc.collect()
    assert flags() == flags_before
    assert torch.cuda.memory_allocated() <= bytes_before + (1 << 20)


@pytest.mark.gpu
def test_a_gpu_that_is_not_there(gpu: None, tiny_bundle: Path) -> None:
    with pytest.raises(BackendError, match="there is no GPU 99"):
        TorchCudaBackend(Bundle.open(tiny_bundle), ordinal=99)


@pytest.mark.gpu
def test_too_little_memory(gpu: None, efficientad: Bundle) -> None:
    free, _ = torch.cuda.mem_get_info()
    batch = free // (128 * 253 * 253 * 2)  # the first layer of one image alone, twice over
    with pytest.raises(BackendError, match="take fewer slots or smaller batches"):
        TorchCudaBackend(efficientad, batches=(batch,))
    gc.collect()  # the traceback holds what was allocated
    TorchCudaBackend(efficientad).close()  # and nothing stays behind
