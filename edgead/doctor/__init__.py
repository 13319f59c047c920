"""Looks a box over: what is there, what fits together, what is in the way, and what to do about it.

Nothing here changes the box. Libraries and tools that may crash or hang are asked in processes of their
own, so that every fault becomes a finding.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgead import __version__
from edgead.doctor import backends, clocks, hardware, libraries, system
from edgead.doctor.finding import NOTE, OK, PROBLEM, Finding
from edgead.doctor.probe import Answer, ask, ask_all

__all__ = ["NOTE", "OK", "PROBLEM", "Finding", "check", "is_healthy", "to_json", "to_text"]

_WIDTH = 105


def check(bundle: Path | None = None, *, root: Path = Path("/")) -> list[Finding]:
    """Looks the box over; never raises for what it finds.

    Args:
        bundle: Also says which back end this bundle gets and why.
        root: Where /proc, /sys, /dev and /etc are.
    """
    machine = hardware.look(root)
    driver, described = ask_all(("driver",), ("machine",))
    findings = [
        system.check_system(root, described),
        system.check_memory(root, machine.board is not None),
        *hardware.check_board(machine.board),
        *clocks.check_cpu(root),
        hardware.check_driver(machine, driver),
    ]
    gpus = [] if driver.error or driver.facts.get("code") else driver.facts["gpus"]
    findings += _check_gpus(gpus, machine, root)
    box = _box(machine, driver, gpus)
    parts = _check_libraries(box, root)
    conclusion = backends.check_usable(box, {finding.check: finding for finding in parts})
    findings += [*parts, system.check_cache(), conclusion]
    if bundle is not None:
        findings += backends.check_bundle(bundle, box)
    return findings


def is_healthy(findings: Sequence[Finding]) -> bool:
    """No finding is a problem."""
    return all(finding.state != PROBLEM for finding in findings)


def to_json(findings: Sequence[Finding]) -> str:
    """The findings for programs: {"edgead", "healthy", "findings": [{check, state, found, remedy}]}."""
    rows = [asdict(finding) for finding in findings]
    record = {"edgead": __version__, "healthy": is_healthy(findings), "findings": rows}
    return json.dumps(record, indent=2, ensure_ascii=False)


def to_text(findings: Sequence[Finding]) -> str:
    """The findings as a table for people."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines += _wrap(f"{finding.state:<8} {finding.check:<{width}}  ", finding.found)
        if finding.remedy:
            lines += _wrap(" " * (11 + width) + "-> ", finding.remedy)
    problems, notes = (sum(finding.state == state for finding in findings) for state in (PROBLEM, NOTE))
    counts = [
        f"{count} {word}{'s' * (count != 1)}" for count, word in ((problems, PROBLEM), (notes, NOTE))
    ]
    return "\n".join([*lines, "", ", ".join(counts)])


def _wrap(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        head + text,
        _WIDTH,
        subsequent_indent=" " * len(head),
        drop_whitespace=True,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _check_gpus(gpus: list[dict[str, Any]], machine: hardware.Hardware, root: Path) -> list[Finding]:
    if not gpus:
        return []
    answer = ask("states", str(len(gpus)), str(root))
    unknown = {"source": None}
    states = answer.facts["gpus"] if not answer.error else [unknown] * len(gpus)
    findings = [
        hardware.check_gpu(number, gpu, state)
        for number, (gpu, state) in enumerate(zip(gpus, states, strict=True))
    ]
    if machine.board is not None:
        return [*findings, *clocks.check_board(machine.board)]
    return findings + [clocks.check_gpu(number, state) for number, state in enumerate(states)]


def _box(machine: hardware.Hardware, driver: Answer, gpus: list[dict[str, Any]]) -> libraries.Box:
    major, _, minor = str(driver.facts.get("version", "")).partition(".")
    capability = gpus[0]["compute_capability"] if gpus else None
    return libraries.Box(
        has_gpu=machine.has_gpu or bool(gpus),
        is_jetson=machine.board is not None,
        capability=(capability[0], capability[1]) if capability else None,
        cuda=(int(major), int(minor)) if major else None,
    )


def _check_libraries(box: libraries.Box, root: Path) -> list[Finding]:
    modules = {name: name.replace("-", "_") for name in backends.FLAVOURS}
    questions = {name: ("flavour", name) for name in modules}
    questions |= {name: ("library", module) for name, module in libraries.MODULES.items()}
    modules |= libraries.MODULES
    questions = {
        name: words for name, words in questions.items() if libraries.is_installed(modules[name])
    }
    layer = libraries.chosen_layer()
    if box.capability is not None and layer in libraries.CUDA_PACKAGES:
        questions["cuda layer"] = ("cuda_layer", str(layer))
    replies = dict(zip(questions, ask_all(*questions.values()), strict=True))
    answers = {name: replies.get(name, Answer({}, "not installed")) for name in modules}
    findings = [
        libraries.check_layer(box, replies.get("cuda layer")),
        *(libraries.check_flavour(name, box, answers[name], root) for name in backends.FLAVOURS),
        libraries.check_torch(box),
        *(libraries.check_cpu_library(name, answers[name]) for name in libraries.MODULES),
    ]
    return [finding for finding in findings if finding is not None]
