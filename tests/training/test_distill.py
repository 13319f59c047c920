"""Distillation: the aggregation of targets against its literal definition, and a small real run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.errors import DataError, TrainingError
from edgead.models.files import load_teacher, save_safetensors
from edgead.models.mobilenet import MobileNetV2
from edgead.training.distill import (
    Crops,
    DistillConfig,
    aggregation_kernel,
    distill,
    pooling_matrix,
)


@pytest.mark.parametrize(("n", "m"), [(2048, 384), (1728, 1024), (5, 3), (3, 5)])
def test_pooling_matrix_is_adaptive_average_pooling(n: int, m: int) -> None:
    x = torch.rand(4, n, dtype=torch.float64)
    torch.testing.assert_close(x @ pooling_matrix(n, m).T, F.adaptive_avg_pool1d(x, m))


def literal_aggregation(fine: Tensor, coarse: Tensor) -> Tensor:
    """PatchCore's aggregation as published: unfold 3x3, resize, pool to 1024 each, join, pool to 384."""
    levels = []
    for level in (fine, coarse):
        n, c, h, w = level.shape
        patches = F.unfold(level, 3, padding=1).view(n, 9 * c, h, w)  # order (c, ky, kx)
        patches = F.interpolate(patches, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        flat = patches.permute(0, 2, 3, 1).reshape(-1, 1, 9 * c)
        levels.append(F.adaptive_avg_pool1d(flat, 1024))
    joined = F.adaptive_avg_pool1d(torch.cat(levels, 2), 384)
    return joined.view(fine.shape[0], *fine.shape[-2:], 384).permute(0, 3, 1, 2)


def test_one_convolution_per_level_equals_the_literal_aggregation() -> None:
    fine, coarse = torch.rand(1, 192, 8, 8), torch.rand(1, 576, 4, 4)
    a = F.conv2d(fine, aggregation_kernel(192, 0), padding=1)
    b = F.interpolate(
        F.conv2d(coarse, aggregation_kernel(576, 1), padding=1), size=(8, 8), mode="bilinear"
    )
    expected = literal_aggregation(fine, coarse)
    torch.testing.assert_close(torch.cat([a, b], 1), expected, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MobileNetV2 with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = MobileNetV2()
        for parameter in network.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    path = tmp_path_factory.mktemp("backbone") / "mobilenet.safetensors"
    save_safetensors(path, network.state_dict(), {})
    return path


CONFIG = DistillConfig(steps=4, batch=1, held_out=0.2, checkpoint_s=0.0)


def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, backbone: Path, natural_images: Path
) -> None:
    seen: list[float] = []
    whole = tmp_path / "whole.safetensors"
    result = distill(
        natural_images, backbone, whole, CONFIG, progress=lambda s, n, loss: seen.append(loss)
    )
    assert len(seen) == result.steps == 4 and result.images == 6
    assert 0.1 < result.loss < 10 and 0.1 < result.held_out_loss < 10  # targets have variance 1

    class Stop(Exception):
        pass

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 3:
            raise Stop

    resumed = tmp_path / "resumed.safetensors"
    with pytest.raises(Stop):
        distill(natural_images, backbone, resumed, CONFIG, progress=stop)
    assert not resumed.exists() and (tmp_path / "resumed.safetensors.checkpoint").exists()
    with pytest.raises(TrainingError, match="other settings.*batch: 1 then, 2 now"):
        other = DistillConfig(steps=4, batch=2, held_out=0.2, checkpoint_s=0.0)
        distill(natural_images, backbone, resumed, other, resume=True)
    steps: list[int] = []
    distill(
        natural_images, backbone, resumed, CONFIG,
        resume=True, progress=lambda s, n, loss: steps.append(s),
    )  # fmt: skip
    assert steps == [3, 4]  # the checkpoint of step 2 was the last one written
    a, b = load_teacher(whole)[0].state_dict(), load_teacher(resumed)[0].state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not (tmp_path / "resumed.safetensors.checkpoint").exists()
    assert load_teacher(whole)[1].metadata["taps"] == "blocks.5.depthwise, blocks.12.depthwise"


def test_crops_depend_on_seed_step_and_position_alone(natural_images: Path) -> None:
    paths = sorted(natural_images.iterdir())
    a, b = Crops(paths, seed=1), Crops(paths, seed=1)
    list(b.batches(0, 2, 2))
    assert np.array_equal(a(5, 1), b(5, 1))
    assert a(5, 1).shape == (512, 512, 3) and a(5, 1).dtype == np.uint8
    assert not np.array_equal(a(5, 1), a(5, 0))
    assert not np.array_equal(a(5, 1), Crops(paths, seed=2)(5, 1))


def test_damaged_images_are_passed_over_and_a_folder_of_them_is_an_error(
    tmp_path: Path, natural_images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    good = sorted(natural_images.iterdir())[0]
    assert Crops([bad, good], seed=0)(0, 0).shape == (512, 512, 3)
    with pytest.raises(DataError, match="20 images in a row"):
        Crops([bad], seed=0)(0, 0)
    assert "passed over" in caplog.text


def test_a_folder_without_images_is_an_error(tmp_path: Path, backbone: Path) -> None:
    with pytest.raises(DataError, match="holds 0 images"):
        distill(tmp_path, backbone, tmp_path / "t.safetensors", CONFIG)
