"""Seconds per training step: edgead's step against a plain reading of the paper, in one run.

    python -m edgead.benchmarks.train_step [--steps 20] [--out FILE]

The plain loop computes the teacher anew, runs three separate student passes and a full quantile, in
FP32. Both see the same images and start from the same weights; only speed differs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgead.benchmarks.results_file import table, write_results
from edgead.models.efficientad import EfficientAD
from edgead.models.pdn import FEATURES, PDN
from edgead.training.device import compute_dtype, keep_memory, pick_device
from edgead.training.efficientad import _step, build_model
from edgead.training.images import jitter
from edgead.training.teacher_targets import TeacherTargets, to_input


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


def measure(steps: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step of both loops, in turns of five."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    batches = [
        np.stack([images[i % 4], images[(i + 1) % 4], jitter(images[i % 4], rng)], dtype=np.float32)
        for i in range(8)
    ]
    ours, plain = build_model(PDN("s").eval(), seed=0), build_model(PDN("s").eval(), seed=0)
    ours.to(device, memory_format=torch.channels_last)
    plain.to(device)
    targets = TeacherTargets(ours, images, device, 64)
    plain.load_state_dict(ours.state_dict())

    def optimizer(model: EfficientAD, **options: Any) -> torch.optim.Optimizer:
        parameters = [*model.student.parameters(), *model.autoencoder.parameters()]
        return torch.optim.Adam(parameters, 1e-4, weight_decay=1e-5, **options)

    adam, plain_adam = optimizer(ours, fused=True), optimizer(plain)
    ours.train(), plain.train()
    seconds: dict[str, list[float]] = {"plain": [], "edgead": []}
    for step in range(-5, steps):
        for name in ("plain", "edgead"):
            start = time.perf_counter()
            if name == "plain":
                plain_step(plain, plain_adam, batches[step % 8], device)
            else:
                _step(ours, adam, batches[step % 8], targets[step % 4], device, seed=step + 5)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    keep_memory()
    seconds = {
        name: float(np.median(values)) for name, values in measure(arguments.steps, device).items()
    }
    ratio = seconds["plain"] / seconds["edgead"]
    precision = str(compute_dtype(device)).removeprefix("torch.")
    rows = [
        ("plain loop, float32", f"{seconds['plain']:.3f}", "1.00"),
        (f"edgead, {precision}", f"{seconds['edgead']:.3f}", f"{ratio:.2f}"),
    ]
    print(table(("training step, EfficientAD-S", "s (median)", "times plain"), rows))
    if arguments.out:
        write_results(
            arguments.out,
            "train_step",
            {
                "device": str(device),
                "precision": precision,
                "threads": torch.get_num_threads(),
                "median_s": seconds,
                "ratio": ratio,
            },
        )


if __name__ == "__main__":
    main()
