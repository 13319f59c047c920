"""Features of the training images, computed once as far as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Remembered:
    """Feature maps of images by their numbers, in FP16; beyond the memory computed each time."""

    def __init__(
        self, features: Callable[[int], list[Tensor]], images: int, device: torch.device, cache_mib: int
    ) -> None:
        """Computes those that are kept.

        Args:
            features: Number of an image -> its maps [1, C, h, w], one for each level.
            images: How many there are.
            device: Where maps are wanted; they are kept in the host's memory.
            cache_mib: Memory for them.
        """
        self._features, self._device = features, device
        self._kept: list[list[Tensor]] = []
        free = cache_mib << 20
        for index in range(images):
            levels = self._halved(index)
            free -= sum(level.nbytes for level in levels)
            if free < 0:
                break
            self._kept.append(levels)

    def __call__(self, chosen: Iterable[int]) -> list[Tensor]:
        """float32 [N, C, h, w] for each level."""
        each = (self._kept[i] if i < len(self._kept) else self._halved(i) for i in map(int, chosen))
        return [torch.cat(level).to(self._device).float() for level in zip(*each, strict=True)]

    @torch.no_grad()
    def _halved(self, index: int) -> list[Tensor]:
        return [level.half().cpu() for level in self._features(index)]
