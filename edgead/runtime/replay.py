"""The golden samples of a bundle on a back end: does this device give the verdicts of the reference?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgead.bundle import Bundle
from edgead.runtime.backend import ANOMALY_MAP, CALIBRATION, IMAGE, SCORE, Backend

TOLERANCE = 0.05  # of the scale of the scores; bfloat16 rounding was measured at 0.007
ROUNDING = 0.01
"""A score that deviates by less, of the spread of the golden scores, may end on the other side of the
threshold. An export's gate grants FP16 as much, and keeps no sample so near if it can; a threshold that
is chosen later may fall right beside one."""


@dataclass(frozen=True)
class Flip:
    """A golden sample on which a back end decides otherwise than the reference."""

    index: int
    expected: bool
    got: bool


@dataclass(frozen=True)
class Replay:
    """How a back end answers the golden samples, compared with the FP32 reference.

    Attributes:
        images: Number of samples.
        score_deviation: Largest absolute deviation of a score; infinite if a score is not finite.
        relative_score_deviation: The same divided by the spread (max - min) of the golden scores;
            infinite if there is a deviation and no spread.
        map_deviation: Largest absolute deviation of a map value; infinite if one is not finite.
        margin: Smallest distance of a golden score from the threshold: deviations below it cannot flip a
            verdict.
        flips: Samples with another verdict at the threshold of the manifest, by more than rounding.
        rounded: Number of samples with another verdict by rounding alone.
        tolerance: Deviations above it are a fault and no rounding: 5 % of the spread of the golden
            scores or of the threshold, whichever is larger; a threshold above them all counts as much as
            the largest of them, because a high one would let everything pass.
        threshold, calibration: Those of the manifest, with which all this was found.
    """

    images: int
    score_deviation: float
    relative_score_deviation: float
    map_deviation: float
    margin: float
    flips: tuple[Flip, ...]
    rounded: int
    tolerance: float
    threshold: float
    calibration: tuple[float, ...]

    @property
    def ok(self) -> bool:
        """No verdict flips, by more than rounding, and scores and maps within the tolerance."""
        deviation = max(self.score_deviation, self.map_deviation)
        return not self.flips and deviation <= self.tolerance

    @property
    def near(self) -> str:
        """What to add to "the same verdicts": nothing, or how many samples rounding decides."""
        return f", but for {self.rounded} that rounding decides" if self.rounded else ""

    def __str__(self) -> str:
        return (
            f"{len(self.flips)} of {self.images} verdicts differ, scores by up to "
            f"{self.score_deviation:.3g} and maps by up to {self.map_deviation:.3g}, allowed is "
            f"{self.tolerance:.3g}"
        )


def replay(backend: Backend, bundle: Bundle) -> Replay:
    """Runs the golden samples of a bundle one by one and compares with the answers of the reference."""
    golden, threshold = bundle.golden(), bundle.manifest.threshold.value
    calibration = np.array(bundle.manifest.calibration.values, np.float32)
    # In float64, as the detector compares with the threshold.
    reference = golden.scores.astype(np.float64)
    scores = np.empty_like(reference)
    map_deviation = 0.0
    for index, image in enumerate(golden.images):
        outputs = backend.infer({IMAGE: image[None], CALIBRATION: calibration})
        scores[index] = outputs[SCORE][0]
        map_deviation = max(map_deviation, _deviation(outputs[ANOMALY_MAP][0], golden.maps[index]))
    score_deviation = _deviation(scores, reference)
    spread = float(np.ptp(reference))
    relative = score_deviation / spread if spread else math.inf
    expected, got = reference >= threshold, scores >= threshold
    scale = min(abs(threshold), float(np.abs(reference).max()))
    is_rounding = np.abs(scores - reference) <= ROUNDING * (spread or scale)
    differ = expected != got
    flipped = differ & ~is_rounding
    return Replay(
        images=len(scores),
        score_deviation=score_deviation,
        relative_score_deviation=relative if score_deviation else 0.0,
        map_deviation=map_deviation,
        margin=float(np.abs(reference - threshold).min()),
        flips=tuple(Flip(int(i), bool(expected[i]), bool(got[i])) for i in np.flatnonzero(flipped)),
        rounded=int((differ & is_rounding).sum()),
        tolerance=TOLERANCE * max(spread, scale),
        threshold=float(threshold),
        calibration=tuple(map(float, bundle.manifest.calibration.values)),
    )


def _deviation(got: np.ndarray, expected: np.ndarray) -> float:
    if got.shape != expected.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.abs(got.astype(np.float64) - expected).max())
