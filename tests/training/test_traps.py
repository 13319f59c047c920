"""Traps that detectors of this kind are known to fall into, each on a real run of one step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgead.bundle import Bundle
from edgead.image import list_images, write_image
from edgead.methods import configure
from edgead.models.efficientad import EfficientAD
from edgead.training import images as images_module
from edgead.training.data import open_dataset
from edgead.training.efficientad import TrainConfig
from edgead.training.run import read_run
from edgead.training.train import raw_maps, train

CPU = torch.device("cpu")


def run_of(data: Path, run: Path, natural: Path, teacher: Path) -> dict[str, Any]:
    config = TrainConfig(steps=1, seed=3)
    train(open_dataset(data, seed=config.seed), run, config, teacher=teacher, penalty=natural)
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    assert np.isfinite(record["calibration"]["values"] + record["calibration"]["scores"]).all()
    assert record["threshold"]["value"] > max(record["calibration"]["scores"])
    return record


def assert_same(first: Path, second: Path) -> None:
    """Weights, quantiles, validation scores and threshold, bit for bit."""
    a, b = load_file(first / "detector.safetensors"), load_file(second / "detector.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    one, other = (json.loads((run / "run.json").read_text()) for run in (first, second))
    assert all(one[key] == other[key] for key in ("calibration", "threshold"))


def copied(source: Path, target: Path, *, backwards: bool = False) -> Path:
    """A copy of a folder; its files are made in the order of their names, or the other way round.

    That is the order in which many file systems list them.
    """
    for path in sorted((p for p in source.rglob("*") if p.is_file()), reverse=backwards):
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.relative_to(source))
    return target


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory,
    demo_images: Path,
    natural_images: Path,
    random_teacher: Path,
) -> Path:
    """The run that others are compared with."""
    run = tmp_path_factory.mktemp("plain") / "run"
    run_of(demo_images, run, natural_images, random_teacher)
    return run


def test_calibration_never_sees_test_images(
    plain: Path, tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    """None can even be read here; whoever opened one would fail."""
    data = copied(demo_images, tmp_path / demo_images.name)
    for path in [*list_images(data / "test"), *list_images(data / "ground_truth")]:
        path.write_bytes(b"garbage")
    run_of(data, tmp_path / "run", natural_images, random_teacher)
    assert_same(plain, tmp_path / "run")


def test_result_does_not_depend_on_file_order_or_number_of_workers(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    demo_images: Path,
    natural_images: Path,
    random_teacher: Path,
) -> None:
    data = copied(demo_images, tmp_path / demo_images.name, backwards=True)
    natural = copied(natural_images, tmp_path / "natural", backwards=True)
    monkeypatch.setattr(images_module.os, "cpu_count", lambda: 7)
    run_of(data, tmp_path / "seven", natural, random_teacher)
    assert_same(plain, tmp_path / "seven")
    monkeypatch.setattr(images_module, "MOST_DECODERS", 1)
    monkeypatch.setattr(images_module, "MOST_STORED", 0)
    run_of(data, tmp_path / "one", natural, random_teacher)
    assert_same(plain, tmp_path / "one")


def test_verdicts_do_not_depend_on_the_batch(trained_bundle: Path) -> None:
    """Alone, and in a batch with others: the last digits of a convolution may differ, no more."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    bundle = Bundle.open(trained_bundle)
    session = onnxruntime.InferenceSession(bundle.model_bytes(), providers=["CPUExecutionProvider"])
    calibration = np.array(bundle.manifest.calibration.values, np.float32)
    images = bundle.golden().images
    together, _ = session.run(None, {"image": images, "calibration": calibration})
    alone = [
        float(session.run(None, {"image": image[None], "calibration": calibration})[0][0])
        for image in images
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    threshold = bundle.manifest.threshold.value
    assert [score >= threshold for score in alone] == [score >= threshold for score in together.tolist()]


def save(folder: Path, *images: np.ndarray) -> None:
    for index, image in enumerate(images):
        path = folder / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, image)


def score(run: Path, image: np.ndarray) -> float:
    """Of an image uint8 [256, 256, 3], by the run's networks and calibration."""
    finished = read_run(run)
    model: EfficientAD = finished.model
    local, logical = raw_maps(model, image[None], CPU)
    a, b, offset = finished.record["calibration"]["values"]
    return float((a * local + b * logical + offset).max())


def test_constant_images_that_are_all_the_same(
    tmp_path: Path, natural_images: Path, random_teacher: Path
) -> None:
    """No channel varies and the quantiles of the map may coincide; a spot is found all the same."""
    image = np.full((64, 64, 3), 90, np.uint8)
    save(tmp_path / "data" / "train" / "good", *[image] * 12)
    record = run_of(tmp_path / "data", tmp_path / "run", natural_images, random_teacher)
    model = read_run(tmp_path / "run").model
    assert torch.isfinite(model.mean).all() and float(model.std.min()) > 0
    spot = np.full((256, 256, 3), 90, np.uint8)
    assert score(tmp_path / "run", spot) < record["threshold"]["value"]
    spot[100:130, 100:130] = 250
    assert score(tmp_path / "run", spot) > record["threshold"]["value"]


def test_one_training_image(tmp_path: Path, natural_images: Path, random_teacher: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    save(tmp_path / "data" / "good", image)
    record = run_of(tmp_path / "data", tmp_path / "run", natural_images, random_teacher)
    assert record["data"]["train"] == record["data"]["validation"] == ["good/000.png"]
    assert (
        "1 good validation images support a false-reject rate of at most 95.0%"
        in (record["threshold"]["claim"])
    )


@pytest.mark.parametrize(("method", "options"), [("fbft", {"steps": 2}), ("protoad", {})])
def test_one_training_image_of_other_methods(
    tmp_path: Path, random_teacher: Path, method: str, options: dict[str, int]
) -> None:
    """STPM, which holds a fifth of them back, refuses it: tests/models/test_stpm.py."""
    image = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    save(tmp_path / "data" / "good", image)
    dataset, config = open_dataset(tmp_path / "data"), configure(method, **options)
    record = train(dataset, tmp_path / "run", config, backbone=random_teacher)
    assert record["data"]["train"] == record["data"]["validation"] == ["good/000.png"]
    assert np.isfinite(record["threshold"]["value"])


def test_images_of_any_shape_and_grey_ones(
    tmp_path: Path, natural_images: Path, random_teacher: Path
) -> None:
    """Wide, high, tiny, grey, and larger than the network: every one is brought to 256x256."""
    rng = np.random.default_rng(0)
    sizes = [(20, 300, 3), (310, 15, 3), (1, 1, 3), (5, 4), (64, 64), (400, 300, 3), (256, 256)]
    shapes = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    save(tmp_path / "data" / "train" / "good", *shapes, *shapes)  # and each of them twice
    record = run_of(tmp_path / "data", tmp_path / "run", natural_images, random_teacher)
    assert len(record["data"]["train"]) == 12 and len(record["calibration"]["scores"]) == 2
