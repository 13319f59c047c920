"""What fewer target channels save: graph, whole call, training step, operations, engine size.

    python -m edgead.benchmarks.reduced [--directions 32,64,384] [--size s|m] [--quick] [--out FILE]

Random weights: speed does not depend on them. Measured are the graphs of runs that were trained with
`--targets K`; for PDN-S, `edgead export --reduce K` gives graphs of the same operations and sizes. Times
are taken in turn over all K in one process (see `edgead.benchmarks.timing`).
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgead.benchmarks.cpu import FRAME_PX, random_bundle
from edgead.benchmarks.results_file import table, write_results
from edgead.benchmarks.timing import Timing, interleave
from edgead.bundle import Bundle
from edgead.detector import Detector
from edgead.engines.build import build_engine
from edgead.export.graph import MergedGraph, flop_per_frame
from edgead.flavour import open_flavour
from edgead.manifest import RESIZE_ON_HOST
from edgead.models.efficientad import IMAGE_PX, EfficientAD
from edgead.models.pdn import FEATURES, Size
from edgead.runtime import open_backend
from edgead.training.device import compute_dtype, keep_memory
from edgead.training.efficientad import TrainConfig, _step
from edgead.training.teacher_targets import TeacherTargets

CPU = torch.device("cpu")
ENGINE_TARGET = "sm86"


def inference(
    bundles: Mapping[int, Bundle] | Mapping[str, Bundle], *, threads: int, rounds: int
) -> dict[str, Timing]:
    """Times of graph and whole call per bundle and back end.

    Their names are "<what>, <back end> <precision>, <key of the bundle>". The frame is 900x900 px, or of
    the one size that the bundle takes.
    """
    rng = np.random.default_rng(1)
    functions: dict[str, Callable[[], object]] = {}
    for name in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(name) is None:
            continue
        for k, bundle in bundles.items():
            spec = bundle.manifest.input
            image = rng.integers(0, 256, (1, spec.height, spec.width, 3), dtype=np.uint8)
            takes_any = spec.resize == RESIZE_ON_HOST
            side = (FRAME_PX, FRAME_PX) if takes_any else (spec.height, spec.width)
            frame = rng.integers(0, 256, (*side, 3), dtype=np.uint8)
            backend = open_backend(bundle, name, threads=threads)
            detector = Detector(bundle, open_backend(bundle, name, threads=threads))
            calibration = np.array(bundle.manifest.calibration.values, np.float32)
            feed = {"image": image, "calibration": calibration}
            label = f"{name} {backend.precision}"
            functions[f"graph, {label}, {k}"] = lambda b=backend, f=feed: b.infer(f)  # type: ignore[misc]
            functions[f"call, {label}, {k}"] = lambda d=detector, f=frame: d(f)  # type: ignore[misc]
    return interleave(functions, rounds=rounds, block=3)


def step_seconds(models: dict[int, EfficientAD], *, steps: int) -> dict[int, float]:
    """Median seconds of a training step per K, on the CPU; the first two of each are not counted."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
    batch = np.stack([images[0], images[1], images[0]], dtype=np.float32)
    sessions = {}
    for k, model in models.items():
        model.to(memory_format=torch.channels_last)
        targets = TeacherTargets(model, images, CPU, 64)
        sessions[k] = targets, TrainConfig().optimizer_of(model)
        model.train()
    seconds: dict[int, list[float]] = {k: [] for k in models}
    for step in range(-2, steps):
        for k, (targets, optimizer) in sessions.items():
            start = time.perf_counter()
            _step(models[k], optimizer, batch, targets[0], CPU, seed=step + 2)
            if step >= 0:
                seconds[k].append(time.perf_counter() - start)
    return {k: float(np.median(values)) for k, values in seconds.items()}


def gflop(model: EfficientAD) -> float:
    """Multiplications and additions of the merged graph for one image of 256 px, in 1e9."""
    return flop_per_frame(MergedGraph(model)) / 1e9


def engine_mib(bundle: Bundle) -> float | None:
    """Size of an engine of TensorRT for RTX, built for another GPU's capability; None without it."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return None
    plan = build_engine(bundle.model_bytes(), open_flavour("tensorrt-rtx"), target=ENGINE_TARGET)
    return len(plan) / 2**20


def measure(
    directions: Sequence[int], size: Size, folder: Path, *, threads: int, quick: bool
) -> dict[str, Any]:
    """Everything, as it goes into the results file: per K a row, and the single times."""
    models, bundles = {}, {}
    for k in directions:
        path = folder / f"{k}.edgead"
        models[k] = random_bundle(path, size=size, targets=k)
        bundles[k] = Bundle.open(path)
    rows: dict[str, dict[str, Any]] = {
        str(k): {
            "gflop": round(gflop(models[k]), 2),
            "model_mib": round(len(bundles[k].model_bytes()) / 2**20, 2),
            f"engine_{ENGINE_TARGET}_mib": engine_mib(bundles[k]),
        }
        for k in directions
    }
    timings = inference(bundles, threads=threads, rounds=1 if quick else 8)
    for label, timing in timings.items():
        what, backend, number = label.split(", ")
        rows[number][f"{what}, {backend}, p50 ms"] = round(timing.p50, 2)
    precision = str(compute_dtype(CPU)).removeprefix("torch.")
    for k, seconds in step_seconds(models, steps=2 if quick else 20).items():
        rows[str(k)][f"training step, {precision}, s"] = round(seconds, 4)
    return {"rows": rows, "timings_ms": {label: t.to_dict() for label, t in timings.items()}}


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directions", type=_numbers, default=[32, 64, 96, 128, FEATURES], metavar="K,..."
    )
    parser.add_argument("--size", choices=("s", "m"), default="s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that it works")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(
            arguments.directions,
            arguments.size,
            Path(folder),
            threads=arguments.threads,
            quick=arguments.quick,
        )
    rows = results["rows"]
    header = list(rows[str(arguments.directions[-1])])
    shown = [
        (k, *("" if row[key] is None else f"{row[key]:.4g}" for key in header))
        for k, row in rows.items()
    ]
    print(table(("K", *header), shown))
    if arguments.out:
        settings = {"size": arguments.size, "threads": arguments.threads, "quick": arguments.quick}
        write_results(arguments.out, "reduced", settings | results)


if __name__ == "__main__":
    main()
