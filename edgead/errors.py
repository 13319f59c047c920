"""Exceptions of edgead. Each is also the builtin that a caller would naturally catch."""

from __future__ import annotations


class EdgeADError(Exception):
    """Base of every error that edgead raises on purpose."""


class BundleError(EdgeADError, ValueError):
    """A bundle file is damaged, hostile, of an unknown version, or does not say what it must."""


class BackendError(EdgeADError, RuntimeError):
    """A runtime back end is missing, refuses the graph, was closed, or got wrong tensors.

    Attributes:
        is_sticky: The device cannot be used any more until it is reset, or at all in this process.
    """

    is_sticky = False


class CudaError(BackendError):
    """A call to the CUDA driver failed.

    Attributes:
        code: Name of the driver's code, such as "CUDA_ERROR_OUT_OF_MEMORY".
        is_sticky: Nothing works any more in the CUDA context until the device is reset and opened again;
            if that fails in the same way, only a new process helps.
    """

    def __init__(self, message: str, code: str, *, is_sticky: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_sticky = is_sticky


class EngineError(BackendError):
    """A TensorRT engine cannot be built, stored, loaded or trusted."""


class BusyError(EdgeADError, RuntimeError):
    """Every slot of an executor is taken and it was told to reject rather than to wait."""


class DataError(EdgeADError, ValueError):
    """An image, mask, frame or data-set folder cannot be used."""


class WeightsError(EdgeADError, ValueError):
    """A weight file has the wrong layout, shapes or values."""


class TrainingError(EdgeADError, RuntimeError):
    """A training, distillation or calibration run cannot start or go on."""


class ExportError(EdgeADError, RuntimeError):
    """A trained run cannot be exported, or the exported graph does not agree with it."""


class LineError(EdgeADError, RuntimeError):
    """A line cannot start as its recipe file says, or a part of it cannot go on."""
