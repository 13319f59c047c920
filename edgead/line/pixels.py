"""Pixel formats of cameras, brought to RGB."""

from __future__ import annotations

import cv2
import numpy as np

from edgead.errors import LineError
from edgead.line.interfaces import Shot

# OpenCV's older Bayer names are shifted against GenICam's: COLOR_BayerBG2RGB is for BayerRG8. These
# spell out the first two rows, which leaves no doubt.
_CODES = {
    "mono": cv2.COLOR_GRAY2RGB,
    "bgr": cv2.COLOR_BGR2RGB,
    "bayer-rg": cv2.COLOR_BayerRGGB2RGB,
    "bayer-gr": cv2.COLOR_BayerGRBG2RGB,
    "bayer-gb": cv2.COLOR_BayerGBRG2RGB,
    "bayer-bg": cv2.COLOR_BayerBGGR2RGB,
}
_SMALLEST_BAYER_PX = 3  # OpenCV returns black for less, and no error


def to_rgb(shot: Shot, into: np.ndarray | None = None) -> np.ndarray:
    """The image of a shot as uint8 [H, W, 3] RGB.

    Args:
        shot: With an image.
        into: uint8 [H, W, 3], C-contiguous and writable, such as a buffer of an executor: takes the
            result, and nothing is allocated.

    Returns:
        `into` if given; otherwise the shot's own image if that is RGB already, else a new array.

    Raises:
        LineError: There is no image, its shape does not go with its pixels, or `into` does not fit.
    """
    image, pixels = shot.image, shot.pixels
    if image is None:
        raise LineError(
            f"{shot.origin}: there is no image: {shot.problem or 'the source gave no reason'}"
        )
    if pixels != "rgb" and pixels not in _CODES:
        raise LineError(f"{shot.origin}: the pixels are {pixels!r}, expected rgb, {', '.join(_CODES)}")
    channels = (3,) if pixels in ("rgb", "bgr") else ()
    smallest_px = _SMALLEST_BAYER_PX if pixels.startswith("bayer") else 1
    if image.dtype != np.uint8 or image.ndim != 2 + len(channels) or image.shape[2:] != channels:
        expected = "[height, width, 3]" if channels else "[height, width]"
        raise LineError(
            f"{shot.origin}: the image is {image.dtype} {list(image.shape)},"
            f" {pixels} needs uint8 {expected}"
        )
    if min(image.shape[:2]) < smallest_px:
        raise LineError(
            f"{shot.origin}: the image is {list(image.shape)}, each side needs {smallest_px} px"
        )
    if into is not None:
        _check_target(into, (*image.shape[:2], 3), shot.origin)
    if pixels != "rgb":
        return cv2.cvtColor(image, _CODES[pixels], dst=into)
    if into is None:
        return image
    np.copyto(into, image)
    return into


def _check_target(into: np.ndarray, shape: tuple[int, ...], origin: str) -> None:
    """OpenCV would write to a new array, without a word, where this does not fit."""
    if into.shape != shape or into.dtype != np.uint8:
        raise LineError(
            f"{origin}: the image gives uint8 {list(shape)}, the array that takes it is"
            f" {into.dtype} {list(into.shape)}"
        )
    if not (into.flags.c_contiguous and into.flags.writeable):
        raise LineError(f"{origin}: the array that takes the image must be C-contiguous and writable")
