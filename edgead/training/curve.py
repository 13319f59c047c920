"""The loss curve of a distillation: JSON, and a picture where matplotlib is installed."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgead.files import whole_file, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """Losses at one moment: the mean over the last 100 steps, and over the held-out images."""

    step: int
    seconds: float
    loss: float
    held_out_loss: float


def write_curve(out: Path, points: list[Point], settings: dict[str, Any]) -> None:
    """Write `out` + ".loss.json" and, with matplotlib, `out` + ".loss.png"."""
    content = {"settings": settings, "points": [asdict(point) for point in points]}
    write_text(out.with_name(out.name + ".loss.json"), json.dumps(content, indent=1) + "\n")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        log.info('no picture of the loss: pip install "edgead[report]"')
        return
    figure = Figure(figsize=(6, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (targets have variance 1)")
    steps = [point.step for point in points]
    axes.plot(steps, [point.loss for point in points], marker=".", label="training, last 100 steps")
    axes.plot(steps, [point.held_out_loss for point in points], marker=".", label="held-out images")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(out.with_name(out.name + ".loss.png")) as temporary:
        figure.savefig(temporary, format="png")
