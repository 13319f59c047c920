"""Opens a TensorRT back end: finds or builds the engine, loads it, and makes it prove its verdicts."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from edgead.bundle import Bundle
from edgead.errors import EngineError
from edgead.flavour import open_flavour
from edgead.runtime.cuda import open_device
from edgead.runtime.replay import replay
from edgead.runtime.tensorrt import TensorRTBackend

logger = logging.getLogger(__name__)


def open_tensorrt(bundle: Bundle, name: str) -> TensorRTBackend:
    """Opens "tensorrt" or "tensorrt-rtx" on the first GPU.

    An engine that has not yet answered the golden samples on this box does so now. If it decides
    otherwise than the reference it is refused and not kept. A cached engine that TensorRT refuses is
    built anew, once.

    Raises:
        EngineError: No TensorRT, or the engine cannot be built, loaded or trusted.
        BackendError: No GPU, no driver, or the device failed.
    """
    try:
        return _open(bundle, name, rebuild=None)
    except _CachedEngineRefused as refused:
        logger.warning("%s; building it again", refused)
        return _open(bundle, name, rebuild=str(refused))


class _CachedEngineRefused(EngineError):
    """TensorRT does not load an engine that came from the cache."""


def _open(bundle: Bundle, name: str, *, rebuild: str | None) -> TensorRTBackend:
    from edgead.engines.prepare import accept, prepare_engine  # engines import TensorRT's builder

    flavour = open_flavour(name)
    device = open_device()
    try:
        device.make_current()  # a build is for the GPU that is current
        prepared = prepare_engine(bundle, flavour, device.info, rebuild=rebuild)
    except BaseException:
        device.close()
        raise
    try:
        backend = TensorRTBackend(bundle, flavour, device, prepared.plan)
    except EngineError as error:
        if prepared.is_new:
            raise
        raise _CachedEngineRefused(str(error)) from error
    if prepared.verified:
        return backend
    try:
        accept(prepared, prove(backend, bundle))
    except BaseException:
        backend.close()
        raise
    return backend


def prove(backend: TensorRTBackend, bundle: Bundle) -> dict[str, Any]:
    """Returns the figures of the golden samples (`Replay`).

    Raises:
        EngineError: The engine decides otherwise than the reference.
    """
    result = replay(backend, bundle)
    if not result.ok:
        raise EngineError(
            f"{backend.name} {backend.flavour.version} on {backend.device.info.name}: the engine is "
            f"refused, it does not give the verdicts of the reference on the golden samples of "
            f"{bundle.path}: {result}. Export the bundle with --precision fp32, or use another back end"
        )
    return asdict(result)
