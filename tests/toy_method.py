"""A method as small as it can be: how far a pixel's colour is from that of the mean good image.

It is the example of CONTRIBUTING.md, and tests/test_methods.py takes it through train, export, predict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgead.models.base import AnomalyModel
from edgead.training.session import Session


@dataclass(frozen=True)
class Config:
    method: str = "toy"
    steps: int = 10
    minutes: float | None = None
    checkpoint_s: float = 60.0
    seed: int = 0
    false_reject: float = 0.01
    cell_px: int = 8


class Toy(AnomalyModel):
    input_px = (64, 64)
    raw_names = ("colour",)
    meaning = "mean absolute difference to the mean good image, per cell"
    mean: Tensor

    def __init__(self, cell_px: int) -> None:
        super().__init__()
        self.cell_px, self.map_cells = cell_px, (64 // cell_px, 64 // cell_px)
        self.register_buffer("mean", torch.zeros(3, 64, 64))

    def architecture(self) -> dict[str, Any]:
        return {"cell_px": self.cell_px}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (F.avg_pool2d((images.float() - self.mean).abs().mean(1), self.cell_px),)

    def merged(self, dtype: torch.dtype) -> nn.Module:
        return self


class Trainer:
    Config = Config
    FILES = ()

    def __init__(self, config: Config, files: Mapping[str, Path], run: Path) -> None:
        self.config, self.model = config, Toy(config.cell_px)
        self.record: dict[str, Any] = {"weights": {}}
        self.settings: dict[str, Any] = {}

    @staticmethod
    def build(*, cell_px: int) -> Toy:
        return Toy(cell_px)

    def fit(self, session: Session) -> None:
        total = torch.zeros_like(self.model.mean)
        while session.fraction_done() < 1:
            image = np.asarray(session.images[session.step % len(session.images)])
            total += torch.from_numpy(image).permute(2, 0, 1)
            session.record(
                {
                    "difference": float(
                        self.model(torch.from_numpy(image)[None].permute(0, 3, 1, 2))[0].mean()
                    )
                }
            )
        self.model.mean.copy_(total / session.step)
