"""From a data-set folder to a finished run: images, teacher, penalty images, fit, calibration."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgead.errors import TrainingError
from edgead.files import write_text
from edgead.models.efficientad import EfficientAD, anomaly_map, anomaly_score
from edgead.models.files import WeightsInfo, load_directions, load_teacher, save_safetensors
from edgead.models.pdn import PDN
from edgead.training.calibrate import MapScale, choose_threshold, graph_constants
from edgead.training.data import Dataset
from edgead.training.demo_data import render_distractors
from edgead.training.device import pick_device
from edgead.training.fit import (
    Losses,
    TrainConfig,
    build_model,
    fit,
    raw_maps,
)
from edgead.training.images import PenaltyImages, iterate_images, store_images
from edgead.training.run import (
    CHECKPOINT_FILE,
    PENALTY_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    git_commit,
    images_file,
)

log = logging.getLogger(__name__)

SHIPPED_TEACHER = Path(__file__).parents[1] / "weights" / "pdn_small.safetensors"
PENALTY_VARIABLE = "EDGEAD_PENALTY_IMAGES"
DISTRACTORS = 300


def penalty_folder(named: Path | None, run: Path, *, seed: int) -> tuple[Path, str]:
    """The folder of penalty images and what it is.

    It is the named one, the environment's, or one of pictures rendered now. Training never goes
    without them: the student would learn to imitate the teacher on everything.
    """
    if named is not None:
        return named, "named by the user"
    if variable := os.environ.get(PENALTY_VARIABLE):
        return Path(variable), f"from {PENALTY_VARIABLE}"
    folder = run / "penalty"
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


def train(
    dataset: Dataset,
    run: Path,
    config: TrainConfig | None = None,
    *,
    teacher: Path | None = None,
    penalty: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: Callable[[float, int, Losses], None] | None = None,
) -> dict[str, Any]:
    """Train EfficientAD on a data set's good images, calibrate it, and write the run folder.

    Args:
        dataset: See `edgead.training.data.open_dataset`; its test part is not touched.
        run: Folder to write; see `edgead.training.run`.
        teacher: PDN teacher file; default: the one that the package ships (PDN-S).
        penalty: Folder of natural images.
        resume: Go on from the run's checkpoint.
        progress: Called after every step with the fraction done, the step and its losses.

    Returns:
        The content of run.json.

    Raises:
        TrainingError: the folder holds another or a finished run, or the loss diverged. DataError,
            WeightsError.
    """
    config = config or TrainConfig()
    _check_folder(run, resume=resume)
    run.mkdir(parents=True, exist_ok=True)
    chosen = pick_device(device)
    inputs = _open_inputs(dataset, run, config, teacher or SHIPPED_TEACHER, penalty)
    images = store_images(dataset.train, _pool_file(run, dataset, inputs.fingerprint))
    model = build_model(inputs.network, seed=config.seed, border=config.border, targets=config.targets)
    steps, seconds = fit(
        model,
        images,
        inputs.penalty,
        run,
        config,
        device=chosen,
        settings=inputs.settings(config),
        directions=load_directions(teacher or SHIPPED_TEACHER),
        resume=resume,
        progress=progress,
    )
    good = iterate_images(dataset.validation)
    calibration, threshold = calibrate(model, good, config.false_reject, chosen)
    record = {
        **inputs.record(config, dataset),
        "training": {"steps": steps, "seconds": round(seconds, 1), "device": device_name(chosen)},
        "calibration": calibration,
        "threshold": threshold,
        "made": made(),
    }
    _write(run, model, record)
    return record


def _check_folder(run: Path, *, resume: bool) -> None:
    if (run / RUN_FILE).exists():
        raise TrainingError(f"{run} holds a finished run; export it, or name another folder with --out")
    if (run / CHECKPOINT_FILE).exists() and not resume:
        raise TrainingError(
            f"{run} holds an unfinished run; go on with --resume, or name another folder with --out"
        )


def _pool_file(run: Path, dataset: Dataset, fingerprint: str) -> Path:
    """Where the training images lie at network size; another data set or split, another name."""
    names = [path.relative_to(dataset.root).as_posix() for path in dataset.train]
    return run / images_file(hashlib.sha256("\n".join([fingerprint, *names]).encode()).hexdigest()[:16])


def _write(run: Path, model: EfficientAD, record: dict[str, Any]) -> None:
    metadata = {"method": record["method"], "data": record["data"]["fingerprint"]}
    save_safetensors(run / WEIGHTS_FILE, model.state_dict(), metadata)
    write_text(run / RUN_FILE, json.dumps(record, indent=2))
    for path in (run / CHECKPOINT_FILE, run / PENALTY_FILE, *run.glob(images_file("*"))):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Inputs:
    """What a run is trained from, besides the images of the data set."""

    network: PDN
    teacher: WeightsInfo
    penalty: PenaltyImages
    penalty_source: str
    fingerprint: str

    def settings(self, config: TrainConfig) -> dict[str, object]:
        """What has to be the same for a checkpoint to be resumed."""
        return {
            **asdict(config),
            "data": self.fingerprint,
            "teacher": self.teacher.sha256,
            "penalty_images": len(self.penalty.paths),
        }

    def record(self, config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
        """The first part of run.json."""
        return {
            "method": f"efficientad-{config.size}",
            "config": asdict(config),
            "data": {**describe_data(dataset), "fingerprint": self.fingerprint},
            "teacher": describe_weights(self.teacher),
            "penalty": {"source": self.penalty_source, "images": len(self.penalty.paths)},
        }


def _open_inputs(
    dataset: Dataset, run: Path, config: TrainConfig, teacher: Path, penalty: Path | None
) -> _Inputs:
    network, info = load_teacher(teacher)
    if network.size != config.size:
        raise TrainingError(
            f"{teacher} is a PDN-{network.size.upper()} teacher,"
            f" --method efficientad-{config.size} needs a PDN-{config.size.upper()} one:"
            f" name another with --teacher, or use --method efficientad-{network.size}"
        )
    folder, source = penalty_folder(penalty, run, seed=config.seed)
    negatives = PenaltyImages(folder, seed=config.seed, store=run / PENALTY_FILE)
    return _Inputs(network, info, negatives, source, dataset.fingerprint())


def calibrate(
    model: Any, images: Iterable[np.ndarray], false_reject: float, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Map scale and threshold, as they stand in run.json.

    Args:
        images: Good validation images, uint8 [256, 256, 3].
        false_reject: Target rate of good parts rejected.
    """
    local, logical = raw_maps(model, images, device)
    return calibration_of(local, logical, false_reject)


def calibration_of(
    local: np.ndarray, logical: np.ndarray, false_reject: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`calibrate` for raw maps that are there already, float32 [N, cells, cells] each."""
    scales = MapScale.of(local), MapScale.of(logical)
    constants = graph_constants(*scales)
    maps = anomaly_map(*map(torch.from_numpy, (local, logical, constants)))
    scores = anomaly_score(maps).numpy()
    threshold = choose_threshold(scores, false_reject=false_reject)
    calibration = {
        "values": [float(value) for value in constants],
        "quantiles": {"local": asdict(scales[0]), "logical": asdict(scales[1])},
        "scores": [float(score) for score in scores],
    }
    return calibration, {**asdict(threshold), "claim": threshold.claim}


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What a run records of its data set; the split is written out so that it can be checked later."""

    def names(paths: tuple[Path, ...]) -> list[str]:
        return [path.relative_to(dataset.root).as_posix() for path in paths]

    return {
        "name": dataset.name,
        "root": str(dataset.root),
        "layout": dataset.layout,
        "train": names(dataset.train),
        "validation": names(dataset.validation),
        "test": names(tuple(item.path for item in dataset.test)),
    }


def describe_weights(info: WeightsInfo) -> dict[str, Any]:
    return {"file": info.name, "sha256": info.sha256, "layout": info.layout, "metadata": info.metadata}


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def made() -> dict[str, Any]:
    """Provenance of a run: when, by which versions, from which commit."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("edgead", "torch", "numpy", "opencv-python-headless")
    }
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "utc": when,
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": git_commit(),
    }
