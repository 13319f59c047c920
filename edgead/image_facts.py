"""Cheap figures of an image: brightness, sharpness, where the part lies, whether it is the same again.

All but the last come from a working picture of at most 256 x 256 pixels: near the resolution at which
models look, and the same for all cameras of a bundle.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from edgead.errors import DataError

WORKING_PX = 256
THUMBNAIL_PX = 32
NEAR_BLACK = 16  # grey values 0..255
SATURATED = 250

_LOW_PASS = 0.2  # cycles per thumbnail pixel: above it, thumbnails are texture and noise
_DIGEST_WORDS = 2039  # prime, so that no scene that moves by whole rows gives the same digest


@dataclass(frozen=True, slots=True, eq=False)
class ImageFacts:
    """Cheap figures of one image.

    Attributes:
        brightness: Mean grey value, 0..255.
        near_black: Share of the pixels with at most NEAR_BLACK, 0..1.
        saturated: Share of the pixels with at least SATURATED, 0..1.
        sharpness: Energy of the Laplacian over that of the gradient, from 0 (a picture of one grey) to
            about 5 (noise). It depends on neither brightness nor contrast and falls with blur.
        thumbnail: float32 [32, 32], grey values.
        digest: Equal for images that are equal in every pixel.
    """

    brightness: float
    near_black: float
    saturated: float
    sharpness: float
    thumbnail: np.ndarray
    digest: bytes

    @classmethod
    def of(cls, image: np.ndarray) -> ImageFacts:
        """Takes the figures: 0.6 ms for 900 x 900 RGB on one core of a shared server (Xeon).

        Args:
            image: uint8 [H, W, 3] RGB or [H, W] grey.

        Raises:
            DataError: Not such an array, or empty.
        """
        good = image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,)) and image.size
        if not good:
            raise DataError(
                f"an image of shape {image.shape} and type {image.dtype} has no input health;"
                " expected uint8 [H, W, 3] RGB or [H, W] grey"
            )
        image = np.ascontiguousarray(image)
        grey = _working_picture(image)
        side, cell = grey.shape[0], grey.shape[0] // THUMBNAIL_PX
        rows = grey.reshape(THUMBNAIL_PX, cell, side).sum(axis=1)
        thumbnail = rows.reshape(THUMBNAIL_PX, THUMBNAIL_PX, cell).sum(axis=2) / np.float32(cell**2)
        return cls(
            brightness=float(thumbnail.mean()),
            near_black=int(np.count_nonzero(grey < NEAR_BLACK + 0.5)) / grey.size,
            saturated=int(np.count_nonzero(grey > SATURATED - 0.5)) / grey.size,
            sharpness=_sharpness(grey),
            thumbnail=thumbnail,
            digest=_digest(image),
        )


def _working_picture(image: np.ndarray) -> np.ndarray:
    """float32 [side, side], the grey picture from four samples per pixel.

    Of RGB the four take R, G, G and B, as a colour sensor does: grey and less noise at the price of one.
    """
    indices, side = _samples(image.shape)
    flat = image.reshape(-1)
    # mode="clip" leaves out the check of each index.
    first, second, third, fourth = (flat.take(index, mode="clip") for index in indices)
    total = np.add(first, second, dtype=np.uint16)
    total += third
    total += fourth
    return np.multiply(total, np.float32(0.25), dtype=np.float32).reshape(side, side)


@functools.lru_cache(maxsize=8)
def _samples(shape: tuple[int, ...]) -> tuple[tuple[np.ndarray, ...], int]:
    """Flat indices of the four samples of each pixel of the working picture, and its side in pixels."""
    height, width = shape[:2]
    channels = shape[2] if len(shape) == 3 else 1
    side = min(WORKING_PX, max(1, min(height, width) // THUMBNAIL_PX) * THUMBNAIL_PX)

    def positions(length: int) -> tuple[np.ndarray, np.ndarray]:
        first = np.arange(side) * length // side
        return first, np.minimum(first + max(1, length // (2 * side)), length - 1)

    rows, columns = positions(height), positions(width)
    indices = tuple(
        ((rows[i][:, None] * width + columns[j]) * channels + (i + j if channels == 3 else 0)).ravel()
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    return indices, side


def _sharpness(grey: np.ndarray) -> float:
    right, down = grey[:, 1:] - grey[:, :-1], grey[1:] - grey[:-1]
    laplacian = right[1:-1, 1:] - right[1:-1, :-1]
    laplacian += down[1:, 1:-1]
    laplacian -= down[:-1, 1:-1]
    gradient = _energy(right) + _energy(down)
    return _energy(laplacian) / gradient if gradient > 0 else 0.0


def _energy(values: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", values, values))


def _digest(image: np.ndarray) -> bytes:
    """Folds the pixels by exclusive or before hashing: a tenth of the time of hashing them all."""
    pixels = image.reshape(-1)
    folded = pixels.size // (8 * _DIGEST_WORDS) * 8 * _DIGEST_WORDS
    words = pixels[:folded].view(np.uint64).reshape(-1, _DIGEST_WORDS)
    hashed = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    hashed.update(np.bitwise_xor.reduce(words, axis=0).tobytes())
    hashed.update(pixels[folded:].tobytes())
    return hashed.digest()


@dataclass(frozen=True, slots=True)
class Shift:
    """Where the part lies against the mean thumbnail.

    Attributes:
        right: In shares of the width, -0.5..0.5; `down` of the height.
        peak: Correlation there; 1 for equal images, about 0.2 for unrelated ones.
        at_home: Correlation at no shift.
    """

    right: float
    down: float
    peak: float
    at_home: float


class Place:
    """Phase correlation with one thumbnail, low-pass weighted.

    Kuglin and Hines, "The phase correlation image alignment method", 1975.
    """

    def __init__(self, thumbnail: np.ndarray) -> None:
        side = THUMBNAIL_PX
        window = np.hanning(side + 2)[1:-1]
        self._window = np.outer(window, window) / np.outer(window, window).sum()
        squared = np.fft.fftfreq(side)[:, None] ** 2 + np.fft.rfftfreq(side)[None] ** 2
        low_pass = np.exp(-squared / (2 * _LOW_PASS**2))
        low_pass[0, 0] = 0
        home = self._spectrum(thumbnail.astype(np.float64))
        total = np.fft.irfft2(low_pass, s=(side, side))[0, 0]
        self._filter = np.conj(home) / (np.abs(home) + 1e-9) * low_pass / total

    def _spectrum(self, thumbnail: np.ndarray) -> np.ndarray:
        return np.fft.rfft2((thumbnail - (thumbnail * self._window).sum()) * self._window)

    def of(self, thumbnail: np.ndarray) -> Shift:
        """Of a thumbnail [32, 32]."""
        spectrum = self._spectrum(thumbnail)
        phase = spectrum / (np.abs(spectrum) + 1e-9)
        plane = np.fft.irfft2(phase * self._filter, s=thumbnail.shape)
        row, column = divmod(int(plane.argmax()), THUMBNAIL_PX)
        down = row + _vertex(*(plane[(row + step) % THUMBNAIL_PX, column] for step in (-1, 0, 1)))
        right = column + _vertex(*(plane[row, (column + step) % THUMBNAIL_PX] for step in (-1, 0, 1)))
        half = THUMBNAIL_PX / 2
        return Shift(
            right=float((right + half) % THUMBNAIL_PX - half) / THUMBNAIL_PX,
            down=float((down + half) % THUMBNAIL_PX - half) / THUMBNAIL_PX,
            peak=float(plane[row, column]),
            at_home=float(plane[0, 0]),
        )


def _vertex(before: float, peak: float, after: float) -> float:
    """Where the parabola through three neighbours has its top, -0.5..0.5 from the middle one."""
    curvature = before - 2 * peak + after
    return 0.5 * (before - after) / curvature if curvature < 0 else 0.0
