"""Patch description network (PDN), the feature extractor of EfficientAD.

Source: Batzner, Heckler, König, "EfficientAD", arXiv 2303.14535, tables of PDN-S and PDN-M. Every
output value describes a patch of 33x33 pixels; neighbouring outputs are 4 pixels apart.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = Literal["s", "m"]
SIZES: tuple[str, ...] = get_args(Size)

FEATURES = 384
"""Channels of a teacher; a student has twice as many."""


class PDN(nn.Module):
    """PDN-S (`size="s"`) or PDN-M (`"m"`).

    Args:
        size: "s" or "m".
        out_channels: 384 for a teacher, 768 for a student.
        padding: with padding a 256 px image gives 64x64 outputs (used while distilling), without it
            56x56 (used everywhere else). Both modes share one state_dict.
    """

    def __init__(self, size: Size, out_channels: int = FEATURES, *, padding: bool = False) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"PDN size {size!r} is unknown; known sizes: {', '.join(SIZES)}")
        self.size = size
        self.padding = padding
        if size == "s":
            self.conv1 = nn.Conv2d(3, 128, 4)
            self.conv2 = nn.Conv2d(128, 256, 4)
            self.conv3 = nn.Conv2d(256, 256, 3)
            self.conv4 = nn.Conv2d(256, out_channels, 4)
        else:
            self.conv1 = nn.Conv2d(3, 256, 4)
            self.conv2 = nn.Conv2d(256, 512, 4)
            self.conv3 = nn.Conv2d(512, 512, 1)
            self.conv4 = nn.Conv2d(512, 512, 3)
            self.conv5 = nn.Conv2d(512, out_channels, 4)
            self.conv6 = nn.Conv2d(out_channels, out_channels, 1)

    @property
    def last(self) -> nn.Conv2d:
        """The convolution that makes the output features; nothing follows it."""
        return self.conv4 if self.size == "s" else self.conv6

    def trunk(self, x: Tensor) -> Tensor:
        """Everything before the last convolution.

        Args:
            x: ImageNet-normalised images, float [N, 3, H, W].

        Returns:
            The input of `last`: [N, 256, h, w] for "s", [N, out_channels, h, w] for "m".
        """
        one = int(self.padding)  # the pools count their padding in the divisor
        x = F.avg_pool2d(torch.relu(self.conv1(self._pad(x, 3))), 2, 2, one)
        x = F.avg_pool2d(torch.relu(self.conv2(self._pad(x, 3))), 2, 2, one)
        if self.size == "s":
            return torch.relu(self.conv3(self._pad(x, 1)))
        x = torch.relu(self.conv3(x))
        x = torch.relu(self.conv4(self._pad(x, 1)))
        return torch.relu(self.conv5(x))

    def _pad(self, x: Tensor, px: int) -> Tensor:
        # Not the convolution's own padding: with 3 px of it, oneDNN takes a weight gradient 10 times
        # slower.
        return F.pad(x, (px,) * 4) if self.padding else x

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, out_channels, h, w] of ImageNet-normalised images [N, 3, H, W].

        Without padding h = ceil(H/4) - 8.
        """
        return self.last(self.trunk(x))
