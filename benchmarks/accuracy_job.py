"""One job of `edgead.benchmarks.accuracy`: train, export, evaluate the packed bundle, in its folder.

    python -m edgead.benchmarks.accuracy_job FOLDER [--threads N]

FOLDER/job.json         what to do; written by `prepare`
FOLDER/run/             the training run, with its checkpoint while it trains
FOLDER/bundle.edgead    what is evaluated
FOLDER/starts.jsonl     process id and time of each start, one line each
FOLDER/evaluation.json  all that `edgead evaluate` tells
FOLDER/result.json      the figures; there is one if, and only if, the job is finished
FOLDER/error.json       why it failed

A job that was killed goes on where its last checkpoint or its finished run was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from edgead import __version__
from edgead.benchmarks.accuracy_list import Job
from edgead.detector import load
from edgead.errors import DataError
from edgead.evaluate import Evaluation, evaluate
from edgead.export.pack import export_run
from edgead.files import write_text
from edgead.image import list_images
from edgead.methods import trainer_of
from edgead.models.files import sha256, shipped_teacher
from edgead.training import train as training
from edgead.training.data import open_dataset
from edgead.training.run import RUN_FILE

log = logging.getLogger(__name__)

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
ERROR_FILE = "error.json"
STARTS_FILE = "starts.jsonl"
BUNDLE_FILE = "bundle.edgead"
FIGURES = (
    "image_auroc",
    "pixel_auroc",
    "au_pro_30",
    "au_pro_05",
    "f1_max",
    "false_reject_rate",
    "missed_defect_rate",
)
COUNTS = ("good_images", "defect_images", "false_rejects", "missed_defects")


def prepare(out: Path, job: Job, root: Path) -> Path:
    """Make the folder of a job and write down what to do; returns the folder.

    Its name ends with a hash over all that the figures depend on: settings, images, frozen weights and
    version of edgead. What has changed gets a new folder, and nothing old is taken for new.
    """
    facts = {**asdict(job), "inputs": _inputs(root, job), "version": __version__}
    del facts["published"]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = out / "jobs" / f"{job.name}-{job.method}-seed{job.config['seed']}-{key[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"root": str(root.resolve()), "job": asdict(job)}
    write_text(folder / JOB_FILE, json.dumps(content, indent=2))
    return folder


def read_job(folder: Path) -> tuple[Job, Path]:
    """The job of a folder, and the root of its paths."""
    content = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    return Job(**content["job"]), Path(content["root"])


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """Content of result.json, else of error.json (it has a key "error"), else None."""
    for name in (RESULT_FILE, ERROR_FILE):
        if (folder / name).exists():
            content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            return content
    return None


def write_error(folder: Path, message: str, details: str = "") -> None:
    """Record why a job failed; the paths in front of its files are left out of the message."""
    root = str(read_job(folder)[1])
    message = message.replace(f"{folder.resolve()}{os.sep}", "").replace(f"{root}{os.sep}", "")
    record = {"error": message, "details": details, "utc": _now()}
    write_text(folder / ERROR_FILE, json.dumps(record, indent=2))


def run_job(folder: Path | str, threads: int | None = None) -> None:
    """Do the job of a folder. Nothing is raised: what fails is in its error.json.

    If another process is at work on the folder (one that outlived its caller, perhaps), this one waits
    for it first.

    Args:
        threads: For training and inference; None leaves it to the libraries.
    """
    folder = Path(folder)
    with _alone(folder):
        if (folder / RESULT_FILE).exists():
            return
        (folder / ERROR_FILE).unlink(missing_ok=True)
        with (folder / STARTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"pid": os.getpid(), "utc": _now()}) + "\n")
        try:
            result = _result(folder, threads)
        except Exception as error:  # it must not stop the other jobs
            write_error(folder, f"{type(error).__name__}: {error}", traceback.format_exc())
        else:
            write_text(folder / RESULT_FILE, json.dumps(result, indent=2))


def _result(folder: Path, threads: int | None) -> dict[str, Any]:
    job, root = read_job(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    dataset = open_dataset(root / job.data, seed=job.config["seed"])
    run, bundle = folder / "run", folder / BUNDLE_FILE
    if not (run / RUN_FILE).exists():
        named = [("teacher", job.teacher), ("penalty", job.penalty), ("backbone", job.backbone)]
        files: dict[str, Any] = {option: root / name for option, name in named if name}
        training.train(
            dataset,
            run,
            trainer_of(job.method).Config(**job.config),
            resume=True,
            **files,
        )
    if not bundle.exists():
        export_run(run, bundle, precision=job.precision, name=job.name)
    # From here on nothing is known but the bundle.
    with load(bundle, backend=job.backend, threads=threads) as detector:
        evaluation = evaluate(detector, dataset)
    write_text(folder / "evaluation.json", evaluation.to_json())
    record = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    return {
        **asdict(job),
        **_figures(evaluation),
        "train": {**record["training"], "starts": len((folder / STARTS_FILE).read_text().splitlines())},
        "images": {part: len(getattr(dataset, part)) for part in ("train", "validation", "test")},
        "data_fingerprint": record["data"]["fingerprint"],
        "weights_used": record["weights"],
        "penalty_used": record.get("penalty"),  # EfficientAD has them
        "made": record["made"],
    }


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    """What the table takes from an evaluation; NaN is None."""
    content = json.loads(evaluation.to_json())
    kept = ("threshold", "threshold_basis", "per_defect", "notes", "errors", "machine")
    return {
        "figures": {name: content[name] for name in FIGURES},
        "counts": {name: content[name] for name in COUNTS},
        "ran": f"{content['backend']} {content['precision']}",
        **{name: content[name] for name in kept},
    }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system lets go of when the process ends, however it does."""
    import fcntl

    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.warning("%s: another process is at work on this job; waiting for it", folder.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _inputs(root: Path, job: Job) -> dict[str, str | None]:
    """Hashes of a job's images and weights; None for what cannot be read, on which the job fails."""
    return {
        "data": _quietly(_data_hash, root / job.data),
        "penalty": _quietly(_names_hash, root / job.penalty) if job.penalty else None,
        "weights": _quietly(sha256, _weights(root, job)),
    }


def _weights(root: Path, job: Job) -> Path:
    """The frozen network of a job."""
    named = job.teacher or job.backbone
    return root / named if named else shipped_teacher(job.config.get("size", "s"))


def _quietly(function: Any, path: Path) -> str | None:
    try:
        return str(function(path))
    except (DataError, OSError):
        return None


@cache
def _data_hash(path: Path) -> str:
    """Over the contents of the good images and the names and sizes of the test images and masks."""
    dataset = open_dataset(path)
    tests = [file for item in dataset.test for file in (item.path, *item.masks)]
    sizes = (f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}" for file in tests)
    return _hash(dataset.fingerprint(), *sizes)


@cache
def _names_hash(folder: Path) -> str:
    return _hash(*(path.relative_to(folder).as_posix() for path in list_images(folder)))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description="One job of edgead.benchmarks.accuracy.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    run_job(arguments.folder, arguments.threads)


if __name__ == "__main__":
    main()
