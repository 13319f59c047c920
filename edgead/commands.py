"""What the commands of `edgead` do.

Each imports what it needs when it runs: `--help` works with core only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgead.errors import BundleError, DataError


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given, to pass on; the others keep the default of where they are used."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


@contextmanager
def progress_bar(title: str, total: float | None = None, **options: Any) -> Iterator[Any]:
    """A progress bar on standard error, once something has taken its time; none without tqdm."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield None
        return
    with tqdm(total=total, desc=title, dynamic_ncols=True, leave=True, delay=0.3, **options) as bar:
        yield bar


def counter(bar: Any) -> Callable[[int, int], None]:
    """Adapter from a (done, total) callback to a bar."""

    def update(done: int, total: int) -> None:
        if bar is not None:
            bar.total = total
            bar.update(done - bar.n)

    return update


def distill(arguments: argparse.Namespace) -> None:
    from edgead.training.distill import DistillConfig, distill

    names = ("size", "steps", "minutes", "batch", "learning_rate", "side_px", "whiten", "loss")
    given = _given(arguments, *names, "optimizer", "precision", "seed")
    if arguments.crop is not None:
        given["crop"] = tuple(arguments.crop)
    config = DistillConfig(**given)
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    with progress_bar("distill", 100, unit="%", disable=not is_first) as bar:

        def progress(step: int, fraction: float, loss: float) -> None:
            if bar is not None:
                bar.set_postfix(step=step, loss=f"{loss:.4f}", refresh=False)
                bar.update(round(100 * fraction, 2) - bar.n)

        result = distill(
            arguments.images,
            arguments.backbone,
            arguments.out,
            config,
            layers=arguments.layers,
            device=arguments.device,
            resume=arguments.resume,
            progress=progress,
        )
    if is_first:
        print(
            f"{arguments.out}: PDN-{config.size.upper()}, {result.steps} steps"
            f" in {result.seconds:.0f} s, loss {result.loss:.4f},"
            f" held-out loss {result.held_out_loss:.4f}"
        )


def train(arguments: argparse.Namespace) -> None:
    from edgead.methods import configure
    from edgead.training.data import open_dataset

    names = ("steps", "minutes", "optimizer", "learning_rate", "border", "targets", "image_px")
    given = _given(arguments, *names, "max_prototypes", "false_reject", "seed")
    config = configure(arguments.method, **given)
    dataset = open_dataset(arguments.data, seed=config.seed)
    record = train_with_bar(dataset, arguments.out, config, arguments)
    training, threshold = record["training"], record["threshold"]
    print(
        f"{arguments.out}: {training['steps']} steps in {training['seconds']:.0f} s"
        f" on {len(dataset.train)} images"
    )
    print(f"threshold {threshold['value']:.4g}: {threshold['basis']}; {threshold['claim']}")


def train_with_bar(
    dataset: Any, out: Path, config: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """`edgead.training.train.train` with a progress bar."""
    from edgead.training.train import train

    with progress_bar(
        "train", 1.0, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    ) as bar:

        def progress(fraction: float, step: int, losses: Mapping[str, float]) -> None:
            if bar is not None:
                text = {name: f"{value:.3f}" for name, value in losses.items()}
                bar.set_postfix(step=step, **text, refresh=False)
                bar.update(fraction - bar.n)

        return train(
            dataset,
            out,
            config,
            progress=progress,
            device=getattr(arguments, "device", "auto"),
            resume=getattr(arguments, "resume", False),
            tile=getattr(arguments, "tile", None),
            overlap=getattr(arguments, "overlap", None),
            **{name: getattr(arguments, name, None) for name in ("teacher", "penalty", "backbone")},
        )


def _check_target(path: Path) -> None:
    """Before the work: whether a file can be written there. Makes its folder."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: its folder cannot be made: {error.strerror}") from error
    if not os.access(path.resolve().parent, os.W_OK):  # links are written through
        raise DataError(f"{path}: files cannot be written in this folder; name another one")


def export(arguments: argparse.Namespace) -> None:
    from edgead.export.pack import export_run

    _check_target(arguments.out)
    lost = _own_values(arguments.out)
    with progress_bar("parity", unit="image") as bar:
        parity = export_run(
            arguments.run_folder,
            arguments.out,
            precision=arguments.precision,
            frame=arguments.frame,
            name=arguments.name,
            reduce=arguments.reduce,
            progress=counter(bar),
        )
    size = arguments.out.stat().st_size / 2**20
    print(
        f"{arguments.out}: {size:.1f} MiB, {parity.precision}; {parity.images} images,"
        f" largest score deviation {parity.score_deviation:.1e} of the score spread,"
        f" {len(parity.flips)} verdict flips"
    )
    for flip in parity.flips:
        reason = (
            "by the resize's rounding" if flip.by_resize else f"within the margin of {parity.margin:.3g}"
        )
        print(f"  {reason}: {flip.image}: {flip.reference:.5g} -> {flip.exported:.5g}")
    _tell_of(lost)


def _tell_of(lost: str) -> None:
    if lost:
        print(f"  this replaced a bundle with {lost}: give it that again, if it still holds")


def _own_values(bundle: Path) -> str:
    """What a user gave a bundle that no export brings back, if there is one at all."""
    from edgead.bundle import SET_BY_HAND, Bundle
    from edgead.recalibrate import HISTORY

    try:
        manifest = Bundle.open(bundle).manifest
    except BundleError:
        return ""
    found = []
    if manifest.threshold.basis == SET_BY_HAND:
        found.append(f"a threshold set by hand, {manifest.threshold.value:.6g}")
    if manifest.provenance.get(HISTORY):
        found.append("a recalibration")
    return " and ".join(found)


def recalibrate(arguments: argparse.Namespace) -> None:
    from edgead.recalibrate import recalibrate, undo

    measures = {
        "--false-reject": arguments.false_reject is not None,
        "--backend": arguments.backend != "auto",
        "--threads": arguments.threads is not None,
    }
    if arguments.undo and any(measures.values()):
        given = ", ".join(name for name, is_given in measures.items() if is_given)
        raise DataError(f"{given} is for a new calibration: leave out --undo, or it")
    lost = ""
    if arguments.out:
        _check_target(arguments.out)
        if arguments.out.resolve() != arguments.bundle.resolve():
            lost = _own_values(arguments.out)
    elif arguments.bundle.is_file():
        _check_target(arguments.bundle)
    if arguments.undo:
        back = undo(arguments.bundle, out=arguments.out)
        written = arguments.out or arguments.bundle
        print(f"{written}: threshold {back.before:.6g} -> {back.after:.6g}; {back.claim}")
        _tell_of(lost)
        return
    with progress_bar("recalibrate", unit="pass") as bar:
        done = recalibrate(
            arguments.bundle,
            _images([arguments.good]),
            out=arguments.out,
            backend=arguments.backend,
            threads=arguments.threads,
            progress=counter(bar),
            **_given(arguments, "false_reject"),
        )
    print(
        f"{arguments.out or arguments.bundle}: calibrated on {done.images} good images,"
        f" {done.rejected} of which were rejected before; threshold {done.before:.6g} ->"
        f" {done.after:.6g} (on the new map scale); {done.claim}"
    )
    _tell_of(lost)


def _images(paths: Sequence[Path]) -> list[Path]:
    from edgead.image import list_images

    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = list_images(path)
            if not inside:
                raise DataError(f"{path}: no images in this folder or below it")
            found += inside
        else:
            found.append(path)
    return found


def predict(arguments: argparse.Namespace) -> int:
    from edgead.detector import load
    from edgead.heat import heat_map
    from edgead.image import read_image, write_image

    images = _images(arguments.paths)
    if arguments.heatmaps:
        arguments.heatmaps.mkdir(parents=True, exist_ok=True)
    failed = unwritten = 0
    with load(arguments.bundle, backend=arguments.backend, threads=arguments.threads) as detector:
        for number, path in enumerate(images):
            try:
                frame = read_image(path)
                try:
                    result = detector(frame)
                except DataError as error:  # of a frame, which does not know its file
                    raise DataError(f"{path}: {error}") from error
            except DataError as error:  # one bad file does not lose the verdicts of the others
                failed += 1
                print(
                    json.dumps({"path": str(path), "error": str(error)})
                    if arguments.json
                    else f"ERROR  {error}",
                    flush=True,
                )
                continue
            if arguments.json:
                row = {
                    "path": str(path),
                    "score": result.score,
                    "relative_score": result.relative_score,
                    "is_anomalous": result.is_anomalous,
                    "threshold": result.threshold,
                    "elapsed_ms": round(result.elapsed_ms, 3),
                }
                print(json.dumps(row), flush=True)
            else:
                verdict = "NG" if result.is_anomalous else "OK"
                print(f"{verdict}  {result.score:9.4f}  {result.elapsed_ms:7.1f} ms  {path}", flush=True)
            if arguments.heatmaps:
                picture = heat_map(frame, result.anomaly_map, result.threshold)
                try:
                    write_image(arguments.heatmaps / f"{number:05d}_{path.stem}.png", picture)
                except DataError as error:  # a full disk: the verdicts go on
                    unwritten += 1
                    print(f"edgead predict: {error}", file=sys.stderr)
    if failed:
        print(
            f"edgead predict: {failed} of {len(images)} images could not be inspected", file=sys.stderr
        )
    return 1 if failed or unwritten else 0


def evaluate(arguments: argparse.Namespace) -> int:
    from edgead.by_size import SizeConfig
    from edgead.detector import load
    from edgead.evaluate import evaluate
    from edgead.files import write_text
    from edgead.training.data import open_dataset

    how = _given(arguments, "bins", "thresholds")
    if how and not arguments.by_size:
        raise DataError("--bins and --thresholds are for figures by size of the defects: add --by-size")
    sizes = SizeConfig(**how) if arguments.by_size else None
    for target in (arguments.json, arguments.html):
        if target:
            _check_target(target)
    if arguments.html:
        from edgead.report import check_packages, load_pictures, write_report

        check_packages()
    dataset = open_dataset(arguments.data)
    with load(arguments.bundle, backend=arguments.backend, threads=arguments.threads) as detector:
        with progress_bar("evaluate", unit="image") as bar:
            evaluation = evaluate(detector, dataset, sizes=sizes, progress=counter(bar))
    print("\n".join(summary(evaluation)), flush=True)
    if arguments.json:
        write_text(arguments.json, evaluation.to_json())
    if arguments.html:
        write_report(
            arguments.html,
            evaluation,
            load_pictures(evaluation, dataset),
            title=f"{evaluation.name}: {evaluation.method}",
        )
    if evaluation.errors:
        print(
            f"edgead evaluate: {len(evaluation.errors)} images could not be inspected", file=sys.stderr
        )
    return 1 if evaluation.errors else 0


def summary(evaluation: Any) -> list[str]:
    """The figures of an evaluation for a terminal."""
    from edgead import by_size

    e = evaluation
    lines = [
        f"{e.name}: {e.images} images ({e.good_images} good, {e.defect_images} with defects),"
        f" {e.backend} {e.precision}",
        f"image AUROC {e.image_auroc:.4f}   pixel AUROC {e.pixel_auroc:.4f}"
        f"   AU-PRO@30 {e.au_pro_30:.4f}   AU-PRO@5 {e.au_pro_05:.4f}",
        f"threshold {e.threshold:.4g}: rejects {e.false_rejects} of {e.good_images} good"
        f" ({e.false_reject_rate:.1%}),"
        f" misses {e.missed_defects} of {e.defect_images} defects ({e.missed_defect_rate:.1%})",
    ]
    lines += [
        f"  {name:<16} image AUROC {row['image_auroc']:.4f},"
        f" misses {row['missed_defects']} of {row['images']}"
        for name, row in e.per_defect.items()
    ]
    lines.append(
        "latency of a call "
        + ", ".join(f"{key} {e.latency_ms[key]:.1f} ms" for key in ("p50", "p90", "p99", "max"))
    )
    return [
        *lines,
        *(by_size.lines(e.by_size) if e.by_size else ()),
        *(f"note: {note}" for note in e.notes),
        *(f"error: {row['path']}: {row['message']}" for row in e.errors),
    ]


def demo(arguments: argparse.Namespace) -> None:
    from edgead.demo import demo

    demo(arguments)
