"""`edgead export`: a finished run becomes one bundle file, if the parity gate lets it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgead.bundle import write_bundle
from edgead.errors import ExportError
from edgead.export.graph import MergedGraph
from edgead.export.parity import Parity, compare
from edgead.export.to_onnx import to_onnx
from edgead.manifest import (
    RESIZE_IN_GRAPH,
    RESIZE_ON_HOST,
    Calibration,
    InputSpec,
    Manifest,
    OutputSpec,
    Threshold,
)
from edgead.models.efficientad import BORDER_CELLS, IMAGE_PX, EfficientAD
from edgead.training.run import Run, read_run

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
MAX_FRAME_PX = 8192
MEANING = (
    "map = student_scale * mean_c((T - S)^2) + autoencoder_scale * mean_c((A - S')^2) + offset,"
    " over the raw maps of EfficientAD (arXiv 2303.14535);"
    " 0 at the 0.9 quantile of good validation images, 0.1 at the 0.995 quantile"
)


def export_run(
    run: Path | str,
    out: Path | str,
    *,
    precision: str = "fp32",
    frame: tuple[int, int] | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Export a run, prove it, and write the bundle.

    Args:
        run: Folder that `edgead train` wrote.
        out: The `.edgead` file; replaced atomically.
        precision: "fp32" or "fp16", of the weights and convolutions in the graph.
        frame: (height, width) in pixels of the camera's frames, to put the resize into the graph.
        name: Name of the recipe; default: that of the data set.
        progress: Called with (images compared, images in all).

    Returns:
        What the parity gate measured.

    Raises:
        ExportError: the gate fails, or the run's images are gone. TrainingError: no finished run.
    """
    if precision not in DTYPES:
        raise ExportError(f"precision {precision!r} is unknown; choose one of {', '.join(DTYPES)}")
    if frame is not None and not all(IMAGE_PX <= side <= MAX_FRAME_PX for side in frame):
        raise ExportError(
            f"frame {frame[0]}x{frame[1]}:"
            f" both sides have to lie between {IMAGE_PX} and {MAX_FRAME_PX} px"
        )
    finished = read_run(run)
    record = finished.record
    root = Path(record["data"]["root"])
    images = _images(record, root)
    graph = MergedGraph(finished.model, dtype=DTYPES[precision], frame=frame)
    content = to_onnx(graph)
    parity, golden = compare(
        finished.model,
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
    write_bundle(Path(out), manifest, content, golden)
    return parity


def _images(record: dict[str, Any], root: Path) -> list[Path]:
    """The validation and test images of a run, for the parity gate."""
    images = [root / path for path in (*record["data"]["validation"], *record["data"]["test"])]
    missing = [path for path in images if not path.is_file()]
    if missing:
        raise ExportError(
            f"{len(missing)} of the run's {len(images)} images are gone, the first is {missing[0]}:"
            " the parity gate needs them"
        )
    return images


def _manifest(
    run: Run, parity: Parity, precision: str, frame: tuple[int, int] | None, name: str
) -> Manifest:
    record = run.record
    height, width = frame or (IMAGE_PX, IMAGE_PX)
    cells = 56 + 2 * BORDER_CELLS
    threshold = {key: value for key, value in record["threshold"].items() if key != "claim"}
    return Manifest(
        method=record["method"],
        name=name,
        precision=precision,
        input=InputSpec(height=height, width=width, resize=RESIZE_IN_GRAPH if frame else RESIZE_ON_HOST),
        outputs={
            "score": OutputSpec(shape=("N",)),
            "anomaly_map": OutputSpec(shape=("N", cells, cells)),
        },
        calibration=Calibration(
            values=tuple(record["calibration"]["values"]),
            names=("student_scale", "autoencoder_scale", "offset"),
            meaning=MEANING,
            quantiles=record["calibration"]["quantiles"],
        ),
        threshold=Threshold(**threshold),
        parity=parity.to_dict(),
        model=_describe_model(run.model) | {"teacher": record["teacher"]},
        provenance=_provenance(record),
    )


def _describe_model(model: EfficientAD) -> dict[str, Any]:
    """Size and cost of the networks as published; the fused graph needs no more."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, IMAGE_PX, IMAGE_PX, dtype=torch.uint8))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "gflop_per_image": round(counter.get_total_flops() / 1e9, 1)}


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
        "penalty": record["penalty"],
        "training": record["training"] | {"config": record["config"]},
        "trained": record["made"],
        "exported": {
            "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions,
        },
    }
