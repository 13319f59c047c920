"""The CUDA layer: what edgead needs of the driver, over `cuda.bindings` or `pycuda`.

Both use the device's *primary* context, which torch and the CUDA runtime share, so that none of them
fights another. Handles and device addresses are plain integers, which TensorRT takes as they are. Host
memory is ours (`edgead.runtime.cuda.host`), only registered with the driver: an array stays readable
after the device was lost, closed or reset.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgead.errors import BackendError

LAYERS = ("cuda.bindings", "pycuda")


@dataclass(frozen=True)
class GpuInfo:
    """What a GPU is.

    Attributes:
        name: As the driver names it, such as "NVIDIA H200".
        compute_capability: (major, minor), such as (9, 0).
        driver: CUDA version that the driver supports, such as "13.0".
        memory_bytes: Total device memory.
        is_integrated: Shares its memory with the CPU (Jetson): zero-copy is then worth it.
    """

    name: str
    compute_capability: tuple[int, int]
    driver: str
    memory_bytes: int
    is_integrated: bool

    @property
    def sm(self) -> str:
        """Such as "sm87"."""
        return "sm{}{}".format(*self.compute_capability)


@dataclass(frozen=True, eq=False)
class HostBuffer:
    """Page-locked host memory.

    Attributes:
        array: uint8 [nbytes], page aligned; it stays valid after `Device.free_host`.
        address: Of the array, for copies.
        device_address: Where the device sees the same memory if it was asked to be mapped, else 0.
    """

    array: np.ndarray
    address: int
    device_address: int


class Device(Protocol):
    """One GPU through its primary context. Every thread that uses it calls `make_current` first.

    Every method raises `CudaError` when the driver reports a failure; its text names the call, the code
    and a remedy. After one that `is_sticky` all calls fail until `reset` and a new `open_device`.
    Handles are of this object alone, except streams and addresses, which other libraries take, too.

    Attributes:
        layer: A name of `LAYERS`.
        info: The GPU.
    """

    layer: str
    info: GpuInfo

    def make_current(self) -> None:
        """Makes the primary context current in the calling thread; quick when it already is."""
        ...

    def synchronize(self) -> None:
        """Waits for everything on the device; gives up the GIL."""
        ...

    def memory_info(self) -> tuple[int, int]:
        """Free and total device memory in bytes."""
        ...

    # Streams and events. A stream is non-blocking: it never waits for the legacy default stream.
    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def synchronize_stream(self, stream: int) -> None:
        """Waits for the stream; gives up the GIL."""
        ...

    def stream_is_idle(self, stream: int) -> bool: ...
    def create_event(self, *, timing: bool = False) -> int: ...
    def destroy_event(self, event: int) -> None: ...
    def record_event(self, event: int, stream: int) -> None: ...
    def synchronize_event(self, event: int) -> None:
        """Waits for the event (blocking, not spinning, unless it has timing); gives up the GIL."""
        ...

    def wait_event(self, stream: int, event: int) -> None:
        """Makes later work of the stream wait for the event."""
        ...

    def elapsed_ms(self, start: int, end: int) -> float: ...

    # Memory.
    def alloc(self, nbytes: int) -> int: ...
    def free(self, address: int) -> None: ...
    def alloc_host(self, nbytes: int, *, mapped: bool = False) -> HostBuffer: ...
    def free_host(self, buffer: HostBuffer) -> None:
        """Unregisters the memory. Until then, or until the end, the device keeps it alive."""
        ...

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueues a copy from page-locked host memory."""
        ...

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueues a copy into page-locked host memory."""
        ...

    # Graphs. Capture is thread local.
    def begin_capture(self, stream: int) -> None: ...
    def end_capture(self, stream: int) -> int:
        """Ends the capture and returns an executable graph (the template is destroyed).

        Raises:
            CudaError: The capture was invalidated; the stream is usable again.
        """
        ...

    def abort_capture(self, stream: int) -> None:
        """Ends a capture whose work failed to enqueue; never raises."""
        ...

    def launch_graph(self, graph: int, stream: int) -> None: ...
    def destroy_graph(self, graph: int) -> None: ...

    def reset(self) -> None:
        """Destroys the primary context with everything in it: the way out of a sticky error.

        Everything else in this process that uses this GPU loses it, too. Handles of before are invalid;
        the device is closed, also if this raises. A driver may stay broken after it: if a new device
        fails again, only a new process helps.
        """
        ...

    def close(self) -> None:
        """Releases the primary context; any thread may call it, and again. Free everything before."""
        ...


def open_device(ordinal: int = 0, *, layer: str | None = None) -> Device:
    """Opens a GPU.

    Args:
        ordinal: Which one, in the driver's order.
        layer: A name of `LAYERS`. None takes the environment variable EDGEAD_CUDA, else the first one
            that is installed.

    Raises:
        BackendError: No layer is installed, the name is unknown, or there is no driver or no such GPU.
    """
    wanted = layer or os.environ.get("EDGEAD_CUDA") or _first_installed()
    if wanted in ("cuda.bindings", "cuda-bindings", "cuda"):
        from edgead.runtime.cuda.bindings import BindingsDevice

        return BindingsDevice(ordinal)
    if wanted == "pycuda":
        from edgead.runtime.cuda.pycuda import PycudaDevice

        return PycudaDevice(ordinal)
    raise BackendError(
        f"CUDA layer {wanted!r} is unknown (argument layer or EDGEAD_CUDA); choose {' or '.join(LAYERS)}"
    )


def _first_installed() -> str:
    for name in LAYERS:
        try:
            if importlib.util.find_spec(name) is not None:
                return name
        except ModuleNotFoundError:  # the parent package `cuda` is missing
            continue
    raise BackendError(
        'no CUDA layer is installed: pip install "edgead[tensorrt]" (cuda-bindings) or "edgead[pycuda]"'
    )
