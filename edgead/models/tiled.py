"""Tiled inspection: the networks see every part of a frame at its own resolution, and the frame as a
whole, in one graph.

A frame is cut into overlapping tiles of the networks' input size, all tiles go through the networks as
one batch, and their raw maps are merged into one map of the frame.

Tiles find what is tiny, and have no context: on defects larger than a tile they are worse than a small
picture of the whole frame. So the networks learn and judge the frame at their own input size, too; its
raw maps are enlarged to those of the tiles, and calibrated beside them. What judges an image as a whole
anyway, EfficientAD's autoencoder (`AnomalyModel.whole_maps`), sees nothing but whole frames.

Where tiles overlap, the weight of each falls linearly with the distance to its edge, and is zero in the
outer part of the overlap: what a network tells of cells near an edge depends on what it makes up for the
pixels beyond. The weights of all tiles add up to 1 in every cell.

How much a seam shows depends on how far the networks look. PDNs look 16 px beyond a cell: from an
overlap of 64 px on (32 with EfficientAD's blind border), their map is that of the whole frame. Deep
backbones, which pad, look across a whole tile. How far the highest map value at a defect moves, at most,
when tile borders pass over it in steps of 16 px, in percent of the typical value; median and largest of
12 round spots, 11 to 25 px wide, on good images of MVTec AD bottle:

    overlap, px                                          32          64          96         128
    ProtoAD, MobileNetV2                            1.0, 2.7    0.7, 1.8    0.3, 0.8    0.2, 0.8
    FBFT, MobileNetV2                               2.5, 4.3    1.5, 2.7    0.6, 1.9    0.3, 1.1
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.errors import TrainingError
from edgead.models.base import AnomalyModel
from edgead.models.maps import Resize

MARGIN = 0.25
"""Of the overlap: where a tile has no weight, because its neighbour reaches further."""
MOST_PX = 4096
MOST_TILES = 128
"""The largest feature map of EfficientAD has 16.4 million values for a tile of 256 px, and TensorRT's
convolutions take less than 2^31 of them."""
TILES_AT_ONCE = 8
"""Of the plain form, so that its memory does not grow with the frame."""


def frame_of(inner: AnomalyModel, image_px: tuple[int, int], tile: int) -> tuple[int, int]:
    """Size of the frame that images of this size are resized to: whole cells, at most 2 px off.

    Args:
        image_px: (height, width) of the camera's images.
        tile: Side of a tile in px of these images.

    Raises:
        TrainingError: a side of the images is shorter than a tile.
    """
    if not 1 <= tile <= min(image_px):
        raise TrainingError(
            f"--tile {tile}: the images are {image_px[0]}x{image_px[1]} px (height x width), and a tile"
            " can be no larger than that; leave the option out to inspect images as a whole"
        )
    (side_px, _), cell_px = inner.input_px, _cell_px(inner)
    height, width = (cell_px * round(px * side_px / (tile * cell_px)) for px in image_px)
    return height, width


class Tiled(AnomalyModel):
    """Any method's networks on the tiles of a frame.

    What a method leaves uninspected at the edges of its input, it leaves at the edges of the frame.

    Args:
        inner: The networks, which take square images: one tile.
        tile: Side of a tile in px of the camera's images. Where it is not that of the networks' input,
            the images are resized as a whole by the ratio, and cut at the networks' size: tiles of 512
            px for networks of 256 px halve them.
        overlap: Of neighbouring tiles, at least, in the same px.
        frame: (height, width) px of the images after that, see `frame_of`: the input of the graph.

    Attributes:
        corners: First row and first column of every tile, row by row.
        local: How many of the raw maps, the first ones, are made of tiles; the others, all that the
            networks give, are those of the whole frame.

    Raises:
        TrainingError: overlap or frame do not suit the networks.
    """

    def __init__(self, inner: AnomalyModel, *, tile: int, overlap: int, frame: Sequence[int]) -> None:
        super().__init__()
        self.inner, self.tile, self.overlap = inner, tile, overlap
        self.local = len(inner.raw_names) - inner.whole_maps
        local, whole = inner.raw_names[: self.local], inner.raw_names[self.local :]
        self.raw_names = (*local, *(f"{name}_whole" for name in local), *whole)
        self.meaning = (
            f"{inner.meaning}; of the tiles of a frame, merged (model.tiling), and of the frame"
        )
        cell_px, blind = _cell_px(inner), inner.blind_cells
        least = 2 * blind * cell_px * tile // inner.input_px[0]
        if not least <= overlap <= tile // 2:
            raise TrainingError(
                f"--overlap {overlap}: tiles of {tile} px need an overlap of {least} to {tile // 2} px"
                + (", because the networks inspect no cells near their edges" if blind else "")
            )
        height, width = self.input_px = (frame[0], frame[1])
        self.map_cells = (height // cell_px, width // cell_px)
        overlap_cells = overlap * inner.map_cells[0] / tile
        self.grid = Grid(self.map_cells, inner.map_cells[0], overlap_cells, cell_px, blind)
        self.whole = Whole(self.input_px, inner, blind)
        self.corners = [(top, left) for top in self.grid.tops for left in self.grid.lefts]
        if max(frame) > MOST_PX or len(self.corners) > MOST_TILES:
            raise TrainingError(
                f"--tile {tile}: a frame of {height}x{width} px, {len(self.corners)} tiles; at most"
                f" {MOST_PX} px and {MOST_TILES} tiles are possible, and larger tiles shrink the frame"
            )
        inner.score(torch.zeros(1, *self.map_cells))  # it may refuse so large a map: not after training

    def architecture(self) -> dict[str, Any]:
        """That of the networks, and "tiling", of which `Tiled` is made."""
        tiling = {"tile": self.tile, "overlap": self.overlap, "frame": list(self.input_px)}
        return {**self.inner.architecture(), "tiling": tiling}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Raw maps of frames; at the edges they lack the cells that those of the networks lack."""
        parts = [self.inner(tiles)[: self.local] for tiles in self.grid.cut(images).split(TILES_AT_ONCE)]
        merged = tuple(self.grid.merge(torch.cat(maps)) for maps in zip(*parts, strict=True))
        return merged + self.whole(images, self.inner)

    def merged(self, dtype: torch.dtype) -> MergedTiled:
        return MergedTiled(self, dtype)

    def anomaly_map(self, raw: tuple[Tensor, ...], calibration: Tensor) -> Tensor:
        joined = super().anomaly_map(raw, calibration)
        blind = self.grid.blind
        return F.pad(joined, (blind,) * 4) if blind else joined

    def score(self, maps: Tensor) -> Tensor:
        return self.inner.score(maps)


class MergedTiled(nn.Module):
    """The networks as they ship, on the tiles of frames float RGB 0..255 [N, 3, *input_px].

    All tiles are one batch: memory grows with the frame.
    """

    def __init__(self, model: Tiled, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid, self.whole, self.networks = model.grid, model.whole, model.inner.merged(dtype)
        self.local = model.local

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        merged = tuple(self.grid.merge(raw) for raw in self.networks(self.grid.cut(x))[: self.local])
        return merged + self.whole(x, self.networks)


class Whole(nn.Module):
    """The raw maps of the whole frame: from the frame at the networks' size, enlarged.

    Where these maps lack more of the frame's edge than those of the tiles, their outermost cells go on.

    Args:
        frame_px: Height and width of the frames.
        blind: Cells at the edges of the frame that raw maps do not have.
    """

    def __init__(self, frame_px: tuple[int, int], inner: AnomalyModel, blind: int) -> None:
        super().__init__()
        self.resize, self.blind = Resize(frame_px, inner.input_px), blind
        cell_px = _cell_px(inner)
        self.cells = (frame_px[0] // cell_px, frame_px[1] // cell_px)

    def forward(self, frames: Tensor, networks: nn.Module) -> tuple[Tensor, ...]:
        """Raw maps of frames [N, 3, H, W] by networks that take their own size.

        Pixels are not rounded: those at half a level would go one way on one device, and another way on
        the next.
        """
        small = self.resize(frames.float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return tuple(self._enlarged(raw) for raw in networks(small))

    def _enlarged(self, raw: Tensor) -> Tensor:
        blind, (rows, columns) = self.blind, self.cells
        whole = F.pad(raw[:, None], (blind,) * 4, mode="replicate") if blind else raw[:, None]
        whole = F.interpolate(whole, size=self.cells, mode="bilinear", align_corners=False)
        return whole[:, 0, blind : rows - blind, blind : columns - blind]


class Grid(nn.Module):
    """The places of the tiles.

    Args:
        frame: Cells of the frame, (rows, columns).
        tile: Cells along a side of a tile.
        overlap: Of neighbours at least, in cells; as few tiles as that allows are spread evenly.
        cell_px: Pixels along a side of a cell.
        blind: Cells at the edges of a tile, and of the frame, that raw maps do not have.
    """

    def __init__(
        self, frame: tuple[int, int], tile: int, overlap: float, cell_px: int, blind: int
    ) -> None:
        super().__init__()
        self.side_px, self.blind = tile * cell_px, blind
        starts = [spread(cells - tile, int(tile - overlap)) for cells in frame]
        self.tops, self.lefts = ([cell_px * start for start in axis] for axis in starts)
        self.rows, self.columns = (Blend(axis, tile - 2 * blind, blind) for axis in starts)

    def cut(self, frames: Tensor) -> Tensor:
        """Tiles [N * T, 3, side, side] of frames [N, 3, H, W], row by row."""
        rows = torch.stack([frames[:, :, top : top + self.side_px] for top in self.tops], 1)
        tiles = torch.stack([rows[..., left : left + self.side_px] for left in self.lefts], 2)
        return tiles.flatten(0, 2)

    def merge(self, maps: Tensor) -> Tensor:
        """One map [N, H, W] of those of all tiles [N * T, h, w]."""
        pieces = maps.unflatten(0, (-1, len(self.tops), len(self.lefts))).transpose(2, 3)
        wide = self.columns(pieces)  # N, tiles, h, W
        return self.rows(wide.permute(0, 3, 1, 2)).transpose(1, 2)


def spread(last: int, most: int) -> list[int]:
    """Whole numbers from 0 to `last`, as few and as even as steps of `most` allow."""
    steps = -(-last // most)
    return [last * step // steps for step in range(steps)] + [last]


class Blend(nn.Module):
    """Joins overlapping pieces along one axis.

    Args:
        starts: First cell of every piece, ascending from 0.
        cells: Of a piece.
        blind: Cells that are missing at both ends of a piece.
    """

    weights: Tensor

    def __init__(self, starts: Sequence[int], cells: int, blind: int) -> None:
        super().__init__()
        self.starts, self.cells, total = starts, cells, starts[-1] + cells
        overlap = cells + 2 * blind - max((b - a for a, b in pairwise(starts)), default=0)
        margin = max(0.0, MARGIN * overlap - blind)
        place = torch.arange(cells, dtype=torch.float64) + 0.5
        rows = torch.zeros(len(starts), total, dtype=torch.float64)
        for row, start in zip(rows, starts, strict=True):
            inside = torch.full_like(place, cells)
            if start > 0:
                inside = torch.minimum(inside, place)
            if start + cells < total:
                inside = torch.minimum(inside, cells - place)
            row[start : start + cells] = (inside - margin).clamp_min(0)
        rows /= rows.sum(0)
        weights = [row[start : start + cells] for row, start in zip(rows, starts, strict=True)]
        self.register_buffer("weights", torch.stack(weights).float(), persistent=False)

    def forward(self, pieces: Tensor) -> Tensor:
        """Float32 [..., pieces, cells] to [..., starts[-1] + cells]."""
        pieces = pieces * self.weights
        runs = []
        for first, end in pairwise(sorted({cell for s in self.starts for cell in (s, s + self.cells)})):
            parts = [
                pieces[..., n, first - start : end - start]
                for n, start in enumerate(self.starts)
                if start <= first and end <= start + self.cells
            ]
            runs.append(sum(parts[1:], start=parts[0]))
        return torch.cat(runs, -1)


def _cell_px(model: AnomalyModel) -> int:
    return model.input_px[0] // model.map_cells[0]
