"""The loop of a training run, as every method needs it: where it stands, when it ends, what is kept."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgead.errors import TrainingError
from edgead.files import write_text
from edgead.training.checkpoint import load_checkpoint, save_checkpoint
from edgead.training.device import autocast, keep_memory
from edgead.training.images import Images, Tiles
from edgead.training.run import CHECKPOINT_FILE, LOSSES_FILE

Progress = Callable[[float, int, Mapping[str, float]], None]
"""Called after every step with the fraction done (0..1), the step and its losses."""


class Session:
    """A run in progress.

    Args:
        run: Folder for the checkpoint and losses.csv.
        config: Of the method. Its `minutes`, or else its `steps`, end the run, and `checkpoint_s`
            seconds lie between checkpoints; a method may lack any of them, see `lasts`.
        images: uint8 [N, h, w, 3], the good training images at the networks' size.
        settings: What a checkpoint must have been made with to be resumed.
        resume: Go on from the checkpoint if there is one.

    Attributes:
        step: Steps done.
        before: What `keep` was given in the session before; None in a new run.
    """

    def __init__(
        self,
        run: Path,
        config: Any,
        *,
        images: Images,
        device: torch.device,
        settings: dict[str, object],
        resume: bool = False,
        progress: Progress | None = None,
    ) -> None:
        keep_memory()
        self.run, self.images, self.device = run, images, device
        self._steps: int | None = getattr(config, "steps", None)
        self._minutes: float | None = getattr(config, "minutes", None)
        self._checkpoint_s: float = getattr(config, "checkpoint_s", math.inf)
        self._settings, self._progress = settings, progress
        self._checkpoint = run / CHECKPOINT_FILE
        self._table = io.StringIO()
        self.step, self._spent = 0, 0.0
        self.before: dict[str, Any] | None = None
        if resume and self._checkpoint.exists():
            state = load_checkpoint(self._checkpoint, settings=settings)
            self.before = state["method"]
            self.step, self._spent = state["step"], state["seconds"]
            self._table.write(state["losses"])
        self.begin()

    def begin(self) -> None:
        """The clock starts here: what was prepared before does not count as training."""
        self._start = self._saved = time.monotonic()

    @property
    def whole_images(self) -> int:
        """How many images there are, whatever they were cut into."""
        return len(self.images.pool if isinstance(self.images, Tiles) else self.images)

    def views(self, wholes: np.ndarray) -> np.ndarray:
        """Indices of all that shows these of the whole images: they themselves, or their tiles, too."""
        return self.images.of(wholes) if isinstance(self.images, Tiles) else wholes

    def shares(self, indices: np.ndarray) -> np.ndarray:
        """Indices of images as often as an epoch shows them.

        A whole image comes as often as its tiles together: networks that learn both would hardly see it
        otherwise.
        """
        return self.images.shares(indices) if isinstance(self.images, Tiles) else indices

    def batch(self, chosen: Iterable[int]) -> torch.Tensor:
        """Training images by their numbers, uint8 [N, 3, h, w] on the device."""
        pixels = np.stack([self.images[int(index)] for index in chosen])
        return torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)

    def lasts(self, steps: int) -> None:
        """How many steps the run has where its config does not say."""
        self._steps = self._steps or steps

    def lasts_epochs(self, epochs: int, per_epoch: int) -> None:
        """As `lasts`, of epochs of so many steps each; with tiles, as many steps as without."""
        shown = self.images.shown_per_image if isinstance(self.images, Tiles) else 1
        self.lasts(math.ceil(epochs * per_epoch / shown))

    def autocast(self) -> AbstractContextManager[object]:
        """Convolutions in this device's quickest precision, parameters and losses in float32."""
        return autocast(self.device)

    def seconds(self) -> float:
        """Time spent on training, over all sessions of a resumed run."""
        return self._spent + time.monotonic() - self._start

    def fraction_done(self) -> float:
        """Of the run, by steps or by minutes; at 1 it is over."""
        if self._minutes is not None:
            return self.seconds() / (60 * self._minutes)
        assert self._steps is not None, "Session.lasts was not called"
        return self.step / self._steps

    def record(self, losses: Mapping[str, float]) -> None:
        """Count a step; the first one and every tenth go into the table.

        Raises:
            TrainingError: a loss is not finite.
        """
        self.step += 1
        values = list(losses.values())
        if not np.isfinite(values).all():
            raise TrainingError(
                f"step {self.step}: the loss is not finite"
                f" ({', '.join(f'{name} {value}' for name, value in losses.items())});"
                " start again with a lower learning rate"
            )
        table = csv.writer(self._table, lineterminator="\n")
        if not self._table.tell():
            table.writerow(["step", "seconds", *losses])
        if self.step % 10 == 0 or self.step == 1:
            table.writerow([self.step, round(self.seconds(), 2), *(f"{v:.6g}" for v in values)])
        if self._progress:
            self._progress(min(1.0, self.fraction_done()), self.step, losses)

    def keep(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint when it is time for one, and at the end.

        Args:
            state: What the method needs to go on: tensors and plain values.
        """
        if self.fraction_done() < 1 and time.monotonic() - self._saved < self._checkpoint_s:
            return
        content = {
            "method": state(),
            "step": self.step,
            "seconds": self.seconds(),
            "losses": self._table.getvalue(),
            "settings": self._settings,
        }
        save_checkpoint(self._checkpoint, content)
        write_text(self.run / LOSSES_FILE, self._table.getvalue())
        self._saved = time.monotonic()
