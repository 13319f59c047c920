"""EfficientAD: student, teacher and autoencoder, and the two raw anomaly maps they make.

Source: Batzner, Heckler, König, "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level
Latencies", arXiv 2303.14535. The defaults follow the public reproduction of the paper's figures: no
padding in the PDNs, maps of 56x56, quantiles taken on those maps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.models.pdn import FEATURES, PDN, Size

IMAGE_PX = 256
BORDER_CELLS = 4
"""The PDN sees no patch centred in the outer 16 px; the final map has 4 cells of zeros there."""

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalise(images: Tensor) -> Tensor:
    """ImageNet normalisation: uint8 or float RGB 0..255 [..., 3, H, W] -> float of the same shape."""
    device = images.device
    return (images.float() / 255 - IMAGENET_MEAN.to(device)) / IMAGENET_STD.to(device)


class Autoencoder(nn.Module):
    """Convolutional autoencoder with a bottleneck of 64 values, which predicts the teacher's features.

    Used at 256 px, where it gives 56x56 features as the unpadded PDN does.
    """

    DECODER_PX = (3, 8, 15, 32, 63, 127)

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 64)
        self.encoder = nn.ModuleList(
            nn.Conv2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.bottleneck = nn.Conv2d(64, 64, 8)
        self.decoder = nn.ModuleList(nn.Conv2d(64, 64, 4, 1, 2) for _ in self.DECODER_PX)
        self.dropout = nn.Dropout(0.2)
        self.smooth = nn.Conv2d(64, 64, 3, 1, 1)
        self.last = nn.Conv2d(64, FEATURES, 3, 1, 1)

    def trunk(self, x: Tensor) -> Tensor:
        """Everything before the last convolution: [N, 3, 256, 256] -> [N, 64, 56, 56]."""
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        for conv in self.encoder:
            x = torch.relu(conv(x))
        return self.bottleneck(x)

    def decode(self, x: Tensor) -> Tensor:
        for side, conv in zip(self.DECODER_PX, self.decoder, strict=True):
            x = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
            x = self.dropout(torch.relu(conv(x)))
        x = F.interpolate(x, size=(56, 56), mode="bilinear", align_corners=False)
        return torch.relu(self.smooth(x))

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, 384, 56, 56] of ImageNet-normalised images [N, 3, 256, 256]."""
        return self.last(self.trunk(x))


class EfficientAD(nn.Module):
    """Teacher, student and autoencoder of one detector, with the teacher's channel statistics.

    `forward` is the plain, unfused definition: what training validates, what the exporter starts from,
    and what the parity gate compares exported graphs with.
    """

    def __init__(self, teacher: PDN) -> None:
        super().__init__()
        size: Size = teacher.size
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = PDN(size, 2 * FEATURES)
        self.autoencoder = Autoencoder()
        self.register_buffer("mean", torch.zeros(FEATURES, 1, 1))
        self.register_buffer("std", torch.ones(FEATURES, 1, 1))

    @property
    def size(self) -> Size:
        return self.teacher.size

    def train(self, mode: bool = True) -> EfficientAD:
        super().train(mode)
        self.teacher.eval()
        return self

    def teacher_features(self, x: Tensor) -> Tensor:
        """Channel-normalised teacher features [N, 384, 56, 56] of normalised images [N, 3, 256, 256]."""
        return (self.teacher(x) - self.mean) / self.std

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw anomaly maps.

        Args:
            images: RGB 0..255, uint8 or float [N, 3, 256, 256].

        Returns:
            Student-teacher and student-autoencoder map, each float32 [N, 56, 56] >= 0: mean over the
            channels of the squared differences.
        """
        x = normalise(images)
        student = self.student(x)
        local = self.teacher_features(x).float() - student[:, :FEATURES].float()
        logical = self.autoencoder(x).float() - student[:, FEATURES:].float()
        return local.square().mean(1), logical.square().mean(1)


def anomaly_map(local: Tensor, logical: Tensor, calibration: Tensor) -> Tensor:
    """Calibrated map.

    Args:
        local, logical: Raw maps [N, 56, 56].
        calibration: [3] student scale, autoencoder scale, offset (see `edgead.calibration`).

    Returns:
        float32 [N, 64, 64]; the border of 4 cells is zero.
    """
    joined = calibration[0] * local + calibration[1] * logical + calibration[2]
    return F.pad(joined, (BORDER_CELLS,) * 4)


def anomaly_score(maps: Tensor) -> Tensor:
    """Image scores [N] of maps [N, h, w]: the largest value.

    Published implementations take the maximum after enlarging the map to the image's size. Enlarging
    bilinearly never exceeds the cells and reaches them in the limit, so this is that score without its
    dependence on the camera's resolution.
    """
    return maps.amax(dim=(1, 2))
