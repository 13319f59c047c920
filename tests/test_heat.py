from __future__ import annotations

import numpy as np
import pytest

from edgead.errors import DataError
from edgead.heat import heat_map, overlay


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def test_overlay() -> None:
    image = noise(8, 10, 3)
    anomaly_map = np.zeros((4, 5), np.float32)
    np.testing.assert_array_equal(overlay(image, anomaly_map, low=0.0, high=1.0), image)
    # The last colour of Turbo (Mikhailov 2019) is (0.4796, 0.0158, 0.0106), shown with 70 % over black.
    hot = overlay(np.zeros((8, 10, 3), np.uint8), anomaly_map + 5, low=0.0, high=1.0)
    assert (np.abs(hot - 0.7 * 255 * np.array([0.4796, 0.0158, 0.0106])) <= 1).all()
    anomaly_map[0, 0] = 1
    blended = overlay(image, anomaly_map, low=0.5, high=1.0)
    assert (blended[:1, :1] != image[:1, :1]).any()
    np.testing.assert_array_equal(blended[4:, 5:], image[4:, 5:])


def test_overlay_refuses() -> None:
    image, anomaly_map = noise(8, 8, 3), np.zeros((4, 4), np.float32)
    for low, high in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(DataError, match="low below high"):
            overlay(image, anomaly_map, low=low, high=high)
    anomaly_map[1, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        overlay(image, anomaly_map, low=0.0, high=1.0)


def test_heat_map_is_on_the_scale_of_the_threshold() -> None:
    """Good pixels show unchanged, whatever the threshold; full heat is 80 % above it."""
    image = np.full((8, 10, 3), 90, np.uint8)
    for threshold in (0.1, 1.0, 40.0):
        cold = np.full((4, 5), 0.6 * threshold, np.float32)
        np.testing.assert_array_equal(heat_map(image, cold, threshold), image)
        hot = heat_map(image, 3 * cold, threshold)
        np.testing.assert_array_equal(hot, overlay(image, 3 * cold, low=0.0, high=threshold))
    assert heat_map(image, np.zeros((4, 5), np.float32), 0.0).shape == image.shape
