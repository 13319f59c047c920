"""Training of EfficientAD: student and autoencoder against the frozen teacher.

Source: Batzner et al., "EfficientAD", arXiv 2303.14535, algorithm 1, in the form of the public
reproduction of its figures. One step sees one training image, a colour-jittered copy of it for the
autoencoder, and one natural image for the penalty.

Every random choice is a function of (seed, step) alone, so a resumed run goes on with exactly the
choices that an uninterrupted one would have made.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.errors import TrainingError
from edgead.models.base import check_choice, check_learning_rate, check_length
from edgead.models.efficientad import Border, EfficientAD
from edgead.models.files import load_directions, load_teacher, sha256, shipped_teacher
from edgead.models.pdn import FEATURES, PDN, Size
from edgead.training.demo_data import render_distractors
from edgead.training.device import autocast
from edgead.training.images import Images, PenaltyImages, Tiles, jitter
from edgead.training.muon import Muon
from edgead.training.run import PENALTY_FILE, PENALTY_VARIABLE
from edgead.training.session import Session
from edgead.training.teacher_targets import TeacherTargets, natural_moment, to_input

log = logging.getLogger(__name__)

DISTRACTORS = 300

Optimizer = Literal["muon", "adam"]
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
LONG_RUN = 20_000
SHIPPED_TARGETS = 128
"""With the teachers that edgead ships these find as much as all 384, in less time, and 64 find fewer of
the smallest defects: docs/reduced-targets.md has the tables."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        size: PDN size, "s" or "m"; the teacher file has to match.
        steps: Training steps; the published figures take 70,000 of Adam.
        minutes: Train for this long instead of for `steps`.
        optimizer: None is Adam, as published, for `LONG_RUN` steps or more, and Muon for shorter runs
            and for `minutes`: it needs a fraction of the steps (docs/training.md).
        learning_rate: None is 1e-4 for Adam, as published, with a tenth of it from 95 % of the run on,
            and 0.02 for Muon; see `rate_at`.
        border: "published" leaves the outer 16 px blind, "reflect" inspects them; see `EfficientAD`.
        targets: Channels of the target space, see `EfficientAD`. None is `SHIPPED_TARGETS` with a
            teacher that edgead ships, and otherwise 384, as published.
        false_reject: Target rate of good parts rejected, for the threshold.
        checkpoint_s: Seconds between checkpoints; what a kill loses at most.
        teacher_cache_mib: Memory for teacher outputs of training images, 2.3 MiB each.
    """

    size: Size = "s"
    steps: int = 2_000
    minutes: float | None = None
    optimizer: Optimizer | None = None
    learning_rate: float | None = None
    weight_decay: float = 1e-5
    seed: int = 42
    border: Border = "published"
    targets: int | None = None
    false_reject: float = 0.01
    checkpoint_s: float = 60.0
    teacher_cache_mib: int = 768

    def __post_init__(self) -> None:
        if self.optimizer is None:
            is_long = self.minutes is None and self.steps >= LONG_RUN
            object.__setattr__(self, "optimizer", "adam" if is_long else "muon")
        check_choice("optimizer", str(self.optimizer), OPTIMIZERS)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 0.02 if self.optimizer == "muon" else 1e-4)
        check_length(self.steps, self.minutes)
        check_learning_rate(self.learning_rate)
        if self.targets is not None and not 1 <= self.targets <= FEATURES:
            raise TrainingError(
                f"--targets {self.targets}: a number of directions from 1 to {FEATURES} is needed,"
                f" {FEATURES} being the published one"
            )

    def rate_at(self, fraction: float, step: int) -> float:
        """The learning rate when this fraction (0..1) of the run is done, which is this many steps.

        Muon's steps have to become smaller with the square root of their number: at a constant rate the
        autoencoder falls apart after some 800 of them.
        """
        assert self.learning_rate is not None
        if self.optimizer == "adam":
            return self.learning_rate * (0.1 if fraction >= 0.95 else 1.0)
        return self.learning_rate / (1 + step / 300) ** 0.5 * min(1.0, 5 * (1 - fraction))

    def optimizer_of(self, model: EfficientAD) -> torch.optim.Optimizer:
        """The optimizer over student and autoencoder."""
        parameters = [*model.student.parameters(), *model.autoencoder.parameters()]
        decay = self.weight_decay
        if self.optimizer == "muon":
            return Muon(parameters, self.rate_at(0, 0), weight_decay=decay)
        return torch.optim.Adam(parameters, self.rate_at(0, 0), weight_decay=decay, fused=True)

    @property
    def method(self) -> str:
        return f"efficientad-{self.size}"


@dataclass(frozen=True)
class Losses:
    """The four terms of one step; see `step_losses`."""

    hard: float
    penalty: float
    autoencoder: float
    student_autoencoder: float


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


class Trainer:
    """EfficientAD as `edgead.methods` wants it; see there.

    Attributes:
        model: The networks, trained in place by `fit`.
        record: What run.json says of the files that the run was made from.
        settings: What has to be the same for a checkpoint to be resumed, beside config and data.
    """

    Config = TrainConfig
    FILES = ("teacher", "penalty")

    def __init__(self, config: TrainConfig, files: Mapping[str, Path], run: Path) -> None:
        teacher = files.get("teacher", shipped_teacher(config.size))
        network, info = load_teacher(teacher)
        if config.targets is None:
            is_shipped = info.sha256 == sha256(shipped_teacher(network.size))
            config = replace(config, targets=SHIPPED_TARGETS if is_shipped else FEATURES)
        self.config = config
        if network.size != config.size:
            raise TrainingError(
                f"{teacher} is a PDN-{network.size.upper()} teacher,"
                f" --method efficientad-{config.size} needs a PDN-{config.size.upper()} one:"
                f" name another with --teacher, or use --method efficientad-{network.size}"
            )
        self.directions = load_directions(teacher)
        self.model = build_model(
            network, seed=config.seed, border=config.border, targets=config.targets or FEATURES
        )
        folder, source = penalty_folder(files.get("penalty"), run, seed=config.seed)
        self.penalty = PenaltyImages(folder, seed=config.seed, store=run / PENALTY_FILE)
        self.record = {
            "weights": {"teacher": info.record()},
            "penalty": {"source": source, "images": len(self.penalty.paths)},
        }
        self.settings = {"teacher": info.sha256, "penalty": self.penalty.identity()}

    @staticmethod
    def build(*, size: Size, border: Border, targets: int) -> EfficientAD:
        """Networks of this architecture, to be filled with a run's weights."""
        return EfficientAD(PDN(size), border=border, targets=targets)

    def fit(self, session: Session) -> None:
        """Train the student and the autoencoder."""
        model, config = self.model, self.config
        model.to(session.device, memory_format=torch.channels_last)
        optimizer = config.optimizer_of(model)
        if session.before:
            _restore(model, optimizer, session.before)

        def natural() -> Tensor:
            return natural_moment(model, self.penalty, session.device, self.directions)

        targets = TeacherTargets(
            model, session.images, session.device, config.teacher_cache_mib, natural
        )
        model.train()
        session.begin()
        shown = session.shares(np.arange(len(session.images)))
        batches = _batches(session.images, shown, self.penalty, config.seed, session.step)
        while (done := session.fraction_done()) < 1:
            index, batch = next(batches)
            optimizer.param_groups[0]["lr"] = config.rate_at(done, session.step)
            seed = (config.seed * 1_000_003 + session.step) % 2**63  # as much as torch takes
            losses = _step(model, optimizer, batch, targets[index], session.device, seed=seed)
            session.record(asdict(losses))
            session.keep(lambda: _state(model, optimizer))


def _state(model: EfficientAD, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "student": model.student.state_dict(),
        "autoencoder": model.autoencoder.state_dict(),
        "rotation": model.rotation,
        "optimizer": optimizer.state_dict(),
    }


def _restore(model: EfficientAD, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    model.student.load_state_dict(state["student"])
    model.autoencoder.load_state_dict(state["autoencoder"])
    if model.rotation is not None:  # the targets of another rotation are others
        model.rotation.copy_(state["rotation"])
    optimizer.load_state_dict(state["optimizer"])


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
    images: Images, shown: np.ndarray, penalty: PenaltyImages, seed: int, first: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Per step the index of the training image and its batch, made ahead.

    A batch is [image, penalty image, jittered image], float32 [3, 256, 256, 3]. The jittered one is for
    the autoencoder: of a tile it is the whole image.

    Args:
        shown: Indices of images to draw from.
    """

    def make(step: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng([seed, step, 0])
        index = int(shown[rng.integers(len(shown))])
        image = images[index]
        whole = image
        if isinstance(images, Tiles) and not images.is_whole(index):
            whole = images.whole(index)
        trio = [image, penalty(step), jitter(whole, rng)]
        return index, np.stack(trio, dtype=np.float32)

    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, first + ahead) for ahead in range(3)]
        step = first
        while True:
            yield waiting.pop(0).result()
            step += 1
            waiting.append(pool.submit(make, step + 2))


def build_model(
    teacher: PDN, *, seed: int, border: Border = "published", targets: int = FEATURES
) -> EfficientAD:
    """Networks with PyTorch's initial weights, seeded; the process's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EfficientAD(teacher, border=border, targets=targets)


def penalty_folder(named: Path | None, run: Path, *, seed: int) -> tuple[Path, str]:
    """The folder of penalty images and what it is.

    It is the named one, the environment's, or one of pictures rendered now. Training never goes
    without them: the student would learn to imitate the teacher on everything.
    """
    if named is not None:
        return named, "named by the user"
    if variable := os.environ.get(PENALTY_VARIABLE):
        return Path(variable), f"from {PENALTY_VARIABLE}"
    folder = run / f"penalty-{seed}"  # of another seed there may be some from before a kill
    log.warning(
        "no penalty images named: training uses %d rendered pictures instead of natural images."
        " Detection is better with natural ones: --penalty FOLDER (any folder of some hundred varied"
        " photos), or set %s",
        DISTRACTORS,
        PENALTY_VARIABLE,
    )
    if not folder.exists():
        render_distractors(folder, seed=seed, count=DISTRACTORS)
    return folder, f"{DISTRACTORS} rendered pictures"
