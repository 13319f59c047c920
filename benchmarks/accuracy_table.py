"""Table and picture of accuracy results, from their JSON records and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgead.benchmarks.results_file import table
from edgead.errors import EdgeADError
from edgead.files import whole_file

SOURCE = (
    "image AUROC and AU-PRO of the public reproduction nelson1425/EfficientAD, per category, from its"
    " README: 70,000 steps, teacher distilled from WideResNet-101 on ImageNet"
)
# MVTec AD category -> image AUROC and AU-PRO@30 in percent, of EfficientAD-S and then of -M.
_MVTEC = {
    "bottle": (99.92, 95.19, 100.0, 95.72),
    "cable": (93.52, 88.23, 94.15, 90.35),
    "capsule": (98.44, 97.60, 98.05, 97.05),
    "carpet": (99.44, 91.83, 99.40, 93.01),
    "grid": (99.75, 89.32, 100.0, 89.20),
    "hazelnut": (99.43, 94.84, 99.79, 95.23),
    "leather": (100.0, 98.22, 100.0, 98.21),
    "metal_nut": (99.51, 93.62, 99.56, 94.75),
    "pill": (98.50, 97.03, 99.10, 96.39),
    "screw": (97.87, 95.58, 97.44, 97.31),
    "tile": (99.82, 88.15, 100.0, 88.36),
    "toothbrush": (100.0, 94.56, 100.0, 94.46),
    "transistor": (99.92, 90.27, 99.87, 91.44),
    "wood": (99.65, 90.43, 99.56, 90.49),
    "zipper": (99.63, 94.36, 99.37, 94.07),
}
PUBLISHED = {
    f"mvtec/{name}": {
        "efficientad-s": {"image_auroc": row[0] / 100, "au_pro_30": row[1] / 100},
        "efficientad-m": {"image_auroc": row[2] / 100, "au_pro_30": row[3] / 100},
    }
    for name, row in _MVTEC.items()
}
HEADER = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "au_pro_30": "AU-PRO@30",
    "au_pro_05": "AU-PRO@5",
    "f1_max": "F1-max",
    "false_reject_rate": "good rejected",
    "missed_defect_rate": "defects missed",
}
_COUNTS = {
    "false_reject_rate": ("false_rejects", "good_images"),
    "missed_defect_rate": ("missed_defects", "defect_images"),
}
_CHOSEN = ("penalty", "teacher", "backbone", "precision", "backend")
_ASIDE = ("seed", "size")  # of a training configuration; these two have columns of their own


def settings(result: dict[str, Any]) -> dict[str, Any]:
    """All that was chosen for a job but its data, method and seed."""
    config = {key: value for key, value in result["config"].items() if key not in _ASIDE}
    if config.get("minutes") is not None:
        del config["steps"]  # not what it was trained for
    return config | {key: result[key] for key in _CHOSEN}


def groups(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results that differ in nothing but the seed, together.

    Returns:
        name, method, settings, seeds, figures {name: {mean, min, max}, or None where a seed has none},
        steps and train_s (means), published (or None), and results.
    """
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        same = {"name": result["name"], "method": result["method"], "settings": settings(result)}
        found.setdefault(repr(same), {**same, "results": []})["results"].append(result)
    for group in found.values():
        members = group["results"] = sorted(group["results"], key=lambda r: r["config"]["seed"])
        published = PUBLISHED.get(members[0]["published"] or "", {}).get(group["method"])
        group |= {
            "seeds": [member["config"]["seed"] for member in members],
            "figures": {name: _spread([m["figures"][name] for m in members]) for name in HEADER},
            "steps": _mean([member["train"]["steps"] for member in members]),
            "train_s": _mean([member["train"]["seconds"] for member in members]),
            "published": published,
        }
    return list(found.values())


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`groups` for a JSON file: without the results."""
    return [{k: v for k, v in group.items() if k != "results"} for group in groups(results)]


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per seed, one for all seeds of a combination, and one with the published figures.

    What varies among the jobs of one method, other than data and seed, has a column.
    """
    found = groups(results)
    values: dict[tuple[str, str], set[str]] = {}
    for group in found:
        for key, value in group["settings"].items():
            values.setdefault((key, group["method"]), set()).add(repr(value))
    varying = list(dict.fromkeys(key for (key, _), seen in values.items() if len(seen) > 1))
    rows = [row for group in found for row in _rows(group, varying)]
    header = ("data", "method", *varying, "seed", *HEADER.values(), "steps", "train s")
    return table(header, rows)


def _rows(group: dict[str, Any], varying: list[str]) -> list[list[str]]:
    chosen = [_text(group["settings"].get(key)) for key in varying]
    first = [group["name"], group["method"], *chosen]
    rows = [
        [
            *first,
            str(result["config"]["seed"]),
            *(_figure(result, name) for name in HEADER),
            str(result["train"]["steps"]),
            f"{result['train']['seconds']:.0f}",
        ]
        for result in group["results"]
    ]
    if len(rows) > 1:
        spreads = [_spread_text(group["figures"][name], percent=name in _COUNTS) for name in HEADER]
        ends = [f"{group['steps']:.0f}", f"{group['train_s']:.0f}"]
        rows.append([*first, f"mean (min..max) of {len(rows)}", *spreads, *ends])
    if group["published"]:
        figures = [_number(group["published"].get(name)) for name in HEADER]
        rows.append([*first, "published", *figures, "70000", ""])
    return rows


def failures_table(failures: dict[str, str]) -> str:
    """Name of a job -> why it failed."""
    return table(("failed", "error"), [(name, _one_line(text)) for name, text in failures.items()])


def machines(results: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence per kind of machine that took part, without anything that names it."""
    found = []
    for result in results:
        machine = result["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["libraries"].items() if v)
        found.append(
            f"{machine['cpu']['model']}, {machine['cpu']['usable_cores']} cores,"
            f" trained on {result['train']['device']}, evaluated with {result['ran']};"
            f" Python {machine['python']}, {versions}"
        )
    return list(dict.fromkeys(found))


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against training time as an SVG: mean over the seeds, and the range as a band.

    Raises:
        EdgeADError: matplotlib is not installed.
    """
    check_plot()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "accuracy", "axes.grid": True, "grid.alpha": 0.4, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        panels = zip(("image_auroc", "au_pro_30"), figure.subplots(1, 2), strict=True)
        for name, axes in panels:
            lines = _series(results, name)
            for label, points in lines.items():
                minutes, mean, low, high = zip(*points, strict=True)
                (line,) = axes.plot(minutes, mean, marker="o", markersize=3, label=label)
                axes.fill_between(minutes, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
            axes.set(xscale="log", xlabel="minutes of training", ylabel=HEADER[name])
            ticks = {float(f"{point[0]:.2g}") for points in lines.values() for point in points}
            axes.set_xticks(sorted(ticks))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(temporary, format="svg", metadata=no_metadata)


def check_plot() -> None:
    """Raises EdgeADError where nothing can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EdgeADError('--plot needs matplotlib: pip install "edgead[report]"') from error


def _series(
    results: Sequence[dict[str, Any]], name: str
) -> dict[str, list[tuple[float, float, float, float]]]:
    """Label -> (minutes of training, mean, min, max), by rising minutes; what has no figure is left out.

    A line is what differs in nothing but the training time; its label says no more than it has to.
    """
    found = groups(results)
    rest = [{k: v for k, v in g["settings"].items() if k not in ("steps", "minutes")} for g in found]
    keys = dict.fromkeys(key for other in rest for key in other)
    varying = [key for key in keys if len({repr(other.get(key)) for other in rest}) > 1]
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for group, other in zip(found, rest, strict=True):
        spread = group["figures"][name]
        if spread is None:
            continue
        extra = [f"{key} {_text(other[key])}" for key in varying if key in other]
        point = (group["train_s"] / 60, spread["mean"], spread["min"], spread["max"])
        lines.setdefault(", ".join([group["name"], group["method"], *extra]), []).append(point)
    return {label: sorted(points) for label, points in lines.items()}


def _spread(values: list[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": _mean(known), "min": min(known), "max": max(known)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)  # the same in any order


def _figure(result: dict[str, Any], name: str) -> str:
    if name not in _COUNTS or result["figures"][name] is None:
        return _number(result["figures"][name])
    part, whole = (result["counts"][key] for key in _COUNTS[name])
    return f"{part} of {whole}"


def _spread_text(spread: dict[str, float] | None, *, percent: bool) -> str:
    if spread is None:
        return "-"
    mean, low, high = (f"{v:.1%}" if percent else f"{v:.4f}" for v in spread.values())
    return f"{mean} ({low}..{high})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
