"""Where records go."""

from __future__ import annotations

SINKS: dict[str, str] = {  # kind in the recipe file -> module of this package
    "jsonl": "jsonl",
    "archive": "archive",
    "mqtt": "mqtt",
    "modbus": "modbus",
    "opcua": "opcua",
    "webhook": "webhook",
    "metrics": "metrics",
    "status": "status",
}
