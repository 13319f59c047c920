"""The benchmark of tiny defects: AU-PRO by size of defect, of several bundles on one data set.

    python -m edgead.benchmarks.tiny_defects DATA X.edgead Y.edgead ... --out DIR

Writes DIR/tiny_defects.json, .md (tables) and .svg (AU-PRO against defect size), anew after each bundle.
Maps and masks are compared at the original resolution; bins, limits and robustness are those of
`edgead.by_size`. A bundle is called what its file is called.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgead.benchmarks.command import exit_status
from edgead.benchmarks.results_file import table, write_results
from edgead.bundle import Bundle
from edgead.by_size import BINS, LIMITS, BySize, SizeConfig, remarks
from edgead.detector import load
from edgead.errors import DataError, EdgeADError
from edgead.evaluate import Evaluation, evaluate
from edgead.files import whole_file, write_text
from edgead.training.data import Dataset, open_dataset

NAME = "tiny_defects"
LOSSY = (".jpg", ".jpeg", ".webp")
_KEPT = (  # of an evaluation
    *("name", "method", "backend", "precision", "images", "image_auroc", "pixel_auroc", "threshold"),
    *("threshold_basis", "false_rejects", "good_images", "missed_defects", "defect_images", "by_size"),
    *("latency_ms", "model", "provenance", "notes", "errors"),
)


def measure(
    dataset: Dataset, bundle: Path, config: SizeConfig, *, backend: str, threads: int | None
) -> tuple[BySize, dict[str, Any]]:
    """Evaluates one bundle.

    Returns:
        Its figures by size, and its record for the JSON file.

    Raises:
        DataError: no defect image has a component.
    """
    with load(bundle, backend=backend, threads=threads) as detector:
        evaluation = evaluate(detector, dataset, sizes=config)
    if evaluation.by_size is None:
        raise DataError(
            f"data set {dataset.name}: there are no figures by size: {' '.join(evaluation.notes)}"
        )
    return evaluation.by_size, _record(evaluation, bundle)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all bundles have figures, else 1."""
    arguments = _parse(argv)
    return exit_status(NAME, lambda: _run(arguments))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="X.edgead")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--bins", choices=BINS, default=SizeConfig.bins)
    parser.add_argument(
        "--thresholds", type=int, metavar="N", help="integrate over N thresholds, published: 99"
    )
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int)
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    _require_matplotlib()
    config = SizeConfig(bins=arguments.bins, thresholds=arguments.thresholds)
    repeated = [name for name, n in Counter(path.stem for path in arguments.bundles).items() if n > 1]
    if repeated:
        raise DataError(f"several bundles are called {repeated[0]}: rename them, the table goes by name")
    for bundle in arguments.bundles:
        Bundle.open(bundle)  # a wrong one is told of before the others have taken their time
    dataset = open_dataset(arguments.data)
    data = _describe(dataset)
    figures: dict[str, BySize] = {}
    records: dict[str, dict[str, Any]] = {}
    for bundle in arguments.bundles:
        figures[bundle.stem], records[bundle.stem] = measure(
            dataset, bundle, config, backend=arguments.backend, threads=arguments.threads
        )
        file = arguments.out / f"{NAME}.json"
        write_results(file, NAME, {"data": data, "bundles": records})
        page = _page(json.loads(file.read_text(encoding="utf-8")), figures)
        write_text(arguments.out / f"{NAME}.md", page)
        plot(figures, arguments.out / f"{NAME}.svg")
    print(page)


def _record(evaluation: Evaluation, bundle: Path) -> dict[str, Any]:
    content = json.loads(evaluation.to_json())
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    return {"sha256": digest, **{name: content[name] for name in _KEPT}}


def _describe(dataset: Dataset) -> dict[str, Any]:
    """What the figures were measured on, without a path of the machine."""
    digest = hashlib.sha256()
    for file in (file for item in dataset.test for file in (item.path, *item.masks)):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(dataset.root).as_posix()}\0{content}\n".encode())
    labels = [item.label for item in dataset.test]
    return {
        "name": dataset.name,
        "layout": dataset.layout,
        "good_images": labels.count(0),
        "defect_images": labels.count(1),
        "formats": dict(Counter(item.path.suffix.lower() for item in dataset.test)),
        "test_sha256": digest.hexdigest(),
    }


def _page(record: dict[str, Any], figures: dict[str, BySize]) -> str:
    data, machine = record["data"], record["machine"]
    one = next(iter(figures.values()))
    quartiles = ", ".join(f"{q:.10g}" for q in one.quartiles_px) or "none"
    formats = ", ".join(f"{count} {suffix}" for suffix, count in data["formats"].items())
    versions = ", ".join(f"{k} {v}" for k, v in machine["libraries"].items() if v)
    lines = [
        f"# Tiny defects: {data['name']}",
        "",
        f"* {data['good_images']} good and {data['defect_images']} defect test images ({formats});"
        f" {len(one.components)} components of {one.components[0].area_px} to"
        f" {one.components[-1].area_px} px, quartiles {quartiles}; {one.bins_mode} bins, {one.integral}",
        *(f"* {text}" for text in remarks(one)),
        f"* {machine['cpu']['model']}, {machine['cpu']['usable_cores']} cores; Python"
        f" {machine['python']}, {versions}; {record['utc']}, commit {record['git_commit']}",
    ]
    if any(suffix in LOSSY for suffix in data["formats"]):
        lines.append("* the images are compressed with loss; published figures are from lossless ones")
    lines += ["", _sizes_table(figures), "", _summary_table(figures, record["bundles"])]
    return "\n".join(lines) + "\n"


def _sizes_table(figures: dict[str, BySize]) -> str:
    """A line per bundle and limit."""
    bins = [f"{bin_.name} ({bin_.components})" for bin_ in next(iter(figures.values())).bins]
    rows = []
    for name, one in figures.items():
        for column, limit in enumerate(one.limits):
            row = [name, f"@{100 * limit:g}", *(_number(bin_.au_pro[column]) for bin_ in one.bins)]
            if one.robustness:
                found = one.robustness[column]
                row += [_number(value) for value in (found.mean, found.ratio, found.rho)]
            rows.append(row)
    more = ("mean", "ratio", "rho") if next(iter(figures.values())).robustness else ()
    return table(("bundle", "AU-PRO", *bins, *more), rows)


def _summary_table(figures: dict[str, BySize], records: dict[str, dict[str, Any]]) -> str:
    """A line per bundle: what it is, what it finds at its threshold, and how long a call takes."""
    rows = []
    for name, one in figures.items():
        record, tiny_px = records[name], one.bins[0].up_to_px
        tiny = [part.is_found for part in one.components if part.area_px <= tiny_px]
        everything = [part.is_found for part in one.components]
        rows.append(
            [
                name,
                record["method"],
                f"{record['backend']} {record['precision']}",
                *(_number(record[key]) for key in ("image_auroc", "pixel_auroc")),
                f"{sum(tiny)} of {len(tiny)}",
                f"{sum(everything)} of {len(everything)}",
                f"{record['false_rejects']} of {record['good_images']}",
                f"{record['latency_ms']['p50']:.1f}",
            ]
        )
    first = next(iter(figures.values())).bins[0].name
    header = ("bundle", "method", "ran with", "image AUROC", "pixel AUROC", f"found in {first}")
    return table((*header, "found in all", "good rejected", "call ms, p50"), rows)


def plot(figures: dict[str, BySize], path: Path) -> None:
    """AU-PRO against defect size as an SVG: a panel per limit, a line per bundle through its bins."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": NAME, "axes.grid": True, "grid.alpha": 0.4, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 6.0), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True).flat
        medians_px = {bin_.median_px for one in figures.values() for bin_ in one.bins}
        ticks_px = sorted({float(f"{px:.2g}") for px in medians_px if px == px})
        for column, (limit, axes) in enumerate(zip(LIMITS, panels, strict=True)):
            for name, one in figures.items():
                places_px = [bin_.median_px for bin_ in one.bins]
                values = [bin_.au_pro[column] for bin_ in one.bins]
                axes.plot(places_px, values, marker="o", markersize=4, label=name)
            axes.set(xscale="log", ylabel=f"AU-PRO@{100 * limit:g}", ylim=(0, 1))
            axes.set_xticks(ticks_px)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        bins_mode = next(iter(figures.values())).bins_mode
        figure.supxlabel(f"median area of the components of a bin, px ({bins_mode} bins)", fontsize=9)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(temporary, format="svg", metadata=no_metadata)


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EdgeADError('the plot needs matplotlib: pip install "edgead[report]"') from error


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
