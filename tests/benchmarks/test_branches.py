"""The scores of each branch, on the tiny bundle whose two branches NumPy can compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgead import metrics
from edgead.benchmarks import branches
from edgead.bundle import Bundle
from edgead.errors import BundleError, DataError
from edgead.image import read_image, write_image
from edgead.manifest import Calibration
from edgead.training.data import Dataset, open_dataset
from tests.conftest import Tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny) -> Path:
    """Good noise; spots, which both branches see; wide dark areas, which neither does."""
    root = tmp_path_factory.mktemp("data") / "set"
    dark = tiny.frames(3, spots=False, seed=8) // 2
    groups = {
        "train/good": tiny.frames(2, spots=False, seed=3),
        "test/good": tiny.frames(4, spots=False, seed=4),
        "test/spot": tiny.frames(3, spots=True, seed=5),
        "test/dark": dark,
    }
    for name, frames in groups.items():
        (root / name).mkdir(parents=True)
        for index, frame in enumerate(frames):
            write_image(root / name / f"{index}.png", frame)
    return root


def expected_scores(tiny: Tiny, dataset: Dataset) -> np.ndarray:
    frames = np.stack([read_image(item.path) for item in dataset.test])
    weights = [(1, 0, 0), (0, 1, 0), tiny.manifest.calibration.values]
    return np.stack([tiny.reference(frames, w)[0] for w in weights], axis=1)


def test_scores_are_those_of_each_branch(tiny: Tiny, tiny_bundle: Path, data: Path) -> None:
    dataset = open_dataset(data)
    found = branches.branch_scores(Bundle.open(tiny_bundle), dataset.test, "onnxruntime")
    np.testing.assert_allclose(found, expected_scores(tiny, dataset), atol=1e-5)


def test_table_of_every_defect_and_branch(
    tiny: Tiny,
    tiny_bundle: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "branches.json"
    arguments = ["branches", tiny_bundle, data, "--backend", "onnxruntime", "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    branches.main()
    found = json.loads(out.read_text())["image_auroc"]
    assert list(found) == ["dark", "spot", "all"]
    dataset = open_dataset(data)
    scores = expected_scores(tiny, dataset)
    for defect in ("dark", "spot"):
        chosen = [i for i, item in enumerate(dataset.test) if item.defect in ("good", defect)]
        labels = [dataset.test[i].label for i in chosen]
        for column, branch in enumerate(branches.BRANCHES):
            expected = metrics.image_auroc(scores[chosen, column], labels)
            assert found[defect][branch] == pytest.approx(expected)
    assert set(found["spot"].values()) == {1.0} and max(found["dark"].values()) < 0.5
    assert "| spot | 1.0000 | 1.0000 | 1.0000 |" in capsys.readouterr().out


def test_bundle_without_two_branches_and_data_without_defects(
    tiny: Tiny, tiny_bundle: Path, data: Path, tmp_path: Path
) -> None:
    one = Calibration(values=(1.0, 1.0, 0.0), names=("a", "b", "c"), meaning="none")
    bundle = Bundle.open(tiny.write(tmp_path / "one.edgead", calibration=one))
    with pytest.raises(BundleError, match="its calibration is a, b, c; expected the two scales"):
        branches.measure(bundle, open_dataset(data))
    for part in ("train", "test"):
        (tmp_path / "set" / part).mkdir(parents=True)
        (tmp_path / "set" / part / "good").symlink_to(data / part / "good")
    with pytest.raises(DataError, match="data set set: needs good and defective test images"):
        branches.measure(Bundle.open(tiny_bundle), open_dataset(tmp_path / "set"))
