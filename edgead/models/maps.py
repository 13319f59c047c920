"""Linear maps of anomaly maps as matrices: enlarging and smoothing, in the plain form and in graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bilinear_matrix(cells: int, px: int) -> Tensor:
    """Bilinear interpolation (corners not aligned) along one axis, float64 [px, cells]."""
    columns = torch.eye(cells, dtype=torch.float64)[None]
    return F.interpolate(columns, size=px, mode="linear", align_corners=False)[0].T


def as_weight(matrix: Tensor) -> Tensor:
    """A matrix [px, cells] as the weight of `both_axes`, float32 [px, cells, 1, 1]."""
    return matrix.float()[:, :, None, None].contiguous()


def both_axes(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix times both axes of maps: [N, C, h, h] to [N, C, px, px] with a weight [px, h, 1, 1].

    As convolutions of one cell, because TensorRT for RTX has no float32 products for Turing.
    """
    wide = F.conv2d(x.permute(0, 3, 1, 2), weight)  # N, columns, C, rows
    return F.conv2d(wide.permute(0, 3, 2, 1), weight).permute(0, 2, 1, 3)
