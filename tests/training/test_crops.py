"""Random crops: each function by what it must and must not change, and the seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgead.errors import DataError
from edgead.image import list_images
from edgead.training.crops import (
    Crops,
    crop_threads,
    random_brightness,
    random_flip,
    random_grey,
    random_resized_crop,
)
from edgead.training.imageset import FolderImages


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def ramp() -> np.ndarray:
    """uint8 [200, 240, 3] whose first two channels are its row and its column."""
    rows, columns = np.mgrid[:200, :240].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 9)], axis=2)


def test_crop_is_a_rectangle_of_the_asked_for_size(ramp: np.ndarray) -> None:
    sides = []
    for seed in range(200):
        crop = random_resized_crop(ramp, rng(seed), 64, (0.3, 0.5)).astype(int)
        assert crop.shape == (64, 64, 3) and (crop[..., 2] == 9).all()
        heights = crop[-1, :, 0] - crop[0, :, 0]
        widths = crop[:, -1, 1] - crop[:, 0, 1]
        assert np.ptp(heights) <= 1 and np.ptp(widths) <= 1  # not turned
        sides.append(np.sqrt(max(heights[0], 1) * max(widths[0], 1)) / 200)
    # mean side between 0.3 and 0.5 short sides; first and last resized pixel miss up to a half each
    assert 0.27 < min(sides) < 0.34 and 0.44 < max(sides) <= 0.51


@pytest.mark.parametrize("shape", [(8, 300, 3), (5, 5, 3), (16, 16, 3), (1, 1, 3)])
def test_crop_of_tiny_images(shape: tuple[int, int, int]) -> None:
    image = np.full(shape, 77, np.uint8)
    for seed in range(20):
        crop = random_resized_crop(image, rng(seed), 32, (0.1, 1.0))
        assert crop.shape == (32, 32, 3) and (crop == 77).all()


def test_flip_exchanges_left_and_right_half_of_the_time(ramp: np.ndarray) -> None:
    flipped = [not np.array_equal(random_flip(ramp, rng(seed)), ramp) for seed in range(400)]
    assert 160 < sum(flipped) < 240  # binomial: 200 +- 4 standard deviations
    assert np.array_equal(random_flip(ramp, rng(), 1.0)[:, ::-1], ramp)


def test_grey_has_equal_channels_and_the_brightness_of_the_picture(ramp: np.ndarray) -> None:
    grey = random_grey(ramp, rng(), 1.0)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
    luma = ramp @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert np.abs(grey[..., 0] - luma).max() <= 1
    assert random_grey(ramp, rng(), 0.0) is ramp


def test_brightness_is_one_factor_and_clips(ramp: np.ndarray) -> None:
    factors = []
    for seed in range(100):
        changed = random_brightness(ramp, rng(seed), 1.0)
        factor = changed[100, 100, 0] / 100
        assert np.abs(changed - np.minimum(ramp * factor, 255)).max() <= 3  # of rounding the factor
        factors.append(factor)
    assert 0.58 <= min(factors) < 0.68 and 1.32 < max(factors) <= 1.4
    assert random_brightness(ramp, rng(), 0.0) is ramp


def test_crops_depend_on_seed_step_and_position_alone(natural_images: Path) -> None:
    images = FolderImages(list_images(natural_images))
    a, b = Crops(images, seed=1), Crops(images, seed=1)
    list(b.batches(0, 2, range(2)))
    assert np.array_equal(a(5, 1), b(5, 1))
    assert a(5, 1).shape == (512, 512, 3) and a(5, 1).dtype == np.uint8
    assert not np.array_equal(a(5, 1), a(5, 0))
    assert not np.array_equal(a(5, 1), Crops(images, seed=2)(5, 1))


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_come_in_order_whatever_the_threads(natural_images: Path, threads: int) -> None:
    crops = Crops(FolderImages(list_images(natural_images)), seed=1, side_px=32)
    for step, batch in enumerate(crops.batches(3, 9, range(1, 3), threads=threads), start=3):
        expected = np.stack([crops(step, 1), crops(step, 2)])
        assert batch.dtype == torch.uint8 and np.array_equal(batch.numpy(), expected)
    assert step == 8


def test_damaged_images_are_passed_over_and_a_folder_of_them_is_an_error(
    tmp_path: Path, natural_images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    good = list_images(natural_images)[0]
    assert Crops(FolderImages([bad, good]), seed=0)(0, 0).shape == (512, 512, 3)
    with pytest.raises(DataError, match="20 images in a row.*bad.jpg"):
        Crops(FolderImages([bad]), seed=0)(0, 0)
    assert "passed over" in caplog.text


def test_a_cpu_keeps_its_cores_for_the_networks() -> None:
    assert crop_threads(torch.device("cpu")) == 1
    assert 1 <= crop_threads(torch.device("cuda")) <= 16
