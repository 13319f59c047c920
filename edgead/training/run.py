"""The folder of one training run: what `edgead train` writes and `edgead export` reads.

RUN/run.json                 settings, data set, weight files, calibration, threshold, timings
RUN/detector.safetensors     the method's networks and their statistics, frozen ones included; FP32
RUN/losses.csv               step, seconds and the losses, of methods that have some
RUN/checkpoint.pt            only while training: what --resume goes on from
RUN/images-*.bin, penalty.bin    only while training: images at network size
RUN/.lock                    only while training: held by the process that trains
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgead.errors import TrainingError
from edgead.methods import trainer_of
from edgead.models.base import AnomalyModel
from edgead.models.files import load_strict, read_state_dict
from edgead.models.tiled import Tiled

RUN_FILE = "run.json"
WEIGHTS_FILE = "detector.safetensors"
LOSSES_FILE = "losses.csv"
CHECKPOINT_FILE = "checkpoint.pt"
PENALTY_FILE = "penalty.bin"
PENALTY_VARIABLE = "EDGEAD_PENALTY_IMAGES"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Run:
    """A finished training run, read back.

    Attributes:
        folder: Where it lies.
        record: The content of run.json.
        model: The trained networks, FP32, in evaluation mode.
    """

    folder: Path
    record: dict[str, Any]
    model: AnomalyModel


def images_file(key: str) -> str:
    """Name of the file with the training images at network size; `key` says which images they are."""
    return f"images-{key}.bin"


def read_run(folder: Path | str) -> Run:
    """Load a finished run.

    Raises:
        TrainingError: not a run folder, or the training has not finished. WeightsError: damaged weights.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        if (folder / CHECKPOINT_FILE).is_file():
            raise TrainingError(
                f"{folder}: this training has not finished;"
                f" go on with `edgead train ... --out {folder} --resume`"
            )
        raise TrainingError(
            f"{folder} is no training run: it has no {RUN_FILE}."
            f" Make one with `edgead train DATA --out {folder}`"
        )
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        model = _build(record["method"], **record["architecture"])
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{folder / RUN_FILE} is damaged ({error}); train again") from error
    state, _ = read_state_dict(folder / WEIGHTS_FILE)
    load_strict(model, state, folder / WEIGHTS_FILE)
    return Run(folder, record, model.eval().requires_grad_(False))


def _build(method: str, *, tiling: dict[str, Any] | None = None, **architecture: Any) -> AnomalyModel:
    model: AnomalyModel = trainer_of(method).build(**architecture)
    return Tiled(model, **tiling) if tiling else model


def git_commit() -> str | None:
    """Commit of the repository that edgead runs from; None where it is installed from elsewhere.

    "+changes" is appended when the files differ from the commit.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not merely in a repository's folder
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
