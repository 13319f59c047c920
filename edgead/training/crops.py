"""Random crops for distillation: an augmentation that makes a thousand images go a long way.

The crop is what both networks see, so that nothing of it has to be undone between them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from torch import Tensor

from edgead.errors import DataError
from edgead.training.imageset import ImageSet

log = logging.getLogger(__name__)


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, side_px: int, scale: tuple[float, float]
) -> np.ndarray:
    """A random rectangle of an image (HWC uint8), resized to [side_px, side_px, 3].

    Its mean side is a uniform share `scale` of the image's short side; its sides differ by up to a
    factor of exp(0.4).
    """
    height, width = image.shape[:2]
    share, aspect = rng.uniform(*scale), np.exp(rng.uniform(-0.2, 0.2))
    side = share * min(height, width)
    h, w = (
        int(np.clip(side * f, min(16, limit), limit))
        for f, limit in ((aspect, height), (1 / aspect, width))
    )
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    crop = image[top : top + h, left : left + w]
    smaller = h < side_px
    return cv2.resize(
        crop, (side_px, side_px), interpolation=cv2.INTER_LINEAR if smaller else cv2.INTER_AREA
    )


def random_flip(image: np.ndarray, rng: np.random.Generator, p: float = 0.5) -> np.ndarray:
    """Left and right exchanged with probability `p`."""
    return image[:, ::-1] if rng.random() < p else image


def random_grey(image: np.ndarray, rng: np.random.Generator, p: float = 0.15) -> np.ndarray:
    """Three equal channels with probability `p`: what a monochrome camera sees."""
    if rng.random() >= p:
        return image
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    return np.repeat(grey[..., None], 3, axis=2)


def random_brightness(image: np.ndarray, rng: np.random.Generator, p: float = 0.5) -> np.ndarray:
    """With probability `p` times a factor from 0.6 to 1.4, clipped to 0..255."""
    if rng.random() >= p:
        return image
    return np.clip(image * rng.uniform(0.6, 1.4), 0, 255).astype(np.uint8)


class Crops:
    """Random crops of an image set; what a (step, position) gives depends on the seed alone.

    Args:
        images: Where they come from; each is decoded when its turn comes and not kept.
        side_px: Height and width of a crop.
        scale: See `random_resized_crop`.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        seed: int,
        side_px: int = 512,
        scale: tuple[float, float] = (0.55, 1.0),
    ) -> None:
        self.images, self.seed, self.side_px, self.scale = images, seed, side_px, scale

    def __call__(self, step: int, position: int) -> np.ndarray:
        """One crop, uint8 [side, side, 3]; a damaged image is passed over with a warning."""
        rng = np.random.default_rng([self.seed, step, position])
        for _ in range(20):
            try:
                image = self.images.read(int(rng.integers(len(self.images))))
            except DataError as error:
                log.warning("passed over: %s", error)
                last = error
                continue
            crop = random_flip(random_resized_crop(image, rng, self.side_px, self.scale), rng)
            return np.ascontiguousarray(random_brightness(random_grey(crop, rng), rng))
        raise DataError(f"20 images in a row cannot be read; check the image set. The last one: {last}")

    def batches(
        self, first: int, last: int, positions: range, *, threads: int = 1, pinned: bool = False
    ) -> Iterator[Tensor]:
        """Batches uint8 [len(positions), side, side, 3] of the steps first .. last - 1.

        They are made ahead in the background, in page-locked memory if `pinned`.
        """

        def make(step: int) -> Tensor:
            batch = torch.from_numpy(np.stack([self(step, position) for position in positions]))
            return batch.pin_memory() if pinned else batch

        ahead = threads + 1
        with ThreadPoolExecutor(threads) as pool:
            waiting = [pool.submit(make, step) for step in range(first, min(first + ahead, last))]
            try:
                for step in range(first, last):
                    images = waiting.pop(0).result()
                    if step + ahead < last:
                        waiting.append(pool.submit(make, step + ahead))
                    yield images
            finally:
                for future in waiting:
                    future.cancel()


def crop_threads(device: torch.device) -> int:
    """A GPU is fed by (up to 16) cores; on a CPU one thread leaves the others to the networks."""
    return min(16, os.cpu_count() or 1) if device.type == "cuda" else 1
