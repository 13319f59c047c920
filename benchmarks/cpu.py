"""Latency of one image on a CPU: the naive deployment, the merged graph, and the whole detector call.

    python -m edgead.benchmarks.cpu [--bundle X.edgead --run RUN] [--peer "COMMAND"] [--out FILE]

Without a bundle one with seeded random weights is made: speed does not depend on the weights. The calls
are timed in turn (see `edgead.benchmarks.timing`). A peer is any command that prints one JSON object
with the milliseconds of its whole call on a 900x900 frame under "p50"; it runs right after them.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgead.benchmarks.results_file import fresh_process, table, write_results
from edgead.benchmarks.timing import Timing, interleave
from edgead.bundle import Bundle, Golden, write_bundle
from edgead.detector import Detector, load
from edgead.export.graph import MergedGraph
from edgead.export.pack import DTYPES
from edgead.export.to_onnx import to_onnx
from edgead.manifest import Calibration, InputSpec, Manifest, OutputSpec, Threshold
from edgead.models.efficientad import EfficientAD, anomaly_map
from edgead.models.folding import normalise
from edgead.models.pdn import FEATURES, PDN, Size
from edgead.runtime import BACKENDS, open_backend
from edgead.training.efficientad import build_model
from edgead.training.run import read_run

FRAME_PX = 900
START = """
import json, sys, time
start = time.perf_counter()
import edgead
detector = edgead.load(sys.argv[1], backend=sys.argv[2])
seconds = time.perf_counter() - start
status = open("/proc/self/status").read()  # getrusage would tell the peak of the parent process
peak_kib = int(status.split("VmHWM:")[1].split()[0])
result = {"import_and_load_s": seconds, "modules": len(sys.modules), "peak_rss_mib": peak_kib / 1024}
print(json.dumps(result))
"""


def random_bundle(
    path: Path, *, precision: str = "fp32", size: Size = "s", targets: int = FEATURES
) -> EfficientAD:
    """Write a bundle with seeded random weights; returns the networks in it, FP32.

    Args:
        precision: "fp32" or "fp16", of the weights and convolutions in the graph.
        targets: Channels of the target space.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(PDN(size), seed=0, targets=targets).eval()
        if model.rotation is not None:
            model.rotation.normal_()
    image = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    with torch.inference_mode():
        local, logical = model(torch.from_numpy(image).permute(0, 3, 1, 2))
        maps = anomaly_map(local, logical, torch.tensor([1.0, 1.0, 0.0])).numpy()
    score = float(maps.max())
    manifest = Manifest(
        method=f"efficientad-{size}",
        name="random weights",
        precision=precision,
        input=InputSpec(height=256, width=256),
        outputs={"score": OutputSpec(shape=("N",)), "anomaly_map": OutputSpec(shape=("N", 64, 64))},
        calibration=Calibration(
            values=(1.0, 1.0, 0.0), names=("a", "b", "c"), meaning="none: random weights"
        ),
        threshold=Threshold(value=score / 2, basis="none: random weights"),
    )
    golden = Golden(image, np.array([score], np.float32), maps)
    write_bundle(path, manifest, to_onnx(MergedGraph(model, dtype=DTYPES[precision])), golden)
    return model


def naive(model: EfficientAD) -> Callable[[torch.Tensor], Any]:
    """Three networks one after another in eager PyTorch, FP32, as most deployments run them."""

    def run(image: torch.Tensor) -> float:
        with torch.inference_mode():
            x = normalise(image)
            student = model.student(x)
            local = (model.teacher_features(x) - student[:, : model.targets]).square().mean(1)
            logical = (model.autoencoder(x) - student[:, model.targets :]).square().mean(1)
            return float(anomaly_map(local, logical, torch.tensor([1.0, 1.0, 0.0])).max())

    return run


def measure(bundle: Path, model: EfficientAD, *, threads: int, rounds: int) -> dict[str, Timing]:
    """Median times of everything that is compared, in one process."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(1)
    frame = rng.integers(0, 256, (FRAME_PX, FRAME_PX, 3), dtype=np.uint8)
    image = rng.integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    eager, tensor = naive(model.eval()), torch.from_numpy(image).permute(0, 3, 1, 2)
    functions: dict[str, Callable[[], object]] = {"naive eager torch fp32": lambda: eager(tensor)}
    opened = Bundle.open(bundle)
    calibration = np.array(opened.manifest.calibration.values, np.float32)
    for name in BACKENDS:
        if importlib.util.find_spec(name) is None:
            continue
        backend = open_backend(opened, name, threads=threads)
        detector = Detector(opened, open_backend(opened, name, threads=threads))
        label = f"{name} {backend.precision}"
        feed = {"image": image, "calibration": calibration}
        functions[f"graph, {label}"] = lambda backend=backend, feed=feed: backend.infer(feed)  # type: ignore[misc]
        functions[f"det(frame {FRAME_PX}x{FRAME_PX}), {label}"] = lambda detector=detector: detector(
            frame
        )  # type: ignore[misc]
    return interleave(functions, rounds=rounds)


def start_up(bundle: Path, *, runs: int) -> dict[str, dict[str, float]]:
    """Import plus load in fresh processes: medians without the first, which fills the file caches."""
    found = {}
    for name in (*BACKENDS, "auto"):
        if name != "auto" and importlib.util.find_spec(name) is None:
            continue
        command = [sys.executable, "-c", START, str(bundle), name]
        samples = [fresh_process(command) for _ in range(runs + 1)][1:]
        found[name] = {key: float(np.median([sample[key] for sample in samples])) for key in samples[0]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="measure this bundle; needs --run")
    parser.add_argument(
        "--run", type=Path, help="the run folder that the bundle came from, for the naive form"
    )
    parser.add_argument("--peer", help="command that measures a peer on this machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if (arguments.bundle is None) != (arguments.run is None):
        parser.error("--bundle and --run go together: a bundle, and the run that it came from")
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle or Path(folder) / "random.edgead"
        model = read_run(arguments.run).model if arguments.bundle else random_bundle(bundle)
        with load(bundle) as detector:
            chosen = f"{detector.backend} {detector.precision}"
        timings = measure(bundle, model, threads=arguments.threads, rounds=arguments.rounds)
        peer = fresh_process(shlex.split(arguments.peer)) if arguments.peer else None
        start = start_up(bundle, runs=5)
    base = timings["naive eager torch fp32"].p50
    rows = [
        (name, f"{t.p50:.1f}", f"{t.p90:.1f}", f"{t.p99:.1f}", f"{base / t.p50:.2f}")
        for name, t in timings.items()
    ]
    if peer:
        rows.append(
            (peer.get("name", "peer"), f"{peer['p50']:.1f}", "", "", f"{base / peer['p50']:.2f}")
        )
    print(table(("what", "p50 ms", "p90 ms", "p99 ms", "times naive"), rows))
    print()
    columns = ("import + load s", "peak RSS MiB", "modules")
    print(
        table(
            ("backend", *columns),
            [
                (
                    name,
                    f"{v['import_and_load_s']:.2f}",
                    f"{v['peak_rss_mib']:.0f}",
                    f"{v['modules']:.0f}",
                )
                for name, v in start.items()
            ],
        )
    )
    if arguments.out:
        results = {
            "threads": arguments.threads,
            "auto_chooses": chosen,
            "timings_ms": {name: t.to_dict() for name, t in timings.items()},
            "start_up": start,
            "peer": peer,
        }
        write_results(arguments.out, "cpu", results)


if __name__ == "__main__":
    main()
