"""What a code of the CUDA driver means: code -> state -> remedy. Codes not listed here pass through."""

from __future__ import annotations

from dataclasses import dataclass

from edgead.errors import BackendError, CudaError


@dataclass(frozen=True)
class _State:
    """What several codes have in common.

    Attributes:
        codes: Number in cuda.h -> name without "CUDA_ERROR_".
        is_sticky: Nothing works any more in the context.
    """

    meaning: str
    remedy: str
    codes: dict[int, str]
    is_sticky: bool = False


_REOPEN = (
    "The CUDA context is unusable: close everything on this GPU, reset the device and open it again; if "
    "the error comes back, start the process anew"
)
_CAPTURE = (
    "While a stream is captured, its thread may only enqueue work: allocate, free and synchronise "
    "before the capture begins, and run the work once without a graph first"
)
_UPDATE = (
    "Install or update the NVIDIA driver (Jetson: JetPack); in a container, start it with GPU access"
)

_STATES = (
    _State(
        "the device memory is exhausted",
        "Close other programs on this GPU, or use fewer slots, a smaller batch or a smaller model",
        {2: "OUT_OF_MEMORY"},
    ),
    _State(
        "no such NVIDIA GPU is visible to this process",
        "Check that nvidia-smi lists it, that CUDA_VISIBLE_DEVICES does not hide it, and that a "
        'container has GPU access; without a GPU use backend="onnxruntime"',
        {100: "NO_DEVICE", 101: "INVALID_DEVICE"},
    ),
    _State(
        "the driver does not fit the GPU or the CUDA libraries",
        _UPDATE,
        {
            34: "STUB_LIBRARY",
            36: "CALL_REQUIRES_NEWER_DRIVER",
            222: "UNSUPPORTED_PTX_VERSION",
            500: "NOT_FOUND",
            803: "SYSTEM_DRIVER_MISMATCH",
            804: "COMPAT_NOT_SUPPORTED_ON_DEVICE",
        },
    ),
    _State(
        "the GPU is in use by another process, lost, or not ready",
        "Check nvidia-smi and the kernel log (dmesg: Xid), the power supply and exclusive compute mode; "
        "wait or restart the machine, then open the device again",
        {
            46: "DEVICE_UNAVAILABLE",
            214: "ECC_UNCORRECTABLE",
            220: "NVLINK_UNCORRECTABLE",
            802: "SYSTEM_NOT_READY",
        },
        is_sticky=True,
    ),
    _State(
        "CUDA is not initialised, or the process is shutting down",
        "Open the device before using it, and close it before the interpreter ends",
        {3: "NOT_INITIALIZED", 4: "DEINITIALIZED"},
    ),
    _State(
        "no usable CUDA context is current in this thread",
        "Call make_current() in each thread that uses the device, and nothing after close() or reset()",
        {201: "INVALID_CONTEXT"},
    ),
    _State(
        "the CUDA context was destroyed, by close(), or by a reset from elsewhere in this process",
        "Open the device again",
        {709: "CONTEXT_IS_DESTROYED"},
        is_sticky=True,
    ),
    _State(
        "work on the GPU failed",
        _REOPEN,
        {
            226: "CONTAINED",
            700: "ILLEGAL_ADDRESS",
            702: "LAUNCH_TIMEOUT",
            710: "ASSERT",
            714: "HARDWARE_STACK_ERROR",
            715: "ILLEGAL_INSTRUCTION",
            716: "MISALIGNED_ADDRESS",
            717: "INVALID_ADDRESS_SPACE",
            718: "INVALID_PC",
            719: "LAUNCH_FAILED",
            721: "TENSOR_MEMORY_LEAK",
            999: "UNKNOWN",
        },
        is_sticky=True,
    ),
    _State(
        "the call is not possible while a stream is captured, or the capture was spoilt by one",
        _CAPTURE,
        {
            900: "STREAM_CAPTURE_UNSUPPORTED",
            901: "STREAM_CAPTURE_INVALIDATED",
            902: "STREAM_CAPTURE_MERGE",
            903: "STREAM_CAPTURE_UNMATCHED",
            904: "STREAM_CAPTURE_UNJOINED",
            905: "STREAM_CAPTURE_ISOLATION",
            906: "STREAM_CAPTURE_IMPLICIT",
            907: "CAPTURED_EVENT",
            908: "STREAM_CAPTURE_WRONG_THREAD",
        },
    ),
    _State(
        "a handle or an argument is wrong: freed already, of another device, or out of range",
        "This is a mistake in the calling code: free each handle once, after the work that uses it",
        {1: "INVALID_VALUE", 400: "INVALID_HANDLE", 401: "ILLEGAL_STATE"},
    ),
    _State(
        "host memory cannot be page-locked",
        "Use fewer or smaller buffers, and register each only once; raise the limit of locked memory "
        "(ulimit -l)",
        {712: "HOST_MEMORY_ALREADY_REGISTERED", 713: "HOST_MEMORY_NOT_REGISTERED"},
    ),
    _State(
        "this GPU or this driver cannot do that",
        _UPDATE,
        {800: "NOT_PERMITTED", 801: "NOT_SUPPORTED"},
    ),
)
_STATE_OF = {code: state for state in _STATES for code in state.codes}


def cuda_error(call: str, code: int, *, name: str | None = None, text: str | None = None) -> CudaError:
    """Returns the error for a driver call that returned `code`.

    Args:
        call: Name of the driver's function.
        code: Of CUresult; not 0.
        name: As the driver calls the code; None if it does not know it.
        text: What the driver says about it.
    """
    state = _STATE_OF.get(code)
    name = name or (f"CUDA_ERROR_{state.codes[code]}" if state else f"CUDA_ERROR_{code}")
    found = f"{call} failed with {name} ({code}{f': {text}' if text else ''})"
    if state is None:
        return CudaError(f"{found}. See CUresult in NVIDIA's manual of the driver API", name)
    return CudaError(f"{found}: {state.meaning}. {state.remedy}", name, is_sticky=state.is_sticky)


def no_driver(detail: object) -> BackendError:
    """The error for a machine without libcuda."""
    reason = str(detail).rstrip(".")
    return BackendError(
        f"the CUDA driver (libcuda.so.1) cannot be loaded: {reason}. {_UPDATE}; without a GPU use "
        'backend="onnxruntime"'
    )
