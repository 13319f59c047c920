"""What the student of EfficientAD learns: the teacher's normalised outputs of the training images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edgead.models.efficientad import EfficientAD
from edgead.models.folding import normalise
from edgead.models.pdn import FEATURES
from edgead.training.device import autocast
from edgead.training.directions import SecondMoment, target_rotation, with_stored
from edgead.training.images import Images, PenaltyImages

NATURAL_IMAGES = 32
"""Penalty images that principal directions are taken from: 100,000 feature vectors."""


def to_input(images: np.ndarray, device: torch.device) -> Tensor:
    """Images [N, H, W, 3] (0..255) -> network input, channels last [N, 3, H, W]."""
    x = torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    return normalise(x).contiguous(memory_format=torch.channels_last)


class TeacherTargets:
    """Teacher outputs of the training images, normalised; in FP16 as far as the cache reaches."""

    def __init__(
        self,
        model: EfficientAD,
        images: Images,
        device: torch.device,
        cache_mib: int,
        natural: Callable[[], Tensor] | None = None,
    ) -> None:
        self.model, self.images, self.device = model, images, device
        kept = min(len(images), max(1, (cache_mib << 20) // (2 * FEATURES * model.cells**2)))
        shape = (kept, FEATURES, model.cells, model.cells)
        self.cache = torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last)
        total = torch.zeros(FEATURES, dtype=torch.float64)
        squares = torch.zeros(FEATURES, dtype=torch.float64)
        moment = SecondMoment(FEATURES)
        choose = model.rotation is not None and not model.rotation.any()  # not in a resumed run
        for index in range(len(images)):
            features = self._raw(index)
            total += features.sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
            squares += features.square().sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
            if choose:
                moment.add(features)
            if index < kept:
                self.cache[index] = features[0]
        n = len(images) * model.cells**2
        mean = total / n
        variance = squares / n - mean.square()  # FP64 sums: as exact as a second pass
        # A channel that hardly varies on the good images must not outweigh all others (or overflow).
        least = 1e-4 * float(squares.sum()) / (n * FEATURES)
        std = variance.clamp_min(max(least, 1e-12)).sqrt()
        model.mean.copy_(mean.view(-1, 1, 1))
        model.std.copy_(std.view(-1, 1, 1))
        mean16, scale16 = model.mean.cpu().half(), (1 / model.std).cpu().half()
        self.cache.sub_(mean16).mul_(scale16)
        if model.rotation is not None:
            if choose:
                assert natural is not None
                own = (moment.mean() - mean.outer(mean)) / std.outer(std)
                model.rotation.copy_(target_rotation(own, natural(), model.targets))
            self._rotate_cache(cache_mib)

    def _rotate_cache(self, cache_mib: int) -> None:
        """The cache in the target space, in which more images have room."""
        features, k, cells = self.cache, self.model.targets, self.model.cells
        kept = min(len(self.images), max(1, (cache_mib << 20) // (2 * k * cells**2)))
        self.cache = features[:0]  # so that the loop makes what is not in `features`
        targets = torch.empty(
            (kept, k, cells, cells), dtype=torch.float16, memory_format=torch.channels_last
        )
        for index in range(kept):
            if index < len(features):
                rotated = self.model.rotated(features[index : index + 1].to(self.device))
            else:
                rotated = self[index]
            targets[index] = rotated[0]
        self.cache = targets

    @torch.no_grad()
    def _raw(self, index: int) -> Tensor:
        with autocast(self.device):
            x = self.model.extended(to_input(self.images[index][None], self.device))
            return self.model.teacher(x).float()

    def __getitem__(self, index: int) -> Tensor:
        """float32 [1, targets, cells, cells] of training image `index`."""
        if index < len(self.cache):
            return self.cache[index : index + 1].to(self.device).float()
        return self.model.rotated((self._raw(index) - self.model.mean) / self.model.std)


@torch.no_grad()
def natural_moment(
    model: EfficientAD,
    penalty: PenaltyImages,
    device: torch.device,
    stored: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Second moment float64 [384, 384] of the normalised teacher features over penalty images.

    Args:
        stored: Directions and energy from the teacher's file, which saw more images: then only the
            channels' energies are those of the penalty images.
    """
    moment = SecondMoment(FEATURES)
    first = 1 << 40  # steps that training never uses
    for step in range(first, first + NATURAL_IMAGES):
        with autocast(device):
            x = model.extended(to_input(penalty(step)[None], device))
            features = model.teacher(x).float()
        moment.add((features - model.mean) / model.std)
    return with_stored(moment.mean(), stored) if stored else moment.mean()
