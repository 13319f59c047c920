"""The slots of the back end torch-cuda: buffers, streams and CUDA graphs.

This module imports torch; `edgead.runtime.torch_cuda` alone imports it, inside functions.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from edgead.errors import BackendError
from edgead.manifest import Manifest
from edgead.runtime.backend import (
    ANOMALY_MAP,
    CALIBRATION,
    IMAGE,
    SCORE,
    TensorSpec,
    check_calibration,
)
from edgead.runtime.onnx_torch import Program

BUILDING = threading.Lock()  # one capture at a time in a process, and cuDNN's flags belong to it, too
_STREAMS = 32  # c10/cuda/CUDAStream.h: kStreamsPerPool
_WARM_UPS = 3  # whatever initialises itself on first use must have done so before a capture
_RESTART = "PyTorch cannot use the GPU again in this process, restart it"
_REMEDIES = {
    "out of memory": (
        "free GPU memory (nvidia-smi names who holds it), or take fewer slots or smaller batches"
    ),
    "no kernel image": "this build of PyTorch has no code for this GPU, install one that has",
    "cuda error": _RESTART,
    "internal assert": _RESTART,  # after a capture that failed
}

logger = logging.getLogger(__name__)
Work = Callable[[], object]


class Queue(Protocol):
    """Where a slot's work runs, in order.

    Attributes:
        device: A torch device.
        is_pinned: Host memory should be page-locked.
    """

    device: Any
    is_pinned: bool

    def prepare(self, work: Work) -> Work:
        """Warms the work up and returns what to launch in its place."""
        ...

    def launch(self, work: Work) -> None:
        """Starts it."""
        ...

    def wait(self) -> None:
        """Waits for all that was launched."""
        ...

    def close(self) -> None:
        """Waits, and frees what was prepared."""
        ...


class TorchSlot:
    """See `edgead.runtime.backend.Slot`."""

    def __init__(
        self, programs: Mapping[int, Program], batch: int, manifest: Manifest, queue: Queue
    ) -> None:
        """Allocates all memory and prepares the launch of every program, which are keyed by batch size.

        Raises:
            RuntimeError: What torch raises.
        """
        rows, size, device = max(programs), manifest.input, queue.device
        shape = (rows, size.height, size.width, 3)
        host: Any = {"device": "cpu", "pin_memory": queue.is_pinned}
        images = torch.zeros(shape, dtype=torch.uint8, **host)
        scores = torch.zeros(rows, dtype=torch.float32, **host)
        maps = torch.zeros((rows, *manifest.map_shape), dtype=torch.float32, **host)
        # These views keep the memory of the tensors: they stay readable after `close`.
        self.images: np.ndarray = images.numpy()[:batch]
        self._scores, self._maps = scores.numpy(), maps.numpy()
        self._values = np.array(manifest.calibration.values, np.float32)
        self._calibration = torch.from_numpy(self._values.copy()).to(device)
        inputs = {
            IMAGE: torch.empty(shape, dtype=torch.uint8, device=device),
            CALIBRATION: self._calibration,
        }
        prepared = {
            count: queue.prepare(_work(programs[count], count, images, inputs, scores, maps))
            for count in sorted(programs)
        }
        self._launches: list[Work] | None = [
            next(work for size, work in prepared.items() if size >= count)
            for count in range(1, batch + 1)
        ]
        # A CUDA graph knows addresses, not tensors: the weights are in the programs.
        self._held: list[object] = [inputs, programs]
        self._queue = queue
        self._count = 0

    def calibrate(self, values: np.ndarray) -> None:
        """See `Slot.calibrate`; copies to the device only when the values change."""
        self._opened("calibrate")
        check_calibration(values, TensorSpec(CALIBRATION, "float32", self._values.shape))
        if np.array_equal(values, self._values):
            return
        copied = values.copy()
        try:
            self._queue.launch(lambda: self._calibration.copy_(torch.from_numpy(copied)))
            self._queue.wait()
        except RuntimeError as error:
            raise failure("calibrate", error) from error
        self._values = copied

    def launch(self, count: int = 1) -> None:
        """See `Slot.launch`."""
        launches = self._opened("launch")
        if self._count:
            raise BackendError("launch: this slot is in flight; wait for it first")
        if not 1 <= count <= len(launches):
            raise BackendError(f"launch: count is {count}, this slot has room for {len(launches)}")
        try:
            self._queue.launch(launches[count - 1])
        except RuntimeError as error:
            raise failure("launch", error) from error
        self._count = count

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Slot.wait`."""
        self._opened("wait")
        if not self._count:
            raise BackendError("wait: nothing was launched in this slot (torch-cuda)")
        count = self._count
        try:
            self._queue.wait()
        except RuntimeError as error:
            raise failure("wait", error) from error
        finally:
            self._count = 0
        return self._scores[:count], self._maps[:count]

    def close(self) -> None:
        """See `Slot.close`."""
        if self._launches is not None:
            self._queue.close()
            self._launches, self._calibration = None, None
            self._held.clear()

    def _opened(self, call: str) -> list[Work]:
        """What can be launched."""
        if self._launches is None:
            raise BackendError(f"{call}: this slot (torch-cuda) is closed")
        return self._launches


def _work(
    program: Program,
    count: int,
    images: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    scores: torch.Tensor,
    maps: torch.Tensor,
) -> Work:
    """Copy in, run the network, copy out, for the first `count` images."""
    images, scores, maps = images[:count], scores[:count], maps[:count]
    inputs = {**inputs, IMAGE: inputs[IMAGE][:count]}

    def work() -> None:
        inputs[IMAGE].copy_(images, non_blocking=True)
        outputs = program(inputs)
        scores.copy_(outputs[SCORE], non_blocking=True)
        maps.copy_(outputs[ANOMALY_MAP], non_blocking=True)

    return work


def new_queue(device: torch.device, *, uses_graph: bool) -> Queue:
    """The queue for this device; `uses_graph` matters on a GPU only."""
    return CudaQueue(device, uses_graph) if device.type == "cuda" else HostQueue(device)


class HostQueue:
    """On the CPU, at once."""

    is_pinned = False

    def __init__(self, device: torch.device) -> None:
        self.device: Any = device

    def prepare(self, work: Work) -> Work:
        """See `Queue`."""
        work()
        return work

    def launch(self, work: Work) -> None:
        """See `Queue`."""
        work()

    def wait(self) -> None:
        """See `Queue`."""

    def close(self) -> None:
        """See `Queue`."""


_streams: set[int] = set()  # of the queues that are open


def _own_stream(device: torch.device) -> tuple[torch.cuda.Stream, int]:
    """A stream that no other queue has, and its handle. PyTorch deals the same 32 in turn.

    With one for two, a capture would take in what the other queue launches meanwhile.

    Raises:
        BackendError: All are taken.
    """
    for _ in range(_STREAMS):
        stream = torch.cuda.Stream(device)
        handle = int(stream.cuda_stream)
        if handle not in _streams:
            _streams.add(handle)
            return stream, handle
    raise BackendError(
        f"torch-cuda: all {_STREAMS} streams of PyTorch are taken by open slots of this process: close"
        " some of them"
    )


class CudaQueue:
    """A stream on a GPU, and the CUDA graphs that were captured on it."""

    is_pinned = True

    def __init__(self, device: torch.device, uses_graph: bool) -> None:
        self.device: Any = device
        self._uses_graph = uses_graph
        self._stream, handle = _own_stream(device)
        self._release_stream = weakref.finalize(self, _streams.discard, handle)
        self._done = torch.cuda.Event(blocking=True)  # a wait sleeps rather than spins
        # Graphs of one slot share memory: each writes before it reads, and one runs at a time.
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[Any] = []

    def prepare(self, work: Work) -> Work:
        """See `Queue`; `BUILDING` is held and `building` entered."""
        # torch.cuda.graph leaves its stream current if a capture fails; this block puts it back.
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                work()
            self._stream.synchronize()
            if not self._uses_graph:
                return lambda: self._launch_kernels(work)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        self._graphs.append(graph)
        return graph.replay

    def _launch_kernels(self, work: Work) -> None:
        with BUILDING, building(self.device):
            work()

    def launch(self, work: Work) -> None:
        """See `Queue`."""
        with torch.cuda.stream(self._stream):
            work()
            self._done.record(self._stream)

    def wait(self) -> None:
        """See `Queue`; without the GIL."""
        self._done.synchronize()

    def close(self) -> None:
        """See `Queue`."""
        try:
            self._stream.synchronize()
        except RuntimeError as error:
            logger.warning("torch-cuda: a slot is closed after a failure of the device: %s", error)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._release_stream()


@contextlib.contextmanager
def building(device: torch.device) -> Iterator[None]:
    """Inside, on a GPU: cuDNN tries its kernels, and float32 convolutions keep their full precision."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    flags = cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False)
    with torch.cuda.device(device), flags:
        yield


def failure(doing: str, error: Exception) -> BackendError:
    """What torch reported, and what to do about it."""
    text = f"{type(error).__name__}: {_first_line(error)}"
    if error.__context__ is not None:  # the end of a capture hides what broke it
        text += f" (after {_first_line(error.__context__)})"
    remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in text.lower()), "")
    told = BackendError(f"torch-cuda: {doing} failed: {text}{'. To go on: ' if remedy else ''}{remedy}")
    told.is_sticky = remedy == _RESTART
    return told


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
