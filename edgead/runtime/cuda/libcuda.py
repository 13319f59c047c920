"""Calls of the driver that pycuda lacks, through ctypes: captures, graphs, registered memory."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

from edgead.errors import BackendError, CudaError
from edgead.runtime.cuda.errors import cuda_error, no_driver

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuDevicePrimaryCtxReset_v2": (c_int,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_void_p), c_void_p, c_uint),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}
_LARGEST_CODE = 1000


class Driver:
    """libcuda.so.1. All calls give up the GIL."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise no_driver(error) from error
        self._codes: dict[str, int] = {}
        for name, types in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise BackendError(
                    f"the CUDA driver lacks {name}: it is older than CUDA 11.4. Update the driver "
                    "(Jetson: JetPack)"
                ) from None
            function.argtypes, function.restype = types, c_int
            setattr(self, name, function)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of `_SIGNATURES`; raises CudaError."""
        code = getattr(self, name)(*arguments)
        if code:
            raise self.error(name, code)

    def get(self, name: str, *arguments: Any) -> int:
        """Calls a function that writes a handle or an address to its first argument; returns that."""
        value = c_void_p()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value or 0

    def error(self, name: str, code: int) -> CudaError:
        """The error for a code that a function returned."""
        named, text = (self._text(f"cuGetError{what}", code) for what in ("Name", "String"))
        return cuda_error(name.removesuffix("_v2"), code, name=named, text=text)

    def code_of(self, text: str) -> int | None:
        """The code that the driver describes so; None if there is none."""
        if not self._codes:
            texts = ((self._text("cuGetErrorString", code), code) for code in range(1, _LARGEST_CODE))
            self._codes = {text: code for text, code in texts if text}
        return self._codes.get(text)

    def _text(self, function: str, code: int) -> str | None:
        text = c_char_p()
        if getattr(self, function)(code, ctypes.byref(text)) or text.value is None:
            return None
        return text.value.decode(errors="replace")
