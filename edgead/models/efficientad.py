"""EfficientAD: student, teacher and autoencoder, and the two raw anomaly maps they make.

Source: Batzner, Heckler, König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level
Latencies", arXiv 2303.14535. The defaults follow the public reproduction of the paper's figures: no
padding in the PDNs, maps of 56x56, quantiles taken on those maps.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.models.pdn import FEATURES, PDN, Size

IMAGE_PX = 256
MAP_CELLS = 64
"""Cells of the final map along a side, one per 4 px."""

Border = Literal["published", "reflect"]
BORDERS: tuple[str, ...] = get_args(Border)
BORDER_CELLS = 4
"""The PDN sees no patch centred in the outer 16 px; the published map has 4 cells of zeros there."""
REFLECTED_PX = (16, 13, 16, 13)
"""Left, right, top, bottom: with these, cell i is the patch of pixels 4 i - 16 .. 4 i + 16, for all 64
cells. Those 4 .. 59 are the published ones."""

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalise(images: Tensor) -> Tensor:
    """ImageNet normalisation: uint8 or float RGB 0..255 [..., 3, H, W] -> float of the same shape."""
    device = images.device
    return (images.float() / 255 - IMAGENET_MEAN.to(device)) / IMAGENET_STD.to(device)


def extended(x: Tensor, border: Border) -> Tensor:
    """What the PDNs see of images [N, 3, 256, 256], whatever their values: "reflect" adds a margin.

    With its reflection around it, an image has [N, 3, 285, 285]. One row fewer at the far edges would
    lose the last cells, more would make no others.
    """
    return F.pad(x, REFLECTED_PX, mode="reflect") if border == "reflect" else x


class Autoencoder(nn.Module):
    """Convolutional autoencoder with a bottleneck of 64 values, which predicts the teacher's features.

    Used at 256 px, where it gives 56x56 features as the unpadded PDN does, or as many as asked for.
    """

    DECODER_PX = (3, 8, 15, 32, 63, 127)

    def __init__(self, cells: int = MAP_CELLS - 2 * BORDER_CELLS, out_channels: int = FEATURES) -> None:
        super().__init__()
        self.cells = cells
        widths = (3, 32, 32, 64, 64, 64)
        self.encoder = nn.ModuleList(
            nn.Conv2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.bottleneck = nn.Conv2d(64, 64, 8)
        self.decoder = nn.ModuleList(nn.Conv2d(64, 64, 4, 1, 2) for _ in self.DECODER_PX)
        self.dropout = nn.Dropout(0.2)
        self.smooth = nn.Conv2d(64, 64, 3, 1, 1)
        self.last = nn.Conv2d(64, out_channels, 3, 1, 1)

    def trunk(self, x: Tensor) -> Tensor:
        """Everything before the last convolution: [N, 3, 256, 256] -> [N, 64, cells, cells]."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        for conv in self.encoder:
            x = torch.relu(conv(x))
        return self.bottleneck(x)

    def decode(self, x: Tensor) -> Tensor:
        for side, conv in zip(self.DECODER_PX, self.decoder, strict=True):
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
            x = self.dropout(torch.relu(conv(x)))
        x = F.interpolate(x, size=(self.cells, self.cells), mode="bilinear", align_corners=False)
        return torch.relu(self.smooth(x))

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, out_channels, cells, cells] of ImageNet-normalised images [N, 3, 256, 256]."""
        return self.last(self.trunk(x))


class EfficientAD(nn.Module):
    """Teacher, student and autoencoder of one detector, with the teacher's channel statistics.

    `forward` is the plain, unfused definition: what training validates, what the exporter starts from,
    and what the parity gate compares exported graphs with.

    Args:
        border: "published": raw maps of 56x56 cells, and the outer 16 px of the image are not inspected.
            "reflect": teacher and student see the image extended by its reflection, the autoencoder
            decodes more cells, and the raw maps have 64x64, up to the edges.
        targets: Channels of the target space: the published 384, or fewer, and then `rotation` leads
            from the normalised teacher features to it (docs/reduced-targets.md).

    Attributes:
        cells: Of the raw maps along a side.
        rotation: None, or float32 [384, targets], filled when training starts.
    """

    rotation: Tensor | None

    def __init__(self, teacher: PDN, *, border: Border = "published", targets: int = FEATURES) -> None:
        super().__init__()
        if border not in BORDERS:
            raise ValueError(f"border {border!r} is unknown; known: {', '.join(BORDERS)}")
        if not 1 <= targets <= FEATURES:
            raise ValueError(f"{targets} target channels: a number from 1 to {FEATURES} is needed")
        self.targets = targets
        self.border = border
        self.cells = MAP_CELLS if border == "reflect" else MAP_CELLS - 2 * BORDER_CELLS
        size: Size = teacher.size
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = PDN(size, 2 * targets)
        self.autoencoder = Autoencoder(self.cells, targets)
        self.register_buffer("mean", torch.zeros(FEATURES, 1, 1))
        self.register_buffer("std", torch.ones(FEATURES, 1, 1))
        rotation = torch.zeros(FEATURES, targets) if targets < FEATURES else None
        self.register_buffer("rotation", rotation)

    @property
    def size(self) -> Size:
        return self.teacher.size

    def train(self, mode: bool = True) -> EfficientAD:
        super().train(mode)
        self.teacher.eval()
        return self

    def extended(self, x: Tensor) -> Tensor:
        """What teacher and student see of images [N, 3, 256, 256]: [N, 3, 285, 285] with "reflect"."""
        return extended(x, self.border)

    def teacher_features(self, x: Tensor) -> Tensor:
        """What the student learns: [N, targets, cells, cells] of normalised 256 px images."""
        return self.rotated((self.teacher(self.extended(x)) - self.mean) / self.std)

    def rotated(self, features: Tensor) -> Tensor:
        """Normalised teacher features [N, 384, h, w] in the target space [N, targets, h, w]."""
        if self.rotation is None:
            return features
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("nchw,ck->nkhw", features.float(), self.rotation)

    def targets_of(self, hidden: Tensor) -> Tensor:
        """`teacher_features`, float32, of what the teacher's trunk gave; cheaper than these in a step.

        With a rotation, the teacher's last convolution makes the rotated channels alone.
        """
        last = self.teacher.last
        if self.rotation is None:
            return (last(hidden).float() - self.mean) / self.std
        assert last.bias is not None
        with torch.autocast(hidden.device.type, enabled=False):
            scaled = self.rotation.T / self.std.flatten()
            weight = (scaled @ last.weight.flatten(1)).unflatten(1, last.weight.shape[1:])
            bias = scaled @ (last.bias - self.mean.flatten())
        return F.conv2d(hidden, weight, bias).float()

    def differences(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher minus student and autoencoder minus student, float32 [N, targets, cells, cells].

        Args:
            images: RGB 0..255, uint8 or float [N, 3, 256, 256].
        """
        x = normalise(images)
        student = self.student(self.extended(x))
        local = self.teacher_features(x).float() - student[:, : self.targets].float()
        return local, self.autoencoder(x).float() - student[:, self.targets :].float()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw anomaly maps.

        Args:
            images: RGB 0..255, uint8 or float [N, 3, 256, 256].

        Returns:
            Student-teacher and student-autoencoder map, each float32 [N, cells, cells] >= 0: mean over
            the channels of the squared differences.
        """
        local, logical = self.differences(images)
        return local.square().mean(1), logical.square().mean(1)


def anomaly_map(local: Tensor, logical: Tensor, calibration: Tensor) -> Tensor:
    """Calibrated map.

    Args:
        local, logical: Raw maps [N, 56, 56], or [N, 64, 64] where the border is inspected, too.
        calibration: [3] student scale, autoencoder scale, offset (see `edgead.calibration`).

    Returns:
        float32 [N, 64, 64]; where the raw maps have no border, its 4 cells are zero.
    """
    joined = calibration[0] * local + calibration[1] * logical + calibration[2]
    border = (MAP_CELLS - joined.shape[-1]) // 2
    return F.pad(joined, (border,) * 4) if border else joined


def anomaly_score(maps: Tensor) -> Tensor:
    """Image scores [N] of maps [N, h, w]: the largest value.

    Published implementations take the maximum after enlarging the map to the image's size. Enlarging
    bilinearly never exceeds the cells and reaches them in the limit, so this is that score without its
    dependence on the camera's resolution.
    """
    return maps.amax(dim=(1, 2))
