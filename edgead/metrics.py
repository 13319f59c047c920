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
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from edgead.errors import DataError

logger = logging.getLogger(__name__)


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


class PixelScores:
    """Pixel scores of all test images of one data set; one sort of the background serves every figure.

    Maps come at the original image size and are kept as float32: 4 bytes per pixel of the whole set,
    sorted in place. Regions are the 8-connected components of each image's mask, of any area. The pixels
    outside the masks of all images, good ones included, are the background.
    """

    def __init__(self) -> None:
        self._background: list[np.ndarray] = []
        self._regions: list[np.ndarray] = []
        self._rates: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def regions(self) -> int:
        """Number of connected components added so far."""
        return len(self._regions)

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
        self._rates = None
        self._background.append(anomaly_map[~mask])
        if mask.any():
            self._regions += _split_regions(anomaly_map, mask)

    def auroc(self) -> float:
        """Probability that a defect pixel scores above a background pixel, ties half.

        Returns:
            0..1, or NaN without defect pixels or without background.
        """
        if self._lacks_pixels("pixel AUROC"):
            return float("nan")
        above, at_least = self._background_rates()
        return float(1.0 - (above + at_least).mean() / 2.0)

    def au_pro(self, limit: float = 0.3) -> float:
        """Area under the per-region overlap up to a false positive rate of `limit`, divided by `limit`.

        The integral of the trapezoid through every distinct threshold, in closed form: with `a` the
        share of the background above a defect pixel's score and `b` the share at or above it, the pixel
        counts in full from a false positive rate of b on, and linearly between a and b, where scores are
        tied.

        Args:
            limit: above 0, at most 1.

        Returns:
            0..1, or NaN without defect pixels or without background.
        """
        if not 0.0 < limit <= 1.0:
            raise ValueError(f"AU-PRO limit is {limit}, expected a rate above 0 and at most 1")
        if self._lacks_pixels("AU-PRO"):
            return float("nan")
        above, at_least = self._background_rates()
        gain = np.maximum(limit - (above + at_least) / 2.0, 0.0)
        cut = (above < limit) & (limit < at_least)  # a block of tied scores straddles the limit
        gain[cut] = (limit - above[cut]) ** 2 / (2.0 * (at_least[cut] - above[cut]))
        areas_px = np.array([region.size for region in self._regions])
        first = np.concatenate([[0], np.cumsum(areas_px)[:-1]])
        return float((np.add.reduceat(gain, first) / areas_px).mean() / limit)

    def _lacks_pixels(self, figure: str) -> bool:
        background_px = sum(part.size for part in self._background)
        return _lacks(figure, background_pixel=background_px, defect_pixel=len(self._regions))

    def _background_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the background above, and at or above, each defect pixel, float64."""
        if self._rates is None:
            background = self._sorted_background()
            scores = np.concatenate(self._regions)
            above = background.size - np.searchsorted(background, scores, side="right")
            at_least = background.size - np.searchsorted(background, scores, side="left")
            self._rates = above / background.size, at_least / background.size
        return self._rates

    def _sorted_background(self) -> np.ndarray:
        merged = np.empty(sum(part.size for part in self._background), dtype=np.float32)
        end = merged.size
        while self._background:  # drops each part once copied: the peak stays near one copy
            part = self._background.pop()
            merged[end - part.size : end] = part
            end -= part.size
        merged.sort()
        self._background.append(merged)
        return merged


def _split_regions(anomaly_map: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Scores of each 8-connected component, sorted (sorted keys make the later searches faster)."""
    import cv2

    count, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    component, scores = components[mask] - 1, anomaly_map[mask]
    order = np.lexsort((scores, component))
    areas_px = np.bincount(component, minlength=count - 1)
    return np.split(scores[order], np.cumsum(areas_px)[:-1])


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
