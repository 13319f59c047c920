"""What a PDN teacher learns to predict: aggregated, normalised feature maps of a frozen network.

Source: the aggregation is PatchCore's (Roth et al., arXiv 2106.08265): 3x3 neighbourhoods of every
level, each averaged down to 1024 values, joined and averaged down to 384; channels are normalised as in
Batzner et al., "EfficientAD", arXiv 2303.14535, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.errors import WeightsError
from edgead.models.files import WeightsInfo, load_backbone
from edgead.models.mobilenet import MobileNetV2
from edgead.models.pdn import FEATURES
from edgead.models.resnet import ResNet

MOBILENET_LAYERS = ("blocks.5.depthwise.linear", "blocks.12.depthwise.linear")
"""Feature maps of MobileNetV2 at strides 8 (192 channels) and 16 (576 channels), before ReLU6."""

RESNET_LAYERS = ("layer2", "layer3")
"""Feature maps of a ResNet at strides 8 and 16, as in the paper."""

_IMAGENET_MEAN, _IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB 0..255


class Source:
    """A frozen network that gives feature maps: one of a weight file, or any torch module.

    For example a vision transformer of timm, whose maps are made of tokens:

        Source(vit, lambda images: [vit.get_intermediate_layers(images, ...)...], name="vit-b")

    Args:
        network: The module; it is put into eval mode, frozen, and moved to the device and precision of
            the run.
        features: Images [N, 3, H, W], normalised by `mean` and `std` -> feature maps [N, C, h, w],
            finest first. Their number has to divide 384.
        name: What is recorded with the teacher.
        layers: Names of the feature maps, recorded too.
        mean: Of RGB 0..255, per channel; the default is ImageNet's.
        std: Of RGB 0..255, per channel.
        sha256: Of the weight file.
    """

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[Tensor], Sequence[Tensor]],
        *,
        name: str,
        layers: tuple[str, ...] = (),
        mean: tuple[float, float, float] = _IMAGENET_MEAN,
        std: tuple[float, float, float] = _IMAGENET_STD,
        sha256: str = "",
    ) -> None:
        self.network, self.features = network.eval().requires_grad_(False), features
        self.name, self.layers, self.sha256 = name, layers, sha256
        self.mean, self.std = mean, std

    @classmethod
    def load(cls, path: Path | str, layers: tuple[str, ...] | None = None) -> Source:
        """The source of a weight file of MobileNetV2 or a ResNet.

        Args:
            layers: Taps, finest first; default MOBILENET_LAYERS or RESNET_LAYERS.

        Raises:
            WeightsError: a wrong file, or a layer that this network does not have.
        """
        network, info = load_backbone(path)
        if isinstance(network, MobileNetV2):
            return cls._tapped(network, layers or MOBILENET_LAYERS, info, (127.5,) * 3, (127.5,) * 3)
        network.fold()
        return cls._tapped(network, layers or RESNET_LAYERS, info, _IMAGENET_MEAN, _IMAGENET_STD)

    @classmethod
    def _tapped(
        cls,
        network: MobileNetV2 | ResNet,
        layers: tuple[str, ...],
        info: WeightsInfo,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> Source:
        def features(images: Tensor) -> list[Tensor]:
            taps = network.taps(images, layers)
            return [taps[layer] for layer in layers]

        try:
            with torch.no_grad():
                features(torch.zeros(1, 3, 32, 32))
        except ValueError as error:
            raise WeightsError(f"{info.name}: {error}") from error
        return cls(
            network, features, name=info.name, layers=layers, mean=mean, std=std, sha256=info.sha256
        )


def pooling_matrix(n: int, m: int) -> Tensor:
    """Matrix float64 [m, n] of `adaptive_avg_pool1d` from n values to m."""
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for j in range(m):
        start, end = j * n // m, -(-(j + 1) * n // m)
        matrix[j, start:end] = 1 / (end - start)
    return matrix


def aggregation_kernel(channels: int, level: int, levels: int = 2) -> Tensor:
    """3x3 kernels that do PatchCore's aggregation of one of `levels` levels in one convolution.

    Of the 384 output channels every level makes its own 384 / levels alone, because pooling the
    levels x 1024 joined values to 384 then never mixes two levels.

    Returns:
        float32 [384 / levels, channels, 3, 3].
    """
    share = FEATURES // levels
    rows = slice(share * level, share * (level + 1))
    joined = pooling_matrix(1024 * levels, FEATURES)[rows, 1024 * level : 1024 * (level + 1)]
    return (joined @ pooling_matrix(9 * channels, 1024)).reshape(share, channels, 3, 3).float()


class Targets:
    """Frozen source and aggregation: RGB 0..255 images [N, 3, H, W] -> targets [N, 384, H/8, W/8].

    Channels have mean 0 and variance 1 over the images that were measured. With `whiten` above 0 they
    are partly (below 1) or entirely decorrelated as well: the normalised channels are multiplied by
    their correlation matrix to the power -whiten/2.

    The source runs in `dtype`; on a CPU one image at a time: its maps then stay in the cache.

    Raises:
        WeightsError: the source's number of feature maps does not divide 384.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        *,
        side_px: int,
        whiten: float = 0.0,
    ) -> None:
        source.network.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        self.source, self.dtype, self.device, self.whiten = source, dtype, device, whiten
        self.source_mean = torch.tensor(source.mean, device=device).view(3, 1, 1)
        self.source_std = torch.tensor(source.std, device=device).view(3, 1, 1)
        levels = self._levels(torch.zeros(1, 3, side_px, side_px, device=device))
        if not levels or FEATURES % len(levels):
            raise WeightsError(
                f"{source.name}: {len(levels)} feature maps; expected a number that divides {FEATURES},"
                " such as 1, 2, 3 or 4"
            )
        self.kernels = [
            aggregation_kernel(level.shape[1], index, len(levels)).to(device, dtype)
            for index, level in enumerate(levels)
        ]
        self.mean = torch.zeros(FEATURES, 1, 1, device=device)
        self.std = torch.ones(FEATURES, 1, 1, device=device)
        self.mixing = torch.eye(FEATURES, device=device)

    def _levels(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(self.source.features(((x - self.source_mean) / self.source_std).to(self.dtype)))

    def __call__(self, x: Tensor) -> Tensor:
        """Targets float32 of images float32 on this device."""
        with torch.no_grad():
            y = (self.raw(x) - self.mean) / self.std
            return F.conv2d(y, self.mixing[..., None, None]) if self.whiten else y

    def raw(self, x: Tensor) -> Tensor:
        """Aggregated features before normalisation."""
        parts = x.split(1) if x.device.type == "cpu" else (x,)
        return torch.cat([self._aggregate(part) for part in parts])

    def _aggregate(self, x: Tensor) -> Tensor:
        grid = (x.shape[-2] // 8, x.shape[-1] // 8)
        joined = []
        for level, kernel in zip(self._levels(x), self.kernels, strict=True):
            y = F.conv2d(level, kernel, padding=1).float()
            if y.shape[-1] > grid[-1]:  # finer than the PDN: means, not samples
                y = F.adaptive_avg_pool2d(y, grid)
            elif y.shape[-2:] != grid:
                y = F.interpolate(y, size=grid, mode="bilinear", align_corners=False)
            joined.append(y)
        return torch.cat(joined, 1)

    def measure(self, batches: Iterable[Tensor], total: Callable[[Tensor], Tensor]) -> None:
        """Set the statistics of the channels from batches of images.

        Args:
            batches: RGB 0..255 float [N, 3, H, W].
            total: Sum over the processes of a run.
        """
        sums = torch.zeros(3, FEATURES, dtype=torch.float64)  # of values, squares, sampled values
        products = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
        counts = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for x in batches:
                features = self.raw(x).double()
                # For products a sixteenth of the positions will do: neighbours overlap. None at the
                # border, where zeros from outside correlate everything.
                columns = features[..., 2::4, 2::4].transpose(0, 1).flatten(1)
                values = [features.sum((0, 2, 3)), features.square().sum((0, 2, 3)), columns.sum(1)]
                sums += torch.stack(values).cpu()
                if self.whiten:
                    products += (columns @ columns.T).cpu()
                counts += torch.tensor([features[:, 0].numel(), columns.shape[1]])
        packed = total(torch.cat([sums.flatten(), products.flatten(), counts]).to(self.device)).cpu()
        sums, products = packed[: 3 * FEATURES].view(3, -1), packed[3 * FEATURES : -2].view(FEATURES, -1)
        mean = sums[0] / packed[-2]
        # FP64 sums of values of order 1: no cancellation to fear
        std = (sums[1] / packed[-2] - mean.square()).clamp_min(1e-12).sqrt()
        self.mean.copy_(mean.view(-1, 1, 1))
        self.std.copy_(std.view(-1, 1, 1))
        if self.whiten:
            sampled = sums[2] / packed[-1]
            covariance = products / packed[-1] - torch.outer(sampled, sampled)
            self.mixing.copy_(whitening(covariance / torch.outer(std, std), self.whiten))

    def state(self) -> dict[str, Tensor]:
        """The statistics, for a checkpoint."""
        return {"mean": self.mean, "std": self.std, "mixing": self.mixing}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the statistics from a checkpoint."""
        for name, value in self.state().items():
            value.copy_(state[name])


def whitening(correlation: Tensor, strength: float) -> Tensor:
    """Matrix W = C^(-strength/2), its rows scaled so that W x has variance 1 in every channel.

    Directions with less than a thousandth of the mean variance are not amplified any further.

    Args:
        correlation: C, float64 [K, K].
        strength: 0 leaves the channels as they are, 1 decorrelates them.
    """
    values, vectors = torch.linalg.eigh(correlation)
    w = vectors @ torch.diag(values.clamp_min(1e-3).pow(-strength / 2)) @ vectors.T
    return w / (w @ correlation @ w.T).diagonal().clamp_min(1e-12).sqrt()[:, None]
