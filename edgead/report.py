"""One HTML file with the figures of an evaluation and a picture of every verdict.

The file needs no network and no other file. All text that comes from data (names of files, folders,
bundles) is escaped. Drawing needs Jinja and matplotlib: `pip install "edgead[report]"`.
"""

from __future__ import annotations

import base64
import functools
import importlib.resources
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgead import metrics
from edgead.by_size import BySize, Component, area_text, remarks, tiniest
from edgead.errors import DataError, EdgeADError
from edgead.evaluate import Evaluation, Row, relative_path
from edgead.files import write_bytes
from edgead.heat import overlay
from edgead.image import enlarge, read_image, resize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from edgead.training.data import Dataset

THUMBNAIL_PX = 220
JPEG_QUALITY = 85
CROP_PX = 64  # shortest side of the surroundings in which a small defect is shown
STRIP = 8  # how many of the tiniest defects found, and missed, are shown
# Plots are drawn in these colours, which then become variables of the page, to follow its theme.
INK, GRID, MARK = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0102{10 + index}" for index in range(12))  # the first is for good images
PLOT_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """Pixels of one row of an evaluation.

    Attributes:
        path: the row's path.
        image: [height, width, 3] uint8 RGB.
        mask: [height, width] bool, True on defects, or None when there is none.
    """

    path: str
    image: np.ndarray
    mask: np.ndarray | None


def load_pictures(evaluation: Evaluation, dataset: Dataset) -> Iterator[Picture]:
    """Reads the images and masks of an evaluation again, one at a time."""
    from edgead.training.data import load_mask

    items = {relative_path(item.path, dataset.root): item for item in dataset.test}
    for row in evaluation.rows:
        item = items[row.path]
        image = read_image(item.path)
        try:
            mask = load_mask(item, (image.shape[0], image.shape[1])) if item.masks else None
        except DataError:  # already listed in the evaluation's errors
            mask = None
        yield Picture(row.path, image, mask)


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    pictures: Iterable[Picture],
    *,
    title: str,
    remark: str = "",
) -> None:
    """Writes the report atomically.

    Args:
        path: the HTML file to write; an existing one is replaced.
        evaluation: what `evaluate` returned, with its maps.
        pictures: for the rows, in any order; a row without one is listed without pictures.
        title: heading of the page.
        remark: a sentence to print under it, such as the licence or attribution of the images.

    Raises:
        EdgeADError: Jinja or matplotlib is not installed, or the file cannot be written.
    """
    environment = _environment()
    low, high = heat_scale(evaluation)
    defects = sorted(evaluation.per_defect)
    series = {"good": 0} | {name: 1 + index % (len(SERIES) - 1) for index, name in enumerate(defects)}
    strip = tiniest(evaluation.by_size, STRIP)
    thumbnails, crops = _draw_pictures(evaluation, pictures, strip, low=low, high=high)
    html = environment.from_string(_template()).render(
        evaluation=evaluation,
        title=title,
        remark=remark,
        defects=defects,
        series=series,
        colors=len(SERIES),
        cards=_cards(evaluation, thumbnails, kinds=list(series)),
        strip=strip,
        crops=crops,
        remarks=remarks(evaluation.by_size) if evaluation.by_size else [],
        wrong=sum(not row.is_right for row in evaluation.rows),
        heat={"low": low, "high": high, "bar": _heat_bar()},
        plots=_plots(evaluation, series),
        machine=_flat(evaluation.machine),
        model=_flat(evaluation.model),
        provenance=_flat(evaluation.provenance),
    )
    try:
        write_bytes(Path(path), html.encode("utf-8", errors="replace"))
    except OSError as error:
        raise EdgeADError(f"{path}: the report cannot be written: {error.strerror}") from error


def heat_scale(evaluation: Evaluation) -> tuple[float, float]:
    """Map values shown as transparent and as full heat, the same in all pictures.

    Transparent is what 99 % of the pixels of good images stay below, and below the threshold in any case
    (maps are on the scale of the score). Full is so far above it that a pixel at the threshold shows at
    half heat, or the peak of a typical defect where that is less.
    """
    threshold, rows, maps = evaluation.threshold, evaluation.rows, evaluation.maps
    peaks = [float(anomaly_map.max()) for anomaly_map in maps]
    good = [m.ravel() for row, m in zip(rows, maps, strict=True) if row.label == 0]
    usual, rare = np.quantile(np.concatenate(good or [m.ravel() for m in maps]), (0.5, 0.99))
    low = float(min(rare, (usual + threshold) / 2))
    high = float(np.median([p for row, p in zip(rows, peaks, strict=True) if row.label == 1] or peaks))
    if threshold > low:
        high = min(high, 2 * threshold - low)
    if high <= low:  # the detector does not separate good from defect
        high = max(*peaks, low + 1e-6)
    return low, high


def check_packages() -> None:
    """Whether a report can be written; raises EdgeADError."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import PIL.Image  # noqa: F401  (a dependency of matplotlib)
    except ImportError as error:
        raise EdgeADError(
            f'writing a report needs the Python package {error.name}: pip install "edgead[report]"'
        ) from error


def _environment() -> Any:
    check_packages()
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": _figure_text, "percent": _percent_text, "area": area_text}
    return environment


def _template() -> str:
    return importlib.resources.files("edgead").joinpath("report.html.jinja").read_text(encoding="utf-8")


def _figure_text(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "n/a"


def _percent_text(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "n/a"


def _draw_pictures(
    evaluation: Evaluation,
    pictures: Iterable[Picture],
    strip: Mapping[str, Sequence[Component]],
    *,
    low: float,
    high: float,
) -> tuple[dict[str, dict[str, Any]], dict[Component, dict[str, Any]]]:
    """Thumbnails of the rows by path, and of the surroundings of the components in the strip."""
    maps = {row.path: m for row, m in zip(evaluation.rows, evaluation.maps, strict=True)}
    thumbnails, crops = {}, {}
    for picture in pictures:
        anomaly_map = maps[picture.path]
        thumbnails[picture.path] = _thumbnails(picture, anomaly_map, low=low, high=high)
        for component in itertools.chain.from_iterable(strip.values()):
            if component.path == picture.path:
                around, part = _surroundings(picture, anomaly_map, component.box_px)
                crops[component] = _thumbnails(around, part, low=low, high=high)
    return thumbnails, crops


def _surroundings(
    picture: Picture, anomaly_map: np.ndarray, box_px: tuple[int, int, int, int]
) -> tuple[Picture, np.ndarray]:
    """What is in and around a box, at the original resolution: image with mask, and map."""
    left, top, width, height = box_px
    half_px = max(CROP_PX, 2 * max(width, height)) // 2
    x, y = left + width // 2, top + height // 2
    part = (slice(max(0, y - half_px), y + half_px), slice(max(0, x - half_px), x + half_px))
    whole = enlarge(anomaly_map, picture.image.shape[0], picture.image.shape[1])
    mask = None if picture.mask is None else picture.mask[part]
    return Picture(picture.path, picture.image[part], mask), whole[part]


def _cards(
    evaluation: Evaluation, thumbnails: Mapping[str, dict[str, Any]], *, kinds: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry per row: the wrong verdicts, the worst first, then the right ones, the closest first."""
    threshold = evaluation.threshold
    top = max([threshold, *(row.score for row in evaluation.rows)])
    bottom = min([threshold, 0.0, *(row.score for row in evaluation.rows)])

    def order(row: Row) -> tuple[bool, float]:
        distance = abs(row.score - threshold)
        return row.is_right, distance if row.is_right else -distance

    def place(score: float) -> float:
        return 100 * (score - bottom) / (top - bottom) if top > bottom else 0.0

    return [
        {
            "row": row,
            "kind": kinds.index(row.defect),
            "thumbnails": thumbnails.get(row.path),
            "bar_percent": place(row.score),
            "threshold_percent": place(threshold),
        }
        for row in sorted(evaluation.rows, key=order)
    ]


def _thumbnails(picture: Picture, anomaly_map: np.ndarray, *, low: float, high: float) -> dict[str, Any]:
    height, width = picture.image.shape[:2]
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    size_px = max(1, round(height * scale)), max(1, round(width * scale))
    small = resize(picture.image, *size_px)
    heat = overlay(small, anomaly_map, low=low, high=high)
    if picture.mask is not None:
        heat = _outlined(heat, picture.mask)
    return {
        "image": _jpeg_uri(small),
        "heat": _jpeg_uri(heat),
        "height_px": size_px[0],
        "width_px": size_px[1],
    }


def _outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with a white line, edged in black, around the mask; specks of the mask are kept."""
    import cv2

    height, width = image.shape[:2]
    small = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) > 0
    inside, outlined = small.astype(np.uint8), image.copy()
    line = cv2.dilate(inside, np.ones((3, 3), np.uint8))
    edge = cv2.dilate(line, np.ones((3, 3), np.uint8))
    outlined[edge > line] = 0
    outlined[line > inside] = 255
    return outlined


def _jpeg_uri(image: np.ndarray) -> str:
    import PIL.Image

    stream = io.BytesIO()
    PIL.Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _heat_bar() -> str:
    ramp = np.tile(np.linspace(0, 1, THUMBNAIL_PX, dtype=np.float32), (10, 1))
    return _jpeg_uri(overlay(np.full((*ramp.shape, 3), 128, np.uint8), ramp, low=0.0, high=1.0))


def _plots(evaluation: Evaluation, series: Mapping[str, int]) -> dict[str, Any]:
    """Inline SVG of each plot. No text of the data goes in: the legend is part of the page."""
    return {
        "scores": _svg("scores", (7.2, 3.4), lambda axes: _draw_scores(axes, evaluation, series)),
        "roc": _svg("roc", (3.3, 2.9), lambda axes: _draw_roc(axes, evaluation))
        if evaluation.good_images and evaluation.defect_images
        else None,
        "latency": _svg("latency", (4.6, 2.4), lambda axes: _draw_latency(axes, evaluation)),
        "by_size": _svg("by_size", (4.0, 3.2), functools.partial(_draw_by_size, figures=by_size))
        if (by_size := evaluation.by_size)
        else None,
    }


def _draw_scores(axes: Axes, evaluation: Evaluation, series: Mapping[str, int]) -> None:
    groups = [[row.score for row in evaluation.rows if row.defect == name] for name in series]
    everything = [row.score for row in evaluation.rows] + [evaluation.threshold]
    limits = min(everything), max(everything)
    colors = [SERIES[index] for index in series.values()]
    axes.hist(groups, bins=40, range=limits, stacked=True, color=colors)
    axes.axvline(evaluation.threshold, color=INK, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"threshold {evaluation.threshold:.3g}",
        (evaluation.threshold, 1.02),
        xycoords=("data", "axes fraction"),
        ha="center",
        color=INK,
    )
    axes.set(xlabel="score", ylabel="images")


def _draw_roc(axes: Axes, evaluation: Evaluation) -> None:
    scores, labels = [row.score for row in evaluation.rows], [row.label for row in evaluation.rows]
    false_rejects, detections, _ = metrics.roc_curve(scores, labels)
    axes.plot([0, 100], [0, 100], color=GRID, linewidth=1)
    axes.plot(100 * false_rejects, 100 * detections, color=SERIES[0], linewidth=2, clip_on=False)
    point = 100 * evaluation.false_reject_rate, 100 * (1 - evaluation.missed_defect_rate)
    axes.plot(*point, "o", color=MARK, markersize=7, clip_on=False, zorder=5)
    axes.set(xlabel="good parts rejected, %", ylabel="defects caught, %", xlim=(0, 100), ylim=(0, 100))
    axes.set_aspect("equal")


def _draw_latency(axes: Axes, evaluation: Evaluation) -> None:
    calls_ms = [row.latency_ms for row in evaluation.rows]
    axes.hist(calls_ms, bins=40, color=SERIES[0])
    for name, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
        axes.axvline(evaluation.latency_ms[name], color=INK, linestyle=style, linewidth=1.2)
    axes.set(xlabel="milliseconds per call", ylabel="calls")


def _draw_by_size(axes: Axes, figures: BySize) -> None:
    """AU-PRO of the bins at their median areas, and of each component at the largest limit."""
    areas_px = [one.area_px for one in figures.components]
    alone = [one.au_pro[0] for one in figures.components]
    axes.scatter(areas_px, alone, s=9, color=SERIES[0], alpha=0.4, linewidth=0)
    medians_px = [one.median_px for one in figures.bins]
    for column, _ in enumerate(figures.limits):
        values = [one.au_pro[column] for one in figures.bins]
        axes.plot(medians_px, values, "o-", color=SERIES[column], markersize=5, clip_on=False)
    axes.set(xscale="log", xlabel="area of the defect, px", ylabel="AU-PRO", ylim=(0, 1))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _svg(name: str, size_in: tuple[float, float], draw: Callable[[Axes], None]) -> Any:
    """Draws on one pair of axes and returns the SVG element, marked as safe for the template."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    stream = io.StringIO()
    # The salt names clip paths: alike in every run, different in each plot of the page.
    with matplotlib.rc_context(PLOT_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size_in, layout="constrained")
        axes = figure.add_subplot()
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        draw(axes)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=no_metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration and the document type
    variables = {INK: "ink", GRID: "line", MARK: "wrong"}
    variables |= {color: f"s{index}" for index, color in enumerate(SERIES)}
    for color, variable in variables.items():
        svg = svg.replace(color, f"var(--{variable})")
    return Markup(svg)


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(key, text) of every leaf of a nested record, in its order."""
    rows: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key} ")
        else:
            rows.append((f"{prefix}{key}".replace("_mib", ", MiB").replace("_", " "), _leaf_text(value)))
    return rows


def _leaf_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_leaf_text(item) for item in value) or "–"
    return str(value)
