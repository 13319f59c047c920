"""ProtoAD: all that is normal as a few prototypes, and a 1x1 convolution that looks for the nearest.

Source: Huang, Kang, Wu, "A Prototype-Based Neural Network for Image Anomaly Detection and Localization",
arXiv 2310.02576. A patch is described by the feature maps of a frozen backbone at its place, all levels
joined, and its anomaly is one minus its largest cosine to a prototype. No gradients, no training beyond
clustering.

What differs from the paper: it inspects the centre 224x224 of an image of 256 px, and leaves a blind
border; here the whole image is resized to 256x256. How it finds prototypes with FINCH is not published
in full; what is done here is in `edgead.training.finch`. Published is Wide ResNet-50-2; the other
backbones are variants. MobileNetV2 gives the narrow outputs of its blocks, because the wide ones before
their projection ("blocks.2.depthwise" and so on, 912 channels instead of 152) were worse: image AUROC
0.985 instead of 0.998, pixel AUROC 0.949 instead of 0.976, on the test images of MVTec AD bottle with
every eighth training image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.errors import TrainingError
from edgead.models.base import AnomalyModel
from edgead.models.folding import set_precision
from edgead.models.maps import as_weight, bilinear_matrix, both_axes
from edgead.models.taps import Backbone
from edgead.training.finch import BLOCK_PATCHES, PROTOTYPES_LIMIT, PrototypeLearner

if TYPE_CHECKING:
    from edgead.training.session import Session

IMAGE_PX = 256
CELLS = 64
"""Cells of the finest feature maps along a side, one per 4 px."""
SIGMA_PX = 4.0

_STAGES = ("layer1", "layer2", "layer3")
TAPS: dict[str, tuple[str, ...]] = {
    "wide_resnet50_2": _STAGES,
    "resnet50": _STAGES,
    "resnet18": _STAGES,
    "mobilenet_v2": ("blocks.2", "blocks.5", "blocks.12"),
    "pdn-s": ("last",),
    "pdn-m": ("last",),
}
"""Backbone -> its feature maps, finest first: 64x64 cells, and each next one has half of them."""


@dataclass(frozen=True)
class ProtoADConfig:
    """Settings of a run, which takes every training image once: it has no steps or minutes to choose.

    Attributes:
        max_prototypes: 1..4096. The clustering decides how many it takes, up to this; an inspection's
            time and memory grow with them.
        seed: Of the split of a data set that has none of its own.
        false_reject: Target rate of good parts rejected, for the threshold.
    """

    max_prototypes: int = 1024
    seed: int = 42
    false_reject: float = 0.01

    method = "protoad"  # without a type it is no setting

    def __post_init__(self) -> None:
        if not 1 <= self.max_prototypes <= PROTOTYPES_LIMIT:
            raise TrainingError(
                f"--max-prototypes {self.max_prototypes}: a number from 1 to {PROTOTYPES_LIMIT} is"
                " needed; time and memory of an inspection grow with it"
            )


def patches(levels: Sequence[Tensor]) -> Tensor:
    """Descriptions of length 1 (or zeros) of all patches.

    Args:
        levels: Feature maps [N, C_i, h, w], [N, C_j, h/2, w/2] and so on, finest first.

    Returns:
        float32 [N, C_i + C_j + ..., h, w]. Coarse levels are repeated, not interpolated, and the norm is
        that over the channels of all levels: both as published.
    """
    cells = levels[0].shape[-2:]
    joined = torch.cat([F.interpolate(level.float(), size=cells, mode="nearest") for level in levels], 1)
    return F.normalize(joined, dim=1, eps=1e-12)


def distances(levels: Sequence[Tensor], prototypes: Tensor) -> Tensor:
    """One minus the largest cosine to a prototype, float32 [N, h, w] in 0..2; see `patches`.

    Args:
        prototypes: Unit rows float32 [K, C].
    """
    cosines = torch.einsum("kc,nchw->nkhw", prototypes, patches(levels))
    return (1 - cosines.amax(1)).clamp(min=0)  # a patch that is a prototype would get -1e-7


def smoothing_matrix(cells: int, px: int, sigma_px: float) -> Tensor:
    """Matrix M, float64 [px, cells]: M X M^T is a map X enlarged bilinearly, then smoothed.

    The Gaussian is cut off at 4 sigma, and the enlarged map goes on as its mirror image beyond its edge
    (d c b a | a b c d), as in `scipy.ndimage.gaussian_filter`. Rows sum to 1.
    """
    radius = int(4 * sigma_px + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma_px) ** 2)
    mirrored = (torch.arange(px)[:, None] + offsets) % (2 * px)
    places = torch.minimum(mirrored, 2 * px - 1 - mirrored)
    gaussian = torch.zeros(px, px, dtype=torch.float64)
    gaussian.scatter_add_(1, places, (weights / weights.sum()).expand(px, -1))
    return gaussian @ bilinear_matrix(cells, px)


class ProtoAD(AnomalyModel):
    """Backbone and prototypes of one detector.

    Args:
        prototypes: Unit rows float32 [K, C], C being the channels of all feature maps together.
    """

    input_px = (IMAGE_PX, IMAGE_PX)
    map_cells = (IMAGE_PX, IMAGE_PX)
    raw_names = ("distance",)
    meaning = (
        "1 - max_k cos(patch, prototype_k) of ProtoAD (arXiv 2310.02576; published with Wide"
        " ResNet-50-2, see model.kind), enlarged to 256x256 and smoothed with a Gaussian of 4 px; the"
        " score is the largest value of the smoothed map"
    )
    prototypes: Tensor
    smoothing: Tensor

    def __init__(self, backbone: Backbone, prototypes: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("prototypes", prototypes)
        smoothing = smoothing_matrix(CELLS, IMAGE_PX, SIGMA_PX).float()
        self.register_buffer("smoothing", smoothing, persistent=False)

    def architecture(self) -> dict[str, Any]:
        return {"kind": self.backbone.kind, "prototypes": len(self.prototypes)}

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Smoothed map float32 [N, 256, 256] of images RGB 0..255, uint8 or float [N, 3, 256, 256]."""
        cells = distances(self.backbone(images), self.prototypes)
        return (self.smoothing @ cells @ self.smoothing.T,)

    def merged(self, dtype: torch.dtype) -> MergedProtoAD:
        return MergedProtoAD(self, dtype)


class Nearest(nn.Module):
    """`distances` without the joined feature maps, which are the largest tensor of the plain form.

    A 1x1 convolution gives the same before or after its input is repeated, and the norm is common to all
    prototypes: every level is multiplied with its own columns of the prototypes where it is small, and
    the products and squared lengths are added up from the coarsest level to the finest.

    Args:
        prototypes: Unit rows [K, C].
        channels: Of the levels, finest first; their sum is C.
        dtype: Of the convolutions. Squares overflow float16 at 256, and near a cosine of 1 it has steps
            of 5e-4, where good patches lie: all but the convolutions is float32.
    """

    def __init__(self, prototypes: Tensor, channels: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for part in prototypes.split(list(channels), dim=1):
            conv = nn.Conv2d(part.shape[1], part.shape[0], 1, bias=False)
            conv.weight.data.copy_(part[:, :, None, None])
            self.convs.append(conv)
        set_precision(self, dtype)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """float32 [N, h, w] of feature maps in `dtype`."""
        dot = _nested([conv(level).float() for conv, level in zip(self.convs, levels, strict=True)])
        square = _nested([level.float().square().sum(1, keepdim=True) for level in levels])
        cosine = dot.amax(1) / square[:, 0].sqrt().clamp(min=1e-12)
        return (1 - cosine).clamp(min=0)


def _nested(maps: list[Tensor]) -> Tensor:
    """Sum of maps of which each has half the cells of the one before, at the cells of the first."""
    total = maps[-1]
    for finer in maps[-2::-1]:
        total = finer + F.interpolate(total, scale_factor=2.0, mode="nearest")
    return total


class MergedProtoAD(nn.Module):
    """The detector as it ships: float RGB 0..255 [N, 3, 256, 256] -> the smoothed map."""

    smoothing: Tensor

    def __init__(self, model: ProtoAD, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = model.backbone.merged(dtype)
        self.nearest = Nearest(model.prototypes, model.backbone.channels, dtype)
        self.register_buffer("smoothing", as_weight(model.smoothing))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (both_axes(self.nearest(self.backbone(x))[:, None], self.smoothing)[:, 0],)


class Trainer:
    """ProtoAD as `edgead.methods` wants it; see there.

    The result is a function of images and weights alone. A run keeps no checkpoint: it takes minutes,
    and one that was interrupted starts from its first image again, also with --resume.

    Attributes:
        model: Its prototypes are missing until `fit`.
        record: What run.json says of the weight file and, after `fit`, of the clustering.
    """

    Config = ProtoADConfig
    FILES = ("backbone",)

    def __init__(self, config: ProtoADConfig, files: Mapping[str, Path], run: Path) -> None:
        self.config = config
        backbone, info = Backbone.load(files.get("backbone"), TAPS)
        self.model = ProtoAD(backbone, torch.zeros(0, sum(backbone.channels)))
        self.record: dict[str, Any] = {"weights": {"backbone": info.record()}}
        self.settings = {"backbone": info.sha256}

    @staticmethod
    def build(*, kind: str, prototypes: int) -> ProtoAD:
        """A detector of this architecture, to be filled with a run's weights."""
        backbone = Backbone(kind, TAPS[kind])
        return ProtoAD(backbone, torch.zeros(prototypes, sum(backbone.channels)))

    @torch.no_grad()
    def fit(self, session: Session) -> None:
        """Find the prototypes of the training images."""
        model = self.model.to(session.device, memory_format=torch.channels_last)
        images = len(session.images)
        session.lasts(images)
        session.begin()
        learner = PrototypeLearner(
            model.prototypes.shape[1], max_prototypes=self.config.max_prototypes, device=session.device
        )
        for index in range(images):
            # In FP32 also where the device has bfloat16: most of the time goes into clustering.
            found = patches(model.backbone(session.batch([index])))
            learner.add(found[0].flatten(1).T)
            session.record({})
        prototypes = learner.finish()
        model.prototypes = prototypes.vectors
        counts = prototypes.counts.cpu().numpy()
        self.record["clustering"] = {
            "learner": f"FINCH in blocks of {BLOCK_PATCHES} patches",
            "hierarchy": list(prototypes.hierarchy),
            "prototypes": len(counts),
            "patches_per_prototype": {
                "least": int(counts.min()),
                "median": float(np.median(counts)),
                "most": int(counts.max()),
            },
        }
