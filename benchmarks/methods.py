"""What the methods cost: graph, whole call, operations, sizes, memory; and ProtoAD's two exact savings.

    python -m edgead.benchmarks.methods X.edgead Y.edgead ... [--out FILE]
    python -m edgead.benchmarks.methods --protoad [--kind wide_resnet50_2] [--out FILE]

The first form measures bundles against each other in one process, in turn. The second one times ProtoAD
with seeded random weights (speed does not depend on them) in its plain form, which joins all feature
maps before it compares them, and in the split form that ships; and the clustering against finch-clust,
if that is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F

from edgead.benchmarks.command import exit_status
from edgead.benchmarks.cpu import START
from edgead.benchmarks.reduced import ENGINE_TARGET, engine_mib, inference
from edgead.benchmarks.results_file import fresh_process, table, write_results
from edgead.benchmarks.timing import interleave
from edgead.bundle import Bundle
from edgead.errors import BundleError
from edgead.export.graph import MergedGraph
from edgead.export.to_onnx import to_onnx
from edgead.models.maps import as_weight, both_axes
from edgead.models.protoad import TAPS, ProtoAD
from edgead.models.taps import Backbone
from edgead.training.finch import finch

PROTOTYPES = 1000
POINTS, POINT_CHANNELS, GROUPS = 4000, 96, 50


def of_bundles(paths: Sequence[Path], *, threads: int, rounds: int) -> dict[str, Any]:
    """A row for each bundle, and the single times."""
    bundles = {path.stem: Bundle.open(path) for path in paths}
    if len(bundles) < len(paths):
        raise BundleError("several bundles have the same file name: rename them, the table goes by it")
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        bundle = bundles[path.stem]
        model = bundle.manifest.model
        start = fresh_process([sys.executable, "-c", START, str(path), "onnxruntime"])
        rows[path.stem] = {
            "method": bundle.manifest.method,
            "networks": model.get("kind", model.get("size", "")),
            "GFLOP": model.get("gflop_per_image"),
            "model MiB": round(len(bundle.model_bytes()) / 2**20, 1),
            f"engine {ENGINE_TARGET} MiB": engine_mib(bundle),
            "peak RSS MiB": round(start["peak_rss_mib"]),
        }
    timings = inference(bundles, threads=threads, rounds=rounds)
    for label, timing in timings.items():
        what, backend, name = label.split(", ")
        rows[name][f"{what}, {backend}, ms"] = round(timing.p50, 2)
    return {"rows": rows, "timings_ms": {label: t.to_dict() for label, t in timings.items()}}


class Plain(torch.nn.Module):
    """ProtoAD's networks as published: feature maps enlarged and joined, then compared."""

    def __init__(self, model: ProtoAD, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = model.backbone.merged(dtype)
        self.prototypes = model.prototypes
        self.register_buffer("smoothing", as_weight(model.smoothing))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        # by whole factors, and with its own norm: in a graph sizes must not come from the uint8 image
        levels = self.backbone(x)
        joined = torch.cat(
            [
                F.interpolate(level, scale_factor=2.0**i) if i else level
                for i, level in enumerate(levels)
            ],
            dim=1,
        )
        joined = joined / torch.linalg.vector_norm(joined, dim=1, keepdim=True).clamp(min=1e-12)
        cosines = F.conv2d(joined, self.prototypes[:, :, None, None])
        cells = (1 - cosines.amax(1)).clamp(min=0)
        return (both_axes(cells[:, None], self.smoothing)[:, 0],)


class PlainProtoAD(ProtoAD):
    """Ships in its plain form."""

    def merged(self, dtype: torch.dtype) -> torch.nn.Module:
        return Plain(self, dtype)


def of_protoad(kind: str, *, threads: int, rounds: int) -> dict[str, Any]:
    """Times of the plain and the split form through ONNX Runtime, and how far apart their maps are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = Backbone(kind, TAPS[kind])
        prototypes = torch.randn(PROTOTYPES, sum(backbone.channels))
    prototypes = torch.nn.functional.normalize(prototypes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    image = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    feed = {"image": image, "calibration": np.array([1, 0], np.float32)}
    runs, maps = {}, []
    for name, form in (("plain", PlainProtoAD), ("split", ProtoAD)):
        content = to_onnx(MergedGraph(form(backbone, prototypes)))
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        maps.append(session.run(["anomaly_map"], feed)[0])
        runs[name] = lambda session=session: session.run(None, feed)
    times = interleave(runs, rounds=rounds, block=3)
    return {
        "kind": kind,
        "prototypes": PROTOTYPES,
        "largest_difference": float(np.abs(maps[0] - maps[1]).max()),
        "times_faster": round(times["plain"].p50 / times["split"].p50, 2),
        "timings_ms": {name: timing.to_dict() for name, timing in times.items()},
    }


def of_finch(*, rounds: int) -> dict[str, Any]:
    """Seconds to cluster the same points, and whether both find the same number of clusters."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((GROUPS, POINT_CHANNELS))
    points = centres[rng.integers(0, GROUPS, POINTS)] + 0.5 * rng.standard_normal(
        (POINTS, POINT_CHANNELS)
    )
    ours, theirs = torch.from_numpy(points.astype(np.float32)), points.astype(np.float32)
    labels = finch(ours)
    found: dict[str, Any] = {"points": POINTS, "channels": POINT_CHANNELS}
    found["clusters"] = [int(level.max()) + 1 for level in labels]
    found["seconds"] = {"edgead": _seconds(lambda: finch(ours), rounds)}
    if importlib.util.find_spec("finch") is None:
        return found | {"finch-clust": "is not installed"}
    from finch import FINCH

    quiet = {"distance": "cosine", "verbose": False}
    found["finch-clust clusters"] = [int(n) for n in FINCH(theirs, **quiet)[1]]
    found["seconds"]["finch-clust"] = _seconds(lambda: FINCH(theirs, **quiet), rounds)
    return found


def _seconds(function: Any, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)), 3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="*", metavar="X.edgead")
    parser.add_argument("--protoad", action="store_true", help="time ProtoAD's forms and the clustering")
    parser.add_argument("--kind", choices=TAPS, default="wide_resnet50_2", help="backbone of ProtoAD")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    if not (arguments.bundles or arguments.protoad):
        parser.error("name bundles, or --protoad")
    return exit_status("methods", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"threads": arguments.threads}
    options = {"threads": arguments.threads, "rounds": arguments.rounds}
    if arguments.bundles:
        results |= of_bundles(arguments.bundles, **options)
        rows = results["rows"]
        header = list(dict.fromkeys(key for row in rows.values() for key in row))
        lines = [(name, *(row.get(key, "") for key in header)) for name, row in rows.items()]
        print(table(("bundle", *header), lines))
    if arguments.protoad:
        results["protoad"] = of_protoad(arguments.kind, **options)
        results["finch"] = of_finch(rounds=3)
        print(results["protoad"], results["finch"], sep="\n")
    if arguments.out:
        write_results(arguments.out, "methods", results)


if __name__ == "__main__":
    sys.exit(main())
