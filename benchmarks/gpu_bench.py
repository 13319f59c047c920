"""What the sections of the GPU acceptance run share: how much to measure, on what, and opened back ends.

The one place that knows how each back end is opened in a variant (engine batches, CUDA graph on or off)
and what lies below its slots.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.flavour import NAMES as TENSORRT
from edgead.image import list_images, read_image, resize
from edgead.manifest import RESIZE_IN_GRAPH
from edgead.runtime import GPU_BACKENDS, Backend, Slot, open_backend
from edgead.runtime.backend import CALIBRATION, IMAGE

if TYPE_CHECKING:
    from edgead.models.efficientad import EfficientAD

LARGE_PX = 900  # frames of the whole detector call


class NotMeasured(Exception):
    """Something cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Effort:
    """How much is measured. The defaults are the acceptance run; `QUICK` only shows that it works.

    Attributes:
        calls, warmup: Of single calls for the latency.
        detector_calls: Of the whole call of a detector on a large frame.
        images: The most images that are compared with the reference.
        batches: Of the throughput, and of the engines built for it.
        slots: In flight together, for the throughput.
        cell_s, settle_s: Counted time of one throughput, and the time before it.
        gaps: Idle gap in seconds and how often it is measured.
        rounds: Of five calls of each, for the overhead and for the naive deployment.
        memory_s, memory_every_s: Continuous inference, and how often memory is read.
        energy_s, idle_s: At saturation, and idle.
        matmul: Side, products in a group, groups.
    """

    calls: int = 10_000
    warmup: int = 200
    detector_calls: int = 1_000
    images: int = 200
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    slots: tuple[int, ...] = (1, 2, 3, 4)
    cell_s: float = 2.0
    settle_s: float = 0.3
    gaps: tuple[tuple[float, int], ...] = ((0, 200), (0.01, 200), (0.1, 50), (1.0, 9), (5.0, 5))
    rounds: int = 400
    memory_s: float = 300.0
    memory_every_s: float = 1.0
    energy_s: float = 20.0
    idle_s: float = 10.0
    matmul: tuple[int, int, int] = (8192, 20, 10)


QUICK = Effort(
    calls=20,
    warmup=2,
    detector_calls=5,
    images=6,
    batches=(1, 2, 4),
    slots=(1, 2),
    cell_s=0.05,
    settle_s=0.02,
    gaps=((0, 3), (0.01, 3), (0.05, 3)),
    rounds=2,
    memory_s=0.5,
    memory_every_s=0.1,
    energy_s=0.2,
    idle_s=0.1,
    matmul=(512, 2, 2),
)


@dataclass(frozen=True, eq=False)
class Images:
    """What is inspected.

    Attributes:
        source: Where the images come from; no path.
        frames: uint8 [N, H, W, 3] RGB at the size of the graph's input.
        large: uint8 [K, h, w, 3] RGB, what a camera would give to the detector.
    """

    source: str
    frames: np.ndarray
    large: np.ndarray


def read_images(bundle: Bundle, folder: Path | None, most: int) -> Images:
    """Images of a folder, at equal distances, or rendered pictures of a demo tray; seeded."""
    if folder is not None:
        paths = list_images(folder)
        if not paths:
            raise NotMeasured("the folder of --images holds no images")
        taken = np.linspace(0, len(paths) - 1, min(len(paths), most)).round().astype(int)
        chosen = [paths[index] for index in taken]
        return _fit(bundle, chosen, f"{len(chosen)} of the {len(paths)} images of the folder given")
    from edgead.training.demo_data import render_demo

    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "tray"
        good = (most + 1) // 2
        render_demo(root, seed=0, train=1, good=good, defective=most - good)
        paths = list_images(root / "test")
        return _fit(bundle, paths, f"{len(paths)} rendered pictures of the demo data set, seed 0")


def _fit(bundle: Bundle, paths: list[Path], source: str) -> Images:
    frame = bundle.manifest.input
    read = [read_image(path) for path in paths]
    frames = np.stack([resize(image, frame.height, frame.width) for image in read])
    if frame.resize == RESIZE_IN_GRAPH:
        return Images(source, frames, frames[:8])
    return Images(source, frames, np.stack([resize(image, LARGE_PX, LARGE_PX) for image in read[:8]]))


@dataclass
class Bench:
    """One back end under test.

    Attributes:
        bundle: What runs.
        name: Of the back end.
        effort: How much is measured.
        images: What is inspected.
        model: The networks in the bundle, FP32, if it was made here.
        engines: Folder for engines that are built for this run, apart from those that a line uses.
        best: Batch and slots of its highest throughput so far, if that was measured.
        built: The engines that were used, by their batches.
    """

    bundle: Bundle
    name: str
    effort: Effort
    images: Images
    model: EfficientAD | None
    engines: Path
    best: dict[str, Any] | None = None
    built: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        return self.name in GPU_BACKENDS

    @property
    def calibration(self) -> np.ndarray:
        return np.array(self.bundle.manifest.calibration.values, np.float32)

    def feeds(self, count: int = 16) -> list[dict[str, np.ndarray]]:
        """Inputs of `infer` for single frames, which take turns."""
        frames = self.images.frames[:count]
        return [{IMAGE: frame[None].copy(), CALIBRATION: self.calibration} for frame in frames]

    @contextmanager
    def open(self, batches: tuple[int, ...] = (1,), *, graph: bool = True) -> Iterator[Any]:
        """The back end for these batches, closed afterwards; `graph` False is without a CUDA graph."""
        backend = self.open_unmanaged(batches, graph=graph)
        try:
            yield backend
        finally:
            backend.close()

    def open_unmanaged(self, batches: tuple[int, ...] = (1,), *, graph: bool = True) -> Backend:
        """As `open`, for an executor, which closes it."""
        if self.name in TENSORRT:
            return _open_tensorrt(self, batches, graph=graph)
        if self.name == "torch-cuda":
            from edgead.runtime.torch_cuda import TorchCudaBackend

            return TorchCudaBackend(self.bundle, batches=batches, graph=graph)
        if not graph:
            raise NotMeasured(f"{self.name} has no CUDA graph that could be switched off")
        return open_backend(self.bundle, self.name)

    @contextmanager
    def slots(self, backend: Backend, count: int, batch: int) -> Iterator[list[Slot]]:
        """Open slots that hold images, closed afterwards."""
        opened: list[Slot] = []
        try:
            for index in range(count):
                slot = backend.open_slot(batch)
                opened.append(slot)
                for place in range(batch):  # not all the same, and never zeros: those run faster
                    image = self.images.frames[(index * batch + place) % len(self.images.frames)]
                    slot.images[place] = image
            yield opened
        finally:
            for slot in opened:
                slot.close()

    @property
    def best_cell(self) -> tuple[int, int, str]:
        """Batch and slots of the highest throughput measured so far, and where they come from."""
        if self.best:
            return self.best["batch"], self.best["slots"], "the best of the section throughput"
        return min(8, self.effort.batches[-1]), 2, "a guess: the section throughput was not measured"


def _open_tensorrt(bench: Bench, batches: tuple[int, ...], *, graph: bool) -> Backend:
    """As `open_backend`, for chosen batches, in a cache of its own for each set of them."""
    from edgead.engines.prepare import accept, prepare_engine
    from edgead.flavour import open_flavour
    from edgead.runtime.cuda import open_device
    from edgead.runtime.open_tensorrt import prove
    from edgead.runtime.tensorrt import TensorRTBackend

    flavour, device = open_flavour(bench.name), open_device()
    label = ",".join(map(str, batches))
    folder = bench.engines / f"batch-{label.replace(',', '-')}"
    try:
        prepared = prepare_engine(bench.bundle, flavour, device.info, batches=batches, folder=folder)
        origin = prepared.sidecar
        bench.built[label] = {"bytes": origin.size_bytes, "build_s": origin.seconds, "utc": origin.utc}
        backend = TensorRTBackend(bench.bundle, flavour, device, prepared.plan, cuda_graph=graph)
    except BaseException:
        device.close()
        raise
    if not prepared.verified:
        try:
            accept(prepared, prove(backend, bench.bundle))
        except BaseException:
            backend.close()
            raise
    return backend


def describe(backend: Backend) -> dict[str, Any]:
    """What was opened: library versions, GPU and engine; no figure of speed."""
    found: dict[str, Any] = {"precision": backend.precision, "max_batch": backend.max_batch}
    flavour: Any = getattr(backend, "flavour", None)
    device: Any = getattr(backend, "device", None)
    if flavour is not None:
        found |= {"tensorrt": flavour.name, "tensorrt_version": flavour.version}
        found["cuda_graph_by"] = "TensorRT" if getattr(backend, "captures_itself", False) else "edgead"
    info = getattr(device, "info", None)
    if info is not None:
        found |= {"gpu": dataclasses.asdict(info), "cuda_layer": device.layer}
    if backend.name == "torch-cuda":
        import torch

        cudnn = torch.backends.cudnn.version()
        found |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "cudnn": cudnn}
    return found


def device_memory(backend: Backend) -> Callable[[], int] | None:
    """A function that gives the bytes in use on the whole device; None for a CPU."""
    device: Any = getattr(backend, "device", None)
    if hasattr(device, "memory_info"):

        def used() -> int:
            free, total = device.memory_info()
            return int(total - free)

        return used
    if backend.name == "torch-cuda":
        import torch

        if not torch.cuda.is_available():
            return None

        def used_by_torch() -> int:
            free, total = torch.cuda.mem_get_info()
            return int(total - free)

        return used_by_torch
    return None


@contextmanager
def bare_launch(slot: Any) -> Iterator[tuple[Callable[[], object], str]]:
    """The device's own launch of one image of a slot, and its synchronisation, without edgead.

    Yields:
        The call, and what it is.

    Raises:
        NotMeasured: This slot has nothing below it that could be called by itself.
    """
    device, stream = getattr(slot, "_device", None), getattr(slot, "_stream", None)
    graph = getattr(slot, "_graphs", {}).get(1)
    queue: Any = getattr(slot, "_queue", None)
    if device is not None and graph is not None:

        def launch() -> None:
            device.launch_graph(graph, stream)
            device.synchronize_stream(stream)

        yield launch, "cuGraphLaunch and cuStreamSynchronize through the CUDA layer"
    elif device is not None:

        def enqueue() -> None:
            slot._enqueue(1)
            device.synchronize_stream(stream)

        yield enqueue, "copies, execute_async_v3 (TensorRT captures its graph), cuStreamSynchronize"
    elif hasattr(queue, "_stream"):
        import torch

        replay, own = slot._launches[0], queue._stream

        def replay_and_wait() -> None:
            replay()
            own.synchronize()

        with torch.cuda.stream(own):  # where a replay goes; once, not in the loop
            yield replay_and_wait, "CUDAGraph.replay and Stream.synchronize of torch"
    else:
        raise NotMeasured("there is no device launch below this back end's slots")


def check_names(names: list[str], known: tuple[str, ...], option: str) -> None:
    """Raises BackendError for a name that does not exist."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BackendError(f"{option}: {', '.join(unknown)} is unknown; choose of {', '.join(known)}")


def pdn_size(method: str) -> str | None:
    """ "s" or "m" of an EfficientAD method; None for others."""
    found = re.fullmatch(r"efficientad-([sm])", method)
    return found[1] if found else None
