"""PyTorch on an NVIDIA GPU: the bundle's own graph in a CUDA graph, for boxes without TensorRT.

The ONNX file is the one that TensorRT gets; `edgead.runtime.onnx_torch` runs it, so that there is no
second definition of a network to keep equal. A slot owns a stream, page-locked host memory and, for each
listed batch size, one CUDA graph: copy in, the network, copy out. A smaller batch is padded up to the
next listed size. Opening takes seconds, because cuDNN tries its kernels for every convolution.

PyTorch's global state is left as it was; but while a slot is being opened, cuDNN's flags are ours, and
another thread that computes with PyTorch at that moment sees them.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.runtime.backend import (
    ANOMALY_MAP,
    CALIBRATION,
    IMAGE,
    SCORE,
    check_graph,
    check_inputs,
    expected_specs,
)
from edgead.runtime.onnx_file import read_graph

if TYPE_CHECKING:
    from edgead.runtime.onnx_torch import Network, Program
    from edgead.runtime.torch_slot import TorchSlot

logger = logging.getLogger(__name__)


class TorchCudaBackend:
    """The graph in PyTorch on one GPU; `infer` and each slot have a stream of their own.

    An FP16 bundle computes in FP16, an FP32 bundle in FP32: without TF32 in convolutions, and in matrix
    products unless the process allowed it for all of PyTorch.
    """

    name = "torch-cuda"

    def __init__(
        self,
        bundle: Bundle,
        *,
        ordinal: int = 0,
        batches: Iterable[int] = (1,),
        graph: bool = True,
        device: str | None = None,
    ) -> None:
        """Copies the weights to the GPU and opens the slot of `infer`, which holds the largest batch.

        Args:
            bundle: A verified bundle.
            ordinal: Which GPU, in PyTorch's order.
            batches: Batch sizes to capture a CUDA graph for.
            graph: False launches the kernels one by one, which shows what the CUDA graph is worth.
            device: "cpu" runs all but streams and CUDA graphs on a machine without a GPU: for tests.

        Raises:
            BackendError: PyTorch or onnx is not installed, PyTorch finds no GPU that it can use, the GPU
                has too little memory, or the graph is refused.
        """
        torch = _import_torch()
        from edgead.runtime.onnx_torch import Network

        self._sizes = _check_batches(batches)
        parsed = read_graph(bundle.model_bytes(), str(bundle.path))
        check_graph(list(parsed.inputs), list(parsed.outputs), bundle.manifest)
        self.precision = bundle.manifest.precision
        self.max_batch: int | None = self._sizes[-1]
        self.inputs, self.outputs = expected_specs(bundle.manifest)
        self._manifest, self._origin, self._uses_graph = bundle.manifest, bundle.path, graph
        self._device = torch.device(device) if device else _open_gpu(torch, ordinal)
        try:
            self._network: Network | None = Network(parsed, self._device)
        except BackendError as error:
            raise self._refusal(error) from error
        self._programs: dict[int, Program] = {}
        self._slots: weakref.WeakSet[TorchSlot] = weakref.WeakSet()
        self._opening, self._inferring = threading.Lock(), threading.Lock()
        self._own = self.open_slot(self._sizes[-1])

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Backend.infer`."""
        self._opened("infer")
        batch = check_inputs(inputs, self.inputs)
        if batch > self._sizes[-1]:
            raise BackendError(
                f"infer: got {batch} images, this back end was opened for at most {self._sizes[-1]}: "
                f"open it with batches=(..., {batch}) or give it fewer images at once"
            )
        with self._inferring:
            self._own.calibrate(inputs[CALIBRATION])
            self._own.images[:batch] = inputs[IMAGE]
            self._own.launch(batch)
            scores, maps = self._own.wait()
            return {SCORE: scores.copy(), ANOMALY_MAP: maps.copy()}

    def open_slot(self, batch: int = 1) -> TorchSlot:
        """See `Backend.open_slot`."""
        is_integer = isinstance(batch, int) and not isinstance(batch, bool)
        if not is_integer or not 1 <= batch <= self._sizes[-1]:
            raise BackendError(
                f"open_slot: batch is {batch!r}, expected an integer from 1 to {self._sizes[-1]}, the "
                "largest of the batches that this back end (torch-cuda) was opened with"
            )
        from edgead.runtime.torch_slot import BUILDING, TorchSlot, building, failure, new_queue

        largest = min(size for size in self._sizes if size >= batch)
        with self._opening:
            network = self._opened("open_slot")
            try:
                with BUILDING, building(self._device):
                    sizes = [size for size in self._sizes if size <= largest]
                    programs = {size: self._program(size, network) for size in sizes}
                    queue = new_queue(self._device, uses_graph=self._uses_graph)
                    slot = TorchSlot(programs, batch, self._manifest, queue)
            except BackendError:
                raise
            except Exception as error:  # torch raises RuntimeError and its kin, AssertionError, OSError
                raise failure(f"opening {self._origin}", error) from error
            self._slots.add(slot)
        return slot

    def close(self) -> None:
        """See `Backend.close`."""
        with self._opening, self._inferring:
            for slot in list(self._slots):
                slot.close()
            self._programs.clear()
            was_open, self._network = self._network is not None, None
            if was_open and self._device.type == "cuda":
                _free_memory()

    def _opened(self, call: str) -> Network:
        if self._network is None:
            raise BackendError(f"{call}: this back end (torch-cuda) is closed")
        return self._network

    def _program(self, size: int, network: Network) -> Program:
        """The graph for one batch size, which all slots share."""
        if size in self._programs:
            return self._programs[size]
        torch = _import_torch()
        shape, values, device = self._manifest.input, self._manifest.calibration.values, self._device
        examples = {
            IMAGE: torch.zeros((size, shape.height, shape.width, 3), dtype=torch.uint8, device=device),
            CALIBRATION: torch.tensor(values, dtype=torch.float32, device=device),
        }
        try:
            program = network.specialise(examples)
        except BackendError as error:
            raise self._refusal(error) from error
        expected = {SCORE: (size,), ANOMALY_MAP: (size, *self._manifest.map_shape)}
        if program.shapes != expected:
            raise self._refusal(f"it gives {program.shapes}, the manifest describes {expected}")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the slots' streams do not wait for this one
        self._programs[size] = program
        return program

    def _refusal(self, reason: object) -> BackendError:
        return BackendError(
            f"torch-cuda refuses the graph of {self._origin}: {reason}. Use the back end onnxruntime"
        )


def _free_memory() -> None:
    """Gives the GPU's memory back to other programs, which PyTorch refuses during a capture."""
    from edgead.runtime.torch_slot import BUILDING

    with BUILDING:
        try:
            _import_torch().cuda.empty_cache()
        except RuntimeError as error:
            logger.warning("torch-cuda: its memory is kept until the process ends: %s", error)


def _import_torch() -> Any:
    try:
        import torch
    except Exception as error:  # OSError, say: one of its shared libraries is missing
        raise BackendError(
            f"back end torch-cuda cannot be imported ({error}): install a CUDA build of PyTorch "
            "(https://pytorch.org/get-started): pip install torch"
        ) from error
    return torch


def _check_batches(batches: Iterable[int]) -> tuple[int, ...]:
    sizes = list(batches)
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise BackendError(f"batches is {sizes}, expected integers >= 1, at least one")
    return tuple(sorted(set(sizes)))


def _open_gpu(torch: Any, ordinal: int) -> Any:
    """The torch device; raises BackendError with the reason if there is none."""
    version = f"PyTorch {torch.__version__}"
    if torch.version.cuda is None:
        raise BackendError(
            f"torch-cuda: {version} was built without CUDA: install a CUDA build of it "
            "(https://pytorch.org/get-started), or use the back end onnxruntime"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"torch-cuda: {version} (CUDA {torch.version.cuda}) finds no NVIDIA GPU that it can use "
            f"({error}). Check the driver with nvidia-smi, and whether the container was given the GPU"
        ) from error
    count = torch.cuda.device_count()
    if not 0 <= ordinal < count:
        raise BackendError(f"torch-cuda: there is no GPU {ordinal}: this machine has {count}, from 0 on")
    return torch.device("cuda", ordinal)
