"""Distillation of a PDN teacher from a frozen backbone and a folder of natural images.

Source: Batzner et al., "EfficientAD", arXiv 2303.14535, algorithm 3: the PDN learns to predict, for
every position of a 64x64 grid, the aggregated and channel-normalised features that a pretrained
classifier has there. The aggregation is PatchCore's (Roth et al., arXiv 2106.08265): 3x3 neighbourhoods
of two levels, each averaged down to 1024 values, joined and averaged down to 384.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.errors import DataError, TrainingError
from edgead.image import list_images, read_image
from edgead.models.efficientad import IMAGENET_MEAN, IMAGENET_STD
from edgead.models.files import load_mobilenet, save_safetensors
from edgead.models.pdn import FEATURES, PDN, Size
from edgead.training.checkpoint import load_checkpoint, save_checkpoint
from edgead.training.device import autocast, compute_dtype, keep_memory, pick_device

log = logging.getLogger(__name__)

TAPS = ("blocks.5.depthwise", "blocks.12.depthwise")
"""Feature maps of MobileNetV2 at strides 8 (192 channels) and 16 (576 channels), after ReLU6."""


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation.

    Steps of batch 8 at 1e-3 suit some thousand steps; the published run is 60,000 of 16 at 1e-4.
    """

    size: Size = "s"
    steps: int = 3000
    batch: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    held_out: float = 0.05
    seed: int = 0
    checkpoint_s: float = 120.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise TrainingError(f"--steps {self.steps}, --batch {self.batch}: both must be at least 1")


@dataclass(frozen=True)
class DistillResult:
    """What a distillation measured; the losses are mean squared errors of targets with variance 1."""

    steps: int
    images: int
    loss: float
    held_out_loss: float
    seconds: float


def pooling_matrix(n: int, m: int) -> Tensor:
    """Matrix [m, n] of `adaptive_avg_pool1d` from n values to m."""
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for j in range(m):
        start, end = j * n // m, -(-(j + 1) * n // m)
        matrix[j, start:end] = 1 / (end - start)
    return matrix


def aggregation_kernel(channels: int, level: int) -> Tensor:
    """3x3 kernels that do PatchCore's aggregation of one of two levels in one convolution.

    Output channels 0..191 of the 384 come from level 0 alone and 192..383 from level 1 alone, because
    pooling the 2 x 1024 joined values to 384 never mixes the two halves.

    Returns:
        float32 [192, channels, 3, 3].
    """
    half = FEATURES // 2
    rows = slice(half * level, half * (level + 1))
    joined = pooling_matrix(2048, FEATURES)[rows, 1024 * level : 1024 * (level + 1)]
    return (joined @ pooling_matrix(9 * channels, 1024)).reshape(half, channels, 3, 3).float()


class Targets(nn.Module):
    """Frozen backbone and aggregation.

    RGB 0..255 images [N, 3, 512, 512] -> target features [N, 384, 64, 64].

    The networks run in `dtype`, one image at a time: its maps then stay in the CPU's cache, and on a GPU
    an image of 512 px is work enough.
    """

    def __init__(self, backbone: Path, dtype: torch.dtype) -> None:
        super().__init__()
        network, self.info = load_mobilenet(backbone)
        self.backbone = network.to(dtype=dtype, memory_format=torch.channels_last)
        self.register_buffer("fine", aggregation_kernel(192, 0).to(dtype))
        self.register_buffer("coarse", aggregation_kernel(576, 1).to(dtype))
        self.register_buffer("mean", torch.zeros(FEATURES, 1, 1))
        self.register_buffer("std", torch.ones(FEATURES, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._one(image) for image in x.split(1)])

    def _one(self, x: Tensor) -> Tensor:
        taps = self.backbone.taps((x / 127.5 - 1).to(self.fine.dtype), TAPS)
        fine = F.conv2d(taps[TAPS[0]], self.fine, padding=1).float()
        coarse = F.conv2d(taps[TAPS[1]], self.coarse, padding=1).float()
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return (torch.cat([fine, coarse], 1) - self.mean) / self.std


class Crops:
    """Random crops of a folder's images; what a (step, position) gives depends on the seed alone."""

    def __init__(self, paths: list[Path], *, seed: int) -> None:
        self.paths, self.seed = paths, seed

    def __call__(self, step: int, position: int) -> np.ndarray:
        """One crop, uint8 [512, 512, 3]; a damaged image is passed over with a warning."""
        rng = np.random.default_rng([self.seed, step, position])
        for _ in range(20):
            path = self.paths[rng.integers(len(self.paths))]
            try:
                return _augment(read_image(path), rng)
            except DataError as error:
                log.warning("passed over: %s", error)
        raise DataError(
            f"20 images in a row cannot be read, the last one {path}; check the image folder"
        )

    def batches(self, first: int, last: int, batch: int) -> Iterator[Tensor]:
        """Batches uint8 [batch, 512, 512, 3] of the steps first .. last - 1.

        They are made two ahead in the background.
        """

        def make(step: int) -> Tensor:
            return torch.from_numpy(np.stack([self(step, position) for position in range(batch)]))

        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(make, step) for step in range(first, min(first + 2, last))]
            for step in range(first, last):
                images = waiting.pop(0).result()
                if step + 2 < last:
                    waiting.append(pool.submit(make, step + 2))
                yield images


def _augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    scale, aspect = rng.uniform(0.55, 1.0), np.exp(rng.uniform(-0.2, 0.2))
    side = scale * min(height, width)
    h, w = (int(np.clip(side * f, 16, limit)) for f, limit in ((aspect, height), (1 / aspect, width)))
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    crop = image[top : top + h, left : left + w]
    crop = cv2.resize(crop, (512, 512), interpolation=cv2.INTER_LINEAR if h < 512 else cv2.INTER_AREA)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if rng.random() < 0.15:
        grey = cv2.cvtColor(np.ascontiguousarray(crop), cv2.COLOR_RGB2GRAY)
        crop = np.repeat(grey[..., None], 3, axis=2)
    if rng.random() < 0.5:
        crop = np.clip(crop * rng.uniform(0.6, 1.4), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(crop)


def _inputs(images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both networks' inputs from the same crops.

    Returns:
        Backbone input (RGB 0..255, 512 px) and PDN input (ImageNet-normalised, 256 px).
    """
    x = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    x = x.float().contiguous(memory_format=torch.channels_last)
    # halving by means is the antialiased resize up to a quarter pixel of blur
    small = F.avg_pool2d(x, 2) / 255
    return x, (small - IMAGENET_MEAN.to(device)) / IMAGENET_STD.to(device)


def _measure_channels(
    targets: Targets, crops: Crops, config: DistillConfig, device: torch.device
) -> None:
    """Set mean and standard deviation of every target channel over (up to 10,000) training images."""
    count = min(len(crops.paths), 10_000) // config.batch + 1
    total = squares = torch.zeros((), dtype=torch.float64)
    n = 0
    first = 1 << 40  # steps that training never uses
    for images in crops.batches(first, first + count, config.batch):
        with torch.inference_mode():
            features = targets(_inputs(images, device)[0]).double()
        total = total + features.sum(dim=(0, 2, 3)).cpu()
        squares = squares + features.square().sum(dim=(0, 2, 3)).cpu()
        n += features.shape[0] * features.shape[2] * features.shape[3]
    mean = total / n
    variance = squares / n - mean.square()  # FP64 sums of values of order 1: no cancellation to fear
    targets.mean.copy_(mean.view(-1, 1, 1))
    targets.std.copy_(variance.clamp_min(1e-12).sqrt().view(-1, 1, 1))


def _held_out_loss(
    teacher: PDN, targets: Targets, crops: Crops, config: DistillConfig, device: torch.device
) -> float:
    losses = []
    for images in crops.batches(0, -(-len(crops.paths) // config.batch), config.batch):
        big, small = _inputs(images, device)
        with torch.inference_mode():
            with autocast(device):
                predicted = teacher(small).float()
            losses.append(F.mse_loss(predicted, targets(big)).item())
    return float(np.mean(losses))


@dataclass(frozen=True)
class _Session:
    """The networks of one distillation and the optimizer, which a checkpoint holds."""

    config: DistillConfig
    device: torch.device
    targets: Targets
    teacher: PDN
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.targets.mean,
            "std": self.targets.std,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.targets.mean.copy_(state["mean"])
        self.targets.std.copy_(state["std"])

    def step(self, step: int, images: Tensor) -> float:
        """One training step on crops uint8 [N, 512, 512, 3]; returns its loss."""
        warmup = min(1.0, (step + 1) / 100)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * warmup * cosine
        big, small = _inputs(images, self.device)
        with torch.no_grad():
            target = self.targets(big)
        with autocast(self.device):
            loss = F.mse_loss(self.teacher(small).float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.item())


def distill(
    images: Path,
    backbone: Path,
    out: Path,
    config: DistillConfig | None = None,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> DistillResult:
    """Train a PDN teacher and write it as FP16 safetensors.

    Args:
        images: Folder of natural images, searched recursively; no labels are needed.
        backbone: MobileNetV2 weight file (see `edgead.models.mobilenet`).
        out: The `.safetensors` file to write. `out` + ".checkpoint" is kept beside it until the end.
        resume: Go on from that checkpoint when it exists.
        progress: Called with (step, steps, loss) after every step.

    Raises:
        DataError: too few images. WeightsError: a wrong backbone file. TrainingError: a diverged run.
    """
    config = config or DistillConfig()
    keep_memory()
    chosen = pick_device(device)
    paths = list_images(Path(images))
    if len(paths) < 2:
        raise DataError(
            f"{images} holds {len(paths)} images;"
            " distillation needs a folder of natural images, the more the better"
        )
    order = np.random.default_rng(config.seed).permutation(len(paths))
    held = max(1, round(config.held_out * len(paths)))
    held_out = Crops([paths[i] for i in sorted(order[:held])], seed=config.seed + 1)
    crops = Crops([paths[i] for i in sorted(order[held:])], seed=config.seed)

    session = _open_session(Path(backbone), config, chosen)
    targets, teacher = session.targets, session.teacher
    checkpoint = out.with_name(out.name + ".checkpoint")
    settings = {**asdict(config), "images": len(paths), "backbone": targets.info.sha256}
    loss, seconds = _fit(session, crops, checkpoint, settings, resume=resume, progress=progress)
    held_out_loss = _held_out_loss(teacher.eval(), targets, held_out, config, chosen)
    result = DistillResult(config.steps, len(paths), loss, held_out_loss, round(seconds, 1))
    _save_teacher(out, session, result)
    checkpoint.unlink(missing_ok=True)
    return result


def _open_session(backbone: Path, config: DistillConfig, device: torch.device) -> _Session:
    targets = Targets(backbone, compute_dtype(device)).to(device).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        teacher = PDN(config.size, padding=True)
    teacher = teacher.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        teacher.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    return _Session(config, device, targets, teacher, optimizer)


def _fit(
    session: _Session,
    crops: Crops,
    checkpoint: Path,
    settings: dict[str, Any],
    *,
    resume: bool,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[float, float]:
    """Take all steps, or those that the checkpoint has not; mean of the last 100 losses, and seconds."""
    config = session.config
    first, spent = 0, 0.0
    if resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, settings=settings)
        session.restore(state)
        first, spent = state["step"], state["seconds"]
    else:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        _measure_channels(session.targets, crops, config, session.device)

    start = saved = time.monotonic()
    recent: list[float] = []
    for step, images in enumerate(crops.batches(first, config.steps, config.batch), start=first):
        recent = [*recent[-99:], session.step(step, images)]
        if not np.isfinite(recent[-1]):
            raise TrainingError(
                f"the distillation loss became {recent[-1]} at step {step}; use a lower --learning-rate"
            )
        if progress:
            progress(step + 1, config.steps, float(np.mean(recent)))
        if time.monotonic() - saved >= config.checkpoint_s:
            saved = time.monotonic()
            done = {"step": step + 1, "seconds": spent + saved - start, "settings": settings}
            save_checkpoint(checkpoint, session.state() | done)
    return float(np.mean(recent)), spent + time.monotonic() - start


def _save_teacher(out: Path, session: _Session, result: DistillResult) -> None:
    """Write the teacher in FP16; settings and results become the file's metadata."""
    metadata = {
        **asdict(session.config),
        **asdict(result),
        "backbone": session.targets.info.name,
        "backbone_sha256": session.targets.info.sha256,
        "taps": ", ".join(TAPS),
        "input": "RGB 0..1, ImageNet mean and std",
        "torch": torch.__version__,
    }
    half = {key: value.half() for key, value in session.teacher.state_dict().items()}
    save_safetensors(
        out,
        half,
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()},
    )
