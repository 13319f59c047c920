"""Fewer inputs of the second convolutions of a trained run: part of `edgead export --reduce`.

Conv-2 is the largest convolution of both PDNs, and the channels that it reads are nearly dependent: with
x their vector at one cell, m its mean and z = D (x - m) fewer mixtures of them, x is about m + U z. The
1x1 convolution D and conv-2 on z, with U folded into its weights W and W m into its bias, cost less than
conv-2 on x. What matters is not the error of x but what W makes of it: with H^2 the sum of W^T W over
the taps and C the covariance of x, the directions V are the first ones of H C H, D = V^T H and
U = H^-1 V. With all directions U D = 1, and nothing changes. docs/reduced-targets.md has what was
measured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.models.efficientad import EfficientAD
from edgead.models.folding import bias_of, fill
from edgead.training.directions import SecondMoment

UNREAD = 1e-6
"""Added to the eigenvalues of H^2, in shares of their mean, so that H has an inverse."""


@contextmanager
def watched(model: EfficientAD) -> Iterator[tuple[SecondMoment, SecondMoment]]:
    """Second moments of (x, 1), x what conv-2 of teacher and of student reads while this is open."""
    moments = SecondMoment(whole_inputs(model) + 1), SecondMoment(whole_inputs(model) + 1)
    handles = [
        pdn.conv2.register_forward_pre_hook(
            lambda _, x, moment=moment: moment.add(F.pad(x[0], (0, 0, 0, 0, 0, 1), value=1.0))
        )
        for pdn, moment in zip((model.teacher, model.student), moments, strict=True)
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def whole_inputs(model: EfficientAD) -> int:
    """Channels that conv-2 of teacher and student reads as trained."""
    return model.teacher.conv1.out_channels


def narrowed(model: EfficientAD, groups: Sequence[tuple[Tensor, Tensor]], inputs: int) -> EfficientAD:
    """A copy whose second convolutions read so many mixtures of their channels.

    Args:
        model: With whole convolutions.
        groups: Per group of images, which have the same weight, the means of what `watched` gives:
            float64 [n + 1, n + 1] of teacher and student.
        inputs: From 1 to n.
    """
    narrow = copy.deepcopy(model)
    for i, pdn in enumerate((narrow.teacher, narrow.student)):
        assert isinstance(pdn.conv2, nn.Conv2d)
        pdn.conv2 = _factors(pdn.conv2, [group[i] for group in groups], inputs)
    return narrow.eval()


def _factors(conv: nn.Conv2d, moments: Sequence[Tensor], inputs: int) -> nn.Sequential:
    """The 1x1 convolution, and `conv` on its outputs."""
    weight, n = conv.weight.double(), conv.in_channels
    mean = torch.stack([moment[:n, n] for moment in moments]).mean(0)
    read, vectors = torch.linalg.eigh(torch.einsum("oikl,ojkl->ij", weight, weight))
    root = (read.clamp_min(0) + UNREAD * read.mean()).sqrt()
    half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    weighted = half @ sum(_covariance(moment, mean) for moment in moments) @ half
    directions = torch.linalg.eigh(weighted)[1].flip(1)[:, :inputs]
    down = nn.Conv2d(n, inputs, 1)
    fill(down, (directions.T @ half)[:, :, None, None], -(directions.T @ half @ mean))
    small = nn.Conv2d(inputs, conv.out_channels, conv.kernel_size)
    fill(
        small,
        torch.einsum("oikl,ir->orkl", weight, inverse @ directions),
        bias_of(conv) + torch.einsum("oikl,i->o", weight, mean),
    )
    return nn.Sequential(down, small)


def _covariance(moment: Tensor, mean: Tensor) -> Tensor:
    """About `mean`, scaled to trace 1; float64 [n, n]."""
    own = moment[: len(mean), -1]
    mixed = torch.outer(own, mean)
    covariance = moment[: len(mean), : len(mean)] - mixed - mixed.T + torch.outer(mean, mean)
    return covariance / covariance.trace().clamp_min(1e-12)
