"""Where records go. Each module has a `Config` and `open_sink(config, *, controls)`."""

from __future__ import annotations

import importlib
from typing import Any

SINKS = ("jsonl", "archive", "mqtt", "modbus", "opcua", "webhook", "metrics", "status")
"""Of the recipe file: the modules of this package."""


def sink_module(kind: str) -> Any:
    """The module of a kind, imported when it is needed."""
    return importlib.import_module(f"{__name__}.{kind}")
