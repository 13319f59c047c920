"""`edgead demo`: from nothing to a running detector and a report.

Everything in the report is measured in that run.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from edgead.commands import counter, progress_bar, summary, train_with_bar
from edgead.errors import DataError

MARKER = ".edgead-demo"
"""File that says that `data` and `run` beside it are the demo's, and go with the next one."""


def demo(arguments: argparse.Namespace) -> None:
    """Render, train, export, inspect, report; see the command's help for the arguments."""
    from edgead.training.demo_data import render_demo
    from edgead.training.efficientad import TrainConfig

    start = time.monotonic()
    data = arguments.only_data or arguments.out / "data"
    config = TrainConfig(minutes=arguments.minutes, seed=arguments.seed)
    if not arguments.only_data:
        _make_room(arguments.out)
    with progress_bar("render", unit="image") as bar:
        render_demo(data, seed=arguments.seed, progress=counter(bar))
    if arguments.only_data:
        print(f"{data}: 120 good training images, 40 good and 66 defective test images with masks")
        return
    bundle = _train_and_export(data, config, arguments)
    _inspect(bundle, data, arguments.out, start)


def _make_room(out: Path) -> None:
    """Removes what an earlier demo left, and nothing else."""
    from edgead.files import write_text

    old = [path for path in (out / "data", out / "run") if path.exists()]
    if old and not (out / MARKER).exists():
        raise DataError(f"{old[0]} exists and is of no demo; name another folder with --out")
    for path in old:
        shutil.rmtree(path)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARKER, "data and run were made by edgead demo, and are replaced by the next one\n")


def _train_and_export(data: Path, config: Any, arguments: argparse.Namespace) -> Path:
    from edgead.export.pack import export_run
    from edgead.training.data import open_dataset

    run, bundle = arguments.out / "run", arguments.out / "tray.edgead"
    record = train_with_bar(open_dataset(data, seed=config.seed), run, config, arguments)
    training, claim = record["training"], record["threshold"]["claim"]
    print(f"trained {training['steps']} steps in {training['seconds']:.0f} s; {claim}")
    with progress_bar("export and compare", unit="image") as bar:
        parity = export_run(run, bundle, name="tray", progress=counter(bar))
    print(
        f"{bundle}: {bundle.stat().st_size / 2**20:.1f} MiB; graph and networks agree"
        f" on {parity.images} images within {parity.score_deviation:.1e} of the score spread,"
        f" {len(parity.flips)} verdict flips"
    )
    return bundle


def _inspect(bundle: Path, data: Path, out: Path, start: float) -> None:
    from edgead.detector import load
    from edgead.evaluate import evaluate
    from edgead.files import write_text
    from edgead.report import load_pictures, write_report
    from edgead.training.data import open_dataset

    dataset = open_dataset(data)
    with load(bundle) as detector, progress_bar("inspect", unit="image") as bar:
        evaluation = evaluate(detector, dataset, progress=counter(bar))
    write_text(out / "results.json", evaluation.to_json())
    report = out / "report.html"
    write_report(
        report,
        evaluation,
        load_pictures(evaluation, dataset),
        title="edgead demo: a tray with six parts",
        remark="Rendered pictures, made by edgead itself. A few minutes of training, no natural images:"
        " a detector for a real line trains longer and with natural penalty images.",
    )
    print("\n".join(summary(evaluation)))
    print(f"{time.monotonic() - start:.0f} s in all. Report: {report.resolve().as_uri()}")
