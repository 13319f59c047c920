"""Frozen backbones: feature maps of RGB images at a few depths, whatever the network.

A backbone is a file that the user names (MobileNetV2, a ResNet or Wide ResNet), or the PDN teacher that
comes with the package. Its batch norms are folded, what lies beyond the deepest tap is left out, and its
input normalisation belongs to it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgead.errors import WeightsError
from edgead.models import vit
from edgead.models.efficientad import extended
from edgead.models.files import (
    WeightsInfo,
    load_backbone,
    load_teacher,
    read_state_dict,
    shipped_teacher,
)
from edgead.models.folding import IMAGENET_MEAN, IMAGENET_STD, normalise, set_precision
from edgead.models.mobilenet import MobileNetV2
from edgead.models.pdn import PDN
from edgead.models.resnet import NAMES, ResNet

PDN_TAPS = ("trunk", "last")
"""Of a PDN: what its last convolution sees, and its features; 64x64 each of 256 px."""


class Backbone(nn.Module):
    """Feature maps of images RGB 0..255 [N, 3, H, W], H and W multiples of 16.

    The PDNs see the image with its reflection around it (`edgead.models.efficientad.extended`), so that
    their maps reach to its edges, as those of the others do.

    Args:
        kind: "pdn-s", "pdn-m", "mobilenet_v2", or a ResNet's name such as "resnet18".
        taps: Names of the feature maps, finest first; see `MobileNetV2.taps`, `ResNet.taps`, `PDN_TAPS`.

    Raises:
        ValueError: an unknown kind.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, kind: str, taps: Sequence[str]) -> None:
        super().__init__()
        self.kind, self.taps = kind, tuple(taps)
        self.network = _network(kind, self.taps)
        is_mobilenet = kind == "mobilenet_v2"
        mean = torch.full((3, 1, 1), 127.5) if is_mobilenet else 255 * IMAGENET_MEAN
        std = torch.full((3, 1, 1), 127.5) if is_mobilenet else 255 * IMAGENET_STD
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path | None, taps: dict[str, tuple[str, ...]]) -> tuple[Backbone, WeightsInfo]:
        """The backbone of a weight file; without one, the PDN-S teacher of the package.

        Args:
            taps: Kind -> names of the feature maps; only these kinds are taken.

        Raises:
            WeightsError: the file holds no network, or one of a kind that has no taps here.
        """
        path = path or shipped_teacher("s")
        network, info = _load(path)
        kind = f"pdn-{network.size}" if isinstance(network, PDN) else network.name
        if kind not in taps:
            raise WeightsError(f"{path} holds {kind}, which this method has no use for;"
                               f" it takes {', '.join(taps)}")  # fmt: skip
        if isinstance(network, ResNet):
            network.fold()
        backbone = cls(kind, taps[kind])
        wanted = backbone.network.state_dict()
        backbone.network.load_state_dict({k: v for k, v in network.state_dict().items() if k in wanted})
        return backbone, info

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the feature maps."""
        with torch.no_grad():
            return tuple(level.shape[1] for level in self(torch.zeros(1, 3, 64, 64)))

    def train(self, mode: bool = True) -> Backbone:
        """Frozen: stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps [N, C, h, w], finest first, of images uint8 or float [N, 3, H, W]."""
        return self._levels((images.float() - self.mean) / self.std)

    def _levels(self, x: Tensor) -> list[Tensor]:
        if isinstance(self.network, PDN):
            return _pdn_levels(self.network, x, self.taps)
        found = self.network.taps(x, self.taps)
        return [found[tap] for tap in self.taps]

    def merged(self, dtype: torch.dtype) -> MergedBackbone:
        """For export: float RGB 0..255 [N, 3, H, W] -> the same maps in `dtype`."""
        return MergedBackbone(self, dtype)


class MergedBackbone(nn.Module):
    """A backbone with its input scale folded into the first convolution.

    The mean is subtracted before: convolutions pad with zeros *after* normalisation.
    """

    mean: Tensor

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.backbone = copy.deepcopy(backbone)
        network = self.backbone.network
        first = network.stem if isinstance(network, MobileNetV2) else network.conv1
        first.weight.data.copy_(first.weight.double() / backbone.std.double().view(1, 3, 1, 1))
        self.register_buffer("mean", backbone.mean.clone())
        set_precision(self, dtype)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.backbone._levels((x - self.mean).to(self.dtype))


class ViTBackbone(nn.Module):
    """A vision transformer that answers as `Backbone` does, for square images of one size.

    Raises:
        TrainingError: the side is no multiple of 14 px.
    """

    def __init__(self, network: vit.ViT, taps: Sequence[int], image_px: int) -> None:
        super().__init__()
        sizes = {config: f"vit-{size}" for size, config in vit.CONFIGS.items()}
        self.kind, self.taps = sizes[network.config], tuple(taps)
        self.network = network
        network.for_size(image_px)
        # The positions for this size are made of weights that may come later.
        self.register_load_state_dict_post_hook(lambda module, _: module.network.for_size(image_px))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps float32 [N, dim, cells, cells] of images uint8 or float [N, 3, side, side]."""
        return self.network.features(normalise(images), self.taps)

    def merged(self, dtype: torch.dtype) -> vit.MergedViT:
        return self.network.merged(dtype, self.taps)


def _network(kind: str, taps: tuple[str, ...]) -> MobileNetV2 | ResNet | PDN:
    """The unfilled network, cut off behind its deepest tap, batch norms folded."""
    if kind in ("pdn-s", "pdn-m"):
        return PDN("s" if kind == "pdn-s" else "m")
    if kind == "mobilenet_v2":
        mobile = MobileNetV2()
        mobile.blocks = mobile.blocks[: 1 + max(int(tap.split(".")[1]) for tap in taps)]
        del mobile.head, mobile.classifier
        return mobile
    shapes = {name: shape for shape, name in NAMES.items()}
    if kind not in shapes:
        raise ValueError(f"backbone {kind!r} is unknown")
    blocks, bottleneck, width = shapes[kind]
    stages = max(int(tap.removeprefix("layer").split(".")[0]) for tap in taps)
    resnet = ResNet(blocks[:stages], bottleneck=bottleneck, width=width, classes=0).eval()
    resnet.fold()
    return resnet


def _load(path: Path) -> tuple[MobileNetV2 | ResNet | PDN, WeightsInfo]:
    state, _ = read_state_dict(path)
    first = state.get("conv1.weight", state.get("0.weight"))
    if first is not None and first.ndim == 4 and tuple(first.shape[1:]) == (3, 4, 4):
        return load_teacher(path)
    return load_backbone(path)


def _pdn_levels(network: PDN, x: Tensor, taps: tuple[str, ...]) -> list[Tensor]:
    hidden = network.trunk(extended(x, "reflect"))
    # A feature sees 4x4 of the hidden cells (in a PDN-M, 1x1). The third of these in each direction
    # stands for it: its patch has its middle at 4 i + 2, and cell i of the map has it at 4 i + 1.5.
    margin = 3 if network.size == "s" else 0
    low = margin - margin // 2
    end = low - margin or None
    found = {"trunk": hidden[..., low:end, low:end]}
    if "last" in taps:
        found["last"] = network.last(hidden)
    return [found[tap] for tap in taps]
