"""What commands say and do about single files, with the tiny bundle: quick."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgead.bundle import Bundle, set_threshold
from edgead.cli import main
from edgead.image import list_images, write_image
from edgead.manifest import RESIZE_IN_GRAPH, InputSpec, Threshold

ON_CPU = ["--backend", "onnxruntime"]


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Path:
    return Path(shutil.copy(tiny_bundle, tmp_path / "part.edgead"))


@pytest.fixture
def good(tmp_path: Path, tiny: Any) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    for index, frame in enumerate(tiny.frames(4, spots=False, seed=5)):
        write_image(folder / f"{index}.png", frame)
    return folder


def test_predict_names_the_file_whose_size_does_not_fit(
    tiny: Any, tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = InputSpec(height=64, width=64, resize=RESIZE_IN_GRAPH)
    bundle = tiny.write(tmp_path / "frame.edgead", input=spec)
    wrong = good / "wrong.png"
    write_image(wrong, tiny.frames(1, spots=False)[0][:60])
    assert main(["predict", str(bundle), str(good), *ON_CPU]) == 1
    out = capsys.readouterr().out
    assert f"ERROR  {wrong}: the frame is 60x64 px" in out and out.count("OK ") == 4
    assert main(["recalibrate", str(bundle), "--good", str(good), *ON_CPU]) == 1
    assert f"error: {wrong}: the frame is 60x64 px" in capsys.readouterr().err
    wrong.write_bytes(b"no picture")
    assert main(["recalibrate", str(bundle), "--good", str(good), *ON_CPU]) == 1
    assert capsys.readouterr().err.count(str(wrong)) == 1


def test_a_heat_map_that_cannot_be_written_loses_no_verdict(
    tmp_path: Path, bundle: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good / "1.png").rename(good / f"1{'x' * 240}.png")  # with its number in front it is too long
    heat = tmp_path / "heat"
    assert main(["predict", str(bundle), str(good), *ON_CPU, "--heatmaps", str(heat)]) == 1
    out, err = capsys.readouterr()
    assert out.count("OK ") == 4 and err.count("cannot be written") == 1
    assert len(list_images(heat)) == 3


def test_evaluate_fails_at_the_end_if_an_image_could_not_be_inspected(
    tmp_path: Path, bundle: Path, demo_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, figures = tmp_path / "data", tmp_path / "figures.json"
    shutil.copytree(demo_images, data)
    command = ["evaluate", str(bundle), str(data), *ON_CPU, "--json", str(figures)]
    assert main(command) == 0
    damaged = list_images(data / "test")[0]
    damaged.write_bytes(damaged.read_bytes()[:3000])
    figures.unlink()
    assert main(command) == 1
    assert "evaluate: 1 images could not be inspected" in capsys.readouterr().err
    assert len(json.loads(figures.read_text())["errors"]) == 1


def test_recalibrate_tells_what_its_target_held(
    tmp_path: Path, bundle: Path, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copy(bundle, tmp_path / "other.edgead"))
    set_threshold(out, 0.75)
    command = ["recalibrate", str(bundle), "--good", str(good), *ON_CPU, "--out", str(out)]
    assert main(command) == 0
    assert "this replaced a bundle with a threshold set by hand, 0.75:" in capsys.readouterr().out
    assert main([*command[:-1], str(bundle)]) == 0
    assert "replaced" not in capsys.readouterr().out


@pytest.mark.parametrize("option", [ON_CPU, ["--threads", "1"], ["--false-reject", "0.1"]])
def test_undo_takes_nothing_for_measuring(
    option: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recalibrate", str(bundle), "--undo", *option]) == 1
    assert f"{option[0]} is for a new calibration" in capsys.readouterr().err


def test_recalibrate_looks_first_whether_the_bundle_can_be_replaced(
    bundle: Path, good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (good / "0.png").write_bytes(b"no picture")  # would be the error if the images came first
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle.parent)  # as on a read-only disk
    assert main(["recalibrate", str(bundle), "--good", str(good), *ON_CPU]) == 1
    assert f"{bundle}: files cannot be written in this folder" in capsys.readouterr().err


def test_inspect_shows_what_the_format_leaves_free(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write(
        tmp_path / "free.edgead",
        model=b"no graph",
        threshold=Threshold(value=0.4, basis="b", upper_bound=0.1, good_images=7),
        parity={"tool": "trtexec"},
    )
    assert main(["inspect", str(path)]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert rows["false rejects"].strip() == "at most 10.0%, 7 good images"
    assert rows["parity"].strip() == 'at export: {"tool": "trtexec"}'
    assert "no ONNX graph" in rows["graph"]
    assert Bundle.open(path).manifest.threshold.confidence is None
