"""TensorRT on an NVIDIA GPU, classic and "for RTX": an engine, and slots that keep it busy.

Everything is allocated when a slot is opened: page-locked host arrays, device memory, one execution
context per batch size of the engine. Shapes and addresses are set once. A launch is one CUDA graph:
copy in, all kernels, copy out. TensorRT for RTX captures its kernels itself (its vendor's way), the
copies are then enqueued around it. On a GPU that shares its memory with the CPU (Jetson) there are no
copies: the engine reads and writes the host arrays.

One execution context = one stream = one slot. Every call makes the primary CUDA context current in the
calling thread, so that any thread may come.
"""

from __future__ import annotations

import _thread
import logging
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError, CudaError, EngineError
from edgead.flavour import Flavour, blames_device, failure
from edgead.manifest import Manifest
from edgead.runtime.backend import (
    ANOMALY_MAP,
    CALIBRATION,
    IMAGE,
    SCORE,
    TensorSpec,
    check_calibration,
    check_graph,
    check_inputs,
    expected_specs,
)
from edgead.runtime.cuda import Device, HostBuffer

_ALIGNMENT_BYTES = 256  # of tensors that share one allocation; TensorRT asks for this much

logger = logging.getLogger(__name__)


class TensorRTBackend:
    """An engine on a GPU. Any thread may call it; it owns the device that it was given."""

    def __init__(
        self, bundle: Bundle, flavour: Flavour, device: Device, plan: bytes, *, cuda_graph: bool = True
    ) -> None:
        """Loads an engine.

        Args:
            plan: The engine, built from this bundle. It is native code in effect: whoever calls has
                checked its SHA-256 (`edgead.engines.prepare`).
            cuda_graph: False enqueues copies and kernels one by one, to measure what a graph saves.

        Raises:
            EngineError: TensorRT refuses the engine, or it is not of this bundle.
            BackendError: TensorRT cannot start, or the device failed or has too little memory.
        """
        self.name = flavour.name
        self.precision = bundle.manifest.precision
        self.inputs, self.outputs = expected_specs(bundle.manifest)
        self.device, self.flavour = device, flavour
        self._manifest = bundle.manifest
        self._has_strategies = hasattr(flavour.module, "CudaGraphStrategy")
        self.captures_itself = cuda_graph and self._has_strategies
        self._capture = cuda_graph and not self.captures_itself
        self._lock = threading.Lock()
        self._slots: list[TensorRTSlot] = []
        self._own: TensorRTSlot | None = None  # of `infer`, opened on its first call
        self._is_lost = self._is_closed = False
        self._engine: Any = None
        self._runtime: Any = None
        self._kernels: Any = None  # of TensorRT for RTX, compiled at run time
        self._log = flavour.new_log()
        try:
            device.make_current()
            self._runtime = flavour.new_runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                error = failure(f"the engine for {bundle.path} cannot be loaded", self._log)
                raise BackendError(str(error)) if blames_device(str(error)) else error
            self.batches = _check_engine(self._engine, bundle.manifest)
            self.max_batch: int | None = self.batches[-1]
        except BaseException:
            self.close()
            raise

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Backend.infer`."""
        with self._lock:
            self._check_open("infer")
            batch = check_inputs(inputs, self.inputs)
            self._check_batch(batch)
            if self._own is None:  # an executor never needs it
                self._own = self.open_slot(self.batches[-1])
            np.copyto(self._own.images[:batch], inputs[IMAGE])
            self._own.calibrate(inputs[CALIBRATION])
            self._own.launch(batch)
            scores, maps = self._own.wait()
            return {SCORE: scores.copy(), ANOMALY_MAP: maps.copy()}

    def open_slot(self, batch: int = 1) -> TensorRTSlot:
        """See `Backend.open_slot`."""
        self._check_open("open_slot")
        self._check_batch(batch)
        slot = TensorRTSlot(self, self._manifest, batch, capture=self._capture)
        self._slots.append(slot)
        return slot

    def close(self) -> None:
        """See `Backend.close`. A CUDA context that a fault has made unusable is reset."""
        with self._lock:  # an inference in progress ends first
            for slot in list(self._slots):
                slot.close()
            if self._is_closed:
                return
            self._is_closed = True
            try:
                self.device.make_current()  # TensorRT frees device memory when its objects go
            except CudaError:
                self._is_lost = True
            self._engine = self._kernels = None
            self._runtime = None
            try:
                self.device.reset() if self._is_lost else self.device.close()
            except CudaError as error:
                logger.warning("closing %s: %s", self.name, error)

    def __del__(self) -> None:
        """Closes what was dropped without it: the driver would keep memory that Python gives back.

        In another thread, without waiting: this one may be in the middle of anything, such as a capture.
        """
        if not self.__dict__.get("_is_closed", True) and not sys.is_finalizing():
            _thread.start_new_thread(self.close, ())

    def _forget(self, slot: TensorRTSlot) -> None:
        if slot in self._slots:
            self._slots.remove(slot)

    def _check_open(self, where: str) -> None:
        if self._engine is None:
            raise BackendError(f"{where}: this back end ({self.name}) is closed; load the bundle again")

    def _check_batch(self, batch: int) -> None:
        if not 1 <= batch <= self.batches[-1]:
            raise BackendError(
                f"batch of {batch}: this engine was built for batches of {_listed(self.batches)}. "
                f"Build it for more: edgead build X.edgead --batch {_listed((*self.batches, batch))}"
            )

    def _create_context(self) -> Any:
        """An execution context; of TensorRT for RTX one that captures its kernels in a CUDA graph."""
        trt = self.flavour.module
        # Each works with one profile: by default it would take memory for the largest of all.
        memory = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._has_strategies:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(memory)
            if self.captures_itself:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # Kernels for the one shape of a context now, not in the background of the first inferences.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            if self._kernels is None:  # else each context would compile them for itself
                self._kernels = config.create_runtime_cache()
            config.set_runtime_cache(self._kernels)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(memory)
        if context is None:
            raise failure("no execution context can be made for the engine", self._log)
        return context


class TensorRTSlot:
    """See `Slot`. Made by `TensorRTBackend.open_slot`."""

    def __init__(
        self, backend: TensorRTBackend, manifest: Manifest, batch: int, *, capture: bool
    ) -> None:
        self._backend, self._device = backend, backend.device
        self._stream = 0
        self._graphs: dict[int, int] = {}
        self._contexts: dict[int, Any] = {}
        self._device_blocks: list[int] = []
        self._host: list[HostBuffer] = []
        self._count = 0
        # A smaller batch is padded to the next size that the engine has, so buffers hold that size.
        self._sizes = [size for size in backend.batches if size < batch]
        self._sizes.append(min(size for size in backend.batches if size >= batch))
        room = self._sizes[-1]
        self._image_shape = (manifest.input.height, manifest.input.width, 3)
        self._image_bytes = int(np.prod(self._image_shape))
        self._map_bytes = 4 * int(np.prod(manifest.map_shape))
        self._map_offset = -(-4 * room // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        try:
            self._device.make_current()
            self._stream = self._device.create_stream()
            self._allocate(room, manifest, batch)
            for size in self._sizes:
                self._prepare(size, capture=capture)
        except BaseException as error:
            self._note(error)
            self.close()
            raise

    def calibrate(self, values: np.ndarray) -> None:
        """See `Slot.calibrate`. Copies only when the values change."""
        self._check_open("calibrate")
        check_calibration(values, self._backend.inputs[CALIBRATION])
        if np.array_equal(values, self._calibration):
            return
        before = self._calibration.copy()
        self._calibration[:] = values
        try:
            self._device.make_current()
            self._upload_calibration()
        except CudaError as error:
            self._calibration[:] = before  # the next call has to copy
            self._note(error)
            raise

    def launch(self, count: int = 1) -> None:
        """See `Slot.launch`."""
        self._check_open("launch")
        if not 1 <= count <= len(self.images):
            raise BackendError(f"launch: {count} images, this slot has room for 1 to {len(self.images)}")
        size = next(size for size in self._sizes if size >= count)
        try:
            self._device.make_current()
            if size in self._graphs:
                self._device.launch_graph(self._graphs[size], self._stream)
            else:
                self._enqueue(size)
        except BackendError as error:
            self._note(error)
            raise
        self._count = count

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Slot.wait`."""
        self._check_open("wait")
        if not self._count:
            raise BackendError("wait: nothing was launched in this slot")
        count, self._count = self._count, 0
        try:
            self._device.make_current()
            self._device.synchronize_stream(self._stream)
        except CudaError as error:
            self._note(error)
            raise
        return self._scores[:count], self._maps[:count]

    def close(self) -> None:
        """See `Slot.close`."""
        stream, self._stream = self._stream, 0
        if not stream:
            return
        self._backend._forget(self)
        if not self._backend._is_lost:  # else everything goes with the CUDA context
            self._free(stream)
        self._contexts.clear()

    def _allocate(self, room: int, manifest: Manifest, batch: int) -> None:
        device, is_mapped = self._device, self._device.info.is_integrated
        out_bytes = self._map_offset + room * self._map_bytes
        calibration = np.array(manifest.calibration.values, np.float32)
        for nbytes in (room * self._image_bytes, calibration.nbytes, out_bytes):
            buffer = device.alloc_host(nbytes, mapped=is_mapped)
            self._host.append(buffer)
            if not is_mapped:
                self._device_blocks.append(device.alloc(nbytes))
        host_in, host_calibration, host_out = (buffer.array for buffer in self._host)
        host_in[:] = 0
        self.images = host_in.reshape(room, *self._image_shape)[:batch]
        self._calibration = host_calibration.view(np.float32)
        self._scores = host_out[: 4 * room].view(np.float32)
        maps = host_out[self._map_offset :].view(np.float32)
        self._maps = maps.reshape(room, *manifest.map_shape)
        # What the engine reads and writes: its own memory, or the host's where both are the same.
        self._addresses = (
            [buffer.device_address for buffer in self._host] if is_mapped else self._device_blocks
        )
        self._calibration[:] = calibration
        self._upload_calibration()

    def _upload_calibration(self) -> None:
        if self._device_blocks:
            source = self._host[1]
            self._device.copy_to_device(
                self._device_blocks[1], source.address, source.array.nbytes, self._stream
            )
        self._device.synchronize_stream(self._stream)

    def _prepare(self, size: int, *, capture: bool) -> None:
        """Makes the context for one batch size and captures its graph, if we are to."""
        backend, stream = self._backend, self._stream
        context = self._contexts[size] = backend._create_context()
        image, calibration, outputs = self._addresses
        try:
            steps = [
                # Profile 0 is set when the context is made.
                (profile := backend.batches.index(size)) == 0
                or context.set_optimization_profile_async(profile, stream),
                context.set_input_shape(IMAGE, (size, *self._image_shape)),
                context.set_tensor_address(IMAGE, image),
                context.set_tensor_address(CALIBRATION, calibration),
                context.set_tensor_address(SCORE, outputs),
                context.set_tensor_address(ANOMALY_MAP, outputs + self._map_offset),
            ]
        except RuntimeError as error:  # what the bindings make of a profile that cannot be set
            what = f"a batch of {size} images cannot be set up ({error})"
            raise failure(what, backend._log) from error
        if not all(steps):
            raise failure(f"the engine does not take a batch of {size} images", backend._log)
        # Twice: what a library does on its first run must not fall into the capture.
        for _ in range(2):
            self._enqueue(size)
            self._device.synchronize_stream(stream)
        if not capture:
            return
        self._device.begin_capture(stream)
        try:
            self._enqueue(size)
        except BaseException:
            self._device.abort_capture(stream)
            raise
        self._graphs[size] = self._device.end_capture(stream)
        self._device.launch_graph(self._graphs[size], stream)  # the first launch uploads the graph
        self._device.synchronize_stream(stream)

    def _enqueue(self, size: int) -> None:
        """Copy in, kernels, copy out."""
        device, stream = self._device, self._stream
        if self._device_blocks:
            nbytes = size * self._image_bytes
            device.copy_to_device(self._device_blocks[0], self._host[0].address, nbytes, stream)
        if not self._contexts[size].execute_async_v3(stream):
            raise failure("the inference could not be started", self._backend._log)
        if self._device_blocks:
            nbytes = self._map_offset + size * self._map_bytes
            device.copy_to_host(self._host[2].address, self._device_blocks[2], nbytes, stream)

    def _free(self, stream: int) -> None:
        device = self._device
        try:
            device.make_current()
            device.synchronize_stream(stream)  # nothing may still use what goes now
            for graph in self._graphs.values():
                device.destroy_graph(graph)
            self._contexts.clear()
            for address in self._device_blocks:
                device.free(address)
            for buffer in self._host:
                device.free_host(buffer)
            device.destroy_stream(stream)
        except CudaError as error:
            self._note(error)
            logger.warning("closing a slot of %s: %s", self._backend.name, error)

    def _check_open(self, where: str) -> None:
        if not self._stream:
            raise BackendError(f"{where}: this slot ({self._backend.name}) is closed")

    def _note(self, error: BaseException) -> None:
        """Remembers that the device must be reset rather than released."""
        if isinstance(error, CudaError) and error.is_sticky:
            self._backend._is_lost = True


def _check_engine(engine: Any, manifest: Manifest) -> tuple[int, ...]:
    """Checks names, types and shapes; returns the batch sizes of the engine's profiles, ascending.

    Raises:
        EngineError: It is not an engine of this bundle.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
    outputs = [name for name in names if name not in inputs]
    try:
        check_graph(_specs(engine, inputs), _specs(engine, outputs), manifest)
    except BackendError as error:
        raise EngineError(f"the engine was not built from this bundle: {error}") from error
    shapes = [
        engine.get_tensor_profile_shape(IMAGE, profile)
        for profile in range(engine.num_optimization_profiles)
    ]
    batches = tuple(int(largest[0]) for _, _, largest in shapes)
    if not batches or list(batches) != sorted(set(batches)):
        raise EngineError(
            f"the engine has profiles for batches of {_listed(batches) or 'none'}, expected ascending "
            "sizes. Build it again: edgead build X.edgead"
        )
    return batches


def _specs(engine: Any, names: list[str]) -> list[TensorSpec]:
    dtypes = {"FLOAT": "float32", "UINT8": "uint8"}
    return [
        TensorSpec(
            name,
            dtypes.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name),
            _free_batch(name, engine.get_tensor_shape(name)),
        )
        for name in names
    ]


def _free_batch(name: str, shape: Iterable[int]) -> tuple[int | None, ...]:
    """The shape with a free first side: an engine of one profile may name the only batch that it has."""
    sides = [None if side < 0 else int(side) for side in shape]
    if name != CALIBRATION and sides:
        sides[0] = None
    return tuple(sides)


def _listed(batches: tuple[int, ...]) -> str:
    return ",".join(map(str, batches))
