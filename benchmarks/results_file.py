"""Benchmark results: one JSON file with the machine in it, and the same as a table."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgead import machine
from edgead.files import write_text


def write_results(path: Path, name: str, results: dict[str, Any]) -> None:
    """Write `results` with date, commit and machine, atomically."""
    from edgead.training.run import git_commit  # needs torch, which who only wants a table may lack

    header = {
        "benchmark": name,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "machine": machine.describe(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(header | results, indent=2) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, header)), ["---"] * len(header), *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def fresh_process(command: Sequence[str], *, sees_gpus: bool = True) -> dict[str, Any]:
    """Run a command and parse the last line it prints as JSON.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote.
    """
    environment = os.environ if sees_gpus else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(command), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ... failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
