"""The training step against a plain reading of the paper, and runs that are interrupted."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgead.errors import DataError, TrainingError
from edgead.models.files import load_teacher, shipped_teacher
from edgead.models.folding import normalise
from edgead.training.data import open_dataset
from edgead.training.efficientad import SHIPPED_TARGETS, TrainConfig, build_model, step_losses
from edgead.training.images import PenaltyImages, jitter, read_images
from edgead.training.teacher_targets import TeacherTargets
from edgead.training.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(demo_images: Path) -> np.ndarray:
    return read_images(list(open_dataset(demo_images).train))


def test_losses_are_those_of_the_paper(images: np.ndarray, random_teacher: Path) -> None:
    """Plain form: three separate student passes, torch.quantile, boolean mask; FP32, dropout off."""
    model = build_model(load_teacher(random_teacher)[0], seed=0)
    TeacherTargets(model, images[:2], CPU, 16)
    model.eval()
    x = normalise(torch.from_numpy(images[:3]).permute(0, 3, 1, 2))
    target = model.teacher_features(x[:1])
    hard, penalty, autoencoder, pair = step_losses(model, x, target)

    distance = (target - model.student(x[:1])[:, :384]) ** 2
    threshold = np.quantile(distance.detach().numpy(), 0.999)
    expected_hard = distance[distance >= float(threshold)].mean()
    decoded, jittered = model.autoencoder(x[2:]), model.student(x[2:])
    torch.testing.assert_close(hard, expected_hard, rtol=1e-4, atol=0)
    torch.testing.assert_close(penalty, (model.student(x[1:2])[:, :384] ** 2).mean(), rtol=1e-4, atol=0)
    expected_autoencoder = ((model.teacher_features(x[2:]) - decoded) ** 2).mean()
    torch.testing.assert_close(autoencoder, expected_autoencoder, rtol=1e-4, atol=0)
    torch.testing.assert_close(pair, ((decoded - jittered[:, 384:]) ** 2).mean(), rtol=1e-4, atol=0)
    # The last term trains both networks: no detach.
    pair.backward()
    assert model.autoencoder.last.weight.grad is not None and model.student.conv1.weight.grad is not None
    assert model.teacher.conv1.weight.grad is None


def test_hard_loss_takes_1205_values() -> None:
    n = 384 * 56 * 56
    assert n - -(-999 * (n - 1) // 1000) == 1205  # as computed in the published analysis of the quantile


def test_teacher_statistics_are_the_two_pass_ones_and_targets_normalised(
    images: np.ndarray, random_teacher: Path
) -> None:
    model = build_model(load_teacher(random_teacher)[0], seed=0)
    targets = TeacherTargets(model, images, CPU, cache_mib=3)  # room for one image only
    with torch.inference_mode():
        features = model.teacher(normalise(torch.from_numpy(images).permute(0, 3, 1, 2))).double()
    mean = features.mean(dim=(0, 2, 3))
    std = (features - mean.view(1, -1, 1, 1)).square().mean(dim=(0, 2, 3)).sqrt()
    scale = float(std.mean())
    assert float((model.mean.flatten() - mean).abs().max()) < 0.02 * scale  # the teacher may run in bf16
    assert float((model.std.flatten() / std - 1).abs().max()) < 0.02
    assert len(targets.cache) == 1
    expected = (features.float() - model.mean) / model.std
    for index in (0, 3):  # cached and computed again
        assert float((targets[index] - expected[index : index + 1]).abs().mean()) < 0.02


def test_jitter_follows_the_three_formulas() -> None:
    image = np.random.default_rng(0).integers(30, 200, (8, 8, 3), dtype=np.uint8)
    x = image.astype(np.float64)
    grey = x @ np.array([0.299, 0.587, 0.114])
    seen = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        kind, f = rng.integers(3), rng.uniform(0.8, 1.2)
        base = (np.zeros_like(x), np.full_like(x, grey.mean()), np.repeat(grey[..., None], 3, 2))[kind]
        expected = np.clip(f * x + (1 - f) * base, 0, 255)
        found = jitter(image, np.random.default_rng(seed))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)
        seen.add(int(kind))
    assert seen == {0, 1, 2}


def test_penalty_images_are_seeded_and_never_silently_absent(
    tmp_path: Path, natural_images: Path
) -> None:
    a, b = PenaltyImages(natural_images, seed=1), PenaltyImages(natural_images, seed=1)
    b(7)
    assert np.array_equal(a(3), b(3)) and a(3).shape == (256, 256, 3) and a(3).dtype == np.uint8
    with pytest.raises(DataError, match="holds no images, and training without penalty images"):
        PenaltyImages(tmp_path, seed=0)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "detector.safetensors")


def _train(
    run: Path,
    demo_images: Path,
    natural_images: Path,
    teacher: Path,
    *,
    false_reject: float = 0.01,
    **options: object,
) -> None:
    config = TrainConfig(steps=4, checkpoint_s=0.0, false_reject=false_reject)
    dataset = open_dataset(demo_images, seed=config.seed)
    train(dataset, run, config, teacher=teacher, penalty=natural_images, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
    demo_images: Path,
    natural_images: Path,
    random_teacher: Path,
) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    _train(run, demo_images, natural_images, random_teacher)
    return run


def test_same_seed_same_numbers_and_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    inputs = (demo_images, natural_images, random_teacher)
    steps = []

    class Stop(Exception):
        pass

    def stop(fraction: float, step: int, losses: object) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        _train(tmp_path / "b", *inputs, progress=stop)
    with pytest.raises(TrainingError, match="unfinished run; go on with --resume"):
        _train(tmp_path / "b", *inputs)
    _train(tmp_path / "b", *inputs, resume=True, progress=lambda f, s, losses: steps.append(s))
    assert steps == [3, 4]  # step 3 was done but not yet in a checkpoint
    a, b = _weights(uninterrupted), _weights(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in a)
    rows = list(csv.DictReader((tmp_path / "b" / "losses.csv").open()))
    assert [row["step"] for row in rows] == ["1"] and float(rows[0]["hard"]) > 0
    assert not (tmp_path / "b" / "checkpoint.pt").exists()
    with pytest.raises(TrainingError, match="holds a finished run"):
        _train(tmp_path / "b", *inputs)
    with pytest.raises(TrainingError, match="--false-reject 0.5 is out of range"):  # and not at the end
        _train(tmp_path / "d", *inputs, false_reject=0.5)
    assert not (tmp_path / "d").exists()
    (tmp_path / "c").touch()
    with pytest.raises(TrainingError, match="c is a file; name a folder"):
        _train(tmp_path / "c", *inputs)


def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    def stop(fraction: float, step: int, losses: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "a", demo_images, natural_images, random_teacher, progress=stop)
    config = TrainConfig(steps=9, checkpoint_s=0.0)
    with pytest.raises(TrainingError, match="other settings.*steps: 4 then, 9 now"):
        train(
            open_dataset(demo_images, seed=config.seed), tmp_path / "a", config,
            teacher=random_teacher, penalty=natural_images, resume=True,
        )  # fmt: skip
    others = tmp_path / "others"  # as many, other ones
    others.mkdir()
    for path in natural_images.iterdir():
        shutil.copy(path, others / f"other_{path.name}")
    with pytest.raises(TrainingError, match="other settings.*penalty: '6 images, names"):
        _train(tmp_path / "a", demo_images, others, random_teacher, resume=True)
    (tmp_path / "a" / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(TrainingError, match="cannot be read as a checkpoint"):
        _train(tmp_path / "a", demo_images, natural_images, random_teacher, resume=True)


SCRIPT = """
import sys
from pathlib import Path
from edgead.training.data import open_dataset
from edgead.training.efficientad import TrainConfig
from edgead.training.train import train
data, natural, teacher, run = map(Path, sys.argv[1:5])
config = TrainConfig(steps=4, checkpoint_s=0.0)
train(open_dataset(data, seed=config.seed), run, config, teacher=teacher, penalty=natural, resume=True,
      progress=lambda fraction, step, losses: print(step, flush=True))
"""


def test_kill_9_loses_no_more_than_the_steps_since_the_checkpoint(
    tmp_path: Path, uninterrupted: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    """Killed over and over until it is through.

    Every start goes on where a checkpoint was, and the result is the same.
    """
    run = tmp_path / "killed"
    arguments = map(str, (demo_images, natural_images, random_teacher, run))
    command = [sys.executable, "-c", SCRIPT, *arguments]
    first_steps = []
    for kill_after in (2, 1, None):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        done = 0
        for line in process.stdout:
            if done == 0:
                first_steps.append(int(line))
            done += 1
            if done == kill_after:
                time.sleep(0.05 * kill_after)  # anywhere in the writing of the checkpoint
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        assert process.wait() == (0 if kill_after is None else -signal.SIGKILL)
    assert first_steps[0] == 1 and first_steps[1] in (2, 3) and first_steps[1] <= first_steps[2] <= 4
    a, b = _weights(uninterrupted), _weights(run)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_short_runs_take_muon_and_long_ones_the_published_schedule() -> None:
    for config in (TrainConfig(steps=70_000), TrainConfig(steps=20_000)):
        assert config.optimizer == "adam" and [config.rate_at(x, 9) for x in (0, 0.949)] == [1e-4, 1e-4]
        assert config.rate_at(0.95, 9) == pytest.approx(1e-5)
    for config in (TrainConfig(), TrainConfig(steps=19_999), TrainConfig(minutes=5)):
        assert config.optimizer == "muon"
        assert [config.rate_at(0.5, x) for x in (0, 900, 2400)] == pytest.approx([0.02, 0.01, 0.02 / 3])
        assert [config.rate_at(x, 0) for x in (0.8, 0.9, 1)] == pytest.approx([0.02, 0.01, 0])
    assert TrainConfig(steps=5, optimizer="adam").rate_at(0, 0) == 1e-4
    assert TrainConfig(steps=5, learning_rate=1e-3).rate_at(0, 0) == 1e-3


def test_the_teacher_that_ships_is_known_by_its_content(
    demo_images: Path, natural_images: Path, tmp_path: Path
) -> None:
    """Named by a path it has its own number of targets, as without a name; any other has all."""
    named = Path(shutil.copy(shipped_teacher("s"), tmp_path / "mine.safetensors"))
    dataset, config = open_dataset(demo_images), TrainConfig(steps=1)
    train(dataset, tmp_path / "run", config, teacher=named, penalty=natural_images)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["architecture"]["targets"] == SHIPPED_TARGETS
