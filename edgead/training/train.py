"""From a data-set folder to a finished run, whatever the method: images, fit, calibration, record."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import edgead
from edgead.calibration import (
    MapScale,
    check_rate,
    choose_threshold,
    graph_constants,
    odd_images,
    warn_of_odd,
)
from edgead.errors import TrainingError
from edgead.files import write_text
from edgead.health import HEALTH, HealthProfile
from edgead.image import read_image
from edgead.methods import configure, trainer_of
from edgead.models.base import AnomalyModel
from edgead.models.files import save_safetensors
from edgead.models.tiled import Tiled, frame_of
from edgead.training.checkpoint import alone
from edgead.training.data import Dataset
from edgead.training.device import exact_convolutions, pick_device
from edgead.training.images import Images, Tiles, common_size, hash_of_names, store_images
from edgead.training.run import (
    CHECKPOINT_FILE,
    LOCK_FILE,
    PENALTY_FILE,
    PENALTY_VARIABLE,
    RUN_FILE,
    WEIGHTS_FILE,
    git_commit,
    images_file,
)
from edgead.training.session import Progress, Session

HEALTH_IMAGES = 300  # are enough for the quantiles of their figures


def train(
    dataset: Dataset,
    run: Path,
    config: Any = None,
    *,
    device: str = "auto",
    resume: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    progress: Progress | None = None,
    **files: Path | None,
) -> dict[str, Any]:
    """Train a detector on a data set's good images, calibrate it, and write the run folder.

    Args:
        dataset: See `edgead.training.data.open_dataset`; its test part is not touched.
        run: Folder to write; see `edgead.training.run`.
        config: A method's settings, see `edgead.methods.configure`; default: EfficientAD-S.
        resume: Go on from the run's checkpoint.
        tile: Train on tiles of this many px of the images, and inspect frames in such tiles, too; see
            `edgead.models.tiled`. The frames have the size of most training images. These lie at that
            size on disk while training: 2.4 MB for 900x900 px.
        overlap: Of neighbouring tiles at least, in px; default: a quarter of a tile.
        progress: Called after every step with the fraction done, the step and its losses.
        files: What the method starts from: `teacher` (a PDN teacher file; default: the one that the
            package ships), `penalty` (a folder of natural images), `backbone` (a weight file).

    Returns:
        The content of run.json.

    Raises:
        TrainingError: the folder holds another or a finished run, the method takes no such file, or the
            loss diverged. DataError, WeightsError.
    """
    config = config or configure("efficientad-s")
    method = trainer_of(config.method)
    named = {option: path for option, path in files.items() if path is not None}
    if surplus := sorted(set(named) - set(method.FILES)):
        raise TrainingError(
            f"--{surplus[0]}: --method {config.method} starts from no such file;"
            f" it takes {', '.join(f'--{option}' for option in method.FILES)}"
        )
    if overlap is not None and tile is None:
        raise TrainingError(f"--overlap {overlap} is that of tiles: add --tile, or leave it out")
    check_rate(config.false_reject)  # not after the training
    if "penalty" in method.FILES:
        _check_penalty(dataset, named.get("penalty") or os.environ.get(PENALTY_VARIABLE))
    if run.is_file():
        raise TrainingError(f"--out {run} is a file; name a folder for the run")
    run.mkdir(parents=True, exist_ok=True)
    with alone(run / LOCK_FILE, run):
        _check_folder(run, resume=resume)
        chosen = pick_device(device)
        trainer = method(config, named, run)
        config = trainer.config  # in which nothing is left open
        model: AnomalyModel = trainer.model
        if tile is not None:
            model = _tiled(model, dataset, tile, overlap)
        fingerprint = dataset.fingerprint()
        dataset.warn_of_copies()
        # All images are read before the training: one that cannot be must not cost it.
        state, size_px = f"{fingerprint} {model.input_px}", model.input_px
        pool, good = (
            store_images(paths, _pool_file(run, dataset.root, paths, state), size_px)
            for paths in (dataset.train, dataset.validation)
        )
        images: Images = pool
        health = health_of(dataset)
        settings = {**asdict(config), **trainer.settings, "data": fingerprint, "tiling": None}
        if isinstance(model, Tiled):
            images = Tiles(pool, model.corners, model.inner.input_px)
            settings["tiling"] = model.architecture()["tiling"]
        session = Session(
            run,
            config,
            images=images,
            device=chosen,
            settings=settings,
            resume=resume,
            progress=progress,
        )
        trainer.fit(session)
        seconds = session.seconds()
        model.to(chosen)  # with what a tiled one has around the trained networks
        calibration, threshold = calibrate(model, good, config.false_reject, chosen)
        warn_of_odd(dataset.validation, calibration["odd_images"])
        record = {
            "method": config.method,
            "config": asdict(config),
            "data": {**describe_data(dataset), "fingerprint": fingerprint},
            "architecture": model.architecture(),
            **trainer.record,
            "training": {
                "steps": session.step,
                "seconds": round(seconds, 1),
                "device": device_name(chosen),
            },
            "calibration": calibration,
            "threshold": threshold,
            HEALTH: health.to_dict(),
            "made": made(),
        }
        _write(run, model, record)
        return record


def _tiled(model: AnomalyModel, dataset: Dataset, tile: int, overlap: int | None) -> Tiled:
    frame = frame_of(model, common_size(dataset.train), tile)
    return Tiled(model, tile=tile, overlap=tile // 4 if overlap is None else overlap, frame=frame)


def _check_penalty(dataset: Dataset, folder: Path | str | None) -> None:
    """Images to inspect as penalty images would teach the networks to fail on them."""
    if not folder:
        return
    penalty, root = Path(folder).resolve(), dataset.root.resolve()
    if penalty.is_relative_to(root) or root.is_relative_to(penalty):
        raise TrainingError(
            f"the penalty images in {folder} would be those of the data set {dataset.root}:"
            " name a folder of other pictures, such as photos, with --penalty"
        )


def _check_folder(run: Path, *, resume: bool) -> None:
    if (run / RUN_FILE).exists():
        raise TrainingError(f"{run} holds a finished run; export it, or name another folder with --out")
    if (run / CHECKPOINT_FILE).exists() and not resume:
        raise TrainingError(
            f"{run} holds an unfinished run; go on with --resume, or name another folder with --out"
        )


def _pool_file(run: Path, root: Path, paths: Sequence[Path], state: str) -> Path:
    """Where images lie at network size; another data set, split or size, another name."""
    return run / images_file(hash_of_names(root, paths, state))


def _write(run: Path, model: AnomalyModel, record: dict[str, Any]) -> None:
    metadata = {"method": record["method"], "data": record["data"]["fingerprint"]}
    save_safetensors(run / WEIGHTS_FILE, model.state_dict(), metadata)
    write_text(run / RUN_FILE, json.dumps(record, indent=2))
    left = [CHECKPOINT_FILE, PENALTY_FILE, images_file("*")]
    left += [f".{name}.*.tmp" for name in left]  # these are of processes that were killed
    for path in (path for name in left for path in run.glob(name)):
        path.unlink(missing_ok=True)


@torch.inference_mode()
def raw_maps(
    model: AnomalyModel, images: Iterable[np.ndarray], device: torch.device
) -> tuple[np.ndarray, ...]:
    """Raw maps of images uint8 [*model.input_px, 3], in FP32.

    Returns:
        float32 [N, h, w] for each of `model.raw_names`.
    """
    model.eval()
    maps: list[list[np.ndarray]] = [[] for _ in model.raw_names]
    with exact_convolutions(device):
        for image in images:
            x = torch.from_numpy(image[None]).to(device).permute(0, 3, 1, 2)
            for kept, raw in zip(maps, model(x), strict=True):
                kept.append(raw[0].cpu().numpy())
    # One kind after the other, so that not all of them lie twice in memory.
    return tuple(np.stack(maps.pop(0)) for _ in model.raw_names)


def calibrate(
    model: AnomalyModel, images: Iterable[np.ndarray], false_reject: float, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Map scale and threshold, as they stand in run.json.

    Args:
        images: Good validation images, uint8 [*model.input_px, 3].
        false_reject: Target rate of good parts rejected.
    """
    return calibration_of(model, raw_maps(model, images, device), false_reject)


def calibration_of(
    model: AnomalyModel, raw: Sequence[np.ndarray], false_reject: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`calibrate` for raw maps that are there already, float32 [N, h, w] each."""
    scales = [MapScale.of(maps) for maps in raw]
    constants = graph_constants(*scales)
    values = torch.from_numpy(constants)
    with torch.inference_mode():  # image by image: maps of large frames fill the memory
        each = zip(*(maps[:, None] for maps in map(torch.from_numpy, raw)), strict=True)
        scores = [float(model.score(model.anomaly_map(one, values))) for one in each]
    odd = odd_images(*raw)
    threshold = choose_threshold(np.array(scores), odd=odd, false_reject=false_reject)
    calibration = {
        "values": [float(value) for value in constants],
        "names": [*(f"{name}_scale" for name in model.raw_names), "offset"],
        "quantiles": dict(zip(model.raw_names, map(asdict, scales), strict=True)),
        "scores": scores,
        "odd_images": odd,
    }
    return calibration, {**asdict(threshold), "claim": threshold.claim}


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What a run records of its data set; the split is written out so that it can be checked later."""

    def names(paths: tuple[Path, ...]) -> list[str]:
        return [path.relative_to(dataset.root).as_posix() for path in paths]

    return {
        "name": dataset.name,
        "root": str(dataset.root.absolute()),
        "layout": dataset.layout,
        "train": names(dataset.train),
        "validation": names(dataset.validation),
        "test": names(tuple(item.path for item in dataset.test)),
    }


def health_of(dataset: Dataset) -> HealthProfile:
    """Input health of good images as the camera gives them; of a large data set, of an even share."""
    paths = sorted({*dataset.train, *dataset.validation})
    share = paths[:: -(-len(paths) // HEALTH_IMAGES)]
    return HealthProfile.of(read_image(path) for path in share)


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )


def made() -> dict[str, Any]:
    """Provenance of a run: when, by which versions, from which commit."""
    modules = {"edgead": edgead, "torch": torch, "numpy": np, "opencv": cv2}  # of whichever distribution
    versions = {name: str(module.__version__) for name, module in modules.items()}
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "utc": when,
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": git_commit(),
    }
