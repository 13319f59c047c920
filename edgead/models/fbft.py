"""FBFT: forward-backward feature transfer between two layers of a frozen network; also named L2BT.

Source: Costanzino, Zama Ramirez, Lisanti, Di Stefano, "Learning to Be a Transformer to Pinpoint
Anomalies", IEEE Access 13, 2025, arXiv 2407.04092, with the settings of its public code. Published with
DINOv2 ViT-B/14 with registers; with ViT-S/14, and with any convolutional backbone, it is a variant.

Two small networks learn from good images to tell the later features of every patch from its earlier ones
and the other way round. A patch on which both fail is anomalous.

What differs from the publication: the map of a bundle has one size, so enlarging, blur and score happen
at the size of the networks' input instead of the image's own, and the blur is wider on the object where
the image was larger. Frames are resized to that square, as for every method here, instead of padded to
a square before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.errors import TrainingError
from edgead.models import vit
from edgead.models.base import AnomalyModel, check_learning_rate, check_length
from edgead.models.files import WeightsInfo, read_state_dict
from edgead.models.folding import set_precision
from edgead.models.maps import as_weight, bilinear_matrix, both_axes
from edgead.models.remembered import Remembered
from edgead.models.resnet import NAMES
from edgead.models.taps import PDN_TAPS, Backbone, ViTBackbone

if TYPE_CHECKING:
    from edgead.training.session import Session

TAPS: dict[str, tuple[str, ...]] = {
    "pdn-s": PDN_TAPS,
    "mobilenet_v2": ("blocks.5", "blocks.12"),
    **dict.fromkeys(NAMES.values(), ("layer2", "layer3")),
}
"""Earlier and later layer by kind of convolutional backbone; those of a ViT are `vit.TAPS`.

MobileNetV2 on MVTec AD bottle, 50 epochs: AU-PRO@30 0.95 with these, and 0.90 from "blocks.9", of the
later layer's stride. The last layer of a PDN-M is its trunk times a matrix, from which both directions
are known without any image: it is left out.
"""

VIT_PX, CONV_PX = 518, 256
CONV_STEP_PX = 16
EPOCHS, BATCH = 50, 4
VIT_RATE, CONV_RATE = 1e-4, 3e-3
MOST_VALUES = 3840
"""Of the largest values, TensorRT's TopK gives no more."""
BOXES = (5, 5, 5, 5, 5, 7, 7, 7)
"""Sides of the boxes whose chain is the published blur: variance 22 px^2, sigma 4.69 px."""

_EPS = 1e-6

BlurBorder = Literal["renormalise", "zero"]


@dataclass(frozen=True)
class FbftConfig:
    """Settings of a training run.

    Attributes:
        steps: Batches of 4 images; None is 50 epochs, as published; with tiles, as
            many steps as without.
        minutes: Train for this long instead of for `steps`.
        learning_rate: None is `VIT_RATE`, as published, or `CONV_RATE`.
        image_px: Side of the square input, a multiple of 14 for a ViT and of 16 for the others; None is
            `VIT_PX` or `CONV_PX`. The map has the same size.
        blur_border: See `blur_matrix`.
        false_reject: Target rate of good parts rejected, for the threshold.
        checkpoint_s: Seconds between checkpoints; what a kill loses at most.
        teacher_cache_mib: Memory for features of training images: 4.0 MiB each with ViT-B at 518 px, 2.0
            with ViT-S, 5.0 with PDN-S at 256 px, 0.1 with MobileNetV2. Those of further images are
            computed again in every epoch.
    """

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    image_px: int | None = None
    blur_border: BlurBorder = "renormalise"
    seed: int = 42
    false_reject: float = 0.01
    checkpoint_s: float = 60.0
    teacher_cache_mib: int = 1024

    method = "fbft"  # without a type it is no setting

    def __post_init__(self) -> None:
        check_length(self.steps, self.minutes)
        check_learning_rate(self.learning_rate)


class Transfer(nn.Module):
    """The two networks between the layers, and the map that they make.

    Args:
        channels: Of the earlier and of the later layer.
        cells: Of their maps along a side; the later ones are enlarged bilinearly if they are fewer.
        image_px: Side of the map.
    """

    finer: Tensor | None
    blur: Tensor

    def __init__(
        self, channels: Sequence[int], cells: Sequence[int], image_px: int, border: BlurBorder
    ) -> None:
        super().__init__()
        (earlier, later), (fine, coarse) = channels, cells
        self.forward_net, self.backward_net = mlp(earlier, later), mlp(later, earlier)
        finer = as_weight(bilinear_matrix(coarse, fine)) if coarse != fine else None
        self.register_buffer("finer", finer, persistent=False)
        blur = as_weight(blur_matrix(fine, image_px, border))
        self.register_buffer("blur", blur, persistent=False)

    def on_one_grid(self, earlier: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """The features [N, C, cells, cells] of both layers, the later ones enlarged."""
        return earlier, later if self.finer is None else both_axes(later, self.finer)

    def forward(self, earlier: Tensor, later: Tensor) -> Tensor:
        """Anomaly map float32 [N, px, px], 0..4, of both layers' features, any float type."""
        earlier, later = self.on_one_grid(earlier, later)
        # float32 from here on: the differences and their product are too small for float16
        wrong_earlier = distance(self.backward_net(later).float(), earlier.float())
        wrong_later = distance(self.forward_net(earlier).float(), later.float())
        return both_axes(wrong_earlier * wrong_later, self.blur)[:, 0]


class FBFT(AnomalyModel):
    """A frozen network and the transfer between two of its layers.

    Args:
        backbone: With the earlier and the later layer as its taps.
        image_px: Side of the square input, and of the map.

    Raises:
        TrainingError: a side that the backbone cannot take, or whose score needs more than 3840 values.
    """

    raw_names = ("transfer",)
    meaning = (
        "product of the forward and the backward distance between predicted and real unit features of"
        " FBFT (arXiv 2407.04092; published with DINOv2 ViT-B/14 with registers, see model.kind),"
        " enlarged to the input's size and blurred; the score is the mean of its largest 0.1 %"
    )

    def __init__(
        self, backbone: Backbone | ViTBackbone, image_px: int, blur_border: BlurBorder = "renormalise"
    ) -> None:
        super().__init__()
        if blur_border not in ("renormalise", "zero"):
            raise ValueError(f"blur border {blur_border!r}: expected renormalise or zero")
        _check_side(backbone.kind, image_px)
        self.input_px = self.map_cells = (image_px, image_px)
        self.blur_border = blur_border
        self.backbone = backbone
        self.transfer = Transfer(*_shapes(backbone, image_px), image_px, blur_border)

    def architecture(self) -> dict[str, Any]:
        return {
            "kind": self.backbone.kind,
            "taps": list(self.backbone.taps),
            "image_px": self.input_px[0],
            "blur_border": self.blur_border,
        }

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Raw map float32 [N, px, px], 0..4, of images RGB 0..255, uint8 or float [N, 3, px, px]."""
        earlier, later = self.backbone(images)
        return (self.transfer(earlier, later),)

    def merged(self, dtype: torch.dtype) -> MergedFBFT:
        return MergedFBFT(self, dtype)

    def score(self, maps: Tensor) -> Tensor:
        """Image scores [N] of calibrated maps: the mean of the largest 0.1 % of their values."""
        return maps.flatten(1).topk(top_values(*maps.shape[1:])).values.mean(1)


class MergedFBFT(nn.Module):
    """The networks as they ship: float RGB 0..255 [N, 3, px, px] -> the raw map.

    Weights and products of backbone and transfer are in `dtype`, the distances and what follows are
    float32.
    """

    def __init__(self, model: FBFT, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.backbone = model.backbone.merged(dtype)
        self.transfer = copy.deepcopy(model.transfer)
        set_precision(self.transfer, dtype)
        if self.transfer.finer is not None:
            self.transfer.finer = self.transfer.finer.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        earlier, later = (level.to(self.dtype) for level in self.backbone(x))
        return (self.transfer(earlier, later),)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Three layers with GELU between them for every cell of a map.

    They are convolutions of one cell and not `nn.Linear`, because TensorRT for RTX has no float32
    products for Turing. PyTorch gives both the same initial weights.
    """
    hidden = (inputs + outputs) // 2
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1), nn.GELU(),
        nn.Conv2d(hidden, hidden, 1), nn.GELU(),
        nn.Conv2d(hidden, outputs, 1),
    )  # fmt: skip


def transfer_loss(predicted: Tensor, features: Tensor) -> Tensor:
    """One minus the mean cosine of predicted and real features [N, C, h, w], over all cells."""
    return 1 - F.cosine_similarity(predicted.float(), features, dim=1, eps=_EPS).mean()


def distance(predicted: Tensor, features: Tensor) -> Tensor:
    """Distance of the directions, float32 [N, 1, h, w] in 0..2, of features float32 [N, C, h, w].

    It is sqrt(2 - 2 cos), in a form that keeps its digits near 0.
    """
    # as F.normalize, which asks the exported graph for the shape of its input
    unit, expected = (x / x.norm(dim=1, keepdim=True).clamp_min(_EPS) for x in (predicted, features))
    return (unit - expected).norm(dim=1, keepdim=True)


def blur_matrix(cells: int, px: int, border: BlurBorder) -> Tensor:
    """Matrix M, float64 [px, cells]: M X M^T is a map X enlarged bilinearly, then blurred.

    Args:
        border: Beyond the edge the published chain sees zeros ("zero"), which takes 72 % from a corner
            and hides what is there. "renormalise" divides by what it makes of a map of ones.
    """
    columns = bilinear_matrix(cells, px).T[None]
    for side in BOXES:
        columns = F.avg_pool1d(columns, side, 1, side // 2)
    matrix = columns[0].T
    return matrix if border == "zero" else matrix / matrix.sum(1, keepdim=True)


def top_values(height: int, width: int) -> int:
    """How many values of a map the score is the mean of.

    Raises:
        TrainingError: more than TensorRT can find.
    """
    count = max(1, height * width // 1000)
    if count > MOST_VALUES:
        raise TrainingError(
            f"a map of {height}x{width} px: the score needs its {count} largest values, and TensorRT"
            f" finds at most {MOST_VALUES}; inspect at {math.isqrt(1000 * (MOST_VALUES + 1) - 1)} px"
            " or less"
        )
    return count


def _check_side(kind: str, image_px: int) -> None:
    below, rest = divmod(image_px, CONV_STEP_PX)
    if not kind.startswith("vit-") and (rest or below < 2):
        nearest = sorted({CONV_STEP_PX * max(n, 2) for n in (below, below + 1)})
        raise TrainingError(
            f"images of {image_px} px side do not fit the strides of {kind};"
            f" take {' or '.join(map(str, nearest))}"
        )
    top_values(image_px, image_px)


def _shapes(backbone: Backbone | ViTBackbone, image_px: int) -> tuple[list[int], list[int]]:
    """Channels and cells along a side, of the earlier and of the later layer."""
    if isinstance(backbone, ViTBackbone):
        return [backbone.network.config.dim] * 2, [image_px // vit.PATCH_PX] * 2
    with torch.no_grad():
        levels = backbone(torch.zeros(1, 3, image_px, image_px))
    return [level.shape[1] for level in levels], [level.shape[2] for level in levels]


def load(path: Path | None, config: FbftConfig) -> tuple[FBFT, WeightsInfo]:
    """A model on the backbone of a weight file; without one, on the PDN-S teacher of the package.

    Raises:
        WeightsError: the file holds no network, or one of a kind that has no taps here.
        TrainingError: the side of the images does not fit it.
    """
    backbone: Backbone | ViTBackbone
    if path is not None and "pos_embed" in read_state_dict(path)[0]:
        network, info = vit.load_vit(path)
        image_px = VIT_PX if config.image_px is None else config.image_px
        backbone = ViTBackbone(network, vit.TAPS, image_px)
    else:
        backbone, info = Backbone.load(path, TAPS)
        image_px = CONV_PX if config.image_px is None else config.image_px
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return FBFT(backbone, image_px, config.blur_border), info


class Trainer:
    """FBFT as `edgead.methods` wants it; see there."""

    Config = FbftConfig
    FILES = ("backbone",)

    def __init__(self, config: FbftConfig, files: Mapping[str, Path], run: Path) -> None:
        self.config = config
        self.model, info = load(files.get("backbone"), config)
        self.record: dict[str, Any] = {"weights": {"backbone": info.record()}}
        self.settings = {"backbone": info.sha256}

    @staticmethod
    def build(*, kind: str, taps: Sequence[Any], image_px: int, blur_border: BlurBorder) -> FBFT:
        """Networks of this architecture, to be filled with a run's weights."""
        backbone: Backbone | ViTBackbone
        if kind.startswith("vit-"):
            backbone = ViTBackbone(vit.ViT(vit.CONFIGS[kind[4:]]), taps, image_px)
        else:
            backbone = Backbone(kind, taps)
        return FBFT(backbone, image_px, blur_border)

    def fit(self, session: Session) -> None:
        """Train both directions."""
        config, transfer = self.config, self.model.transfer
        count = len(session.images)
        learned = session.shares(np.arange(count))
        per_epoch = math.ceil(len(learned) / BATCH)
        session.lasts_epochs(EPOCHS, per_epoch)
        default = VIT_RATE if isinstance(self.model.backbone, ViTBackbone) else CONV_RATE
        rate = config.learning_rate or default
        self.model.to(session.device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(transfer.parameters(), rate, fused=True)
        if session.before:
            transfer.load_state_dict(session.before["transfer"])
            optimizer.load_state_dict(session.before["optimizer"])

        def state() -> dict[str, Any]:
            return {"transfer": transfer.state_dict(), "optimizer": optimizer.state_dict()}

        def levels(index: int) -> list[Tensor]:
            return self.model.backbone(session.batch([index]))  # float32, as it will be exported

        features = Remembered(levels, count, session.device, config.teacher_cache_mib)
        session.begin()
        while session.fraction_done() < 1:
            epoch, batch = divmod(session.step, per_epoch)
            order = np.random.default_rng([config.seed, epoch]).permutation(learned)
            earlier, later = transfer.on_one_grid(*features(order[batch * BATCH : (batch + 1) * BATCH]))
            with session.autocast():
                predicted = transfer.backward_net(later), transfer.forward_net(earlier)
            losses = [transfer_loss(*pair) for pair in zip(predicted, (earlier, later), strict=True)]
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()
            optimizer.step()
            names = ("backward", "forward")
            session.record(dict(zip(names, torch.stack(losses).tolist(), strict=True)))
            session.keep(state)
        self.record["fit"] = {"learning_rate": rate, "epochs": round(session.step / per_epoch, 2)}
