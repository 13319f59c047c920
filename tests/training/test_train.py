"""From data set to run folder: what is written, what is refused.

And the penalty images, which are never left out.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgead.errors import DataError, TrainingError
from edgead.image import read_image, resize
from edgead.models.files import save_safetensors
from edgead.models.pdn import PDN
from edgead.training.data import open_dataset
from edgead.training.device import pick_device
from edgead.training.efficientad import TrainConfig, penalty_folder
from edgead.training.run import read_run
from edgead.training.train import describe_data, raw_maps, train


def test_run_folder_holds_what_it_says(trained_run: Path, demo_images: Path) -> None:
    record = json.loads((trained_run / "run.json").read_text())
    dataset = open_dataset(demo_images, seed=42)
    assert record["method"] == "efficientad-s"
    assert record["data"]["fingerprint"] == dataset.fingerprint()
    assert len(record["data"]["train"]) == 5 and len(record["data"]["validation"]) == 1
    assert not set(record["data"]["train"] + record["data"]["validation"]) & set(record["data"]["test"])
    assert record["training"]["steps"] == 3 and record["penalty"]["images"] == 6
    assert record["made"]["versions"]["edgead"] == "0.1.0"
    assert "takes at least 299" in record["threshold"]["claim"]
    names = {path.name for path in trained_run.iterdir()}
    assert names == {"run.json", "detector.safetensors", "losses.csv"}


def test_threshold_and_scale_come_from_the_validation_images(trained_run: Path) -> None:
    """Recomputed here from the saved weights: quantiles 0.9 and 0.995 of raw maps, score = maximum."""
    run = read_run(trained_run)
    root = Path(run.record["data"]["root"])
    paths = run.record["data"]["validation"]
    images = np.stack([resize(read_image(root / path), 256, 256) for path in paths])
    import torch

    local, logical = raw_maps(run.model, images, torch.device("cpu"))
    joined = np.zeros_like(local)
    for maps, name in ((local, "student"), (logical, "autoencoder")):
        low, high = np.quantile(maps.astype(np.float64), [0.9, 0.995])
        quantiles = run.record["calibration"]["quantiles"][name]
        assert quantiles == pytest.approx({"low": low, "high": high}, rel=1e-4)
        joined += (0.05 * (maps - low) / (high - low)).astype(np.float32)
    assert run.record["calibration"]["scores"] == pytest.approx(joined.max(axis=(1, 2)), rel=1e-3)
    assert run.record["threshold"]["value"] > joined.max()


def test_without_penalty_images_others_are_rendered_and_said_loudly(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    natural_images: Path,
) -> None:
    monkeypatch.delenv("EDGEAD_PENALTY_IMAGES", raising=False)
    monkeypatch.setattr("edgead.training.efficientad.DISTRACTORS", 3)
    tmp_path.joinpath("run").mkdir()
    with caplog.at_level(logging.WARNING):
        folder, source = penalty_folder(None, tmp_path / "run", seed=0)
    assert len(list(folder.iterdir())) == 3 and source == "3 rendered pictures"
    assert "no penalty images named" in caplog.text and "--penalty" in caplog.text
    monkeypatch.setenv("EDGEAD_PENALTY_IMAGES", str(natural_images))
    assert penalty_folder(None, tmp_path, seed=0) == (natural_images, "from EDGEAD_PENALTY_IMAGES")
    assert penalty_folder(tmp_path, tmp_path, seed=0)[0] == tmp_path


def test_teacher_of_the_wrong_size(tmp_path: Path, demo_images: Path, natural_images: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_safetensors(path, PDN("m").state_dict(), {})
    dataset, config = open_dataset(demo_images), TrainConfig(steps=1)
    with pytest.raises(TrainingError, match="is a PDN-M teacher.*--method efficientad-m"):
        train(dataset, tmp_path / "run", config, teacher=path, penalty=natural_images)


@pytest.mark.parametrize("options", [{"steps": 0}, {"minutes": 0.0}, {"minutes": -1.0}])
def test_nothing_to_do_is_an_error(options: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match="at least one step"):
        TrainConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Muon", "Adam", "sgd"])
def test_an_unknown_optimizer_is_an_error(name: str) -> None:
    with pytest.raises(TrainingError, match=f"--optimizer {name}: choose one of muon, adam"):
        TrainConfig(optimizer=name)  # type: ignore[arg-type]


def test_two_trainings_into_one_folder(
    tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    """The second one must not take the files of the first, not even to resume what is not there yet."""
    dataset, config = open_dataset(demo_images), TrainConfig(steps=2)
    files = {"teacher": random_teacher, "penalty": natural_images}
    problems = []

    def again(*_: object) -> None:
        with pytest.raises(TrainingError) as caught:
            train(dataset, tmp_path / "run", config, resume=True, **files)
        problems.append(str(caught.value))

    train(dataset, tmp_path / "run", config, progress=again, **files)
    assert len(problems) == 2 and "another process trains into" in problems[0]


def test_what_killed_trainings_left_is_removed(
    tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in (".checkpoint.pt.0a1b2c3d.tmp", ".images-0123.bin.0a1b2c3d.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half")
    files = {"teacher": random_teacher, "penalty": natural_images}
    train(open_dataset(demo_images), tmp_path / "run", TrainConfig(steps=1), **files)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"detector.safetensors", "losses.csv", "run.json"}


@pytest.mark.parametrize("folder", [".", "..", "test", "train/good"])
def test_penalty_images_of_the_data_set_are_refused(
    tmp_path: Path, demo_images: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    dataset, penalty = open_dataset(demo_images), demo_images / folder
    with pytest.raises(TrainingError, match="penalty images in .* would be those of the data set"):
        train(dataset, tmp_path / "run", TrainConfig(steps=1), penalty=penalty)
    monkeypatch.setenv("EDGEAD_PENALTY_IMAGES", str(penalty))
    with pytest.raises(TrainingError, match="penalty images in .* would be those of the data set"):
        train(dataset, tmp_path / "run", TrainConfig(steps=1))


def test_minutes_end_the_training(
    tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    fractions: list[float] = []
    config = TrainConfig(minutes=0.02)
    record = train(
        open_dataset(demo_images), tmp_path / "run", config,
        teacher=random_teacher, penalty=natural_images,
        progress=lambda fraction, step, losses: fractions.append(fraction),
    )  # fmt: skip
    assert record["training"]["steps"] == len(fractions) >= 1
    assert fractions == sorted(fractions) and fractions[-1] <= 1.0


def test_folders_that_are_no_run(tmp_path: Path, trained_run: Path) -> None:
    with pytest.raises(TrainingError, match="is no training run: it has no run.json"):
        read_run(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(TrainingError, match="has not finished"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"config": ')
    with pytest.raises(TrainingError, match="damaged"):
        read_run(tmp_path)


def test_an_image_that_cannot_be_read_costs_no_training(
    tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    """A validation image is needed after the training only, and its repair makes it another data set."""
    data = tmp_path / "data"
    shutil.copytree(demo_images, data)
    dataset = open_dataset(data)
    damaged = dataset.validation[0]
    damaged.write_bytes(damaged.read_bytes()[:2000])
    steps: list[int] = []
    with pytest.raises(DataError, match=f"{damaged.name}: a JPEG file without its end"):
        train(
            dataset, tmp_path / "run", TrainConfig(steps=2), teacher=random_teacher,
            penalty=natural_images, progress=lambda fraction, step, losses: steps.append(step),
        )  # fmt: skip
    assert steps == [] and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_images_are_not_read_after_the_training(
    tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo_images, data)
    record = train(
        open_dataset(data), tmp_path / "run", TrainConfig(steps=1), teacher=random_teacher,
        penalty=natural_images, progress=lambda fraction, step, losses: shutil.rmtree(data),
    )  # fmt: skip
    assert record["threshold"]["value"] > 0 and record["input_health"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "detector.safetensors", "losses.csv"}


def test_a_relative_data_folder_is_found_from_everywhere(
    tmp_path: Path, demo_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(demo_images, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert describe_data(open_dataset(Path("data")))["root"] == str(tmp_path / "data")


def test_any_seed_that_the_command_takes(
    tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    """Such as a date with the time."""
    config = TrainConfig(steps=1, seed=20251129061900)
    record = train(
        open_dataset(demo_images), tmp_path / "run", config,
        teacher=random_teacher, penalty=natural_images,
    )  # fmt: skip
    assert record["training"]["steps"] == 1


def test_a_device_that_does_not_exist() -> None:
    with pytest.raises(TrainingError, match="--device gpu: expected auto, cpu, cuda or cuda:N"):
        pick_device("gpu")
