"""Calibration on good images: the scale of the anomaly map and the threshold of the verdict.

The map scale is EfficientAD's (arXiv 2303.14535, section 3.4), for all methods: the 0.9 quantile of the
raw values of good images becomes 0 and the 0.995 quantile becomes 0.1, for each raw map apart; the map
is their mean. Odd images have no part in the quantiles. The threshold is chosen for a stated
false-reject rate. Test images are never involved. numpy only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgead.errors import TrainingError

log = logging.getLogger(__name__)

Q_LOW, Q_HIGH = 0.9, 0.995
ODD = 3.0
"""An image is odd if its own high quantile is over this many times that of the median image. One of four
would take the whole upper end of the scale, and the raw map that finds it odd would hardly count any
more. docs/training.md has the ratios that were measured."""


@dataclass(frozen=True)
class MapScale:
    """Quantiles of one kind of raw map over all pixels of the calibration images that are not odd.

    On the calibrated map `low` becomes 0 and `high` 0.1.
    """

    low: float
    high: float

    @classmethod
    def of(cls, maps: np.ndarray) -> MapScale:
        """Quantiles (linear interpolation) of raw maps [N, h, w].

        Raises:
            TrainingError: no values, or values that are not finite.
        """
        values = np.asarray(maps)
        if values.size == 0 or not np.isfinite(values).all():
            raise TrainingError(
                "the calibration maps are empty or hold NaN or infinite values;"
                " the training diverged or got no images"
            )
        odd = _odd(values)
        usual = values[~odd] if odd.any() else values.copy()
        low, high = np.quantile(usual, np.array([Q_LOW, Q_HIGH]), overwrite_input=True)
        return cls(float(low), float(high))

    @property
    def span(self) -> float:
        """high - low, kept from zero.

        Maps of identical good images must not make every deviation infinite.
        """
        return max(self.high - self.low, 1e-3 * abs(self.high), 1e-12)


def odd_images(*raw: np.ndarray) -> list[int]:
    """Indices of images that the scale of one of these raw maps [N, ...] leaves out; see `ODD`.

    None if each of the maps finds others odd and fewer than two would remain: then nothing is usual.
    """
    odd: np.ndarray = np.logical_or.reduce([_odd(maps) for maps in raw])
    return [int(index) for index in np.flatnonzero(odd)] if (~odd).sum() >= 2 else []


def _odd(maps: np.ndarray) -> np.ndarray:
    high = np.array([np.quantile(one, Q_HIGH) for one in maps], np.float64)
    usual = np.median(high)
    return high > ODD * usual if usual > 0 else np.zeros(len(maps), bool)


def warn_of_odd(images: Sequence[object], odd: Sequence[int]) -> None:
    """Names odd images, by their indices, in the log, and what to do about them."""
    for index in odd:
        log.warning(
            "%s: the anomaly map of this good image is over %g times as high as is usual."
            " Scale and threshold leave it out, so that parts like it may be rejected: look at it; if it"
            " is a good part, add more images like it",
            images[index],
            ODD,
        )


def graph_constants(*scales: MapScale) -> np.ndarray:
    """The graph's input `calibration`, float32 [n + 1] for n raw maps.

    map = c[0] * raw[0] + ... + c[n - 1] * raw[n - 1] + c[n], which is the mean of
    0.1 (M - low) / (high - low) over the raw maps M.
    """
    factors = [0.1 / len(scales) / scale.span for scale in scales]
    offset = -sum(a * scale.low for a, scale in zip(factors, scales, strict=True))
    return np.array([*factors, offset], dtype=np.float32)


@dataclass(frozen=True)
class Threshold:
    """A threshold and what may be claimed for it.

    Attributes:
        value: Scores at or above it are NG.
        basis: How it was chosen, one sentence.
        target_false_reject_rate: The rate of good images rejected that was asked for.
        upper_bound: With `confidence`, the true rate is at most this, as far as the number of images
            supports.
        good_images: Number of good validation images.
    """

    value: float
    basis: str
    target_false_reject_rate: float
    upper_bound: float
    confidence: float
    good_images: int

    @property
    def claim(self) -> str:
        """One sentence for people."""
        text = (
            f"{self.good_images} good validation images support a false-reject rate of at most"
            f" {self.upper_bound:.1%} ({self.confidence:.0%} confidence);"
            f" asked for was {self.target_false_reject_rate:.2%}"
        )
        needed = math.ceil(math.log(1 - self.confidence) / math.log1p(-self.target_false_reject_rate))
        if self.good_images >= needed:
            return text
        return f"{text}, which takes at least {needed} of them to claim"


def choose_threshold(
    scores: np.ndarray,
    *,
    odd: Sequence[int] = (),
    false_reject: float = 0.01,
    confidence: float = 0.95,
) -> Threshold:
    """Threshold for a target false-reject rate from the scores of good validation images.

    With at least 1 / false_reject images it is the matching order statistic: as many of them lie above
    as the rate allows. With fewer, that quantile lies beyond the data; the score is a maximum over many
    pixels, so a Gumbel distribution (the limit law of maxima) is fitted by its moments and extrapolated,
    and never below the largest score seen. Odd images are left out of that fit, in which one would raise
    the threshold above all defects; the claim counts those that it rejects.

    Args:
        scores: Image scores [n] of good images.
        odd: Indices of odd ones, fewer than all; see `odd_images`.
        false_reject: Target rate, 0 < rate < 0.5.

    Raises:
        TrainingError: no scores, scores that are not finite, or a rate out of range.
    """
    every = np.asarray(scores, dtype=np.float64).ravel()
    n = len(every)
    if n == 0 or not np.isfinite(every).all():
        raise TrainingError(
            "the threshold needs finite scores of good validation images,"
            f" got {n} scores; add good images"
        )
    check_rate(false_reject)
    rejected = math.floor(n * false_reject + 1e-9)
    ordered = np.sort(every if rejected >= 1 else np.delete(every, list(odd)))
    highest_ok = float(ordered[-1 - rejected])
    higher = ordered[ordered > highest_ok]
    spread = float(ordered.std(ddof=1)) if len(ordered) > 1 else 0.0
    spread = max(spread, 0.05 * abs(float(ordered.mean())), 1e-6)  # near-identical images leave no room
    # Never on a sample's own score: the last digit of a sum would decide, and differ between devices.
    clear_of_it = float(highest_ok + higher[0]) / 2 if len(higher) else highest_ok + 0.05 * spread
    if rejected >= 1:
        value = clear_of_it
        basis = f"order statistic: {len(higher)} of {n} good validation images score above it"
    else:
        beta = spread * math.sqrt(6) / math.pi
        mode = float(ordered.mean()) - 0.5772156649 * beta
        value = max(mode - beta * math.log(-math.log1p(-false_reject)), clear_of_it)
        basis = (
            f"Gumbel fit to the scores of {len(ordered)} good validation images,"
            f" too few for the empirical {1 - false_reject:.2%} quantile"
        )
        if odd:
            basis += f"; {len(odd)} odd left out"
    value = float(np.float32(value))  # as the graph's score and the manifest have it
    if value <= highest_ok:
        value = float(np.nextafter(np.float32(highest_ok), np.float32(np.inf)))
    above = int((every >= value).sum())
    return Threshold(
        value, basis, false_reject, binomial_upper_bound(above, n, confidence), confidence, n
    )


def check_rate(false_reject: float) -> None:
    """Raises TrainingError unless it is a rate that a threshold can be chosen for."""
    if not 0 < false_reject < 0.5:
        raise TrainingError(
            f"--false-reject {false_reject} is out of range: a rate between 0 and 0.5, such as 0.01"
        )


def binomial_upper_bound(events: int, n: int, confidence: float = 0.95) -> float:
    """Clopper-Pearson upper bound of a rate after `events` in `n` trials.

    It is the p with P(X <= events) = 1 - confidence.
    """
    if events >= n:
        return 1.0

    def at_most(p: float) -> float:
        terms = (
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * math.log(p)
            + (n - k) * math.log1p(-p)
            for k in range(events + 1)
        )
        return sum(math.exp(term) for term in terms)

    low, high = 1e-12, 1 - 1e-12
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(middle) > 1 - confidence else (low, middle)
    return high
