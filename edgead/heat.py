"""Heat maps over images, for people to look at."""

from __future__ import annotations

import cv2
import numpy as np

from edgead.errors import DataError
from edgead.image import enlarge


def heat_map(image: np.ndarray, anomaly_map: np.ndarray, threshold: float) -> np.ndarray:
    """Blends a heat map over an image, on one scale for all images of a bundle.

    Heat begins 40 % below the threshold, so that good images show unchanged; strongest it is 80 % above.
    Arguments, result and errors are those of `overlay`.
    """
    span = max(abs(threshold), 1e-6)
    return overlay(image, anomaly_map, low=threshold - 0.4 * span, high=threshold + 0.8 * span)


def overlay(image: np.ndarray, anomaly_map: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """Blends a heat map over an image, for people to look at.

    Args:
        image: HWC uint8 RGB.
        anomaly_map: HW float32 of any size; it is enlarged to the image's.
        low: map value up to which the image shows unchanged.
        high: map value from which the heat map is strongest (dark red, 70 % opaque).

    Returns:
        HWC uint8 RGB of the image's size, a new array.

    Raises:
        DataError: low is not below high, or the map is not HW or not finite.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise DataError(f"low is {low} and high is {high}; both must be finite and low below high")
    heat = (enlarge(anomaly_map, image.shape[0], image.shape[1]) - low) / (high - low)
    if not np.isfinite(heat).all():
        raise DataError("the anomaly map has values that are not finite")
    heat = np.clip(heat, 0.0, 1.0)
    colours = cv2.applyColorMap(np.rint(heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    colours = cv2.cvtColor(colours, cv2.COLOR_BGR2RGB)
    opacity = 0.7 * heat[..., None]
    return np.rint(image * (1.0 - opacity) + colours * opacity).astype(np.uint8)
