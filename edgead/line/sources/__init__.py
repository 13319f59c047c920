"""Where images come from. Each module has a `Config` and `open_source(config, *, camera)`."""

from __future__ import annotations

import importlib
from typing import Any

SOURCES = ("folder", "video", "opencv", "gige")
"""Of the recipe file: the modules of this package."""


def source_module(kind: str) -> Any:
    """The module of a kind, imported when it is needed."""
    return importlib.import_module(f"{__name__}.{kind}")
