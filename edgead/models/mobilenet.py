"""MobileNetV2 1.0 with folded batch norms, in TensorFlow's padding convention.

Source: Sandler et al., "MobileNetV2", arXiv 1801.04381; the conventions (input in [-1, 1], "SAME"
padding, ReLU6, 1001 classes with a background class first) are those of the published TensorFlow models.
Used as the frozen source network when a PDN teacher is distilled.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# (expanded channels, output channels, stride of the depthwise convolution) of blocks 0..16
_BLOCKS = (
    (32, 16, 1),
    (96, 24, 2), (144, 24, 1),
    (144, 32, 2), (192, 32, 1), (192, 32, 1),
    (192, 64, 2), (384, 64, 1), (384, 64, 1), (384, 64, 1),
    (384, 96, 1), (576, 96, 1), (576, 96, 1),
    (576, 160, 2), (960, 160, 1), (960, 160, 1),
    (960, 320, 1),
)  # fmt: skip


class _SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: the odd pixel goes to the right and bottom."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        if k == 1:
            return super().forward(x)
        height, width = (max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[-2:])
        if height == width == k - 1 and k % 2:  # symmetric: let the convolution pad
            return F.conv2d(x, self.weight, self.bias, s, k // 2, 1, self.groups)
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, s, 0, 1, self.groups)


class _Block(nn.Module):
    def __init__(self, channels: int, expanded: int, out: int, stride: int, *, expand: bool) -> None:
        super().__init__()
        if expand:
            self.expand = _SameConv(channels, expanded, 1)
        self.depthwise = _SameConv(expanded, expanded, 3, stride, groups=expanded)
        self.project = _SameConv(expanded, out, 1)
        self.residual = stride == 1 and channels == out


class MobileNetV2(nn.Module):
    """MobileNetV2.

    The keys of its state_dict are `stem`, `blocks.N.{expand,depthwise,project}`, `head`, `classifier`.
    """

    name = "mobilenet_v2"

    def __init__(self) -> None:
        super().__init__()
        self.stem = _SameConv(3, 32, 3, 2)
        blocks, channels = [], 32
        for index, (expanded, out, stride) in enumerate(_BLOCKS):
            blocks.append(_Block(channels, expanded, out, stride, expand=index > 0))
            channels = out
        self.blocks = nn.ModuleList(blocks)
        self.head = _SameConv(channels, 1280, 1)
        self.classifier = nn.Linear(1280, 1001)

    def taps(self, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Intermediate feature maps.

        Args:
            x: RGB in [-1, 1], float [N, 3, H, W].
            names: "blocks.5" (the block's output), "blocks.5.depthwise" or "blocks.6.expand" (after
                ReLU6), "blocks.5.depthwise.linear" or "blocks.6.expand.linear" (before ReLU6).

        Returns:
            name -> [N, C, h, w]; nothing beyond the deepest named tap is computed.
        """
        wanted, found = set(names), {}
        x = F.relu6(self.stem(x))
        for index, block in enumerate(self.blocks):
            y = x
            if index > 0:
                found[f"blocks.{index}.expand.linear"] = y = block.expand(y)
                found[f"blocks.{index}.expand"] = y = F.relu6(y)
            found[f"blocks.{index}.depthwise.linear"] = y = block.depthwise(y)
            found[f"blocks.{index}.depthwise"] = y = F.relu6(y)
            y = block.project(y)
            x = x + y if block.residual else y
            found[f"blocks.{index}"] = x
            found = {name: value for name, value in found.items() if name in wanted}
            if len(found) == len(wanted):
                return found
        raise ValueError(f"MobileNetV2 has no tap {', '.join(sorted(wanted - set(found)))}")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 1001] of RGB images in [-1, 1], [N, 3, H, W].

        Logit 0 is the background, ImageNet class c is at c + 1.
        """
        x = self.taps(x, ("blocks.16",))["blocks.16"]
        x = F.relu6(self.head(x)).mean(dim=(2, 3))
        return self.classifier(x)
