"""The README's commands are commands that exist, and its promises about files hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from edgead.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    edgead ")]
COMMANDS = [line for line in COMMANDS if "/" not in line.split()[0] and not line.startswith("edgead/")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    arguments = build_parser().parse_args(shlex.split(line)[1:])
    assert callable(arguments.run)


def test_there_are_commands_for_the_whole_path() -> None:
    named = {shlex.split(line)[1] for line in COMMANDS}
    assert named == {
        "train",
        "export",
        "inspect",
        "predict",
        "evaluate",
        "verify",
        "set-threshold",
        "recalibrate",
        "distill",
        "doctor",
        "build",
        "engines",
        "run",
        "simulate",
    }


def test_make_targets_and_files_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for name in (
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "edgead/weights/pdn_small.md",
        "edgead/weights/pdn_medium.md",
        "edgead/bundle.py",
        "docs/boxes.md",
        "docs/runtime.md",
    ):
        assert name in README and (ROOT / name).is_file()


def test_every_dependency_is_in_the_table() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    start = text.index("dependencies = [")
    names = set(
        re.findall(r'"([a-z][a-z0-9-]+)[>=<;\[" ]', text[start : text.index("[project.scripts]")])
    ) - {"edgead"}
    table = README[README.index("| dependency |") :]
    missing = {name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)}
    assert missing <= {"packaging", "pip", "setuptools"}
