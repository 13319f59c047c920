"""The CUDA layer over `pycuda`: device, context, streams, events, memory and copies are pycuda's.

What pycuda has not, or cannot do safely, goes through `edgead.runtime.cuda.libcuda`:

- Captures and graphs: pycuda has none.
- The current context: a thread that ends with a context on pycuda's own stack aborts the process. So the
  context is on that stack only while a pycuda object is made or destroyed, which pycuda insists on.
- Registered memory: `register_host_memory` fails since pycuda 2024.1 (inducer/pycuda#459).

pycuda reports a failed clean-up on stderr and goes on: destroying and closing raise no error here. A
device must be closed or reset: pycuda ends the process if it collects objects of a context that is gone.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from edgead.errors import BackendError, CudaError
from edgead.runtime.cuda import GpuInfo, HostBuffer
from edgead.runtime.cuda.errors import cuda_error, no_driver
from edgead.runtime.cuda.host import host_pages
from edgead.runtime.cuda.libcuda import Driver
from edgead.runtime.cuda.primary import PrimaryContext

_STREAM_NON_BLOCKING = 1
_CAPTURE_THREAD_LOCAL = 1
_REGISTER_DEVICEMAP = 2
_INVALID_HANDLE, _INVALID_CONTEXT = 400, 201

logger = logging.getLogger(__name__)
T = TypeVar("T")


class PycudaDevice:
    """See `Device`."""

    layer = "pycuda"

    def __init__(self, ordinal: int = 0) -> None:
        self._cuda = _import_driver()
        self._driver = Driver()
        self._call(self._cuda.init)
        device = self._call(self._cuda.Device, ordinal)
        self._ordinal = ordinal
        self.info = self._read_info(device)
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        self._blocks: dict[int, Any] = {}
        self._pages: dict[int, Any] = {}  # address -> array; registered memory must not be unmapped
        self._event_numbers = itertools.count(1)  # pycuda does not tell an event's handle
        retain = functools.partial(self._call, device.retain_primary_context)
        self._context: PrimaryContext | None = PrimaryContext(ordinal, retain)

    def make_current(self) -> None:
        """See `Device.make_current`."""
        if self._context is None:
            raise BackendError(f"{self.info.name}: this device was closed or reset; open it again")
        self._context.check("cuCtxSetCurrent")
        self._driver.call("cuCtxSetCurrent", self._context.handle.handle)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self._call(self._cuda.Context.synchronize)

    def memory_info(self) -> tuple[int, int]:
        """See `Device.memory_info`."""
        free, total = self._call(self._cuda.mem_get_info)
        return free, total

    def create_stream(self) -> int:
        """See `Device`."""
        with self._on_stack("cuStreamCreate"):
            stream = self._call(self._cuda.Stream, _STREAM_NON_BLOCKING)
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def destroy_stream(self, stream: int) -> None:
        """See `Device`."""
        self._destroy(self._streams, stream, "cuStreamDestroy")

    def synchronize_stream(self, stream: int) -> None:
        """See `Device.synchronize_stream`."""
        self._call(_find(self._streams, stream, "cuStreamSynchronize").synchronize)

    def stream_is_idle(self, stream: int) -> bool:
        """See `Device`."""
        return bool(self._call(_find(self._streams, stream, "cuStreamQuery").is_done))

    def create_event(self, *, timing: bool = False) -> int:
        """See `Device`."""
        flags = self._cuda.event_flags
        with self._on_stack("cuEventCreate"):
            quiet = flags.BLOCKING_SYNC | flags.DISABLE_TIMING
            event = self._call(self._cuda.Event, flags.DEFAULT if timing else quiet)
        number = next(self._event_numbers)
        self._events[number] = event
        return number

    def destroy_event(self, event: int) -> None:
        """See `Device`."""
        self._destroy(self._events, event, "cuEventDestroy")

    def record_event(self, event: int, stream: int) -> None:
        """See `Device`."""
        found = _find(self._events, event, "cuEventRecord")
        self._call(found.record, _find(self._streams, stream, "cuEventRecord"))

    def synchronize_event(self, event: int) -> None:
        """See `Device.synchronize_event`."""
        self._call(_find(self._events, event, "cuEventSynchronize").synchronize)

    def wait_event(self, stream: int, event: int) -> None:
        """See `Device.wait_event`."""
        found = _find(self._streams, stream, "cuStreamWaitEvent")
        self._call(found.wait_for_event, _find(self._events, event, "cuStreamWaitEvent"))

    def elapsed_ms(self, start: int, end: int) -> float:
        """See `Device`."""
        found = _find(self._events, start, "cuEventElapsedTime")
        return float(self._call(found.time_till, _find(self._events, end, "cuEventElapsedTime")))

    def alloc(self, nbytes: int) -> int:
        """See `Device`."""
        with self._on_stack("cuMemAlloc"):
            block = self._call(self._cuda.mem_alloc, nbytes)
        self._blocks[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        """See `Device`."""
        self._destroy(self._blocks, address, "cuMemFree")

    def alloc_host(self, nbytes: int, *, mapped: bool = False) -> HostBuffer:
        """See `Device`."""
        pages = host_pages(nbytes)
        address = pages.ctypes.data
        flags = _REGISTER_DEVICEMAP if mapped else 0
        self._driver.call("cuMemHostRegister_v2", address, pages.nbytes, flags)
        self._pages[address] = pages
        device_address = 0
        if mapped:
            try:
                device_address = self._driver.get("cuMemHostGetDevicePointer_v2", address, 0)
            except CudaError:
                self._unregister(address)
                raise
        return HostBuffer(pages[:nbytes], address, device_address)

    def free_host(self, buffer: HostBuffer) -> None:
        """See `Device`."""
        self._unregister(buffer.address)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """See `Device.copy_to_device`."""
        found = _find(self._streams, stream, "cuMemcpyHtoDAsync")
        self._call(self._cuda.memcpy_htod_async, target, _memory(source, nbytes), found)

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """See `Device.copy_to_host`."""
        found = _find(self._streams, stream, "cuMemcpyDtoHAsync")
        self._call(self._cuda.memcpy_dtoh_async, _memory(target, nbytes), source, found)

    def begin_capture(self, stream: int) -> None:
        """See `Device`."""
        self._driver.call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """See `Device.end_capture`."""
        template = self._end_capture(stream)
        try:
            return self._driver.get("cuGraphInstantiateWithFlags", template, 0)
        finally:
            self._driver.call("cuGraphDestroy", template)

    def abort_capture(self, stream: int) -> None:
        """See `Device.abort_capture`."""
        try:
            self._driver.call("cuGraphDestroy", self._end_capture(stream))
        except BackendError as error:  # expected: what failed in the capture has spoilt it
            logger.debug("aborted capture: %s", error)

    def launch_graph(self, graph: int, stream: int) -> None:
        """See `Device`."""
        self._driver.call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """See `Device`."""
        self._driver.call("cuGraphExecDestroy", graph)

    def reset(self) -> None:
        """See `Device.reset`."""
        if self._context is not None:
            self._release(reset=True)

    def close(self) -> None:
        """See `Device.close`."""
        if self._context is None:
            return
        try:
            self.make_current()
            for address in list(self._pages):
                self._unregister(address)
        except CudaError as error:
            logger.debug("closing: %s", error)
        self._release(reset=False)

    def _release(self, *, reset: bool) -> None:
        """Gives the primary context back; it goes with its last user."""
        assert self._context is not None
        primary, self._context = self._context, None
        context, on_stack = primary.handle, 0
        try:
            on_stack += int(self._driver.get("cuCtxGetCurrent") == context.handle)
            context.push()  # otherwise detach() does nothing in another thread than this was opened in
            on_stack += 1
        except (CudaError, self._cuda.Error) as error:
            logger.debug("closing: %s", error)
        try:
            if reset:
                primary.reset(lambda: self._driver.call("cuDevicePrimaryCtxReset_v2", self._ordinal))
        finally:
            context.detach()
            # What is still in here is of a dead context now, and pycuda leaves it alone.
            for objects in (self._streams, self._events, self._blocks, self._pages):
                objects.clear()
            if self._cuda.Context.get_current() is None:  # nothing of the caller's on pycuda's stack
                for _ in range(on_stack):
                    self._driver.call("cuCtxSetCurrent", None)

    def _unregister(self, address: int) -> None:
        self._driver.call("cuMemHostUnregister", address)
        self._pages.pop(address, None)

    def _end_capture(self, stream: int) -> int:
        template = ctypes.c_void_p()
        self._driver.call("cuStreamEndCapture", stream, ctypes.byref(template))
        return template.value or 0

    def _destroy(self, objects: dict[int, Any], handle: int, call: str) -> None:
        with self._on_stack(call):
            _find(objects, handle, call)
            del objects[handle]  # its last reference

    @contextmanager
    def _on_stack(self, call: str) -> Iterator[None]:
        """Puts the context on pycuda's stack for a while, if it is current as it must be."""
        context = self._context.handle if self._context else None
        if context is None or self._driver.get("cuCtxGetCurrent") != context.handle:
            raise self._driver.error(call, _INVALID_CONTEXT)
        self._call(context.push)
        try:
            yield
        finally:
            self._call(self._cuda.Context.pop)
            self.make_current()  # pop() brings back what the caller may have had on pycuda's stack

    def _read_info(self, device: Any) -> GpuInfo:
        version = self._call(self._cuda.get_driver_version)
        integrated = self._call(device.get_attribute, self._cuda.device_attribute.INTEGRATED)
        return GpuInfo(
            name=self._call(device.name),
            compute_capability=tuple(self._call(device.compute_capability)),
            driver=f"{version // 1000}.{version % 1000 // 10}",
            memory_bytes=int(self._call(device.total_memory)),
            is_integrated=bool(integrated),
        )

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return function(*arguments)
        except self._cuda.Error as error:
            raise self._translated(str(error)) from None

    def _translated(self, message: str) -> CudaError:
        """From pycuda's "cuMemAlloc failed: out of memory"."""
        call, _, text = message.partition(" failed: ")
        code = self._driver.code_of(text) or self._driver.code_of(text.partition(" - ")[0])
        if code is None:
            return CudaError(f"{message}. pycuda does not tell this error's code", "CUDA_ERROR_UNKNOWN")
        return self._driver.error(call, code)


def _find(objects: dict[int, Any], handle: int, call: str) -> Any:
    try:
        return objects[handle]
    except KeyError:
        raise cuda_error(call, _INVALID_HANDLE) from None


def _memory(address: int, nbytes: int) -> Any:
    return (ctypes.c_uint8 * nbytes).from_address(address)


def _import_driver() -> Any:
    try:
        import pycuda.driver
    except ModuleNotFoundError as error:
        raise BackendError(
            f'pycuda cannot be imported ({error}): pip install "edgead[pycuda]" (it compiles for a '
            "minute and needs the CUDA headers), or leave EDGEAD_CUDA unset"
        ) from error
    except Exception as error:  # ImportError, or what one built for another NumPy raises
        if "libcuda" in str(error) and "undefined symbol" not in str(error):
            raise no_driver(error) from error
        raise BackendError(
            f"pycuda cannot be loaded ({error}): it was built for another CUDA than the driver's. Build "
            "it anew: pip install --no-cache-dir --force-reinstall --no-deps pycuda"
        ) from error
    return pycuda.driver
