"""The benchmark of tiny defects on two variants of the tiny bundle: record, tables, plot, errors."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.benchmarks import tiny_defects
from edgead.bundle import Golden
from edgead.by_size import SizeConfig
from edgead.detector import load
from edgead.evaluate import evaluate
from edgead.image import write_image
from edgead.training.data import open_dataset
from tests.conftest import Tiny
from tests.test_by_size import SIDES_PX, spots

pytest.importorskip("matplotlib", reason="matplotlib (for the plot) is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spots(tmp_path_factory.mktemp("data") / "parts")


@pytest.fixture(scope="module")
def bundles(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny bundle, and one whose map is the same everywhere."""
    folder = tmp_path_factory.mktemp("bundles")
    blind = replace(tiny.manifest.calibration, values=(0.0, 0.0, 0.1))
    images = tiny.golden.images
    golden = Golden(images, *tiny.reference(images, blind.values))
    return [
        tiny.write(folder / "sees.edgead"),
        tiny.write(folder / "blind.edgead", calibration=blind, golden=golden),
    ]


def run(out: Path, data: Path, bundles: list[Path], *options: str) -> dict[str, Any]:
    arguments = [str(data), *map(str, bundles), "--out", str(out), "--backend", "onnxruntime", *options]
    assert tiny_defects.main(arguments) == 0
    record: dict[str, Any] = json.loads((out / "tiny_defects.json").read_text(encoding="utf-8"))
    return record


def test_bundles_are_compared_with_provenance(
    data: Path, bundles: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(tmp_path / "new" / "out", data, bundles, "--threads", "1")
    assert {"benchmark", "utc", "git_commit", "machine"} <= set(record)
    assert record["data"]["name"] == "parts" and record["data"]["formats"] == {".png": 9}
    assert (record["data"]["good_images"], record["data"]["defect_images"]) == (3, 6)
    assert list(record["bundles"]) == ["sees", "blind"]
    assert str(tmp_path) not in json.dumps(record)

    sees, blind = record["bundles"].values()
    assert sees["sha256"] == hashlib.sha256(bundles[0].read_bytes()).hexdigest()
    assert (sees["method"], sees["backend"], sees["provenance"]) == (
        "tiny-blob",
        "onnxruntime",
        {"seed": 0},
    )
    with load(bundles[0], backend="onnxruntime", threads=1) as detector:
        evaluation = evaluate(detector, open_dataset(data), sizes=SizeConfig())
    again = json.loads(evaluation.to_json())
    for key in ("by_size", "image_auroc", "pixel_auroc", "threshold"):
        assert sees[key] == again[key]
    # A constant map has AU-PRO@L = L/2 in every bin, so that no size is worse than another.
    for limit, one in zip((0.3, 0.1, 0.05, 0.01), blind["by_size"]["robustness"], strict=True):
        assert (one["mean"], one["ratio"], one["rho"]) == pytest.approx((limit / 2, 1.0, limit / 2))

    page = (tmp_path / "new" / "out" / "tiny_defects.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert "| bundle | AU-PRO | Q1 (2) | Q2 (3) | Q3 (4) | Q4 (6) | mean | ratio | rho |" in page
    assert "| blind | @30 | 0.1500 | 0.1500 | 0.1500 | 0.1500 | 0.1500 | 1.0000 | 0.1500 |" in page
    assert page.count("| sees | @") == 4
    assert "cumulative bins, exact integral" in page and "after the published description" in page
    assert "6 components of 4 to 144 px, quartiles 10.75, 26, 57" in page
    found = sum(one.is_found for one in evaluation.by_size.components) if evaluation.by_size else -1
    assert f"| {found} of 6 |" in page and "| blind | tiny-blob | onnxruntime fp32 | 0.5000 |" in page
    assert "compressed with loss" not in page

    svg = (tmp_path / "new" / "out" / "tiny_defects.svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml") and svg.count('<g id="axes_') == 4


def test_bins_and_integral_are_named(data: Path, bundles: list[Path], tmp_path: Path) -> None:
    record = run(tmp_path, data, bundles[:1], "--bins", "disjoint", "--thresholds", "99")
    figures = record["bundles"]["sees"]["by_size"]
    assert (figures["bins_mode"], figures["thresholds"]) == ("disjoint", 99)
    assert "disjoint bins, 99 thresholds" in (tmp_path / "tiny_defects.md").read_text(encoding="utf-8")


def test_few_components_and_lossy_images(bundles: list[Path], tmp_path: Path) -> None:
    root = spots(tmp_path / "parts", sides_px=SIDES_PX[:3])
    for path in (root / "test" / "good").iterdir():
        path.unlink()
        write_image(path.with_suffix(".jpg"), np.full((64, 64, 3), 70, np.uint8))
    record = run(tmp_path / "out", root, bundles)
    assert record["data"]["formats"] == {".jpg": 3, ".png": 3}
    page = (tmp_path / "out" / "tiny_defects.md").read_text(encoding="utf-8")
    assert "| bundle | AU-PRO | Q4 (3) |\n" in page and "quartiles none" in page
    assert "compressed with loss" in page


def test_errors_come_before_the_work(
    data: Path, bundles: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    twin = shutil.copy(bundles[0], tmp_path / "other" / "sees.edgead")
    for arguments, message in (
        ([data, bundles[0], twin], "several bundles are called sees: rename them"),
        ([data, bundles[0], "nothing.edgead"], "nothing.edgead: cannot be read"),
        ([tmp_path / "other", bundles[0]], "not a data set"),
    ):
        assert tiny_defects.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    masks = open_dataset(data).test[-1].masks
    root = shutil.copytree(data, tmp_path / "parts")
    write_image(root / masks[0].relative_to(data), np.zeros((64, 64), np.uint8))
    assert tiny_defects.main([str(root), str(bundles[0]), "--out", str(tmp_path / "out")]) == 1
    assert "1 of 6 cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_that_do_not_exist() -> None:
    assert [tiny_defects._number(value) for value in (None, math.nan, 0.5)] == ["-", "-", "0.5000"]
