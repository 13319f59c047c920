"""edgead: visual anomaly detection on camera lines.

    import edgead
    with edgead.load("bottle.edgead") as detector:
        result = detector(frame)          # HWC uint8 RGB
        print(result.score, result.is_anomalous)

Names are resolved on first use, so that `import edgead` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgead.bundle import Bundle
    from edgead.detector import Detector, load
    from edgead.errors import (
        BackendError,
        BundleError,
        BusyError,
        DataError,
        EdgeADError,
        ExportError,
        TrainingError,
        WeightsError,
    )
    from edgead.result import Result
    from edgead.runtime.executor import Executor

__version__ = "0.1.0"

_HOME = {
    "load": "edgead.detector",
    "Detector": "edgead.detector",
    "Executor": "edgead.runtime.executor",
    "Result": "edgead.result",
    "Bundle": "edgead.bundle",
    "EdgeADError": "edgead.errors",
    "BackendError": "edgead.errors",
    "BundleError": "edgead.errors",
    "BusyError": "edgead.errors",
    "DataError": "edgead.errors",
    "ExportError": "edgead.errors",
    "TrainingError": "edgead.errors",
    "WeightsError": "edgead.errors",
}

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "BusyError",
    "DataError",
    "Detector",
    "EdgeADError",
    "Executor",
    "ExportError",
    "Result",
    "TrainingError",
    "WeightsError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgead' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
