"""Distillation of a PDN teacher from a frozen backbone and natural images.

Source: Batzner et al., "EfficientAD", arXiv 2303.14535, algorithm 3: the PDN learns to predict, for
every position of a 64x64 grid, the aggregated and channel-normalised features that a pretrained
classifier has there (see `edgead.training.targets`).

One process or, started by `torchrun`, several: the same crops, the same batch, the same result.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.errors import DataError, TrainingError
from edgead.models.base import check_choice, check_learning_rate
from edgead.models.files import save_safetensors
from edgead.models.folding import IMAGENET_MEAN, IMAGENET_STD
from edgead.models.pdn import FEATURES, PDN, Size
from edgead.training.checkpoint import alone, load_checkpoint, save_checkpoint
from edgead.training.crops import Crops, crop_threads
from edgead.training.curve import Point, write_curve
from edgead.training.device import autocast, compute_dtype, keep_memory, pick_device
from edgead.training.directions import SecondMoment, directions_of
from edgead.training.group import Group, own_device, process_group
from edgead.training.imageset import ImageSet, hold_out, names_of, open_images
from edgead.training.muon import Muon
from edgead.training.targets import Source, Targets

log = logging.getLogger(__name__)

Loss = Literal["mse", "smooth-l1"]
Optimizer = Literal["muon", "adamw"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
LOSSES: tuple[str, ...] = get_args(Loss)
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
_RATES = {"muon": 0.02, "adamw": 1e-3}
PRECISIONS: tuple[str, ...] = get_args(Precision)

_CURVE_POINTS = 20
_UNUSED_STEPS = 1 << 40  # the first of the steps whose crops are not for training


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation.

    The published run is 60,000 steps of 16 with Adam at a constant 1e-4.

    Attributes:
        steps: Training steps.
        minutes: Stop after this time if the steps are not done by then; the learning rate follows
            whichever is nearer to its end.
        batch: Images per step, of all processes together.
        optimizer: "muon" learns several times as much per image; "adamw" is nearer to the published run.
        learning_rate: At its highest; None is 0.02 for Muon and 0.001 for AdamW.
        held_out: Share of the images that only measure the loss; see `imageset.hold_out`.
        side_px: The PDN's input; the backbone sees twice as many pixels of the same crop.
        crop: Smallest and largest mean side of a crop, in short sides of the image.
        whiten: Decorrelate the target channels, from 0 (only mean and variance) to 1 (entirely).
        loss: What is minimised. The reported losses are mean squared errors in any case.
        precision: Of the networks' arithmetic. "auto": bf16 where the hardware has it, else fp16 on a
            GPU and fp32 on a CPU.
        checkpoint_s: Seconds between checkpoints; what a kill loses at most.
    """

    size: Size = "s"
    steps: int = 3000
    minutes: float | None = None
    batch: int = 8
    optimizer: Optimizer = "muon"
    learning_rate: float | None = None
    weight_decay: float = 1e-5
    held_out: float = 0.05
    side_px: int = 256
    crop: tuple[float, float] = (0.55, 1.0)
    whiten: float = 0.0
    loss: Loss = "mse"
    precision: Precision = "auto"
    seed: int = 0
    checkpoint_s: float = 120.0

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        return _RATES[self.optimizer] if self.learning_rate is None else self.learning_rate

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise TrainingError(f"--steps {self.steps}, --batch {self.batch}: both must be at least 1")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise TrainingError(f"--minutes {self.minutes}: must be above 0")
        for option, value, choices in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("loss", self.loss, LOSSES),
            ("precision", self.precision, PRECISIONS),
        ):
            check_choice(option, value, choices)
        check_learning_rate(self.learning_rate)
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise TrainingError(
                f"--crop {self.crop[0]} {self.crop[1]}: expected 0 < smallest <= largest <= 1"
            )
        if not 0 <= self.whiten <= 1:
            raise TrainingError(f"--whiten {self.whiten}: expected 0 to 1")
        if self.side_px < 64 or self.side_px % 16:
            raise TrainingError(f"--side {self.side_px}: expected a multiple of 16 from 64 on")


@dataclass(frozen=True)
class DistillResult:
    """What a distillation measured; the losses are mean squared errors of targets with variance 1."""

    steps: int
    images: int
    loss: float
    held_out_loss: float
    seconds: float


def distill(
    images: Path | ImageSet,
    backbone: Path | Source,
    out: Path,
    config: DistillConfig | None = None,
    *,
    layers: tuple[str, ...] | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: Callable[[int, float, float], None] | None = None,
) -> DistillResult:
    """Train a PDN teacher and write it as FP16 safetensors, its loss curve beside it.

    Args:
        images: Folder of natural images (searched recursively, no labels) or of tar shards.
        backbone: Weight file of MobileNetV2 or a ResNet, or any network as a `Source`.
        out: The `.safetensors` file to write, which must not exist. `out` + ".checkpoint" is kept beside
            it until the end.
        layers: Taps of a weight file's network, finest first; None: those of `edgead.training.targets`.
        resume: Go on from that checkpoint when it exists.
        progress: Called with (step, fraction done, mean loss) after every step, in process 0.

    Raises:
        DataError: too few images. WeightsError: a wrong backbone file. TrainingError: a diverged run, or
            `out` is no name for a new teacher; nothing that is there is replaced.
    """
    config, out = config or DistillConfig(), Path(out)
    _check_out(out, resume=resume)
    keep_memory()
    found = open_images(images) if isinstance(images, str | Path) else images
    if len(found) < 2:
        raise DataError(
            f"{images} holds {len(found)} images;"
            " distillation needs a folder of natural images, the more the better"
        )
    chosen = own_device(pick_device(device))
    source = backbone if isinstance(backbone, Source) else Source.load(backbone, layers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with process_group(chosen) as group, _tuned_convolutions(chosen):
            if group.rank == 0:
                held.enter_context(alone(out.with_name(f".{out.name}.lock"), out))
            share = group.share(config.batch)
            session = _Session(config, chosen, source, group)
            train, held_out = hold_out(found, config.held_out, seed=config.seed)
            run = _Run(
                session,
                crops=session.crops(train, config.seed),
                held_out=session.crops(held_out, config.seed + 1),
                positions=share,
                out=out,
                settings=recipe(config, source)
                | {"images": len(found), "image_names": names_of(found), "backbone": source.name},
            )
            run.fit(resume=resume, progress=progress if group.rank == 0 else None)
            last = run.points[-1]
            result = DistillResult(
                last.step, len(found), last.loss, last.held_out_loss, round(last.seconds, 1)
            )
        if group.rank == 0:
            run.save_teacher(result)
    return result


def _check_out(out: Path, *, resume: bool) -> None:
    if out.suffix != ".safetensors":
        raise TrainingError(f"--out {out}: a teacher's file is named NAME.safetensors")
    if out.exists():
        raise TrainingError(f"{out} exists; name another file with --out")
    if _checkpoint(out).exists() and not resume:
        raise TrainingError(
            f"{_checkpoint(out)} is of an unfinished run; go on with --resume, or name another file"
            " with --out"
        )


def _checkpoint(out: Path) -> Path:
    return out.with_name(out.name + ".checkpoint")


def recipe(config: DistillConfig, source: Source) -> dict[str, Any]:
    """What a teacher's file says of how it was made; its `loss` is a number that came of it."""
    settings = asdict(config)
    settings["loss_function"] = settings.pop("loss")
    return settings | {"backbone_sha256": source.sha256, "taps": ", ".join(source.layers)}


def as_text(values: dict[str, Any]) -> dict[str, str]:
    """Values as a teacher's file has them: text as it is, all else as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}


class _Session:
    """The networks of one distillation and what a checkpoint holds of them."""

    def __init__(
        self, config: DistillConfig, device: torch.device, source: Source, group: Group
    ) -> None:
        self.config, self.device, self.group = config, device, group
        self.dtype = _dtype(device, config.precision)
        self.targets = Targets(
            source, self.dtype, device, side_px=2 * config.side_px, whiten=config.whiten
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            teacher = PDN(config.size, padding=True)
        self.teacher = teacher.to(device, memory_format=torch.channels_last)
        self.network = group.wrap(self.teacher)
        self.optimizer = self._optimizer(config)
        # FP16 ends at 65504 and at 6e-8: gradients are scaled into its range
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def _optimizer(self, config: DistillConfig) -> torch.optim.Optimizer:
        parameters, decay = self.teacher.parameters(), config.weight_decay
        if config.optimizer == "muon":
            return Muon(parameters, config.rate, weight_decay=decay)
        return torch.optim.AdamW(parameters, config.rate, weight_decay=decay, fused=True)

    def crops(self, images: ImageSet, seed: int) -> Crops:
        config = self.config
        return Crops(images, seed=seed, side_px=2 * config.side_px, scale=config.crop)

    def batches(self, crops: Crops, first: int, last: int, positions: range) -> Iterator[Tensor]:
        """Batches of crops uint8 on the host, made ahead."""
        on_gpu = self.device.type == "cuda"
        return crops.batches(first, last, positions, threads=crop_threads(self.device), pinned=on_gpu)

    def state(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "targets": self.targets.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty of a run in bf16, on a GPU that has it
            self.scaler.load_state_dict(state["scaler"])
        self.targets.restore(state["targets"])

    def inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both networks' inputs from the same crops uint8 [N, 2 side, 2 side, 3].

        Returns:
            Backbone input (RGB 0..255, 2 side) and PDN input (ImageNet-normalised, side).
        """
        x = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.float().contiguous(memory_format=torch.channels_last)
        # halving by means is the antialiased resize up to a quarter pixel of blur
        small = F.avg_pool2d(x, 2) / 255
        return x, (small - IMAGENET_MEAN.to(self.device)) / IMAGENET_STD.to(self.device)

    def step(self, step: int, fraction: float, images: Tensor) -> Tensor:
        """One training step at this fraction of the run; its mean squared error, a scalar."""
        warmup = min(1.0, max((step + 1) / 100, 10 * fraction))  # 100 steps, or a tenth of a short run
        cosine = 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
        self.optimizer.param_groups[0]["lr"] = self.config.rate * warmup * cosine
        big, small = self.inputs(images)
        target = self.targets(big)
        with autocast(self.device, self.dtype):
            predicted = self.network(small).float()
        error = F.mse_loss(predicted, target)
        loss = error if self.config.loss == "mse" else F.smooth_l1_loss(predicted, target)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return error.detach()

    @torch.no_grad()
    def error(self, images: Tensor) -> Tensor:
        """Mean squared error of a batch without training on it, a scalar."""
        big, small = self.inputs(images)
        with autocast(self.device, self.dtype):
            predicted = self.teacher(small).float()
        return F.mse_loss(predicted, self.targets(big))


@dataclass
class _Run:
    """The loop: steps, measurements in between, and the files that come of them."""

    session: _Session
    crops: Crops
    held_out: Crops
    positions: range
    out: Path
    settings: dict[str, Any]
    step: int = 0
    spent: float = 0.0
    recent: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def fit(self, *, resume: bool, progress: Callable[[int, float, float], None] | None) -> None:
        """Take all steps, or those that the checkpoint has not."""
        session, config = self.session, self.session.config
        checkpoint = _checkpoint(self.out)
        if resume and checkpoint.exists():
            self._restore(load_checkpoint(checkpoint, settings=self.settings))
        else:
            self._measure_channels()
        is_first = session.group.rank == 0
        self.start = saved = time.monotonic()
        fraction = self._agree(0.0)[1]
        batches = session.batches(self.crops, self.step, config.steps, self.positions)
        while fraction < 1:
            loss = session.step(self.step, fraction, next(batches)).item()
            self.step += 1
            before, (loss, fraction) = fraction, self._agree(loss)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the distillation loss became {loss} at step {self.step};"
                    " use a lower --learning-rate"
                )
            self.recent = [*self.recent[-99:], loss]
            if progress:
                progress(self.step, min(fraction, 1.0), sum(self.recent) / len(self.recent))
            if int(_CURVE_POINTS * fraction) > int(_CURVE_POINTS * before) or fraction >= 1:
                self._measure_held_out(write=is_first)
            if is_first and time.monotonic() - saved >= config.checkpoint_s:
                saved = time.monotonic()
                save_checkpoint(checkpoint, self._state())
        batches.close()  # type: ignore[attr-defined]

    def seconds(self) -> float:
        """Time of the run, that before an interruption included."""
        return self.spent + time.monotonic() - self.start

    def _agree(self, loss: float) -> tuple[float, float]:
        """Mean loss of all processes, and the fraction of the run that is done by process 0's clock."""
        group, config = self.session.group, self.session.config
        done = self.step / config.steps
        if config.minutes is not None:
            done = max(done, self.seconds() / (60 * config.minutes))
        if group.size == 1:
            return loss, done
        values = [loss / group.size, done if group.rank == 0 else 0.0]
        loss, done = group.sum(torch.tensor(values, dtype=torch.float64, device=self.session.device))
        return float(loss), float(done)

    def _state(self) -> dict[str, Any]:
        return self.session.state() | {
            "settings": self.settings,
            "step": self.step,
            "seconds": self.seconds(),
            "recent": self.recent,
            "points": [asdict(point) for point in self.points],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.session.restore(state)
        self.step, self.spent, self.recent = state["step"], state["seconds"], state["recent"]
        self.points = [Point(**point) for point in state["points"]]

    def _measure_channels(self) -> None:
        """Statistics of the targets over (up to 10,000) crops of training images."""
        session = self.session
        count = min(len(self.crops.images), 10_000) // session.config.batch + 1
        batches = session.batches(self.crops, _UNUSED_STEPS, _UNUSED_STEPS + count, self.positions)
        inputs = (session.inputs(images)[0] for images in batches)
        session.targets.measure(inputs, session.group.sum)

    def _measure_held_out(self, *, write: bool) -> None:
        session = self.session
        count = -(-len(self.held_out.images) // session.config.batch)
        total = torch.zeros((), dtype=torch.float64, device=session.device)
        for images in session.batches(self.held_out, 0, count, self.positions):
            total += session.error(images)
        held_out_loss = float(session.group.sum(total)) / (count * session.group.size)
        loss = sum(self.recent) / len(self.recent)
        self.points.append(Point(self.step, round(self.seconds(), 3), loss, held_out_loss))
        if write:
            write_curve(self.out, self.points, self.settings)

    def save_teacher(self, result: DistillResult) -> None:
        """Write the teacher in FP16, and its directions; settings and results become metadata."""
        metadata = {
            **self.settings,
            **asdict(result),
            "input": "RGB 0..1, ImageNet mean and std",
            "torch": torch.__version__,
        }
        tensors = {key: value.half() for key, value in self.session.teacher.state_dict().items()}
        tensors["directions"], tensors["energy"] = self._directions()
        save_safetensors(self.out, tensors, as_text(metadata))
        _checkpoint(self.out).unlink(missing_ok=True)

    @torch.no_grad()
    def _directions(self) -> tuple[Tensor, Tensor]:
        """Directions and energy of the normalised features, over (up to 512) crops, unpadded."""
        session, batch = self.session, self.session.config.batch
        session.teacher.padding = False
        count = min(len(self.crops.images), 512) // batch + 1
        first = _UNUSED_STEPS << 1
        moment, total = SecondMoment(FEATURES), torch.zeros(FEATURES, dtype=torch.float64)
        for images in session.batches(self.crops, first, first + count, range(batch)):
            with autocast(session.device, session.dtype):
                features = session.teacher(session.inputs(images)[1]).float()
            moment.add(features)
            total += features.double().mean((0, 2, 3)).cpu() / count
        covariance = moment.mean() - torch.outer(total, total)
        std = covariance.diagonal().clamp_min(1e-12).sqrt()
        return directions_of(covariance / torch.outer(std, std))


def _dtype(device: torch.device, precision: Precision) -> torch.dtype:
    if precision == "auto":
        dtype = compute_dtype(device)
        return torch.float16 if device.type == "cuda" and dtype == torch.float32 else dtype
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _tuned_convolutions(device: torch.device) -> Any:
    """On a GPU, cuDNN tries its algorithms once for every shape; a run has few of them."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)  # by default: enabled=False
