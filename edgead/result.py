"""What a detector says about one frame."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from edgead.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)  # eq: comparing maps element by element has no truth value
class Result:
    """Verdict on one frame. It owns its arrays: a later frame does not change it.

    Attributes:
        score: Image score, finite, no unit; higher is more anomalous.
        is_anomalous: `score >= threshold`.
        threshold: Threshold at the time of the verdict, on the scale of the score.
        anomaly_map: [h, w] float32, on the scale of the score, usually smaller than the frame.
        elapsed_ms: Wall time in milliseconds from frame to verdict, of a batch its share.

    Raises:
        DataError: The values contradict each other or are not finite.
    """

    score: float
    is_anomalous: bool
    threshold: float
    anomaly_map: np.ndarray = field(repr=False)
    elapsed_ms: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.score) and math.isfinite(self.threshold)):
            raise DataError(
                f"Result: score {self.score!r} and threshold {self.threshold!r} must be finite numbers"
            )
        if self.is_anomalous != (self.score >= self.threshold):
            raise DataError(
                f"Result: is_anomalous={self.is_anomalous!r} contradicts score {self.score!r} and "
                f"threshold {self.threshold!r}; it must be score >= threshold"
            )
        if not isinstance(self.anomaly_map, np.ndarray):
            raise DataError(
                f"Result: anomaly_map is {type(self.anomaly_map).__name__}, expected a numpy array"
            )
        if self.anomaly_map.ndim != 2 or self.anomaly_map.dtype != np.float32:
            raise DataError(
                f"Result: anomaly_map is {self.anomaly_map.dtype} of shape {self.anomaly_map.shape}, "
                "expected float32 [h, w]"
            )
        if not self.elapsed_ms >= 0:
            raise DataError(f"Result: elapsed_ms is {self.elapsed_ms!r}, expected a number >= 0")

    @property
    def relative_score(self) -> float | None:
        """The score on one scale for all methods: 0 at the normal level, 1 at the threshold.

        None where the threshold was set by hand to 0 or below, where there is no such scale.
        """
        return self.score / self.threshold if self.threshold > 0 else None

    def map_at(self, height_px: int, width_px: int) -> np.ndarray:
        """Returns the map as float32 [height_px, width_px], enlarged bilinearly (half-pixel centres)."""
        from edgead.image import enlarge  # loads OpenCV

        return enlarge(self.anomaly_map, height_px, width_px)
