"""Asks a question in a process of its own: a library that crashes or hangs becomes an answer."""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from edgead.gpu_state import run_tool

TIMEOUT_S = 60.0  # the first import of a large library from a slow card takes long
MARK = "edgead-probe:"
_CODE = (  # the same search path as this process, whatever it was started with
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from edgead.doctor.child import main; main(sys.argv[2], sys.argv[3:])"
)


@dataclass(frozen=True)
class Answer:
    """Facts, or why there are none (`error`)."""

    facts: dict[str, Any]
    error: str = ""


def ask(question: str, *arguments: str, timeout_s: float | None = None) -> Answer:
    """Runs a function of `edgead.doctor.child.QUESTIONS` in a new process; never raises."""
    timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
    command = [sys.executable, "-c", _CODE, json.dumps(sys.path), question, *arguments]
    try:
        outcome = run_tool(command, timeout_s)
    except OSError as error:
        return Answer({}, f"no process can be started: {error.strerror or error}")
    for line in reversed(outcome.stdout.splitlines()):
        if line.startswith(MARK):
            facts = json.loads(line.removeprefix(MARK))
            return Answer(facts, facts.pop("error", ""))
    if outcome.returncode is None:
        return Answer({}, f"no answer within {timeout_s:g} s, it hangs")
    said = outcome.stderr.strip().splitlines()[-1:]
    return Answer({}, ": ".join([_ending(outcome.returncode), *said]))


def ask_all(*questions: tuple[str, ...]) -> list[Answer]:
    """Asks several questions at the same time; the answers are in the same order."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return list(pool.map(lambda question: ask(*question), questions))


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"it ended the process with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"it crashed the process ({name})"
