"""What training, calibration, export and the parity gate need of every method's networks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from edgead.errors import TrainingError


class AnomalyModel(nn.Module):
    """Networks of one detector in plain form, which give raw anomaly maps of images.

    The plain form is the reference: training validates with it, and the parity gate compares the merged
    graph with it on real images. Every raw map is 0 or above and grows with the anomaly.

    Attributes:
        input_px: Height and width of the images that the networks take.
        map_cells: Height and width of the anomaly map.
        blind_cells: Cells at each edge of the anomaly map that the raw maps lack.
        raw_names: Names of the raw maps, in the order in which `forward` gives them.
        whole_maps: How many of them, the last ones, judge the image as a whole. Where frames are
            inspected in tiles, these are not made of tiles; see `Tiled`.
        meaning: One sentence for the manifest: what the raw maps are, and where they are published.
    """

    input_px: tuple[int, int]
    map_cells: tuple[int, int]
    blind_cells: int = 0
    raw_names: tuple[str, ...]
    whole_maps: int = 0
    meaning: str

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What the method's `build` makes the same networks of; plain JSON values."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Raw maps float32 [N, h, w] of images RGB 0..255, uint8 or float [N, 3, *input_px]."""

    @abstractmethod
    def merged(self, dtype: Any) -> nn.Module:
        """A copy with everything folded that can be: the same raw maps of float images.

        Args:
            dtype: torch.float32 or torch.float16, of weights and convolutions.
        """

    def anomaly_map(self, raw: tuple[Tensor, ...], calibration: Tensor) -> Tensor:
        """Calibrated map float32 [N, *map_cells].

        Args:
            raw: What `forward` gives.
            calibration: float32 [len(raw) + 1], a scale for each raw map and an offset; see
                `edgead.calibration.graph_constants`.
        """
        joined = calibration[0] * raw[0]
        for index in range(1, len(raw)):
            joined = joined + calibration[index] * raw[index]
        return joined + calibration[len(raw)]

    def score(self, maps: Tensor) -> Tensor:
        """Image scores [N] of calibrated maps: the largest value."""
        return maps.amax(dim=(1, 2))


def check_learning_rate(rate: float | None) -> None:
    """For settings whose rate may be left open (None). Raises TrainingError unless it is above 0."""
    if rate is not None and not 0 < rate < math.inf:
        raise TrainingError(f"--learning-rate {rate}: a number above 0 is needed")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raises TrainingError for a name that is none of `choices`."""
    if value not in choices:
        raise TrainingError(f"--{option} {value}: choose one of {', '.join(choices)}")


def check_length(steps: int | None, minutes: float | None) -> None:
    """For the settings of methods that train in steps.

    Raises:
        TrainingError: less than one step, or no time at all.
    """
    if (steps is not None and steps < 1) or (minutes is not None and not 0 < minutes < math.inf):
        raise TrainingError(
            f"--steps {steps} / --minutes {minutes}: need at least one step, or more than 0 minutes"
        )
