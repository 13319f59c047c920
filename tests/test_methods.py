"""The dictionary of methods: every entry holds what it must, and a new one needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgead.errors import TrainingError
from edgead.methods import METHODS, Method, configure, trainer_of


@pytest.mark.parametrize("name", METHODS)
def test_every_method_holds_what_a_method_must(name: str) -> None:
    pytest.importorskip("torch", reason="the methods need torch")
    config = configure(name, seed=7)
    assert config.method == name and config.seed == 7 and 0 < config.false_reject < 0.5
    assert dataclasses.is_dataclass(config) and type(config).__dataclass_params__.frozen
    json.dumps(dataclasses.asdict(config))  # as run.json has it
    assert set(trainer_of(name).FILES) <= {"teacher", "penalty", "backbone"}


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys, edgead.methods; assert 'torch' not in sys.modules; print(*edgead.methods.METHODS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(METHODS)


def test_unknown_methods_and_options_are_named() -> None:
    with pytest.raises(TrainingError, match="'padim' is unknown; known are efficientad-s, "):
        configure("padim")
    with pytest.raises(TrainingError, match="--max-prototypes: not an option of --method eff"):
        configure("efficientad-s", max_prototypes=64)


def test_a_fifth_method_is_one_file_and_one_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_images: Path
) -> None:
    """From training to the verdict, by the commands that a user has."""
    from edgead import load
    from edgead.cli import main
    from edgead.image import read_image
    from edgead.training.data import open_dataset

    monkeypatch.setitem(METHODS, "toy", Method("tests.toy_method"))
    run, bundle = tmp_path / "run", tmp_path / "toy.edgead"
    assert main(["train", str(demo_images), "--method", "toy", "--steps", "4", "--out", str(run)]) == 0
    assert main(["export", str(run), "--out", str(bundle)]) == 0
    dataset = open_dataset(demo_images, seed=0)
    mean = np.mean([_small(path) for path in dataset.train[:4]], axis=0)
    with load(bundle, backend="onnxruntime") as detector:
        assert detector.manifest.method == "toy" and detector.manifest.map_shape == (8, 8)
        scale, offset = detector.manifest.calibration.values
        for item in dataset.test[:3]:
            frame = read_image(item.path)
            difference = np.abs(_small(item.path) - mean).mean(2).reshape(8, 8, 8, 8).mean((1, 3))
            expected = scale * difference + offset
            result = detector(frame)
            np.testing.assert_allclose(result.anomaly_map, expected, rtol=1e-3, atol=1e-3)
            assert result.score == pytest.approx(expected.max(), rel=1e-3, abs=1e-3)


def _small(path: Path) -> np.ndarray:
    from edgead.image import read_image, resize

    return resize(read_image(path), 64, 64).astype(np.float64)
