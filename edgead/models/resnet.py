"""ResNet and Wide ResNet, with the names and shapes of torchvision's weight files.

Source: He et al., "Deep Residual Learning", arXiv 1512.03385; Zagoruyko and Komodakis, "Wide Residual
Networks", arXiv 1605.07146. As in torchvision, a bottleneck has its stride in the 3x3 convolution.
Used as the frozen source network when a PDN teacher is distilled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Blocks of the four stages, whether bottlenecks, channels inside a block of stage 1
NAMES: dict[tuple[tuple[int, ...], bool, int], str] = {
    ((2, 2, 2, 2), False, 64): "resnet18",
    ((3, 4, 6, 3), True, 64): "resnet50",
    ((3, 4, 6, 3), True, 128): "wide_resnet50_2",
    ((3, 4, 23, 3), True, 128): "wide_resnet101_2",
}


class _Block(nn.Module):
    """Basic block (two 3x3 convolutions) or bottleneck (1x1, 3x3, 1x1)."""

    def __init__(self, channels: int, width: int, out: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            convs = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            convs = [(channels, width, 3, stride), (width, out, 3, 1)]
        self.depth = len(convs)
        for index, (before, after, side, step) in enumerate(convs, start=1):
            conv = nn.Conv2d(before, after, side, step, side // 2, bias=False)
            self.add_module(f"conv{index}", conv)
            self.add_module(f"bn{index}", nn.BatchNorm2d(after))
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index in range(1, self.depth + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            y = torch.relu(y) if index < self.depth else y
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    def fold(self) -> None:
        for index in range(1, self.depth + 1):
            _fold(self, f"conv{index}", f"bn{index}")
        if self.downsample is not None:
            _fold(self.downsample, "0", "1")


class ResNet(nn.Module):
    """ResNet of any depth and width.

    Args:
        blocks: Number of blocks of every stage, (3, 4, 23, 3) for the 101 layers.
        bottleneck: Blocks of three convolutions (50 layers and more) instead of two.
        width: Channels inside the blocks of stage 1: 64, or 128 for the wide ones.
        classes: Outputs of the classifier; 0 leaves it out.
    """

    def __init__(
        self, blocks: tuple[int, ...], *, bottleneck: bool, width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.stages = tuple(f"layer{index}" for index in range(1, len(blocks) + 1))
        channels = 64
        for stage, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            out = 64 * 2**stage * (4 if bottleneck else 1)
            layer = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                layer.append(_Block(channels, width * 2**stage, out, stride, bottleneck=bottleneck))
                channels = out
            self.add_module(name, nn.Sequential(*layer))
        if classes:
            self.fc = nn.Linear(channels, classes)
        self.name = NAMES.get((blocks, bottleneck, width)) or f"resnet {blocks} of width {width}"

    @classmethod
    def of_state_dict(cls, state: Mapping[str, Tensor]) -> ResNet | None:
        """The network that these weights belong to, not yet filled; None if they are no ResNet's."""
        if "conv1.weight" not in state or tuple(state["conv1.weight"].shape) != (64, 3, 7, 7):
            return None
        blocks: list[int] = []
        while found := {k.split(".")[1] for k in state if k.startswith(f"layer{len(blocks) + 1}.")}:
            blocks.append(len(found))
        first = state.get("layer1.0.conv1.weight")
        if first is None or first.ndim != 4:
            return None
        fc = state.get("fc.weight")
        return cls(
            tuple(blocks),
            bottleneck="layer1.0.conv3.weight" in state,
            width=first.shape[0],
            classes=0 if fc is None else fc.shape[0],
        )

    def fold(self) -> None:
        """Put the batch norms (of a network in eval mode) into the convolutions before them.

        Needed before a cast to half precision, in which the variances of batch norms lose too much.
        """
        _fold(self, "conv1", "bn1")
        for module in self.modules():
            if isinstance(module, _Block):
                module.fold()

    def taps(self, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Intermediate feature maps.

        Args:
            x: ImageNet-normalised RGB, float [N, 3, H, W].
            names: "layer2" (output of the stage) or "layer2.0" (output of one of its blocks).

        Returns:
            name -> [N, C, h, w]; nothing beyond the deepest named tap is computed.

        Raises:
            ValueError: an unknown name.
        """
        wanted, found = set(names), {}
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in self.stages:
            for index, block in enumerate(getattr(self, stage)):
                x = block(x)
                found[f"{stage}.{index}"] = x
            found[stage] = x
            found = {name: value for name, value in found.items() if name in wanted}
            if len(found) == len(wanted):
                return found
        raise ValueError(f"{self.name} has no tap {', '.join(sorted(wanted - set(found)))}")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of ImageNet-normalised RGB [N, 3, H, W]."""
        return self.fc(self.taps(x, (self.stages[-1],))[self.stages[-1]].mean(dim=(2, 3)))


def _fold(parent: nn.Module, conv: str, norm: str) -> None:
    setattr(parent, conv, fuse_conv_bn_eval(getattr(parent, conv), getattr(parent, norm)))
    setattr(parent, norm, nn.Identity())
