"""The CUDA layer over NVIDIA's `cuda.bindings`. All its calls give up the GIL (from 12.9.1 on)."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from edgead.errors import BackendError, CudaError
from edgead.runtime.cuda import GpuInfo, HostBuffer
from edgead.runtime.cuda.errors import cuda_error, no_driver
from edgead.runtime.cuda.host import host_pages
from edgead.runtime.cuda.primary import PrimaryContext

_HOLDS_THE_GIL_BEFORE = (12, 9, 1)

logger = logging.getLogger(__name__)


class BindingsDevice:
    """See `Device`."""

    layer = "cuda.bindings"

    def __init__(self, ordinal: int = 0) -> None:
        self._driver = _import_driver()
        self._call("cuInit", 0)
        self._ordinal = self._call("cuDeviceGet", ordinal)
        self.info = self._read_info()
        self._pages: dict[int, Any] = {}  # address -> array; registered memory must not be unmapped
        retain = functools.partial(self._call, "cuDevicePrimaryCtxRetain", self._ordinal)
        self._context: PrimaryContext | None = PrimaryContext(ordinal, retain)

    def make_current(self) -> None:
        """See `Device.make_current`."""
        if self._context is None:
            raise BackendError(f"{self.info.name}: this device was closed or reset; open it again")
        self._context.check("cuCtxSetCurrent")
        self._call("cuCtxSetCurrent", self._context.handle)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        self._call("cuCtxSynchronize")

    def memory_info(self) -> tuple[int, int]:
        """See `Device.memory_info`."""
        free, total = self._call("cuMemGetInfo")
        return free, total

    def create_stream(self) -> int:
        """See `Device`."""
        return int(self._call("cuStreamCreate", self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        """See `Device`."""
        self._call("cuStreamDestroy", stream)

    def synchronize_stream(self, stream: int) -> None:
        """See `Device.synchronize_stream`."""
        self._call("cuStreamSynchronize", stream)

    def stream_is_idle(self, stream: int) -> bool:
        """See `Device`."""
        (code,) = self._results("cuStreamQuery", stream)
        if code == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if code:
            raise self._error("cuStreamQuery", code)
        return True

    def create_event(self, *, timing: bool = False) -> int:
        """See `Device`."""
        flags = self._driver.CUevent_flags
        quiet = flags.CU_EVENT_BLOCKING_SYNC | flags.CU_EVENT_DISABLE_TIMING
        return int(self._call("cuEventCreate", flags.CU_EVENT_DEFAULT if timing else quiet))

    def destroy_event(self, event: int) -> None:
        """See `Device`."""
        self._call("cuEventDestroy", event)

    def record_event(self, event: int, stream: int) -> None:
        """See `Device`."""
        self._call("cuEventRecord", event, stream)

    def synchronize_event(self, event: int) -> None:
        """See `Device.synchronize_event`."""
        self._call("cuEventSynchronize", event)

    def wait_event(self, stream: int, event: int) -> None:
        """See `Device.wait_event`."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def elapsed_ms(self, start: int, end: int) -> float:
        """See `Device`."""
        return float(self._call("cuEventElapsedTime", start, end))

    def alloc(self, nbytes: int) -> int:
        """See `Device`."""
        return int(self._call("cuMemAlloc", nbytes))

    def free(self, address: int) -> None:
        """See `Device`."""
        self._call("cuMemFree", address)

    def alloc_host(self, nbytes: int, *, mapped: bool = False) -> HostBuffer:
        """See `Device`."""
        pages = host_pages(nbytes)
        address = pages.ctypes.data
        flags = self._driver.CU_MEMHOSTREGISTER_DEVICEMAP if mapped else 0
        self._call("cuMemHostRegister", address, pages.nbytes, flags)
        self._pages[address] = pages
        device_address = 0
        if mapped:
            try:
                device_address = int(self._call("cuMemHostGetDevicePointer", address, 0))
            except CudaError:
                self._unregister(address)
                raise
        return HostBuffer(pages[:nbytes], address, device_address)

    def free_host(self, buffer: HostBuffer) -> None:
        """See `Device`."""
        self._unregister(buffer.address)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """See `Device.copy_to_device`."""
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, stream)

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """See `Device.copy_to_host`."""
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, stream)

    def begin_capture(self, stream: int) -> None:
        """See `Device`."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """See `Device.end_capture`."""
        template = self._call("cuStreamEndCapture", stream)
        try:
            return int(self._call("cuGraphInstantiate", template, 0))
        finally:
            self._call("cuGraphDestroy", template)

    def abort_capture(self, stream: int) -> None:
        """See `Device.abort_capture`."""
        try:
            self._call("cuGraphDestroy", self._call("cuStreamEndCapture", stream))
        except BackendError as error:  # expected: what failed in the capture has spoilt it
            logger.debug("aborted capture: %s", error)

    def launch_graph(self, graph: int, stream: int) -> None:
        """See `Device`."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """See `Device`."""
        self._call("cuGraphExecDestroy", graph)

    def reset(self) -> None:
        """See `Device.reset`."""
        if self._context is None:
            return
        try:
            self._context.reset(lambda: self._call("cuDevicePrimaryCtxReset", self._ordinal))
        finally:
            self._release()

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
        self._release()

    def _release(self) -> None:
        """Gives the primary context back; it goes with its last user."""
        self._context = None
        try:
            self._call("cuCtxSetCurrent", 0)
        finally:
            self._call("cuDevicePrimaryCtxRelease", self._ordinal)
        self._pages.clear()

    def _unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)
        self._pages.pop(address, None)

    def _read_info(self) -> GpuInfo:
        names = self._driver.CUdevice_attribute
        prefix = "CU_DEVICE_ATTRIBUTE_"

        def attribute(name: str) -> int:
            return int(self._call("cuDeviceGetAttribute", getattr(names, prefix + name), self._ordinal))

        version = self._call("cuDriverGetVersion")
        name = self._call("cuDeviceGetName", 256, self._ordinal)
        return GpuInfo(
            name=name.split(b"\0")[0].decode(errors="replace"),
            compute_capability=(
                attribute("COMPUTE_CAPABILITY_MAJOR"),
                attribute("COMPUTE_CAPABILITY_MINOR"),
            ),
            driver=f"{version // 1000}.{version % 1000 // 10}",
            memory_bytes=int(self._call("cuDeviceTotalMem", self._ordinal)),
            is_integrated=bool(attribute("INTEGRATED")),
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls the driver; returns what comes with the code: a value, or a list of none or several."""
        code, *values = self._results(name, *arguments)
        if code:
            raise self._error(name, code)
        return values[0] if len(values) == 1 else values

    def _results(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        try:
            return tuple(getattr(self._driver, name)(*arguments))
        except RuntimeError as error:
            if "not found" in str(error) and name in str(error):
                raise BackendError(
                    f"the CUDA driver lacks {name}: it is older than the installed cuda-bindings "
                    f"{_version()}. Update the driver, or pip install cuda-bindings of its CUDA version"
                ) from error
            raise no_driver(error) from error
        except (KeyError, ValueError) as error:  # a code that the installed cuda-bindings do not know
            number = re.search(r"\d+", str(error))
            if number is None:
                raise
            raise cuda_error(name, int(number[0])) from None

    def _error(self, name: str, code: Any) -> CudaError:
        _, text = self._driver.cuGetErrorString(code)
        described = text.decode(errors="replace") if text else None
        return cuda_error(name, int(code), name=code.name, text=described)


def _version() -> str:
    import cuda.bindings

    return str(cuda.bindings.__version__)


def _import_driver() -> Any:
    try:
        from cuda.bindings import driver
    except Exception as error:  # whatever a half updated package raises
        raise BackendError(
            f'cuda.bindings cannot be imported ({error}): pip install "edgead[tensorrt]", '
            "or set EDGEAD_CUDA=pycuda"
        ) from error
    version = _version()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < _HOLDS_THE_GIL_BEFORE:
        logger.warning(
            "cuda-bindings %s stops all Python threads while it waits for the GPU: "
            'pip install -U "cuda-bindings>=12.9.1"',
            version,
        )
    return driver
