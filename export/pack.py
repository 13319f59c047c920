"""`edgead export`: a finished run becomes one bundle file, if the parity gate lets it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgead.bundle import write_bundle
from edgead.errors import DataError, ExportError
from edgead.export.graph import MergedGraph, flop_per_frame
from edgead.export.narrow import whole_inputs
from edgead.export.parity import Parity, compare
from edgead.export.reduce import Size, reduce_run, sizes_for
from edgead.export.to_onnx import to_onnx
from edgead.health import HEALTH
from edgead.image import read_image
from edgead.manifest import (
    RESIZE_IN_GRAPH,
    RESIZE_ON_HOST,
    Calibration,
    InputSpec,
    Manifest,
    OutputSpec,
    Threshold,
)
from edgead.models.base import AnomalyModel
from edgead.models.efficientad import EfficientAD
from edgead.models.tiled import Tiled
from edgead.training.data import open_dataset
from edgead.training.run import Run, read_run

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
MAX_FRAME_PX = 8192
SCALE = (
    "map = the sum of each raw map times its scale, plus offset;"
    " 0 at the 0.9 quantile of good validation images, 0.1 at the 0.995 quantile."
)


def export_run(
    run: Path | str,
    out: Path | str,
    *,
    precision: str = "fp32",
    frame: tuple[int, int] | None = None,
    name: str | None = None,
    reduce: str = "off",
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Export a run, prove it, and write the bundle.

    Args:
        run: Folder that `edgead train` wrote.
        out: The `.edgead` file; replaced atomically.
        precision: "fp32" or "fp16", of the weights and convolutions in the graph.
        frame: (height, width) in pixels of the camera's frames, to put the resize into the graph.
        name: Name of the recipe; default: that of the data set.
        reduce: "off"; "auto" for the fewest operations that pass their gate, all of them if none do; or
            a number of directions in the difference convolutions (see `edgead.export.reduce`).
        progress: Called with (images compared, images in all).

    Returns:
        What the parity gate measured.

    Raises:
        ExportError: the gate fails, or the run's images are gone. TrainingError: no finished run.
    """
    if precision not in DTYPES:
        raise ExportError(f"precision {precision!r} is unknown; choose one of {', '.join(DTYPES)}")
    finished = read_run(run)
    record, smallest = finished.record, finished.model.input_px
    if frame and not all(s <= side <= MAX_FRAME_PX for s, side in zip(smallest, frame, strict=True)):
        raise ExportError(
            f"frame {frame[0]}x{frame[1]}: it has to lie between {smallest[0]}x{smallest[1]} px, the"
            f" networks' size, and {MAX_FRAME_PX} px (height x width)"
        )
    root = Path(record["data"]["root"])
    images = _images(record, root)
    finished, model, outcome = _reduced(finished, images, reduce, progress)
    record = finished.record
    graph = MergedGraph(model, dtype=DTYPES[precision], frame=frame)
    content = to_onnx(graph)
    parity, golden = compare(
        model,
        content,
        images,
        precision=precision,
        frame=frame,
        root=root,
        progress=progress,
        calibration=np.array(record["calibration"]["values"], np.float32),
        threshold=record["threshold"]["value"],
    )
    manifest = _manifest(finished, parity, precision, frame, name or record["data"]["name"])
    about = _cost(graph) | ({"reduction": outcome} if outcome else {})
    manifest = replace(manifest, model=manifest.model | about)
    write_bundle(Path(out), manifest, content, golden)
    return parity


def _images(record: dict[str, Any], root: Path) -> list[Path]:
    """The validation and test images of a run, for the parity gate; test images may be lacking."""
    parts = [[root / path for path in record["data"][part]] for part in ("validation", "test")]
    images = sum(parts, [])
    # Each thread holds an image, which may have a hundred megapixels.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        problems = dict(zip(images, pool.map(_problem, images), strict=True))
    validation, test = ([path for path in part if not problems[path]] for part in parts)
    found = [*validation, *test]
    if len(found) == len(images):
        return found
    first = next(filter(None, problems.values()))
    lost = len(images) - len(found)
    said = f"{lost} of the run's {len(images)} images are gone or damaged, the first: {first}"
    if len(validation) < len(parts[0]) or not test:
        raise ExportError(f"{said}; the parity gate needs them")
    log.warning("%s; the parity gate goes without", said)
    return found


def _problem(path: Path) -> str:
    try:
        read_image(path)
    except DataError as error:
        return str(error)
    return ""


def _reduced(
    run: Run, images: list[Path], reduce: str, progress: Callable[[int, int], None] | None
) -> tuple[Run, AnomalyModel, dict[str, Any]]:
    """The run, calibrated anew if reduced, its networks, and what the manifest says of the reduction."""
    if reduce == "off":
        return run, run.model, {}
    if not isinstance(run.model, EfficientAD):
        tiled = " with --tile" if isinstance(run.model, Tiled) else ""
        raise ExportError(
            f"--reduce {reduce}: this is a run of {run.record['method']}{tiled}; only EfficientAD on"
            " whole images can be reduced. Leave the option out"
        )
    whole = Size(run.model.targets, whole_inputs(run.model))
    sizes = sizes_for(reduce, run.model)
    found, refused = reduce_run(run, images, _labels(run.record), sizes=sizes, progress=progress)
    if found is None and reduce != "auto":
        raise ExportError(
            f"--reduce {reduce} fails its gate on this run: {'; '.join(refused[sizes[0]][:5])}."
            " Take more directions, auto, or off"
        )
    left = Size(found.gate.directions, found.gate.inputs) if found else whole
    outcome = {
        "asked": reduce,
        **{name: getattr(left, name) for name in Size._fields},
        **{f"{name}_of": getattr(whole, name) for name in Size._fields},
        **({"gate": found.gate.to_dict()} if found else {}),
        "refused": {str(size): why for size, why in refused.items()},
    }
    if found is None:
        log.warning("no reduction passes its gate on this run: exported whole")
        return run, run.model, outcome
    record = run.record | {"calibration": found.calibration, "threshold": found.threshold}
    return replace(run, record=record), found.model, outcome


def _labels(record: dict[str, Any]) -> dict[Path, int]:
    """0 or 1 (defective) of the run's test images; empty if the data set cannot be read any more."""
    try:
        dataset = open_dataset(record["data"]["root"], seed=record["config"]["seed"])
    except DataError as error:
        log.warning("the reduction is gated without labels: %s", error)
        return {}
    return {item.path: item.label for item in dataset.test}


def _manifest(
    run: Run, parity: Parity, precision: str, frame: tuple[int, int] | None, name: str
) -> Manifest:
    record = run.record
    model = run.model
    height, width = frame or model.input_px
    threshold = {key: value for key, value in record["threshold"].items() if key != "claim"}
    return Manifest(
        method=record["method"],
        name=name,
        precision=precision,
        input=InputSpec(height=height, width=width, resize=RESIZE_IN_GRAPH if frame else RESIZE_ON_HOST),
        outputs={
            "score": OutputSpec(shape=("N",)),
            "anomaly_map": OutputSpec(shape=("N", *model.map_cells)),
        },
        calibration=Calibration(
            values=tuple(record["calibration"]["values"]),
            names=tuple(record["calibration"]["names"]),
            meaning=f"{SCALE} The raw maps: {model.meaning}",
            quantiles=record["calibration"]["quantiles"],
        ),
        threshold=Threshold(**threshold),
        parity=parity.to_dict(),
        model={
            **model.architecture(),
            **record["weights"],
            **{key: record[key] for key in (HEALTH,) if key in record},  # runs before it was taken
        },
        provenance=_provenance(record),
    )


def _cost(graph: MergedGraph) -> dict[str, Any]:
    """Parameters and operations of what ships."""
    parameters = sum(parameter.numel() for parameter in graph.parameters())
    return {"parameters": parameters, "gflop_per_image": round(flop_per_frame(graph) / 1e9, 1)}


def _provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Where the bundle comes from, without a path of the machine it was made on."""
    data = record["data"]
    counts = {part: len(data[part]) for part in ("train", "validation", "test")}
    versions = {
        package: importlib.metadata.version(package)
        for package in ("edgead", "torch", "onnx", "onnxscript", "onnxruntime")
    }
    return {
        "data": {
            "name": data["name"],
            "layout": data["layout"],
            "fingerprint": data["fingerprint"],
            "images": counts,
        },
        **{key: record[key] for key in ("penalty", "fit", "clustering") if key in record},
        "training": record["training"] | {"config": record["config"]},
        "trained": record["made"],
        "exported": {
            "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions,
        },
    }
