"""Detection and localisation figures: exact, from sorted scores, without a grid of thresholds.

A larger score is more anomalous everywhere. Non-finite scores raise `DataError`. A figure that needs a
class which is absent (no good image, no defect pixel ...) is NaN, and a warning in the log says what was
missing.

AU-PRO is the per-region overlap of Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021,
integrated over the false positive rate from 0 to a limit and divided by that limit; neither axis is
rescaled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from edgead.background import Background, Histogram
from edgead.errors import DataError

logger = logging.getLogger(__name__)

_PIECE_PX = 2**20  # pixels taken at a time, where a whole image would need too much memory


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a defect scores above a good image, ties counted half.

    Args:
        scores: [n] finite.
        labels: [n], 0 = good, 1 = defect.

    Returns:
        0..1, or NaN when one of the classes is empty.
    """
    good, defect = _by_class(scores, labels)
    if _lacks("image AUROC", good_image=good.size, defect_image=defect.size):
        return float("nan")
    good.sort()
    below = np.searchsorted(good, defect, side="left")
    not_above = np.searchsorted(good, defect, side="right")
    return float((below + not_above).sum() / (2.0 * good.size * defect.size))


def f1_max(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Best F1 over all thresholds, with `score >= threshold` as the decision.

    The threshold is chosen with the labels of the scores it is judged on: a ceiling, not what a line
    will see.

    Returns:
        (f1 0..1, the threshold that reaches it: one of the scores, the largest of equally good ones);
        (NaN, NaN) when there is no defect.
    """
    good, defect = _by_class(scores, labels)
    if _lacks("F1", defect_image=defect.size):
        return float("nan"), float("nan")
    thresholds = np.unique(np.concatenate([good, defect]))[::-1]
    hits = _count_at_least(defect, thresholds)
    f1 = 2.0 * hits / (hits + _count_at_least(good, thresholds) + defect.size)
    best = int(np.argmax(f1))
    return float(f1[best]), float(thresholds[best])


def roc_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the ROC curve for plots, one per distinct score, from (0, 0) to (1, 1).

    Returns:
        (false reject rate [m], detection rate [m], threshold [m] descending from infinity), float64; a
        rate whose class is empty is NaN throughout.
    """
    good, defect = _by_class(scores, labels)
    _lacks("ROC curve", good_image=good.size, defect_image=defect.size)
    thresholds = np.append(np.unique(np.concatenate([good, defect])), np.inf)[::-1]
    with np.errstate(invalid="ignore"):
        false_rejects = _count_at_least(good, thresholds) / np.float64(good.size)
        detections = _count_at_least(defect, thresholds) / np.float64(defect.size)
    return false_rejects, detections, thresholds


def false_reject_rate(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """Share of good images with `score >= threshold`; NaN without good images."""
    good, _ = _by_class(scores, labels)
    if _lacks("false reject rate", good_image=good.size):
        return float("nan")
    return float(np.mean(good >= _checked(threshold)))


def missed_defect_rate(scores: ArrayLike, labels: ArrayLike, threshold: float) -> float:
    """Share of defect images with `score < threshold`; NaN without defect images."""
    _, defect = _by_class(scores, labels)
    if _lacks("missed defect rate", defect_image=defect.size):
        return float("nan")
    return float(np.mean(defect < _checked(threshold)))


def pixel_auroc(anomaly_maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> float:
    """AUROC over all pixels of all images; see `PixelScores` for the arrays."""
    return _collect(anomaly_maps, masks).auroc()


def au_pro(
    anomaly_maps: Iterable[np.ndarray],
    masks: Iterable[np.ndarray],
    *,
    limits: Sequence[float] = (0.3, 0.05),
) -> tuple[float, ...]:
    """AU-PRO at each of the limits, in their order; see `PixelScores` for the arrays."""
    pixels = _collect(anomaly_maps, masks)
    return tuple(pixels.au_pro(limit) for limit in limits)


@dataclass(frozen=True, slots=True)
class Region:
    """One 8-connected component of a mask.

    Attributes:
        image: number of its image in the order of `PixelScores.add`, from 0.
        box_px: left, top, width, height.
        peak: highest map value inside.
    """

    image: int
    area_px: int
    box_px: tuple[int, int, int, int]
    peak: float


class PixelScores:
    """Pixel scores of all test images of one data set; one sort of the background serves every figure.

    Maps come at the original image size and are compared as float32. Regions are the 8-connected
    components of each image's mask, of any area. The pixels outside the masks of all images, good ones
    included, are the background.

    Memory: 4 bytes for each pixel; with `keep_px` 5 for each background pixel to keep and 4 for each
    defect pixel.

    Args:
        keep_px: how many of the highest background scores to keep, and with them what ties with the
            lowest. AU-PRO is then exact up to the limit `keep_px` / background pixels, and refused
            beyond; AUROC comes from a histogram (`edgead.background.Histogram`). None keeps all.
    """

    def __init__(self, *, keep_px: int | None = None) -> None:
        self._background = Background(keep_px)
        self._histogram = None if keep_px is None else Histogram()
        # Per image with regions: its number, scores sorted within each region, boxes and areas.
        self._images: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._added = 0

    @property
    def regions(self) -> int:
        """Number of connected components added so far."""
        return sum(len(boxes) for _, _, boxes in self._images)

    @property
    def background_px(self) -> int:
        """Number of background pixels added so far."""
        return self._background.count

    def list_regions(self) -> list[Region]:
        """The regions in the order in which they were added, within an image as OpenCV numbers them."""
        return [
            Region(image, area_px, (left, top, width, height), float(scores[end - 1]))
            for image, scores, boxes in self._images
            for (left, top, width, height, area_px), end in zip(
                boxes.tolist(), np.cumsum(boxes[:, -1]).tolist(), strict=True
            )
        ]

    def add(self, anomaly_map: np.ndarray, mask: np.ndarray) -> None:
        """Adds one image.

        Args:
            anomaly_map: [height, width] finite; compared as float32.
            mask: [height, width] bool, True on defects; all False for a good image.

        Raises:
            DataError: other shapes or types, or a value that is not finite.
        """
        anomaly_map, mask = np.asarray(anomaly_map, dtype=np.float32), np.asarray(mask)
        if anomaly_map.ndim != 2 or mask.shape != anomaly_map.shape:
            raise DataError(
                f"anomaly map has shape {anomaly_map.shape} and mask {mask.shape}, expected [height,"
                " width] for both: enlarge the map to the image size, never resize the mask"
            )
        if mask.dtype != np.bool_:
            raise DataError(f"mask has dtype {mask.dtype}, expected bool: pass `mask > 127` for grey")
        if not np.isfinite(anomaly_map).all():
            bad = np.count_nonzero(~np.isfinite(anomaly_map))
            raise DataError(f"anomaly map holds {bad} values that are not finite")
        step = max(1, _PIECE_PX // mask.shape[1]) if mask.size else 1
        for top in range(0, mask.shape[0], step):  # in bands: no second copy of a large image
            band, outside = anomaly_map[top : top + step], ~mask[top : top + step]
            self._background.add(band[outside])
            if self._histogram:
                self._histogram.add(band[outside], is_defect=False)
                self._histogram.add(band[~outside], is_defect=True)
        if mask.any():
            self._images.append((self._added, *_split_regions(anomaly_map, mask)))
        self._added += 1

    def auroc(self) -> float:
        """Probability that a defect pixel scores above a background pixel, ties half.

        Returns:
            0..1, or NaN without defect pixels or without background.
        """
        if self._lacks_pixels("pixel AUROC"):
            return float("nan")
        if self._histogram:
            return self._histogram.auroc()
        total, count = 0.0, 0
        for _, scores in self._pieces():
            above, at_least = self._background.shares(scores)
            total += float((above + at_least).sum())
            count += scores.size
        return 1.0 - total / (2.0 * count)

    def au_pro(self, limit: float = 0.3) -> float:
        """Area under the per-region overlap up to a false positive rate of `limit`, divided by `limit`.

        Args:
            limit: above 0, at most 1.

        Returns:
            0..1, or NaN without defect pixels or without background.
        """
        values = self.region_au_pro((limit,))
        return float(values.mean()) if values.size else float("nan")

    def region_au_pro(self, limits: Sequence[float], *, thresholds: int | None = None) -> np.ndarray:
        """AU-PRO of each region by itself, against the background of all images.

        The mean over regions is the AU-PRO of these regions. By default it is the integral of the
        trapezoid through every distinct threshold, in closed form: with `a` the share of the background
        above a defect pixel's score and `b` the share at or above it, the pixel counts in full from a
        false positive rate of b on, and linearly between a and b, where scores are tied.

        Args:
            limits: each above 0, at most 1.
            thresholds: instead, take the trapezoid through so many thresholds, at equally spaced ranks
                of the background, as the published code of the size-binned benchmark does (with 99);
                far off at small limits.

        Returns:
            [regions, limits] float64, 0..1; NaN without background.

        Raises:
            DataError: too few background scores were kept for these limits.
        """
        for limit in limits:
            if not 0.0 < limit <= 1.0:
                raise ValueError(f"AU-PRO limit is {limit}, expected a rate above 0 and at most 1")
        if self._lacks_pixels("AU-PRO"):
            return np.full((self.regions, len(limits)), np.nan)
        totals = self._sampled(limits, thresholds) if thresholds else self._exact(limits)
        areas_px = np.concatenate([boxes[:, -1] for _, _, boxes in self._images])
        return totals / areas_px[:, None] / np.array(limits)

    def _exact(self, limits: Sequence[float]) -> np.ndarray:
        """Sum over each region's pixels of the rates from which on they count, [regions, limits]."""
        self._background.require(max(limits) * self._background.count)
        totals = np.zeros((self.regions, len(limits)))
        for numbers, scores in self._pieces():
            above, at_least = self._background.shares(scores)
            for column, limit in enumerate(limits):
                gain = np.maximum(limit - (above + at_least) / 2.0, 0.0)
                cut = (above < limit) & (limit < at_least)  # a block of tied scores straddles the limit
                gain[cut] = (limit - above[cut]) ** 2 / (2.0 * (at_least[cut] - above[cut]))
                _add_by_number(totals[:, column], numbers, gain)
        return totals

    def _sampled(self, limits: Sequence[float], thresholds: int) -> np.ndarray:
        """As `_exact`, from the recipe with thresholds at equally spaced ranks of the background."""
        pixels = self._background.count
        ranks = np.linspace(0, pixels - 1, thresholds, dtype=int)[::-1]
        rates = np.append(1.0 - (ranks + 1) / pixels, 1.0)  # the last: everything passes
        weights = np.stack([_trapezoid_weights(rates, limit) for limit in limits], axis=1)
        used = np.flatnonzero(weights[:-1].any(axis=1))
        levels = self._background.highest(pixels - 1 - ranks[used])[::-1]
        passed = np.concatenate([weights[-1:], weights[used][::-1]]).cumsum(axis=0)
        totals = np.zeros((self.regions, len(limits)))
        for numbers, scores in self._pieces():
            gain = passed[np.searchsorted(levels, scores, side="left")]
            for column in range(len(limits)):
                _add_by_number(totals[:, column], numbers, gain[:, column])
        return totals

    def _pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Defect pixels, some at a time: number of the region (ascending) and score."""
        first = 0
        for _, scores, boxes in self._images:
            ends = np.cumsum(boxes[:, -1])
            for start in range(0, scores.size, _PIECE_PX):
                piece = scores[start : start + _PIECE_PX]
                places = np.arange(start, start + piece.size)
                yield first + np.searchsorted(ends, places, side="right"), piece
            first += len(boxes)

    def _lacks_pixels(self, figure: str) -> bool:
        return _lacks(figure, background_pixel=self._background.count, defect_pixel=len(self._images))


def _split_regions(anomaly_map: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the defect pixels, by 8-connected component and sorted within each (sorted keys make the
    later searches faster), and [n, 5] left, top, width, height, area of each."""
    import cv2

    _, components, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    scores = anomaly_map[mask]
    return scores[np.lexsort((scores, components[mask]))], boxes[1:]


def _add_by_number(totals: np.ndarray, numbers: np.ndarray, values: np.ndarray) -> None:
    """Adds to totals[n] the values whose number is n; numbers ascend."""
    sums = np.bincount(numbers - numbers[0], weights=values)
    totals[numbers[0] : numbers[0] + sums.size] += sums


def _trapezoid_weights(rates: np.ndarray, limit: float) -> np.ndarray:
    """w with w @ y = integral from 0 to `limit` of the line through (rates, y); rates ascend from 0."""
    weights = np.zeros(rates.size)
    widths = np.diff(rates)
    parts = np.clip(limit - rates[:-1], 0.0, widths)
    with np.errstate(invalid="ignore"):
        to_the_right = np.where(widths > 0, parts**2 / (2.0 * widths), 0.0)
    weights[:-1] += parts - to_the_right
    weights[1:] += to_the_right
    return weights


def _collect(anomaly_maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> PixelScores:
    pixels = PixelScores()
    for anomaly_map, mask in zip(anomaly_maps, masks, strict=True):
        pixels.add(anomaly_map, mask)
    return pixels


def _by_class(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Checked copies of the scores of the good and of the defect images, float64."""
    values, classes = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or classes.shape != values.shape:
        raise DataError(
            f"scores have shape {values.shape} and labels {classes.shape}, expected [n] for both"
        )
    if not np.isfinite(values).all():
        bad = np.count_nonzero(~np.isfinite(values))
        raise DataError(f"{bad} of {values.size} scores are not finite")
    if not np.isin(classes, (0, 1)).all():
        unknown = sorted(set(classes.tolist()) - {0, 1})
        raise DataError(f"labels hold {unknown}, expected 0 (good) and 1 (defect) only")
    defect = classes == 1
    return values[~defect], values[defect]


def _checked(threshold: float) -> float:
    if np.isnan(threshold):
        raise DataError("threshold is NaN, expected a number")
    return threshold


def _count_at_least(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return scores.size - np.searchsorted(np.sort(scores), thresholds, side="left")


def _lacks(figure: str, **counts: int) -> bool:
    """True, with a warning, when one of the kinds that the figure needs has no member."""
    absent = [kind.replace("_", " ") for kind, count in counts.items() if count == 0]
    if absent:
        logger.warning("%s is NaN: there is no %s to compute it from", figure, " and no ".join(absent))
    return bool(absent)
