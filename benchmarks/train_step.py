"""Seconds per training step of EfficientAD-S: edgead's against others', in one run.

    python -m edgead.benchmarks.train_step [--peer PATH ...] [--memory] [--rounds 3] [--out FILE]

The plain loop is a reading of the paper: teacher computed anew, three separate student passes, a full
quantile, FP32. It and edgead see the same images; only speed differs. Peers are named by path, see
`edgead.benchmarks.train_step_peer`, and take their turn in every round. `--memory` adds what a training
with 300 images takes at its peak, in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgead.benchmarks.results_file import fresh_process, table, write_results
from edgead.benchmarks.train_step_peer import name_of
from edgead.errors import EdgeADError
from edgead.models.efficientad import EfficientAD
from edgead.models.pdn import FEATURES, PDN
from edgead.training.device import compute_dtype, keep_memory, pick_device
from edgead.training.efficientad import TrainConfig, _step, build_model
from edgead.training.images import jitter
from edgead.training.teacher_targets import TeacherTargets, to_input

WARM_UP = 5
STEPS = 7
"""Per round and loop."""
FEWER_TARGETS = 64
LOOPS = {
    "plain": "plain loop, float32, Adam",
    "edgead": "edgead, Adam",
    "edgead_muon": "edgead, Muon",
    "edgead_muon_64": f"edgead, Muon, {FEWER_TARGETS} directions",
}


def plain_step(
    model: EfficientAD, optimizer: torch.optim.Optimizer, batch: np.ndarray, device: torch.device
) -> float:
    """One step as the paper's algorithm reads."""
    image, penalty, jittered = to_input(batch, device).contiguous().split(1)
    with torch.no_grad():
        target = model.teacher_features(image)
    distance = (target - model.student(image)[:, :FEATURES]).square()
    # torch.quantile sorts everything; the paper's definition
    hard = distance[distance >= torch.quantile(distance, 0.999)].mean()
    pretraining = model.student(penalty)[:, :FEATURES].square().mean()
    with torch.no_grad():
        jittered_target = model.teacher_features(jittered)
    decoded = model.autoencoder(jittered)
    student = model.student(jittered)[:, FEATURES:]
    loss = (
        hard
        + pretraining
        + (jittered_target - decoded).square().mean()
        + (decoded - student).square().mean()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def loops(device: torch.device) -> dict[str, Callable[[int], object]]:
    """A function for each of `LOOPS` that does the step of a number."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    batches = [
        np.stack([images[i % 4], images[(i + 1) % 4], jitter(images[i % 4], rng)], dtype=np.float32)
        for i in range(8)
    ]

    plain = build_model(PDN("s").eval(), seed=0).to(device).train()
    parameters = [*plain.student.parameters(), *plain.autoencoder.parameters()]
    plain_adam = torch.optim.Adam(parameters, 1e-4, weight_decay=1e-5)
    found: dict[str, Callable[[int], object]] = {
        "plain": lambda step: plain_step(plain, plain_adam, batches[step % 8], device)
    }

    def add(name: str, config: TrainConfig) -> None:
        model = build_model(PDN("s").eval(), seed=0, targets=config.targets or FEATURES)
        model.to(device, memory_format=torch.channels_last).train()
        optimizer = config.optimizer_of(model)
        natural = torch.eye(FEATURES, dtype=torch.float64)
        targets = TeacherTargets(model, images, device, 64, lambda: natural)
        found[name] = lambda step: _step(
            model, optimizer, batches[step % 8], targets[step % 4], device, seed=step
        )

    add("edgead", TrainConfig(optimizer="adam"))
    add("edgead_muon", TrainConfig(optimizer="muon"))
    add("edgead_muon_64", TrainConfig(optimizer="muon", targets=FEWER_TARGETS))
    return found


def measure(
    rounds: int, device: torch.device, peers: tuple[Path, ...] = (), *, steps: int = STEPS
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each step by loop, and the versions of the peers. All take turns in every round."""
    ours = loops(device)
    for step in range(WARM_UP):
        for loop in ours.values():
            loop(step)
    seconds: dict[str, list[float]] = {name: [] for name in ours}
    versions = {}
    for _ in range(rounds):
        for name, loop in ours.items():
            for step in range(steps):
                start = time.perf_counter()
                loop(WARM_UP + step)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
        for path in peers:
            command = [sys.executable, "-m", "edgead.benchmarks.train_step_peer", str(path)]
            command += ["--steps", str(steps), "--threads", str(torch.get_num_threads())]
            command += [f"--search={other}" for other in peers]
            try:
                found = fresh_process(command, sees_gpus=device.type == "cuda")
            except RuntimeError as error:  # of the peer: what else was measured stays
                print(f"train_step: {error}", file=sys.stderr)
                continue
            seconds.setdefault(found["peer"], []).extend(found["step_s"])
            versions[found["peer"]] = found["versions"]
    return seconds, versions


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory, too")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    try:
        wanted = {name_of(path) for path in arguments.peer}
        measured = _run(arguments)
    except (EdgeADError, RuntimeError) as error:  # RuntimeError: of another process
        print(f"train_step: {error}", file=sys.stderr)
        return 1
    return int(not wanted <= measured)  # what failed was told of


def _run(arguments: argparse.Namespace) -> set[str]:
    """Measures, prints and writes; returns what was measured."""
    device = pick_device(arguments.device)
    keep_memory()
    seconds, versions = measure(arguments.rounds, device, tuple(arguments.peer))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    precision = str(compute_dtype(device)).removeprefix("torch.")
    rows = [
        (LOOPS.get(name, name), f"{median:.3f}", f"{median / medians['edgead_muon']:.2f}")
        for name, median in medians.items()
    ]
    title = f"training step, EfficientAD-S, {device.type}, edgead in {precision}"
    print(table((title, "s (median)", "times edgead, Muon"), rows))
    results: dict[str, Any] = {
        "device": str(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "median_s": medians,
        "steps": {name: len(values) for name, values in seconds.items()},
        "peers": versions,
    }
    if arguments.memory:
        results["memory"] = fresh_process([sys.executable, "-m", "edgead.benchmarks.train_memory"])
        print(f"\npeak of a training with 300 images: {results['memory']}")
    if arguments.out:
        write_results(arguments.out, "train_step", results)
    return set(medians)


if __name__ == "__main__":
    sys.exit(main())
