"""Back ends: the one place that chooses."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import platform

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.runtime.backend import Backend, Slot, TensorSpec
from edgead.runtime.replay import TOLERANCE, Flip, Replay, replay

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "TOLERANCE",
    "Backend",
    "Flip",
    "Replay",
    "Slot",
    "TensorSpec",
    "explain_auto",
    "open_backend",
    "replay",
]

GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "torch-cuda")
BACKENDS = (*GPU_BACKENDS, "openvino", "onnxruntime")  # in the order in which "auto" tries them
_MODULES = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "torch-cuda": "torch",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
}

logger = logging.getLogger(__name__)


def open_backend(bundle: Bundle, backend: str = "auto", *, threads: int | None = None) -> Backend:
    """Loads the graph of a bundle.

    Args:
        bundle: A verified bundle.
        backend: A name of `BACKENDS`: that one and never another. Or "auto": the first of `BACKENDS`
            that is installed, finds its hardware and gives the verdict of the reference on every golden
            sample; ONNX Runtime is taken without that replay. The choice and its reasons are logged at
            level INFO.
        threads: CPU threads for one inference, at least 1; None leaves the number to the library. GPU
            back ends have no use for it.

    A TensorRT back end needs an engine of its own. If there is none for this box in the cache it is
    built now, which takes minutes on a small board (`edgead build` does it beforehand).

    Raises:
        BackendError: An unknown name, the library is not installed, there is no GPU, or the graph is
            refused.
        EngineError: An engine cannot be built or does not give the verdicts of the reference.
    """
    if threads is not None and (
        isinstance(threads, bool) or not isinstance(threads, int) or threads < 1
    ):
        raise BackendError(f"threads is {threads!r}, expected an integer >= 1 or None")
    if backend == "auto":
        return _open_auto(bundle, threads)
    if backend == "onnxruntime":
        from edgead.runtime.ort import OrtBackend

        return OrtBackend(bundle, threads=threads)
    if backend == "openvino":
        from edgead.runtime.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, threads=threads)
    if backend in ("tensorrt", "tensorrt-rtx"):
        from edgead.runtime.open_tensorrt import open_tensorrt

        return open_tensorrt(bundle, backend)
    if backend == "torch-cuda":
        from edgead.runtime.torch_cuda import TorchCudaBackend

        return TorchCudaBackend(bundle)
    raise BackendError(f"back end {backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")


def explain_auto() -> list[tuple[str, bool, str]]:
    """What "auto" would try on this machine: (back end, whether it is tried, why not).

    Quick: nothing is loaded or built. A back end that is tried is still passed over if it fails or if it
    does not reproduce the golden samples of a bundle.
    """
    missing = {name: _why_not(name) for name in BACKENDS}
    return [(name, not reason, reason) for name, reason in missing.items()]


def _why_not(name: str) -> str:
    """Why "auto" does not try a back end here; empty when it does."""
    if importlib.util.find_spec(_MODULES[name]) is None:
        return f"{_MODULES[name]} is not installed"
    if name in GPU_BACKENDS and not _has_driver():
        return "there is no NVIDIA driver (libcuda.so.1)"
    if name == "openvino" and platform.machine().lower() not in ("x86_64", "amd64"):
        return f"OpenVINO is used on x86 only, this is {platform.machine()}"
    return ""


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _open_auto(bundle: Bundle, threads: int | None) -> Backend:
    passed_over: list[str] = []
    for name in BACKENDS:
        reason = _why_not(name)
        if not reason:
            opened, reason = _try(bundle, name, threads)
            if opened is not None:
                others = f" ({'; '.join(passed_over)})" if passed_over else ""
                choice = f"back end {name} ({opened.precision}) for {bundle.path}: {reason}{others}"
                logger.info("%s", choice)
                return opened
        passed_over.append(f"not {name}: {reason}")
    raise BackendError(f"no back end can run {bundle.path}: {'; '.join(passed_over)}")


def _try(bundle: Bundle, name: str, threads: int | None) -> tuple[Backend | None, str]:
    """Returns a back end if it can be trusted with this bundle, and why or why not."""
    opened: Backend | None = None
    try:
        opened = open_backend(bundle, name, threads=threads)
        if name == "onnxruntime":
            return opened, "it runs on any CPU"
        result = replay(opened, bundle)
    except Exception as error:  # a library that is half updated raises anything, also when imported
        if opened is not None:
            opened.close()
        kind = "" if isinstance(error, BackendError) else f"{type(error).__name__}: "
        return None, f"it failed ({kind}{error})"
    if result.ok:
        samples = f"all {result.images} golden samples{result.near}"
        return opened, f"it gives the verdicts of the reference on {samples}"
    opened.close()
    return None, f"it does not reproduce the golden samples in {opened.precision}: {result}"
