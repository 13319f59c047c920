"""Principal directions of a teacher's features: the rotation behind the reduced target space.

Both anomaly maps are squared norms over the target channels, and a rotation leaves norms as they are
(docs/reduced-targets.md). "Energy" is the mean square about zero, not the variance about a mean: zero is
what the student answers to natural images, and a shift of all features is a deviation like any other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from edgead.errors import TrainingError


class SecondMoment:
    """Mean of f f^T over feature vectors f, summed in float64 on the CPU, batch by batch.

    Args:
        channels: Length of the vectors.
    """

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(channels, channels, dtype=torch.float64)
        self.vectors = 0

    def add(self, features: Tensor) -> None:
        """Count features [N, channels, h, w], any float type and device."""
        rows = features.detach().double().movedim(1, -1).reshape(-1, len(self.total))
        self.total += (rows.T @ rows).cpu()
        self.vectors += len(rows)

    def mean(self) -> Tensor:
        """float64 [channels, channels].

        Raises:
            TrainingError: nothing was added, or NaN or infinite values.
        """
        if not self.vectors or not torch.isfinite(self.total).all():
            raise TrainingError(
                f"principal directions of {self.vectors} feature vectors: there are none,"
                " or they hold NaN or infinite values; check the images and the teacher file"
            )
        return self.total / self.vectors


def principal_directions(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Directions of a set of normalised teacher features, by falling energy.

    Args:
        batches: Features, float [N, C, h, w] each; one pass, so a generator will do.

    Returns:
        directions float32 [C, C], orthonormal columns, and energy float32 [C], shares of 1. The largest
        entry of a column is positive, so the same features give the same signs.

    Raises:
        TrainingError: no features, or NaN or infinite values.
    """
    moment: SecondMoment | None = None
    for batch in batches:
        moment = moment or SecondMoment(batch.shape[1])
        moment.add(batch)
    return directions_of((moment or SecondMoment(1)).mean())


def directions_of(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Directions and energy as in `principal_directions` of a second moment, float64 [C, C]."""
    energy, vectors = torch.linalg.eigh(moment)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    return vectors.float().contiguous(), (energy / energy.sum().clamp_min(1e-300)).float()


def target_rotation(own: Tensor, natural: Tensor, targets: int) -> Tensor:
    """The rotation from 384 normalised teacher channels to fewer targets, commonly scaled.

    Its columns are the first principal directions of both kinds of images together, each kind with the
    same weight: those of the training images alone would cut what a defect looks like. One scale for all
    makes the mean square of a target over the training images 1, as that of a published channel is: so
    the means over channels in losses and maps keep their scale.

    Args:
        own: Second moment float64 [384, 384] of the normalised features of the training images.
        natural: The same of natural images.

    Returns:
        float32 [384, targets].
    """
    directions, _ = directions_of(own / own.trace() + natural / natural.trace())
    kept = directions[:, :targets].double()
    energy = ((own @ kept) * kept).sum() / targets
    return (kept / energy.clamp_min(1e-12).sqrt()).float()


def with_stored(moment: Tensor, stored: tuple[Tensor, Tensor]) -> Tensor:
    """A second moment with the correlations of stored directions and its own energies of the channels.

    A teacher's file holds directions of features that were normalised over natural images, a run
    normalises them over its own: the scale of each channel differs, the correlations do not.

    Args:
        moment: float64 [C, C].
        stored: Directions [C, C] and energy [C] as `principal_directions` gives them.
    """
    directions, energy = stored[0].double(), stored[1].double()
    kept = (directions * energy) @ directions.T
    scale = (moment.diagonal() / kept.diagonal().clamp_min(1e-12)).sqrt()
    return kept * scale.outer(scale)
