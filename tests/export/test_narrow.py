"""Fewer inputs of the second convolutions: exact where the channels are dependent."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from edgead.export.graph import MergedGraph, flop_per_frame
from edgead.export.narrow import narrowed, watched, whole_inputs
from edgead.export.reduce import Reduced, folding
from edgead.models.efficientad import EfficientAD, anomaly_map
from tests.export.test_reduce import CALIBRATION, maps_of, orthonormal, random_model


def picture(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def moments_of(model: EfficientAD, *seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
    with watched(model) as moments:
        for seed in seeds:
            model(picture(seed).permute(0, 3, 1, 2))
    return moments[0].mean(), moments[1].mean()


def dependent(model: EfficientAD) -> EfficientAD:
    """Half of conv-1's channels are 0.5 times the other half, and conv-2 does not read the loudest."""
    for pdn in (model.teacher, model.student):
        half = pdn.conv1.out_channels // 2
        for parameter in (pdn.conv1.weight, pdn.conv1.bias):
            parameter.data[half:] = 0.5 * parameter.data[:half]
            parameter.data[0] *= 100
        pdn.conv2.weight.data[:, 0] = 0
    return model


def spread_and_error(expected: torch.Tensor, maps: torch.Tensor) -> tuple[float, float]:
    return float(expected.max() - expected.min()), float((maps - expected).abs().max())


def test_what_is_watched() -> None:
    """Second moments of (x, 1) of both networks, of what was read meanwhile and nothing after it."""
    model = random_model("s", 16)
    with torch.inference_mode(), watched(model) as (teacher, student):
        a, b = torch.randn(1, 128, 9, 9), torch.randn(1, 128, 7, 5)
        model.teacher.conv2(a)
        model.teacher.conv2(b)
        model.student.conv2(a)
    model.teacher.conv2(a)
    assert (teacher.vectors, student.vectors) == (81 + 35, 81)
    rows = torch.cat([x[0].flatten(1).T for x in (a, b)]).double()
    mean = teacher.mean()
    np.testing.assert_allclose(mean[:128, :128], rows.T @ rows / 116, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean[:128, 128], rows.mean(0), rtol=1e-9, atol=1e-12)
    assert float(mean[128, 128]) == 1


@pytest.mark.parametrize("size", ["s", "m"])
def test_dependent_channels_cost_nothing(size: str) -> None:
    """Half of the channels hold everything that conv-2 reads: the maps stay, on pictures never seen."""
    model = dependent(random_model(size, 16))
    before = copy.deepcopy(model.state_dict())
    half = whole_inputs(model) // 2
    narrow = narrowed(model, [moments_of(model, 1), moments_of(model, 2)], half)
    assert narrow.student.conv2[1].in_channels == narrow.teacher.conv2[0].out_channels == half
    expected = maps_of(model, picture(3))
    spread, error = spread_and_error(expected, maps_of(narrow, picture(3)))
    assert spread > 0.5 and error < 1e-4 * spread
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # a quarter is not enough: what was just shown could have failed
    less = narrowed(model, [moments_of(model, 1)], half // 2)
    assert spread_and_error(expected, maps_of(less, picture(3)))[1] > 1e-3 * spread


@pytest.mark.parametrize("size", ["s", "m"])
def test_all_channels_change_nothing(size: str) -> None:
    model = random_model(size, 16)
    narrow = narrowed(model, [moments_of(model, 1)], whole_inputs(model))
    spread, error = spread_and_error(maps_of(model, picture(3)), maps_of(narrow, picture(3)))
    assert spread > 0.5 and error < 1e-4 * spread


@torch.inference_mode()
def test_merged_graph_equals_the_plain_form() -> None:
    """With rotated differences, too; and it costs what was counted by hand."""
    model = random_model("s", 64)
    rotations = folding(orthonormal(64, 2), 32), folding(orthonormal(64, 3), 32)
    plain = Reduced(narrowed(model, [moments_of(model, 1)], 64), rotations)
    graph = MergedGraph(plain)
    _, maps = graph(picture(3), CALIBRATION)
    expected = anomaly_map(*plain(picture(3).permute(0, 3, 1, 2)), CALIBRATION)
    spread, error = spread_and_error(expected, maps)
    assert spread > 0.5 and error < 1e-5 * spread
    # Both networks: 64 instead of 128 inputs of 16 taps at 123^2 places, and 128 to 64 mixed at 126^2.
    saved = 2 * 2 * (123**2 * 16 * 64 * 256 - 126**2 * 128 * 64)
    assert flop_per_frame(MergedGraph(Reduced(model, rotations))) - flop_per_frame(graph) == saved


def test_channels_that_never_vary() -> None:
    """Images of one colour: no covariance at all, and still a finite graph."""
    model = random_model("s", 16)
    grey = torch.full((1, 3, 256, 256), 128, dtype=torch.uint8)
    with torch.inference_mode(), watched(model) as moments:
        model(grey)
    narrow = narrowed(model, [(moments[0].mean(), moments[1].mean())], 64)
    with torch.inference_mode():
        expected, got = model(grey)[0], narrow(grey)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-3)
