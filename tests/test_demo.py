"""`edgead demo` from end to end, on fewer pictures and seconds than a user gets."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from edgead.cli import main
from edgead.demo import MARKER
from edgead.training import demo_data


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = functools.partial(demo_data.render_demo, train=6, good=2, defective=7)
    monkeypatch.setattr(demo_data, "render_demo", fewer)
    monkeypatch.setattr("edgead.training.efficientad.DISTRACTORS", 3)
    monkeypatch.delenv("EDGEAD_PENALTY_IMAGES", raising=False)


def test_a_demo_replaces_an_earlier_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    (out / "data" / "train").mkdir(parents=True)
    (out / "run").mkdir()
    left = MARKER, "data/train/old.png", "run/run.json", "tray.edgead", "results.json", "report.html"
    for name in left:
        (out / name).write_text("of an earlier one")
    assert main(["demo", "--out", str(out), "--minutes", "0.02"]) == 0
    printed = capsys.readouterr().out
    assert (out / "report.html").resolve().as_uri() in printed and "image AUROC" in printed
    assert not (out / "data" / "train" / "old.png").exists()
    results = json.loads((out / "results.json").read_text())
    assert results["images"] == 9 and results["name"] == "tray"
    assert "scratch" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "tray.edgead").is_file()


def test_what_is_not_of_a_demo_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "data" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert f"{mine.parent} exists and is of no demo" in capsys.readouterr().err
    assert mine.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_wrong_number_costs_no_earlier_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / MARKER).touch()
    assert main(["demo", "--out", str(tmp_path), "--minutes", "nan"]) == 1
    assert "more than 0 minutes" in capsys.readouterr().err and (tmp_path / "run").is_dir()


def test_only_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--only-data", str(tmp_path / "data")]) == 0
    parts = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert parts == ["ground_truth", "test", "train"]
    assert "data" in capsys.readouterr().out
