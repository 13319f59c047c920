"""STPM: student-teacher feature pyramid matching, on any frozen backbone.

Source: Wang, Han, Ding, Huang, "Student-Teacher Feature Pyramid Matching for Anomaly Detection",
BMVC 2021, arXiv 2103.04257, in the form of its official implementation (no factor 1/2 in the loss, maps
multiplied at 64x64). Published with ResNet-18; with any other backbone it is a variant.

A student of the teacher's topology learns the teacher's features of good images. Where it does not know
them, at any level, the image is anomalous.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from edgead.errors import TrainingError
from edgead.models.base import AnomalyModel, check_learning_rate, check_length
from edgead.models.remembered import Remembered
from edgead.models.taps import PDN_TAPS, Backbone

if TYPE_CHECKING:
    from edgead.training.session import Session

_STAGES = ("layer1", "layer2", "layer3")
TAPS = {
    "resnet18": _STAGES,
    "resnet50": _STAGES,
    "wide_resnet50_2": _STAGES,
    "wide_resnet101_2": _STAGES,
    "mobilenet_v2": ("blocks.2", "blocks.5", "blocks.12"),
    "pdn-s": PDN_TAPS,
    "pdn-m": PDN_TAPS,
}
"""Levels by kind of backbone: strides 4, 8, 16; of a PDN two of stride 4."""

EPOCHS = 100
BATCHES = dict.fromkeys(TAPS, 32) | dict.fromkeys(("mobilenet_v2", "pdn-s", "pdn-m"), 8)
"""Images per step by kind of backbone: with ResNets 32, as published.

With the others a step of 8 goes about as far: after 800 images of MVTec AD bottle, MobileNetV2 has image
AUROC 1.00 in steps of 8 and 0.67 in steps of 32. And a PDN-S takes 0.4 GiB of memory for each of them.
"""

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
HELD_OUT = 0.2


@dataclass(frozen=True)
class StpmConfig:
    """Settings of a training run.

    Attributes:
        steps: Batches, see `BATCHES`; None is 100 epochs, as published; with tiles, as
            many steps as without.
        minutes: Train for this long instead of for `steps`.
        learning_rate: As published. It suits MobileNetV2, too: on MVTec AD bottle the mean of the
            validation maps after 100 steps is 0.012 with it, 0.021 with 0.2, and 0.056 with 0.8.
        false_reject: Target rate of good parts rejected, for the threshold.
        checkpoint_s: Seconds between checkpoints; what a kill loses at most.
        teacher_cache_mib: Memory for teacher features of training images: 0.3 MiB each with MobileNetV2,
            0.9 with ResNet-18, 5 with a PDN. Those of further images are computed again in every epoch.
    """

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 0.4
    seed: int = 42
    false_reject: float = 0.01
    checkpoint_s: float = 60.0
    teacher_cache_mib: int = 768

    def __post_init__(self) -> None:
        check_length(self.steps, self.minutes)
        check_learning_rate(self.learning_rate)

    @property
    def method(self) -> str:
        return "stpm"


class ConvNorm(nn.Sequential):
    """A convolution without bias, and its batch norm, float32 in any case."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self
        return norm(conv(x).float())


class Student(Backbone):
    """A network of the teacher's topology, to be trained: a batch norm follows each convolution.

    Also in a PDN, whose teacher has none: without them its student learns next to nothing at rates of
    0.03 to 0.4, with them it learns at 0.4 as quickly as the others.
    """

    def __init__(self, kind: str, taps: Sequence[str]) -> None:
        super().__init__(kind, taps)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        _add_norms(self.network)
        self.requires_grad_(True)

    def train(self, mode: bool = True) -> Student:
        return nn.Module.train(self, mode)

    def folded(self) -> Student:
        """A copy in evaluation mode whose batch norms are in its convolutions."""
        twin = copy.deepcopy(self).eval()
        _fold_norms(twin.network)
        return twin


def _add_norms(network: nn.Module) -> None:
    for name, part in network.named_children():
        if isinstance(part, nn.Conv2d):
            part.bias = None
            setattr(network, name, ConvNorm(part, nn.BatchNorm2d(part.out_channels)))
        else:
            _add_norms(part)


def _fold_norms(network: nn.Module) -> None:
    for name, part in network.named_children():
        if isinstance(part, ConvNorm):
            setattr(network, name, fuse_conv_bn_eval(part[0].double(), part[1].double()).float())
        else:
            _fold_norms(part)


def unit(features: Tensor) -> Tensor:
    """Features [N, C, h, w] of length 1, float32.

    `F.normalize` would do, but it expands the norms to a size that the graph takes from its uint8 input.
    """
    features = features.float()
    return features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(1e-12)


def level_distances(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """Squared distances of the features' directions.

    Args:
        teacher, student: Feature maps [N, C, h, w] of the levels, any float type.

    Returns:
        float32 [N, h, w] for each level, 0..4: 2 - 2 cos, without the cancellation of that form.
    """
    # float32 from here on: the product of three small distances underflows float16
    differences = (unit(t) - unit(s) for t, s in zip(teacher, student, strict=True))
    return [(d * d).sum(1) for d in differences]


class STPM(AnomalyModel):
    """Teacher and student of one detector.

    Args:
        teacher: With the levels of `TAPS`.
    """

    input_px = (256, 256)
    map_cells = (64, 64)
    raw_names = ("product",)
    meaning = (
        "product over the levels of the squared distance between normalised teacher and student features"
        " of STPM (arXiv 2103.04257; published with ResNet-18, see model.kind)"
    )

    def __init__(self, teacher: Backbone) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = Student(teacher.kind, teacher.taps)

    def architecture(self) -> dict[str, Any]:
        return {"kind": self.teacher.kind}

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Raw map float32 [N, 64, 64] of images RGB 0..255, uint8 or float [N, 3, 256, 256].

        It is the published map before its last, bilinear, enlarging to 256x256, which never exceeds the
        cells and reaches them in the limit; the runtime enlarges maps to the camera's size.
        """
        return (self.product(level_distances(self.teacher(images), self.student(images))),)

    def product(self, distances: Sequence[Tensor]) -> Tensor:
        """The levels' maps [N, h, w], each enlarged, multiplied: [N, 64, 64]."""
        # by whole factors, which export as constants, where sizes would be computed in the graph
        factors = [self.map_cells[0] // level.shape[1] for level in distances]
        enlarged = [
            F.interpolate(level[:, None], scale_factor=factor, mode="bilinear")[:, 0]
            if factor > 1
            else level
            for level, factor in zip(distances, factors, strict=True)
        ]
        return functools.reduce(torch.mul, enlarged)

    def merged(self, dtype: torch.dtype) -> MergedSTPM:
        return MergedSTPM(self, dtype)


class MergedSTPM(nn.Module):
    """Both networks as they ship: float RGB 0..255 [N, 3, 256, 256] -> the raw map.

    Batch norms and the input's scale are in the convolutions, the tail is float32. Teacher and student
    stay two branches: with their first convolutions joined, or all as the two groups of shared ones,
    ONNX Runtime takes 7 to 17 % longer (one CPU core, FP32; ResNet-18, MobileNetV2, PDN-S).
    """

    def __init__(self, model: STPM, dtype: torch.dtype) -> None:
        super().__init__()
        self.teacher = model.teacher.merged(dtype)
        self.student = model.student.folded().merged(dtype)
        self._product = model.product

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self._product(level_distances(self.teacher(x), self.student(x))),)


class Trainer:
    """STPM as `edgead.methods` wants it; see there."""

    Config = StpmConfig
    FILES = ("backbone",)

    def __init__(self, config: StpmConfig, files: Mapping[str, Path], run: Path) -> None:
        self.config = config
        teacher, info = Backbone.load(files.get("backbone"), TAPS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = STPM(teacher)
        self.record: dict[str, Any] = {"weights": {"backbone": info.record()}}
        self.settings = {"backbone": info.sha256}

    @staticmethod
    def build(*, kind: str) -> STPM:
        """Networks of this architecture, to be filled with a run's weights."""
        return STPM(Backbone(kind, TAPS[kind]))

    def fit(self, session: Session) -> None:
        """Train the student, and keep it as it was after the epoch with the lowest validation maps."""
        model, config, device = self.model, self.config, session.device
        apart = split(session.whole_images, config.seed)
        learned, held_out = map(session.views, apart)
        shown = session.shares(learned)
        size = BATCHES[model.teacher.kind]
        per_epoch = math.ceil(len(shown) / size)
        session.lasts_epochs(EPOCHS, per_epoch)
        model.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.student.parameters(),
            config.learning_rate,
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
        )
        best: dict[str, Any] = {}
        if session.before:
            model.student.load_state_dict(session.before["student"])
            optimizer.load_state_dict(session.before["optimizer"])
            best = session.before["best"]

        def state() -> dict[str, Any]:
            student = model.student.state_dict()
            return {"student": student, "optimizer": optimizer.state_dict(), "best": best}

        targets = directions(model.teacher, session, config.teacher_cache_mib)
        session.begin()
        while session.fraction_done() < 1:
            epoch, batch = divmod(session.step, per_epoch)
            order = np.random.default_rng([config.seed, epoch]).permutation(shown)
            chosen = order[batch * size : (batch + 1) * size]
            model.train()
            with session.autocast():
                features = model.student(session.batch(chosen))
            losses = [level.mean() for level in level_distances(targets(chosen), features)]
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()
            optimizer.step()
            session.record(dict(zip(model.teacher.taps, torch.stack(losses).tolist(), strict=True)))
            if session.step % per_epoch == 0:
                best = better(best, model, targets, held_out, session)
            session.keep(state)
        if session.step % per_epoch or not best:  # the run ended within an epoch
            best = better(best, model, targets, held_out, session)
        model.student.load_state_dict(best["student"])
        self.record["fit"] = {
            "epochs": round(session.step / per_epoch, 2),
            "chosen_step": best["step"],
            "validation_map_mean": best["mean"],
            "images": {"learned": len(apart[0]), "validation": len(apart[1])},
        }


def directions(teacher: Backbone, session: Session, cache_mib: int) -> Remembered:
    """The teacher's features of the training images, of length 1."""

    def levels(index: int) -> list[Tensor]:
        with session.autocast():
            found = teacher(session.batch([index]))
        return [unit(level) for level in found]

    return Remembered(levels, len(session.images), session.device, cache_mib)


@torch.no_grad()
def better(
    best: dict[str, Any], model: STPM, targets: Remembered, held_out: np.ndarray, session: Session
) -> dict[str, Any]:
    """The student as it is now, if the mean of its validation maps is the lowest so far, else `best`."""
    model.eval()
    total = 0.0
    size = BATCHES[model.teacher.kind]
    for first in range(0, len(held_out), size):
        chosen = held_out[first : first + size]
        with session.autocast():
            features = model.student(session.batch(chosen))
        maps = model.product(level_distances(targets(chosen), features))
        total += float(maps.double().mean(dim=(1, 2)).sum())
    mean = total / len(held_out)
    if best and (math.isnan(mean) or best["mean"] <= mean):
        return best
    return {"mean": mean, "step": session.step, "student": copy.deepcopy(model.student.state_dict())}


def split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images that are learned and of those that pick the epoch, one in five.

    Raises:
        TrainingError: there is only one image.
    """
    if count < 2:
        raise TrainingError(
            f"stpm holds one in five training images back to pick the epoch, and there is only {count};"
            " add good images"
        )
    order = np.random.default_rng(seed).permutation(count)
    held_out = math.ceil(HELD_OUT * count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
