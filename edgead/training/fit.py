"""Training of EfficientAD: student and autoencoder against the frozen teacher.

Source: Batzner et al., "EfficientAD", arXiv 2303.14535, algorithm 1, in the form of the public
reproduction of its figures. One step sees one training image, a colour-jittered copy of it for the
autoencoder, and one natural image for the penalty.

Every random choice is a function of (seed, step) alone, so a resumed run goes on with exactly the
choices that an uninterrupted one would have made.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.errors import TrainingError
from edgead.files import write_text
from edgead.models.efficientad import Border, EfficientAD, normalise
from edgead.models.pdn import FEATURES, PDN, Size
from edgead.training.checkpoint import load_checkpoint, save_checkpoint
from edgead.training.device import autocast, keep_memory
from edgead.training.directions import SecondMoment, target_rotation, with_stored
from edgead.training.images import Images, PenaltyImages, jitter
from edgead.training.run import CHECKPOINT_FILE, LOSSES_FILE

NATURAL_IMAGES = 32
"""Penalty images that principal directions are taken from: 100,000 feature vectors."""


PUBLISHED_RATE, LONG_RUN = 1e-4, 20_000
SHORT_RATE = 1e-3
"""On MVTec AD bottle 1,000 steps give image AUROC 0.98, AU-PRO@30 0.72 at 1e-4; 1.00, 0.88 at 1e-3."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        size: PDN size, "s" or "m"; the teacher file has to match.
        steps: Training steps; the published figures take 70,000.
        minutes: Train for this long instead of for `steps`.
        learning_rate: None is 1e-4, as published, for `LONG_RUN` steps or more, and ten times that for
            shorter runs and for `minutes`: see `SHORT_RATE`.
        border: "published" leaves the outer 16 px blind, "reflect" inspects them; see `EfficientAD`.
        targets: Channels of the target space, see `EfficientAD`; 384 as published.
        false_reject: Target rate of good parts rejected, for the threshold.
        checkpoint_s: Seconds between checkpoints; what a kill loses at most.
        teacher_cache_mib: Memory for teacher outputs of training images, 2.3 MiB each.
    """

    size: Size = "s"
    steps: int = 70_000
    minutes: float | None = None
    learning_rate: float | None = None
    weight_decay: float = 1e-5
    seed: int = 42
    border: Border = "published"
    targets: int = FEATURES
    false_reject: float = 0.01
    checkpoint_s: float = 60.0
    teacher_cache_mib: int = 768

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            is_long = self.minutes is None and self.steps >= LONG_RUN
            object.__setattr__(self, "learning_rate", PUBLISHED_RATE if is_long else SHORT_RATE)
        if self.steps < 1 or (self.minutes is not None and self.minutes <= 0):
            raise TrainingError(
                f"--steps {self.steps} / --minutes {self.minutes}:"
                " need at least one step, or more than 0 minutes"
            )
        if not 1 <= self.targets <= FEATURES:
            raise TrainingError(
                f"--targets {self.targets}: a number of directions from 1 to {FEATURES} is needed,"
                f" {FEATURES} being the published one"
            )


    @property
    def rate(self) -> float:
        """The learning rate, of which `learning_rate` is the value after construction, too."""
        assert self.learning_rate is not None
        return self.learning_rate


@dataclass(frozen=True)
class Losses:
    """The four terms of one step; see `step_losses`."""

    hard: float
    penalty: float
    autoencoder: float
    student_autoencoder: float


def to_input(images: np.ndarray, device: torch.device) -> Tensor:
    """Images [N, H, W, 3] (0..255) -> network input, channels last [N, 3, H, W]."""
    x = torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2)
    return normalise(x).contiguous(memory_format=torch.channels_last)


class TeacherTargets:
    """Teacher outputs of the training images, normalised; in FP16 as far as the cache reaches."""

    def __init__(
        self,
        model: EfficientAD,
        images: Images,
        device: torch.device,
        cache_mib: int,
        natural: Callable[[], Tensor] | None = None,
    ) -> None:
        self.model, self.images, self.device = model, images, device
        kept = min(len(images), max(1, (cache_mib << 20) // (2 * FEATURES * model.cells**2)))
        shape = (kept, FEATURES, model.cells, model.cells)
        self.cache = torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last)
        total = torch.zeros(FEATURES, dtype=torch.float64)
        squares = torch.zeros(FEATURES, dtype=torch.float64)
        moment = SecondMoment(FEATURES)
        choose = model.rotation is not None and not model.rotation.any()  # not in a resumed run
        for index in range(len(images)):
            features = self._raw(index)
            total += features.sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
            squares += features.square().sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
            if choose:
                moment.add(features)
            if index < kept:
                self.cache[index] = features[0]
        n = len(images) * model.cells**2
        mean = total / n
        variance = squares / n - mean.square()  # FP64 sums: as exact as a second pass
        # A channel that hardly varies on the good images must not outweigh all others (or overflow).
        least = 1e-4 * float(squares.sum()) / (n * FEATURES)
        std = variance.clamp_min(max(least, 1e-12)).sqrt()
        model.mean.copy_(mean.view(-1, 1, 1))
        model.std.copy_(std.view(-1, 1, 1))
        mean16, scale16 = model.mean.cpu().half(), (1 / model.std).cpu().half()
        self.cache.sub_(mean16).mul_(scale16)
        if model.rotation is not None:
            if choose:
                assert natural is not None
                own = (moment.mean() - mean.outer(mean)) / std.outer(std)
                model.rotation.copy_(target_rotation(own, natural(), model.targets))
            self._rotate_cache(cache_mib)

    def _rotate_cache(self, cache_mib: int) -> None:
        """The cache in the target space, in which more images have room."""
        features, k, cells = self.cache, self.model.targets, self.model.cells
        kept = min(len(self.images), max(1, (cache_mib << 20) // (2 * k * cells**2)))
        self.cache = features[:0]  # so that the loop makes what is not in `features`
        targets = torch.empty(
            (kept, k, cells, cells), dtype=torch.float16, memory_format=torch.channels_last
        )
        for index in range(kept):
            if index < len(features):
                rotated = self.model.rotated(features[index : index + 1].to(self.device))
            else:
                rotated = self[index]
            targets[index] = rotated[0]
        self.cache = targets

    @torch.no_grad()
    def _raw(self, index: int) -> Tensor:
        with autocast(self.device):
            x = self.model.extended(to_input(self.images[index][None], self.device))
            return self.model.teacher(x).float()

    def __getitem__(self, index: int) -> Tensor:
        """float32 [1, targets, cells, cells] of training image `index`."""
        if index < len(self.cache):
            return self.cache[index : index + 1].to(self.device).float()
        return self.model.rotated((self._raw(index) - self.model.mean) / self.model.std)


@torch.no_grad()
def natural_moment(
    model: EfficientAD,
    penalty: PenaltyImages,
    device: torch.device,
    stored: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Second moment float64 [384, 384] of the normalised teacher features over penalty images.

    Args:
        stored: Directions and energy from the teacher's file, which saw more images: then only the
            channels' energies are those of the penalty images.
    """
    moment = SecondMoment(FEATURES)
    first = 1 << 40  # steps that training never uses
    for step in range(first, first + NATURAL_IMAGES):
        with autocast(device):
            x = model.extended(to_input(penalty(step)[None], device))
            features = model.teacher(x).float()
        moment.add((features - model.mean) / model.std)
    return with_stored(moment.mean(), stored) if stored else moment.mean()


def step_losses(model: EfficientAD, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four loss terms.

    The student sees the three images as one batch; its first 384 output channels are only made for the
    training and the penalty image and its last 384 only for the jittered one, because nothing else reads
    them (`model.targets` where it is not 384).

    Args:
        x: Normalised training image, penalty image and jittered training image, [3, 3, 256, 256].
        target: Normalised teacher output of the training image, [1, 384, 56, 56].

    Returns:
        L_hard (mean of the largest 0.1 % of the squared differences), L_penalty, L_AE, L_STAE.
    """
    extended = model.extended(x)
    hidden = model.student.trunk(extended)
    last = model.student.last
    assert last.bias is not None
    k = model.targets
    local = F.conv2d(hidden[:2], last.weight[:k], last.bias[:k]).float()
    logical = F.conv2d(hidden[2:], last.weight[k:], last.bias[k:]).float()
    decoded = model.autoencoder(x[2:]).float()
    with torch.no_grad():
        jittered_target = model.targets_of(model.teacher.trunk(extended[2:]))
    difference = (target - local[:1]).square().flatten()
    n = difference.numel()
    hardest = n - -(-999 * (n - 1) // 1000)  # how many values lie at or above the 0.999 quantile
    hard = difference.topk(hardest, sorted=False).values.mean()
    # Gradients go into both networks of the last term, as published.
    return (
        hard,
        local[1:].square().mean(),
        (jittered_target - decoded).square().mean(),
        (decoded - logical).square().mean(),
    )


def fit(
    model: EfficientAD,
    images: Images,
    penalty: PenaltyImages,
    run: Path,
    config: TrainConfig,
    *,
    device: torch.device,
    settings: dict[str, object],
    directions: tuple[Tensor, Tensor] | None = None,
    resume: bool = False,
    progress: Callable[[float, int, Losses], None] | None = None,
) -> tuple[int, float]:
    """Train `model` in place.

    Args:
        images: uint8 [N, 256, 256, 3], the good training images.
        run: Folder for the checkpoint and losses.csv.
        settings: What a checkpoint must have been made with to be resumed.
        directions: Principal directions and energy that came with the teacher, for fewer than 384
            targets; without them those of the penalty images are taken.
        progress: Called after every step with the fraction done (0..1), the step and its losses.

    Returns:
        Steps done and seconds spent, over all sessions of a resumed run.

    Raises:
        TrainingError: the loss is not finite, or the checkpoint belongs to another run.
    """
    keep_memory()
    model.to(device, memory_format=torch.channels_last)
    session = _Session(model, run, config, settings)
    if resume and session.checkpoint.exists():
        session.restore()

    def natural() -> Tensor:
        return natural_moment(model, penalty, device, directions)

    targets = TeacherTargets(model, images, device, config.teacher_cache_mib, natural)
    model.train()
    session.start = saved = time.monotonic()
    for index, batch in _batches(images, penalty, config.seed, session.step):
        if (done := session.fraction_done()) >= 1:
            break
        optimizer = session.optimizer
        optimizer.param_groups[0]["lr"] = config.rate * (0.1 if done >= 0.95 else 1.0)
        seed = config.seed * 1_000_003 + session.step
        losses = _step(model, optimizer, batch, targets[index], device, seed=seed)
        session.record(losses)
        if progress:
            progress(min(1.0, session.fraction_done()), session.step, losses)
        if time.monotonic() - saved >= config.checkpoint_s:
            session.save()
            saved = time.monotonic()
    session.save()
    return session.step, session.seconds()


class _Session:
    """The state of a run that its checkpoint holds, and the table of its losses.

    Attributes:
        step: Steps done.
        start: When this session's training began, on the monotonic clock.
    """

    def __init__(
        self, model: EfficientAD, run: Path, config: TrainConfig, settings: dict[str, object]
    ) -> None:
        self.model, self.run, self.config, self.settings = model, run, config, settings
        self.checkpoint = run / CHECKPOINT_FILE
        parameters = [*model.student.parameters(), *model.autoencoder.parameters()]
        self.optimizer = torch.optim.Adam(
            parameters, config.rate, weight_decay=config.weight_decay, fused=True
        )
        self.step, self.spent, self.start = 0, 0.0, time.monotonic()
        self.table = io.StringIO()
        self.table.write("step,seconds,hard,penalty,autoencoder,student_autoencoder\n")

    def restore(self) -> None:
        state = load_checkpoint(self.checkpoint, settings=self.settings)
        self.model.student.load_state_dict(state["student"])
        self.model.autoencoder.load_state_dict(state["autoencoder"])
        if self.model.rotation is not None:  # the targets of another rotation are others
            self.model.rotation.copy_(state["rotation"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent = state["step"], state["seconds"]
        self.table = io.StringIO()
        self.table.write(state["losses"])

    def save(self) -> None:
        state = {
            "student": self.model.student.state_dict(),
            "autoencoder": self.model.autoencoder.state_dict(),
            "rotation": self.model.rotation,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds(),
            "losses": self.table.getvalue(),
            "settings": self.settings,
        }
        save_checkpoint(self.checkpoint, state)
        write_text(self.run / LOSSES_FILE, self.table.getvalue())

    def seconds(self) -> float:
        """Time spent on training, over all sessions of a resumed run."""
        return self.spent + time.monotonic() - self.start

    def fraction_done(self) -> float:
        if self.config.minutes is not None:
            return self.seconds() / (60 * self.config.minutes)
        return self.step / self.config.steps

    def record(self, losses: Losses) -> None:
        """Count a step; the first one and every tenth go into the table."""
        self.step += 1
        values = list(asdict(losses).values())
        if not np.isfinite(values).all():
            raise TrainingError(
                f"step {self.step}: the loss is not finite ({losses});"
                " start again with a lower learning rate"
            )
        if self.step % 10 == 0 or self.step == 1:
            row = [self.step, round(self.seconds(), 2), *(f"{v:.6g}" for v in values)]
            csv.writer(self.table, lineterminator="\n").writerow(row)


def _step(
    model: EfficientAD,
    optimizer: torch.optim.Optimizer,
    batch: np.ndarray,
    target: Tensor,
    device: torch.device,
    *,
    seed: int,
) -> Losses:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # the autoencoder's dropout
        with autocast(device):
            terms = step_losses(model, to_input(batch, device), target)
    optimizer.zero_grad(set_to_none=True)
    torch.stack(terms).sum().backward()
    optimizer.step()
    return Losses(*torch.stack([term.detach() for term in terms]).tolist())


def _batches(
    images: Images, penalty: PenaltyImages, seed: int, first: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Per step the index of the training image and its batch, made ahead.

    A batch is [image, penalty image, jittered image], float32 [3, 256, 256, 3].
    """

    def make(step: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng([seed, step, 0])
        index = int(rng.integers(len(images)))
        image = images[index]
        trio = [image, penalty(step), jitter(image, rng)]
        return index, np.stack(trio, dtype=np.float32)

    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, first + ahead) for ahead in range(3)]
        step = first
        while True:
            yield waiting.pop(0).result()
            step += 1
            waiting.append(pool.submit(make, step + 2))


@torch.inference_mode()
def raw_maps(
    model: EfficientAD, images: Iterable[np.ndarray], device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Student-teacher and student-autoencoder maps of images uint8 [256, 256, 3], in FP32.

    Returns:
        float32 [N, cells, cells] each.
    """
    model.eval()
    local, logical = [], []
    for image in images:
        x = torch.from_numpy(image[None]).to(device).permute(0, 3, 1, 2)
        a, b = model(x)
        local.append(a[0].cpu().numpy())
        logical.append(b[0].cpu().numpy())
    return np.stack(local), np.stack(logical)


def build_model(
    teacher: PDN, *, seed: int, border: Border = "published", targets: int = FEATURES
) -> EfficientAD:
    """Networks with PyTorch's initial weights, seeded; the process's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EfficientAD(teacher, border=border, targets=targets)
