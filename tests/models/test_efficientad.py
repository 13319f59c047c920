"""EfficientAD's networks, raw maps and score; counts from the paper (8 M and 21 M parameters)."""

from __future__ import annotations

import pytest
import torch

from edgead.models.efficientad import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Autoencoder,
    EfficientAD,
    anomaly_map,
    anomaly_score,
    normalise,
)
from edgead.models.pdn import FEATURES, PDN


@pytest.mark.parametrize(("size", "expected"), [("s", 8_057_856), ("m", 20_738_432)])
def test_parameter_counts(size: str, expected: int) -> None:
    assert sum(p.numel() for p in EfficientAD(PDN(size)).parameters()) == expected


@torch.inference_mode()
def test_autoencoder_sizes() -> None:
    network = Autoencoder().eval()
    x = torch.rand(2, 3, 256, 256)
    assert sum(p.numel() for p in network.parameters()) == 1_096_320
    assert network.encode(x).shape == (2, 64, 1, 1)
    assert network(x).shape == (2, FEATURES, 56, 56)


def test_dropout_acts_in_training_only() -> None:
    network, x = Autoencoder(), torch.rand(1, 3, 256, 256)
    network.train()
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_normalise_is_imagenets() -> None:
    x = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = (torch.tensor([0, 128 / 255, 1]).view(3, 1, 1) - IMAGENET_MEAN) / IMAGENET_STD
    torch.testing.assert_close(normalise(x), expected)


@torch.inference_mode()
def test_raw_maps_are_the_mean_squared_differences() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EfficientAD(PDN("s")).eval()
    model.mean.fill_(0.01)
    model.std.fill_(0.5)
    image = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    x = normalise(image)
    student = model.student(x)
    teacher = (model.teacher(x) - 0.01) / 0.5
    local, logical = model(image)
    torch.testing.assert_close(local, ((teacher - student[:, :FEATURES]) ** 2).mean(1))
    torch.testing.assert_close(logical, ((model.autoencoder(x) - student[:, FEATURES:]) ** 2).mean(1))


def test_teacher_never_trains() -> None:
    model = EfficientAD(PDN("s")).train()
    assert not model.teacher.training and model.student.training
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_map_is_calibrated_padded_with_zeros_and_scored_by_its_maximum() -> None:
    local, logical = torch.full((2, 56, 56), 2.0), torch.full((2, 56, 56), 3.0)
    local[1, 10, 20] = 7.0
    maps = anomaly_map(local, logical, torch.tensor([0.5, 2.0, -1.0]))
    assert maps.shape == (2, 64, 64)
    assert torch.all(maps[:, :4] == 0) and torch.all(maps[:, -4:] == 0)
    assert torch.all(maps[..., :4] == 0) and torch.all(maps[..., -4:] == 0)
    assert maps[0, 30, 30] == 0.5 * 2 + 2 * 3 - 1
    assert maps[1, 14, 24] == 0.5 * 7 + 2 * 3 - 1
    torch.testing.assert_close(anomaly_score(maps), torch.tensor([6.0, 8.5]))


def test_score_is_the_limit_of_the_maximum_after_enlarging() -> None:
    """The published score is the maximum of the map enlarged to the image.

    Ours is what that tends to from below.
    """
    maps = torch.rand(1, 64, 64)
    gaps = []
    for side in (256, 1024, 4096):
        enlarged = torch.nn.functional.interpolate(
            maps[None], size=(side, side), mode="bilinear", align_corners=False
        )
        gaps.append(float(anomaly_score(maps)[0] - enlarged.max()))
    assert gaps[0] >= gaps[1] >= gaps[2] >= 0
    assert gaps[2] < 0.02
