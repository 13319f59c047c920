"""Training on fewer target channels: the rotation, the scale of the losses, runs and their export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgead.cli import main
from edgead.errors import TrainingError
from edgead.models.files import load_teacher
from edgead.models.folding import normalise
from edgead.models.pdn import PDN
from edgead.training.data import open_dataset
from edgead.training.directions import principal_directions, target_rotation, with_stored
from edgead.training.efficientad import TrainConfig, Trainer, build_model, step_losses
from edgead.training.images import PenaltyImages, read_images
from edgead.training.run import read_run
from edgead.training.teacher_targets import TeacherTargets, natural_moment
from edgead.training.train import train

CPU = torch.device("cpu")


def random_moment(channels: int, seed: int) -> torch.Tensor:
    root = np.random.default_rng(seed).normal(size=(channels, channels)) * np.linspace(3, 0.1, channels)
    return torch.from_numpy(root @ root.T)


def test_rotation_holds_the_most_energy_at_the_common_scale() -> None:
    own, natural = random_moment(24, 0), random_moment(24, 1)
    rotation = target_rotation(own, natural, 6).double()
    gram = rotation.T @ rotation
    torch.testing.assert_close(gram, torch.eye(6).double() * gram[0, 0], rtol=1e-5, atol=1e-5)
    # the mean square of a target over the training images is 1, as that of a published channel
    assert float((rotation.T @ own @ rotation).trace()) / 6 == pytest.approx(1, rel=1e-5)
    # no other 6 directions hold more of the joined energy: the sum of the 6 largest eigenvalues
    joined = own / own.trace() + natural / natural.trace()
    held = (rotation.T @ joined @ rotation).trace() / gram[0, 0]
    assert float(held) == pytest.approx(float(np.linalg.eigvalsh(joined)[-6:].sum()), rel=1e-5)


def test_stored_directions_bring_correlations_not_scales() -> None:
    rng = np.random.default_rng(2)
    features = torch.from_numpy(rng.normal(size=(2000, 8)) @ rng.normal(size=(8, 8)))
    stored = principal_directions([features.T[None, :, :, None]])
    scale = torch.linspace(0.5, 2, 8).double()
    scaled = features * scale
    expected = scaled.T @ scaled / len(scaled)
    flat = torch.diag(expected.diagonal())  # the right energies, no correlations
    torch.testing.assert_close(with_stored(flat, stored), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", ["s", "m"])
@torch.inference_mode()
def test_folded_teacher_gives_the_rotated_features(size: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(PDN(size).eval(), seed=0, targets=5)  # type: ignore[arg-type]
        model.std.uniform_(0.5, 2)
        model.mean.normal_()
        assert model.rotation is not None
        model.rotation.normal_()
        x = torch.randn(1, 3, 64, 64)
    features = (model.teacher(x) - model.mean) / model.std
    expected = torch.einsum("nchw,ck->nkhw", features, model.rotation)
    found = model.targets_of(model.teacher.trunk(x))
    assert found.shape[1] == 5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32, two orders of summation


def test_384_targets_are_the_published_layout() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = PDN("s").eval()
    model = build_model(teacher, seed=3, targets=384)
    default = build_model(teacher, seed=3)
    assert model.rotation is None and "rotation" not in model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), default.parameters(), strict=True))


@pytest.fixture(scope="module")
def images(demo_images: Path) -> np.ndarray:
    return read_images(open_dataset(demo_images).train)


def test_targets_and_losses_keep_the_published_scale(
    images: np.ndarray, random_teacher: Path, natural_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgead.training.teacher_targets.NATURAL_IMAGES", 2)
    model = build_model(load_teacher(random_teacher)[0], seed=0, targets=16)
    penalty = PenaltyImages(natural_images, seed=0)
    targets = TeacherTargets(model, images[:3], CPU, 1, lambda: natural_moment(model, penalty, CPU))
    # at 16 channels an image takes 0.1 MiB: all three are cached, where 384 channels left room for one
    assert targets.cache.shape == (3, 16, 56, 56)
    x = normalise(torch.from_numpy(images[:3]).permute(0, 3, 1, 2))
    with torch.inference_mode():
        expected = model.teacher_features(x)
    for index in range(3):
        # FP16 cache, and the teacher may run in bf16
        assert float((targets[index] - expected[index : index + 1]).abs().mean()) < 0.03
    assert float(expected.square().mean()) == pytest.approx(1, rel=0.05)
    # an untrained student answers about 0: the losses against the targets are about their mean square
    model.eval()
    hard, penalty_loss, autoencoder, pair = (
        float(term.detach()) for term in step_losses(model, x, targets[0])
    )
    assert 0.5 < autoencoder < 2 and hard > 1 and penalty_loss < 0.5 and pair < 0.5
    resumed = TeacherTargets(model, images[:3], CPU, 1, None)  # keeps its rotation and asks for no other
    assert torch.equal(resumed.cache, targets.cache)


def _train(run: Path, data: Path, natural: Path, teacher: Path, **options: object) -> None:
    config = TrainConfig(steps=3, checkpoint_s=0.0, targets=12)
    dataset = open_dataset(data, seed=config.seed)
    train(dataset, run, config, teacher=teacher, penalty=natural, **options)  # type: ignore[arg-type]


def test_a_run_resumes_and_exports(
    tmp_path: Path,
    demo_images: Path,
    natural_images: Path,
    random_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("edgead.training.teacher_targets.NATURAL_IMAGES", 2)
    inputs = demo_images, natural_images, random_teacher
    _train(tmp_path / "a", *inputs)

    def stop(fraction: float, step: int, losses: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "b", *inputs, progress=stop)
    _train(tmp_path / "b", *inputs, resume=True)
    a, b = (load_file(tmp_path / name / "detector.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert a["rotation"].shape == (384, 12) and a["student.conv4.weight"].shape[0] == 24
    assert a["autoencoder.last.weight"].shape[0] == 12
    assert read_run(tmp_path / "a").model.targets == 12
    # the gate compares the graph with the plain definition on the validation and test images
    assert main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "a.edgead")]) == 0
    assert "10 images, largest score deviation" in capsys.readouterr().out


def test_default_is_128_with_a_teacher_that_ships(
    tmp_path: Path, random_teacher: Path, natural_images: Path
) -> None:
    """Of another teacher nobody knows where its energy lies."""
    files = {"penalty": natural_images}
    shipped = Trainer(TrainConfig(), files, tmp_path)
    assert shipped.config.targets == shipped.model.targets == 128
    named = Trainer(TrainConfig(), {**files, "teacher": random_teacher}, tmp_path)
    assert named.config.targets == named.model.targets == 384
    assert Trainer(TrainConfig(targets=384), files, tmp_path).model.targets == 384


@pytest.mark.parametrize("targets", [0, 385])
def test_wrong_numbers(targets: int) -> None:
    with pytest.raises(
        TrainingError, match=f"--targets {targets}: a number of directions from 1 to 384"
    ):
        TrainConfig(targets=targets)
