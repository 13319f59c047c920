"""AU-PRO by size of the defects: does localisation hold from large defects to tiny ones?

The benchmark of Forward-Backward Feature Transfer: the size of a defect is the area of its 8-connected
component at the original resolution, the quartiles of the areas of one data set make four bins, and all
bins share the same false positives, those on the background of all test images. Pixels of the components
outside a bin count as neither right nor wrong. AU-PRO of a bin is therefore the mean of what its
components reach one by one.

    cumulative  Q1, Q2, Q3: area up to the first, second, third quartile; Q4: all components
    disjoint    the same limits, each bin without the ones before it

Robustness follows the published description, whose code was not released: rho = mean of the four bins
* min(Q1, Q4) / max(Q1, Q4).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgead.errors import DataError
from edgead.image import read_image
from edgead.metrics import PixelScores, Region

if TYPE_CHECKING:
    from edgead.training.data import Dataset, TestItem

LIMITS = (0.30, 0.10, 0.05, 0.01)
BINS = ("cumulative", "disjoint")
FEWEST_COMPONENTS = 4  # fewer have no quartiles worth the name


@dataclass(frozen=True)
class SizeConfig:
    """How figures by size are computed.

    Attributes:
        bins: one of BINS.
        thresholds: None for the exact integral, 99 for the recipe of the published code.

    Raises:
        DataError: an unknown name, or fewer than 2 thresholds.
    """

    bins: str = BINS[0]
    thresholds: int | None = None

    def __post_init__(self) -> None:
        if self.bins not in BINS:
            raise DataError(f"bins are {self.bins!r}, expected one of {', '.join(BINS)}")
        if self.thresholds is not None and self.thresholds < 2:
            raise DataError(f"thresholds are {self.thresholds}, expected 2 or more, published are 99")

    @property
    def integral(self) -> str:
        """How AU-PRO is integrated, for people."""
        if self.thresholds is None:
            return "exact integral"
        return f"{self.thresholds} thresholds at equally spaced background ranks (published recipe)"


@dataclass(frozen=True)
class Component:
    """One defect.

    Attributes:
        path: of its image, as in the evaluation's rows.
        box_px: left, top, width, height.
        peak: highest map value inside.
        is_found: whether the peak reaches the threshold, and the image is rejected.
        au_pro: AU-PRO of this component alone, at each limit.
    """

    path: str
    area_px: int
    box_px: tuple[int, int, int, int]
    peak: float
    is_found: bool
    au_pro: tuple[float, ...]


@dataclass(frozen=True)
class SizeBin:
    """The components with `above_px` < area <= `up_to_px`; median and figures of none are NaN."""

    name: str
    above_px: float
    up_to_px: float
    components: int
    median_px: float
    au_pro: tuple[float, ...]


@dataclass(frozen=True)
class Robustness:
    """Robustness to defect size at one limit, from the figures of the bins at that limit.

    Attributes:
        mean: of the bins that have components.
        ratio: min(Q1, Q4) / max(Q1, Q4); 0 if both are 0, NaN if one of them is empty.
        rho: mean * ratio, after the published description.
    """

    limit: float
    mean: float
    ratio: float
    rho: float


@dataclass(frozen=True, kw_only=True)
class BySize:
    """AU-PRO by size of one data set. Tuples of figures go with `limits`.

    Attributes:
        bins_mode: "cumulative" or "disjoint".
        integral: how AU-PRO was integrated.
        thresholds: as in `SizeConfig`.
        limits: false positive rates, L.
        quartiles_px: q1, q2, q3 of the areas; empty with fewer than FEWEST_COMPONENTS.
        background_px: pixels outside of all defects, of all test images.
        bins: Q1 to Q4; Q4 alone with fewer than FEWEST_COMPONENTS.
        empty_bins: how many bins have no component; they are in no mean.
        robustness: per limit; empty with fewer than FEWEST_COMPONENTS.
        components: from the smallest to the largest.
    """

    bins_mode: str
    integral: str
    thresholds: int | None
    limits: tuple[float, ...]
    quartiles_px: tuple[float, ...]
    background_px: int
    bins: tuple[SizeBin, ...]
    empty_bins: int
    robustness: tuple[Robustness, ...]
    components: tuple[Component, ...]


def open_pixels(dataset: Dataset, config: SizeConfig) -> PixelScores:
    """Looks through all masks and makes a `PixelScores` that keeps no more than the figures need.

    The sizes of the test images come from their headers: an upper bound for the background.

    Raises:
        DataError: no defect image, or one whose mask is missing, damaged, empty or of another size.
    """
    sizes_px = [_header_size_px(item) for item in dataset.test]
    defects = [(item, size) for item, size in zip(dataset.test, sizes_px, strict=True) if item.label]
    if not defects:
        raise DataError(f"data set {dataset.name}: no defect images, so no sizes to tell apart")
    problems = [problem for item, size in defects if (problem := _mask_problem(item, size))]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DataError(
            f"data set {dataset.name}: figures by size need the mask of every defect image, and"
            f" {len(problems)} of {len(defects)} cannot be used: {'; '.join(problems[:3])}{more}"
        )
    share = max(LIMITS)
    if config.thresholds is not None:  # the first threshold beyond the limit takes part
        share = min(1.0, share + 1 / (config.thresholds - 1))
    pixels = sum(height * width for height, width in sizes_px)
    return PixelScores(keep_px=int(share * pixels) + 2)


def by_size(
    pixels: PixelScores,
    paths: Sequence[str],
    config: SizeConfig,
    *,
    threshold: float,
    rejected: Sequence[bool],
) -> BySize | None:
    """Figures by size.

    Args:
        pixels: all test images.
        paths: of the images, in the order in which they were added.
        threshold: map value from which on a component is found, if its image is rejected as well.
        rejected: of the images; a method whose score is no maximum of its map may let one pass.

    Returns:
        None if there are no components or no background.
    """
    regions = pixels.list_regions()
    if not regions or not pixels.background_px:
        return None
    values = pixels.region_au_pro(LIMITS, thresholds=config.thresholds)
    areas_px = np.array([region.area_px for region in regions])
    quartiles_px: tuple[float, ...] = ()
    if len(regions) >= FEWEST_COMPONENTS:
        quartiles_px = tuple(float(q) for q in np.quantile(areas_px, (0.25, 0.5, 0.75)))
    bins = tuple(_bins(areas_px, values, quartiles_px, config))
    return BySize(
        bins_mode=config.bins,
        integral=config.integral,
        thresholds=config.thresholds,
        limits=LIMITS,
        quartiles_px=quartiles_px,
        background_px=pixels.background_px,
        bins=bins,
        empty_bins=sum(not one.components for one in bins),
        robustness=tuple(
            robustness(limit, [one.au_pro[column] for one in bins])
            for column, limit in enumerate(LIMITS if quartiles_px else ())
        ),
        components=_components(regions, values, paths, threshold, rejected),
    )


def robustness(limit: float, values: Sequence[float]) -> Robustness:
    """Robustness from AU-PRO at `limit` of the bins Q1 to Q4; NaN stands for an empty bin."""
    mean = float(np.nanmean(values))
    first, last = values[0], values[-1]
    if math.isnan(first) or math.isnan(last):
        return Robustness(limit, mean, math.nan, math.nan)
    ratio = min(first, last) / max(first, last) if max(first, last) else 0.0
    return Robustness(limit, mean, ratio, mean * ratio)


def tiniest(figures: BySize | None, count: int) -> dict[str, list[Component]]:
    """The smallest components under "missed" and under "found"; without figures nothing."""
    if figures is None:
        return {}
    kinds = {"missed": False, "found": True}
    return {
        name: [one for one in figures.components if one.is_found == is_found][:count]
        for name, is_found in kinds.items()
    }


def lines(figures: BySize) -> list[str]:
    """Table for a terminal: bins, then robustness, each column at its own limit."""
    found = sum(one.is_found for one in figures.components)
    rows = [
        ["", "area, px", "components", *(f"AU-PRO@{100 * limit:g}" for limit in figures.limits)],
        *(
            [one.name, area_text(one), str(one.components), *map(_text, one.au_pro)]
            for one in figures.bins
        ),
    ]
    if figures.robustness:
        for name in ("mean", "ratio", "rho"):
            rows.append([name, "", "", *(_text(getattr(one, name)) for one in figures.robustness)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        f"defects by size: {len(figures.components)} components ({found} found),"
        f" {figures.bins_mode} bins, {figures.integral}",
        *(
            "  ".join(
                ["", *(f"{text:<{n}}" for text, n in zip(row[:2], widths[:2], strict=True))]
                + [f"{text:>{n}}" for text, n in zip(row[2:], widths[2:], strict=True)]
            )
            for row in rows
        ),
        *(f"  {text}" for text in remarks(figures)),
    ]


def remarks(figures: BySize) -> list[str]:
    """What has to be said beside the figures."""
    said = [
        "AU-PRO@L: up to a false positive rate of L percent on the background of all test images;"
        " components are 8-connected, areas are those at the original resolution."
    ]
    if not figures.robustness:
        said.append(f"Fewer than {FEWEST_COMPONENTS} components: no quartiles, Q4 holds all of them.")
        return said
    used = f"{4 - figures.empty_bins} bins with components" if figures.empty_bins else "four bin values"
    said.append(
        f"mean: of the {used} at that L, {figures.bins_mode} bins; ratio: min(Q1, Q4) / max(Q1, Q4);"
        " rho: mean * ratio, after the published description."
    )
    if figures.empty_bins:
        said.append(f"{figures.empty_bins} of 4 bins are empty, because areas tie: n/a, and in no mean.")
    return said


def area_text(one: SizeBin) -> str:
    """The limits of a bin."""
    low = f"above {one.above_px:.10g} " if one.above_px else ""
    return f"{low}up to {one.up_to_px:.10g}"


def _bins(
    areas_px: np.ndarray, values: np.ndarray, quartiles_px: Sequence[float], config: SizeConfig
) -> Iterator[SizeBin]:
    above_px = 0.0
    limits_px = (*quartiles_px, float(areas_px.max()))
    for number, up_to_px in enumerate(limits_px, start=5 - len(limits_px)):
        inside = (areas_px > above_px) & (areas_px <= up_to_px)
        yield SizeBin(
            name=f"Q{number}",
            above_px=above_px,
            up_to_px=up_to_px,
            components=int(inside.sum()),
            median_px=float(np.median(areas_px[inside])) if inside.any() else math.nan,
            au_pro=_mean(values[inside]),
        )
        if config.bins == "disjoint":
            above_px = up_to_px


def _mean(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.mean(axis=0).tolist()) if len(values) else (math.nan,) * values.shape[1]


def _components(
    regions: Sequence[Region],
    values: np.ndarray,
    paths: Sequence[str],
    threshold: float,
    rejected: Sequence[bool],
) -> tuple[Component, ...]:
    found = [
        Component(
            path=paths[region.image],
            area_px=region.area_px,
            box_px=region.box_px,
            peak=region.peak,
            is_found=bool(rejected[region.image]) and region.peak >= threshold,
            au_pro=tuple(value.tolist()),
        )
        for region, value in zip(regions, values, strict=True)
    ]
    return tuple(sorted(found, key=lambda one: one.area_px))


def _header_size_px(item: TestItem) -> tuple[int, int]:
    """(height, width) from the file's header; (0, 0) if it has none, and then no pixel will count."""
    import imagesize

    try:
        width, height = imagesize.get(item.path)
    except (OSError, ValueError):
        return 0, 0
    return max(height, 0), max(width, 0)


def _mask_problem(item: TestItem, size_px: tuple[int, int]) -> str | None:
    """What is wrong with the mask of a defect image; None if nothing is."""
    from edgead.training.data import load_mask

    if not item.masks:
        return f"{item.path}: there is no mask for this image"
    if not all(size_px):
        return None  # the image is listed as unusable when its turn comes
    try:
        has_defect = load_mask(item, size_px).any()
    except (DataError, OSError) as error:
        with contextlib.suppress(DataError):  # imagesize does not turn a PNG or WebP as its EXIF says
            height, width = read_image(item.path).shape[:2]
            if (height, width) != size_px:
                return _mask_problem(item, (height, width))
        return str(error)
    return None if has_defect else f"{item.masks[0]}: this mask is empty, its image {item.path} a defect"


def _text(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.4f}"
