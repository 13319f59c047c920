"""EfficientAD: student, teacher and autoencoder, and the two raw anomaly maps they make.

Source: Batzner, Heckler, König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level
Latencies", arXiv 2303.14535. The defaults follow the public reproduction of the paper's figures: no
padding in the PDNs, maps of 56x56, quantiles taken on those maps.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.models.base import AnomalyModel
from edgead.models.folding import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    bias_of,
    copy_of,
    fill,
    grouped,
    input_scale,
    normalise,
    parameters_of,
    rotated,
    set_precision,
    side_by_side,
)
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


class EfficientAD(AnomalyModel):
    """Teacher, student and autoencoder of one detector, with the teacher's channel statistics.

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

    input_px = (IMAGE_PX, IMAGE_PX)
    map_cells = (MAP_CELLS, MAP_CELLS)
    raw_names = ("student", "autoencoder")
    whole_maps = 1
    meaning = (
        "mean_c((T - S)^2) and mean_c((A - S')^2) of EfficientAD (arXiv 2303.14535), or of fewer"
        " directions (model.targets, model.reduction)"
    )
    rotation: Tensor | None

    def __init__(self, teacher: PDN, *, border: Border = "published", targets: int = FEATURES) -> None:
        super().__init__()
        if border not in BORDERS:
            raise ValueError(f"border {border!r} is unknown; known: {', '.join(BORDERS)}")
        if not 1 <= targets <= FEATURES:
            raise ValueError(f"{targets} target channels: a number from 1 to {FEATURES} is needed")
        self.targets = targets
        self.border = border
        self.blind_cells = 0 if border == "reflect" else BORDER_CELLS
        self.cells = MAP_CELLS - 2 * self.blind_cells
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

    def architecture(self) -> dict[str, Any]:
        return {"size": self.size, "border": self.border, "targets": self.targets}

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

    def merged(
        self, dtype: torch.dtype, *, rotations: tuple[Tensor, Tensor] | None = None
    ) -> MergedEfficientAD:
        return MergedEfficientAD(self, dtype, rotations)

    def anomaly_map(self, raw: tuple[Tensor, ...], calibration: Tensor) -> Tensor:
        return anomaly_map(raw[0], raw[1], calibration)


class MergedEfficientAD(nn.Module):
    """The three networks as they ship: float RGB 0..255 [N, 3, 256, 256] -> both raw maps.

    Input normalisation is folded into the first convolutions, the teacher's channel statistics into its
    last one, and teacher-minus-student into one convolution over both networks' features, so that the
    difference forms in the accumulator instead of between two rounded tensors. Teacher and student run
    as the two groups of shared convolutions.

    Args:
        model: The trained networks, FP32. They are copied, not changed.
        dtype: Of weights and convolutions. From the squared difference on everything is float32, because
            squares overflow float16 at 256.
        rotations: What turns teacher-minus-student and autoencoder-minus-student differences into fewer
            ones, float64 [model.targets, K] each (see `edgead.export.reduce`); None for all of them.
    """

    mean255: Tensor

    def __init__(
        self, model: EfficientAD, dtype: torch.dtype, rotations: tuple[Tensor, Tensor] | None = None
    ) -> None:
        super().__init__()
        teacher, student, autoencoder = model.teacher, model.student, model.autoencoder
        self.size, self.dtype, self.border = model.size, dtype, model.border

        # The PDNs have no padding, so (x / 255 - mean) / std folds into their first convolution as a
        # whole.
        self.conv1 = nn.Conv2d(3, 2 * teacher.conv1.out_channels, 4)
        weight, bias = side_by_side(teacher.conv1, student.conv1)
        shift = (IMAGENET_MEAN.double() / IMAGENET_STD.double()).view(1, 3, 1, 1)
        fill(self.conv1, weight * input_scale(), bias - (weight * shift).sum(dim=(1, 2, 3)))
        self.conv2 = grouped(teacher.conv2, student.conv2)
        self.conv3 = grouped(teacher.conv3, student.conv3)
        if self.size == "m":
            self.conv4 = grouped(teacher.conv4, student.conv4)
            self.teacher5, self.student5 = copy_of(teacher.conv5), copy_of(student.conv5)

        # (T(t) - mu) / sigma - S(s) is one convolution over the concatenated [t, s]. The rotations act
        # on its outputs and those of the other branch, so they fold into the same weights.
        sigma, mu = model.std.double(), model.mean.double().flatten()
        t, s, k = teacher.last, student.last, model.targets
        target = t.weight.double() / sigma.unsqueeze(1), (bias_of(t) - mu) / sigma.flatten()
        if model.rotation is not None:
            target = rotated(*target, model.rotation.double())
        difference = torch.cat([target[0], -s.weight.double()[:k]], 1), target[1] - bias_of(s)[:k]
        logical, decoded = (s.weight.double()[k:], bias_of(s)[k:]), parameters_of(autoencoder.last)
        if rotations is not None:
            difference = rotated(*difference, rotations[0])
            logical, decoded = (rotated(*pair, rotations[1]) for pair in (logical, decoded))
        self.local = nn.Conv2d(t.in_channels + s.in_channels, len(difference[1]), t.kernel_size)
        fill(self.local, *difference)
        self.logical = nn.Conv2d(s.in_channels, len(logical[1]), s.kernel_size)
        fill(self.logical, *logical)

        # The autoencoder pads with zeros *after* normalisation: the mean is subtracted first, and
        # 1 / (255 std) folds into the weights.
        self.autoencoder = type(autoencoder)(autoencoder.cells, model.targets)
        self.autoencoder.load_state_dict(autoencoder.state_dict())
        self.autoencoder.dropout = nn.Identity()
        last = autoencoder.last
        self.autoencoder.last = nn.Conv2d(last.in_channels, len(decoded[1]), 3, 1, 1)
        fill(self.autoencoder.last, *decoded)
        first = autoencoder.encoder[0]
        fill(self.autoencoder.encoder[0], first.weight.double() * input_scale(), bias_of(first))
        self.register_buffer("mean255", 255 * IMAGENET_MEAN)
        set_precision(self, dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        local, logical = self.differences(x)
        return local.square().mean(1), logical.square().mean(1)

    def differences(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher minus student and autoencoder minus student, float32 [N, K, cells, cells].

        Args:
            x: RGB 0..255, float [N, 3, 256, 256].
        """
        both = F.avg_pool2d(torch.relu(self.conv1(extended(x.to(self.dtype), self.border))), 2, 2)
        both = F.avg_pool2d(torch.relu(self.conv2(both)), 2, 2)
        both = torch.relu(self.conv3(both))
        if self.size == "m":
            t, s = torch.relu(self.conv4(both)).chunk(2, 1)
            student = torch.relu(self.student5(s))
            both = torch.cat([torch.relu(self.teacher5(t)), student], 1)
        else:
            student = both[:, both.shape[1] // 2 :]
        decoded = self.autoencoder((x - self.mean255).to(self.dtype))
        return self.local(both).float(), decoded.float() - self.logical(student).float()


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
