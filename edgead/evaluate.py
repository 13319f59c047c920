"""Runs a detector over the test images of a data set and puts the figures into one record.

The detector's own outputs are judged: maps are enlarged to each image's own size, masks are never
resized.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgead import machine, metrics
from edgead.by_size import BySize, SizeConfig, by_size, open_pixels
from edgead.errors import DataError
from edgead.image import read_image

if TYPE_CHECKING:
    from edgead.detector import Detector
    from edgead.result import Result
    from edgead.training.data import Dataset, TestItem

LATENCY_SCOPE = (
    "the whole detector call, from the decoded frame to the result; reading the file is not included,"
    " and one warm-up call before the first is left out"
)
_KEPT_MAP_PX = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """Verdict on one test image; `path` is relative to the data set, label 1 is a defect."""

    path: str
    label: int
    defect: str
    score: float
    is_anomalous: bool
    latency_ms: float

    @property
    def is_right(self) -> bool:
        return self.is_anomalous == bool(self.label)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All figures of one run. NaN = cannot be computed; `notes` says why. Rates and areas are 0..1.

    Attributes:
        images: how many images gave a verdict; the others are in `errors` as {path, message}.
        regions: connected components of the masks, the regions of AU-PRO.
        f1_max: best F1 over all thresholds, a ceiling: its threshold was chosen with the test labels.
        per_defect: defect name -> {images, image_auroc (against all good images), missed_defects,
            missed_defect_rate}.
        latency_ms: {p50, p90, p99, max, calls, scope}.
        by_size: AU-PRO by size of the defects; None when it was not asked for or cannot be computed.
            With it memory is bounded, and `pixel_auroc` comes from a histogram of 2**20 bins.
        maps: the detector's anomaly map of each row, [h, w] float32; not part of the JSON. With
            `by_size` a map of more than 2**20 pixels is reduced to the highest value of each block.
    """

    dataset: str
    name: str
    method: str
    backend: str
    precision: str
    date: str
    images: int
    good_images: int
    defect_images: int
    regions: int
    image_auroc: float
    pixel_auroc: float
    au_pro_30: float
    au_pro_05: float
    f1_max: float
    f1_max_threshold: float
    threshold: float
    threshold_basis: str
    false_rejects: int
    false_reject_rate: float
    missed_defects: int
    missed_defect_rate: float
    per_defect: dict[str, dict[str, Any]]
    latency_ms: dict[str, Any]
    machine: dict[str, Any]
    model: dict[str, Any]
    provenance: dict[str, Any]
    notes: list[str]
    errors: list[dict[str, str]]
    rows: list[Row]
    by_size: BySize | None = None
    maps: list[np.ndarray] = field(repr=False, compare=False)

    def to_json(self) -> str:
        """JSON text of everything but the maps; NaN becomes null."""
        record = asdict(replace(self, maps=[]))  # asdict copies arrays
        del record["maps"]
        return json.dumps(_null_for_nan(record), indent=2, allow_nan=False) + "\n"


def evaluate(
    detector: Detector,
    dataset: Dataset,
    *,
    sizes: SizeConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Judges every test image of a data set.

    An image that cannot be used is listed in `errors`, and the evaluation goes on. Pixel figures are NaN
    as soon as one defect image has no usable mask: its defects would count as background.

    Args:
        detector: called once per test image with the RGB frame at its own size, once more to warm up.
        dataset: its `test` items, in their order.
        sizes: asks for figures by size of the defects.
        progress: called with (images done, images in all) after each image.

    Raises:
        DataError: no test image could be used; with `sizes`, also a defect image without a usable mask.
        BackendError: the back end failed; no later image would fare better.
    """
    has_masks = any(item.masks for item in dataset.test)
    run = _Run(dataset.root, open_pixels(dataset, sizes) if sizes else None, has_masks=has_masks)
    for done, item in enumerate(dataset.test, start=1):
        run.inspect(detector, item)
        if progress is not None:
            progress(done, len(dataset.test))
    if not run.rows:
        first = f", first: {run.errors[0]['path']}: {run.errors[0]['message']}" if run.errors else ""
        raise DataError(
            f"data set {dataset.name}: none of its {len(dataset.test)} test images can be used{first}"
        )

    scores, labels = [row.score for row in run.rows], [row.label for row in run.rows]
    threshold = detector.threshold
    f1, f1_threshold = metrics.f1_max(scores, labels)
    au_pro_30, au_pro_05 = run.au_pro(0.3, 0.05)
    return Evaluation(
        dataset=dataset.name,
        name=detector.manifest.name,
        method=detector.manifest.method,
        backend=detector.backend,
        precision=detector.precision,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        images=len(run.rows),
        good_images=labels.count(0),
        defect_images=labels.count(1),
        regions=run.pixels.regions,
        image_auroc=metrics.image_auroc(scores, labels),
        pixel_auroc=math.nan if run.without_mask else run.pixels.auroc(),
        au_pro_30=au_pro_30,
        au_pro_05=au_pro_05,
        f1_max=f1,
        f1_max_threshold=f1_threshold,
        threshold=threshold,
        threshold_basis=_threshold_basis(detector),
        false_rejects=sum(row.is_anomalous for row in run.rows if row.label == 0),
        false_reject_rate=metrics.false_reject_rate(scores, labels, threshold),
        missed_defects=sum(not row.is_anomalous for row in run.rows if row.label == 1),
        missed_defect_rate=metrics.missed_defect_rate(scores, labels, threshold),
        per_defect=_per_defect(run.rows, threshold),
        latency_ms=_latency_ms(run.rows),
        machine=machine.describe(),
        model=dict(detector.manifest.model),
        provenance=dict(detector.manifest.provenance),
        notes=_notes(run, len(dataset.test)),
        errors=run.errors,
        rows=run.rows,
        by_size=by_size(
            run.pixels,
            [row.path for row in run.rows],
            sizes,
            threshold=threshold,
            rejected=[row.is_anomalous for row in run.rows],
        )
        if sizes and not run.without_mask
        else None,
        maps=run.maps,
    )


class _Run:
    """What is collected image by image."""

    def __init__(self, root: Path, bounded: metrics.PixelScores | None, *, has_masks: bool) -> None:
        self.root = root
        self.is_bounded = bounded is not None
        self.rows: list[Row] = []
        self.maps: list[np.ndarray] = []
        self.errors: list[dict[str, str]] = []
        self.pixels = bounded or metrics.PixelScores()
        self.has_masks = has_masks
        self.without_mask = 0

    def au_pro(self, *limits: float) -> list[float]:
        """AU-PRO at each limit; NaN where it cannot be computed."""
        values = np.empty((0, 0)) if self.without_mask else self.pixels.region_au_pro(limits)
        return [float(column.mean()) for column in values.T] if len(values) else [math.nan] * len(limits)

    def inspect(self, detector: Detector, item: TestItem) -> None:
        try:
            frame = read_image(item.path)
            if not self.rows:
                detector(frame)
            started = time.perf_counter()
            result = detector(frame)
            latency_ms = (time.perf_counter() - started) * 1e3
        except (DataError, OSError) as error:
            self._fail(item.path, error)
            return
        row = Row(
            path=relative_path(item.path, self.root),
            label=item.label,
            defect=item.defect,
            score=float(result.score),
            is_anomalous=bool(result.is_anomalous),
            latency_ms=latency_ms,
        )
        self.rows.append(row)
        self.maps.append(_reduced(result.anomaly_map) if self.is_bounded else result.anomaly_map)
        self._add_pixels(result, item, (frame.shape[0], frame.shape[1]))

    def _add_pixels(self, result: Result, item: TestItem, size_px: tuple[int, int]) -> None:
        from edgead.training.data import load_mask

        try:
            mask = load_mask(item, size_px)
        except (DataError, OSError) as error:
            self._fail(item.masks[0] if item.masks else item.path, error)
            mask = np.zeros(size_px, dtype=bool)
        if item.label == 1 and not mask.any():
            self.without_mask += 1
            self.pixels = metrics.PixelScores()
        if self.has_masks and not self.without_mask:  # 4 bytes a pixel, for no figure
            self.pixels.add(result.map_at(*size_px), mask)

    def _fail(self, path: Path, error: Exception) -> None:
        message = str(error).replace(f"{self.root}{os.sep}", "")
        self.errors.append({"path": relative_path(path, self.root), "message": message})


def _reduced(anomaly_map: np.ndarray) -> np.ndarray:
    """The map, or where it is large the highest values of its blocks."""
    side = math.ceil(math.sqrt(anomaly_map.size / _KEPT_MAP_PX))
    if side <= 1:
        return anomaly_map
    rows = np.maximum.reduceat(anomaly_map, np.arange(0, anomaly_map.shape[0], side), axis=0)
    return np.maximum.reduceat(rows, np.arange(0, anomaly_map.shape[1], side), axis=1)


def relative_path(path: Path, root: Path) -> str:
    """How rows and errors name a file: relative to the data set, with forward slashes."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _threshold_basis(detector: Detector) -> str:
    shipped = detector.manifest.threshold
    if detector.threshold == shipped.value:
        return shipped.basis
    return f"set after loading; the bundle says {shipped.value:g} ({shipped.basis})"


def _per_defect(rows: list[Row], threshold: float) -> dict[str, dict[str, Any]]:
    good = [row.score for row in rows if row.label == 0]
    table = {}
    for defect in sorted({row.defect for row in rows if row.label == 1}):
        scores = [row.score for row in rows if row.label == 1 and row.defect == defect]
        labels = [0] * len(good) + [1] * len(scores)
        table[defect] = {
            "images": len(scores),
            "image_auroc": metrics.image_auroc(good + scores, labels),
            "missed_defects": sum(score < threshold for score in scores),
            "missed_defect_rate": metrics.missed_defect_rate(scores, [1] * len(scores), threshold),
        }
    return table


def _latency_ms(rows: list[Row]) -> dict[str, Any]:
    calls_ms = [row.latency_ms for row in rows]
    p50, p90, p99 = (float(value) for value in np.percentile(calls_ms, (50, 90, 99)))
    return {
        "p50": p50,
        "p90": p90,
        "p99": p99,
        "max": max(calls_ms),
        "calls": len(calls_ms),
        "scope": LATENCY_SCOPE,
    }


def _notes(run: _Run, images: int) -> list[str]:
    """Sentences on what the figures leave out."""
    notes = []
    missing = images - len(run.rows)
    if missing:
        notes.append(f"{missing} of {images} test images could not be used and are in no figure.")
    labels = [row.label for row in run.rows]
    if 0 not in labels:
        notes.append("No good image: AUROC and the false reject rate cannot be computed.")
    if 1 not in labels:
        notes.append("No defect image: AUROC, AU-PRO, F1 and the missed defect rate cannot be computed.")
    if run.without_mask:
        notes.append(
            f"{run.without_mask} of {labels.count(1)} defect images have no mask with a defect pixel:"
            " no pixel figures, since their defects would count as background."
        )
    return notes


def _null_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
