"""Images and anomaly maps times matrices: resizing, enlarging and smoothing, also in graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.image import resize_matrix


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


class Resize(nn.Module):
    """What `edgead.image.resize` does before it rounds, in a graph.

    Args:
        source_px, target_px: (height, width) of the images before and after.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, source_px: tuple[int, int], target_px: tuple[int, int]) -> None:
        super().__init__()
        for name, side, px in zip(("rows", "columns"), source_px, target_px, strict=True):
            matrix = torch.from_numpy(resize_matrix(side, px))
            self.register_buffer(name, matrix[:, :, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Float32 [N, H, W, 3] to [N, h, w, 3].

        The two products with a matrix are convolutions, because TensorRT for RTX has no float32 products
        for Turing.
        """
        wide = F.conv2d(images.permute(0, 2, 1, 3), self.columns)  # N, columns, H, 3
        return F.conv2d(wide.permute(0, 2, 1, 3), self.rows)
