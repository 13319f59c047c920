"""Records as JSON, the same in all sinks that send or store it."""

from __future__ import annotations

import json
import math
from typing import Any

from edgead.line.verdicts import Record


def encode(record: Record, *, is_late: bool = False) -> bytes:
    """One line of UTF-8 JSON without a line end; `is_late` adds `"late": true`."""
    data = record.to_dict()
    if is_late:
        data["late"] = True
    try:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    except ValueError:  # JSON has no NaN and no infinity
        text = json.dumps(_finite(data), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")  # names of files may hold what is not UTF-8


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
