from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgead.errors import LineError
from edgead.line.recipe import load

GOOD = """\
[line]
name = "demo"
journal = "state"

[[camera]]
name = "top"
deadline_ms = 40
source = { kind = "folder", path = "frames", rate_hz = 20 }

[[camera.recipe]]
bundle = "tiny.edgead"

[[camera.recipe]]
bundle = "tiny.edgead"
roi_px = [0, 0, 32, 32]
threshold = 2

[[sink]]
kind = "jsonl"
path = "results.jsonl"
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_bundle: Path) -> Path:
    shutil.copy(tiny_bundle, tmp_path / "tiny.edgead")
    (tmp_path / "frames").mkdir()
    cv2.imwrite(str(tmp_path / "frames" / "a.png"), np.full((64, 64, 3), 128, np.uint8))
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "line.toml"
    path.write_text(text)
    return path


def test_paths_are_those_beside_the_file(folder: Path) -> None:
    recipe = load(write(folder, GOOD))
    (camera,) = recipe.cameras
    assert camera.source.path == folder / "frames" and recipe.settings.journal == folder / "state"
    assert [one.bundle for one in camera.recipes] == [folder / "tiny.edgead"] * 2
    assert camera.recipes[1].roi_px == (0, 0, 32, 32) and camera.recipes[1].threshold == 2.0
    (sink,) = recipe.sinks
    assert (sink.name, sink.kind, sink.config.path) == ("jsonl", "jsonl", folder / "results.jsonl")
    assert recipe.place("camera top") == f"{folder / 'line.toml'}:8: "
    assert recipe.place("sink jsonl") == f"{folder / 'line.toml'}:18: "


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("deadline_ms = 40", "deadline_ms = 0", 7, "deadline_ms is 0, expected 0.5 to 600000"),
        ("deadline_ms = 40", "deadline_ms = 1e9", 7, "deadline_ms is 1e+09, expected 0.5 to 600000"),
        ("deadline_ms = 40", "dead_line = 40", 7, "camera 1 has no key 'dead_line': did you mean"),
        ("deadline_ms = 40\n", "", 5, "camera 1 lacks the key 'deadline_ms'"),
        ('"tiny.edgead"', '"gone.edgead"', 11, "there is no such file"),
        ('kind = "folder"', 'kind = "webcam"', 8, "source needs a kind, got 'webcam': one of"),
        ('kind = "jsonl"', 'kind = "fax"', 19, "sink needs a kind, got 'fax': one of"),
        ("threshold = 2", 'threshold = "2"', 16, "threshold is '2', expected a number"),
        ("[0, 0, 32, 32]", "[0, 0, 0, 32]", 15, "roi_px is [0, 0, 0, 32], expected left, top >= 0"),
        ('name = "top"', 'name = "top/left"', 6, "expected letters, digits, - and _"),
        ("deadline_ms = 40", 'deadline_ms = 40\ntrigger = "plc"', 8, "the source runs by itself"),
        (
            "rate_hz = 20",
            "triggered = true",
            8,
            'the source waits to be triggered: write trigger = "plc"',
        ),
        (
            'kind = "jsonl"',
            'kind = "jsonl"\nname = ["a"]',
            20,
            "name of the sink is ['a'], expected text",
        ),
        (
            'kind = "jsonl"\npath = "results.jsonl"',
            'kind = "webhook"\nurl = "http://a"\ntimeout_s = 10',
            21,
            "timeout_s is 10, expected less than the stall_s of the line, 10:",
        ),
        ("deadline_ms = 40", "deadline_ms = 40\nqueue = 0", 8, "queue is 0, expected 1 to 10000"),
        ("deadline_ms = 40", "deadline_ms = 40\nstart_recipe = 2", 8, "start_recipe is 2, there are 2"),
        (
            'journal = "state"',
            'journal = "state"\nreject = ["BAD"]',
            4,
            "reject names 'BAD', verdicts are",
        ),
        (
            'journal = "state"',
            'journal = "state"\nsync = "often"',
            4,
            "sync is 'often', expected one of",
        ),
        ('journal = "state"', 'journal = "state"\nin_flight = 9', 4, "in_flight is 9, expected 1 to 3"),
        ('journal = "state"\n', "", 1, "line lacks the key 'journal'"),
        ("[[sink]]", "[[sinks]]", 18, "no table 'sinks' is known here"),
        ("[[sink]]", "[sink]", 18, "write [[sink]] with two brackets"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    folder: Path, old: str, new: str, line: int, words: str
) -> None:
    assert old in GOOD
    path = write(folder, GOOD.replace(old, new))
    with pytest.raises(LineError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and words in str(error.value), error.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no table"),
        ('[line]\njournal = "x"', "has no camera; write"),
        (GOOD[: GOOD.index("[[sink]]")], "has no sink, nobody would get a verdict"),
        (GOOD[: GOOD.index("[[camera.recipe]]")], "camera lacks a recipe"),
        (GOOD + GOOD[GOOD.index("[[camera]]") : GOOD.index("[[sink]]")], "two cameras named 'top'"),
        (GOOD + '[[sink]]\nkind = "jsonl"\npath = "b.jsonl"', "two sinks named 'jsonl'"),
    ],
)
def test_what_is_missing_or_double(folder: Path, text: str, words: str) -> None:
    with pytest.raises(LineError, match=words):
        load(write(folder, text))
