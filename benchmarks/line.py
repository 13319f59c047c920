"""What the line costs beside the model, and whether it keeps its promise.

    python -m edgead.benchmarks.line latency --out DIR --bundle X.edgead --images FOLDER
    python -m edgead.benchmarks.line promise --out DIR [--parts 1000000]
    python -m edgead.benchmarks.line kills --out DIR [--count 100]
    python -m edgead.benchmarks.line soak --out DIR [--minutes 60]

latency: trigger to verdict at a set share of what the model can do, with 1, 2 and 4 cameras whose
triggers are spread evenly; a stand-in model of a set duration, or a bundle. promise, kills and soak run
the simulator (`edgead simulate`) with faults and count verdicts: exactly one for each trigger. Each
writes DIR/line_<what>.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgead.benchmarks.command import exit_status
from edgead.benchmarks.line_faults import EVERYTHING, KILLS, write_line
from edgead.benchmarks.results_file import table, write_results
from edgead.bundle import Bundle
from edgead.errors import DataError
from edgead.files import write_text
from edgead.image import list_images, read_image
from edgead.line.assembly import open_line
from edgead.line.inspector import Open, bundle_opener
from edgead.line.interfaces import Shot, Source
from edgead.line.recipe import CameraConfig, Inspection, Recipe, Settings, SinkConfig
from edgead.line.run import SWITCH_INTERVAL_S
from edgead.line.simulate import simulate
from edgead.line.sources.pacing import Replay, Stored
from edgead.line.standin import StandIn
from edgead.line.verdicts import Record, Verdict
from edgead.runtime.backend import Backend

LOADS = (0.5, 0.8, 0.95, 1.5)
CAMERAS = (1, 2, 4)
PERCENTILES = (50, 99, 99.9, 100)


@dataclass
class Kept:
    """A sink that keeps all records in memory."""

    records: list[Record]
    wants_pictures: bool = False

    def write(self, record: Record, picture: object) -> None:
        self.records.append(record)

    def write_late(self, record: Record) -> None:
        """Counted by the line."""

    def knows(self, part_id: int) -> bool:
        return True

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        """There is nothing to close."""


def measure(
    bundle: Path,
    images: Sequence[np.ndarray],
    open_model: Callable[[Bundle], Backend],
    *,
    rate_hz: float,
    cameras: int,
    parts: int,
    deadline_ms: float,
) -> dict[str, Any]:
    """Runs a line in this process and returns its latencies.

    Args:
        rate_hz: Triggers per second, of all cameras together.
        parts: Of all cameras together.
    """
    each = parts // cameras
    configs = tuple(
        CameraConfig(
            name=f"camera-{index}",
            deadline_ms=deadline_ms,
            queue=64,
            recipes=(Inspection(bundle=bundle),),
            kind="folder",
            source=index,
        )
        for index in range(cameras)
    )

    def source(config: CameraConfig) -> Source:
        return Later(images, each, rate_hz / cameras, config.source / rate_hz)

    kept = Kept([])
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(journal=Path(folder), sync="never")
        recipe = Recipe(settings, configs, (SinkConfig("kept", "kept", None),), {})
        line = open_line(
            recipe, open_model=open_model, source=source, sink=lambda config, controls: kept
        )
        line.wait()
        line.stop()
    return summary(kept.records)


class Later:
    """A camera whose first trigger comes `phase_s` after the start, so that cameras take turns."""

    def __init__(self, images: Sequence[np.ndarray], count: int, rate_hz: float, phase_s: float) -> None:
        stored = (Stored(image, "memory") for image in itertools.cycle(images))
        self._replay = Replay(itertools.islice(stored, count), rate_hz=rate_hz)
        self._phase_s = phase_s
        self.fire, self.counters, self.close = (
            self._replay.fire,
            self._replay.counters,
            self._replay.close,
        )

    def shots(self) -> Iterator[Shot]:
        time.sleep(self._phase_s)
        yield from self._replay.shots()


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Percentiles in ms of trigger to verdict, the inference, and the rest; and what was missed."""
    answered = [record for record in records if record.infer_ms is not None]
    figures: dict[str, Any] = {"parts": len(records)}
    for verdict in Verdict:
        figures[verdict.value] = sum(record.verdict is verdict for record in records)
    figures["missed_percent"] = 100 * (1 - len(answered) / len(records))
    total = np.array([record.total_ms for record in answered])
    infer = np.array([record.infer_ms for record in answered])
    for name, values in (("total_ms", total), ("infer_ms", infer), ("rest_ms", total - infer)):
        found = np.percentile(values, PERCENTILES) if len(values) else [None] * len(PERCENTILES)
        figures[name] = dict(zip(map(str, PERCENTILES), found, strict=True))
    return figures


def latency(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """All loads and numbers of cameras."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    bundle, set_ms = arguments.bundle, arguments.model_ms
    images = [read_image(path) for path in list_images(arguments.images)[:32]]
    if not images:
        raise DataError(f"{arguments.images}: no images in this folder or below it")
    if arguments.stand_in:
        open_model: Open = lambda bundle: StandIn(bundle, set_ms)  # noqa: E731
        what = f"a stand-in that takes {set_ms:g} ms"
    else:
        open_model = bundle_opener(arguments.backend, None)
        what = f"{bundle.name}"
    alone = measure(bundle, images, open_model, rate_hz=5, cameras=1, parts=30, deadline_ms=60_000)
    model_ms = alone["infer_ms"]["50"]
    deadline_ms = arguments.deadline_ms or 10 * model_ms
    runs = []
    for cameras, load in itertools.product(CAMERAS, LOADS):
        rate_hz = load * 1000 / model_ms
        parts = max(int(rate_hz * arguments.seconds) // cameras, 25) * cameras
        run = measure(
            bundle,
            images,
            open_model,
            rate_hz=rate_hz,
            cameras=cameras,
            parts=parts,
            deadline_ms=deadline_ms,
        )
        runs.append({"cameras": cameras, "load": load, "rate_hz": rate_hz, **run})
        print(_row(runs[-1], model_ms), flush=True)
    header = ["cameras", "load", "rate", "p50", "p99", "p99.9", "max", "over the model, p99", "missed"]
    page = (
        f"Model: {what}; by itself {model_ms:.2f} ms (median). Deadline: {deadline_ms:.0f} ms."
        " Trigger to verdict in ms; missed: parts without an answer in time.\n\n"
        + table(header, [_row(run, model_ms) for run in runs])
    )
    return {"model": what, "model_ms": model_ms, "runs": runs}, page


def _row(run: dict[str, Any], model_ms: float) -> list[str]:
    total = run["total_ms"]
    return [
        str(run["cameras"]),
        f"{run['load']:.0%}",
        f"{run['rate_hz']:.0f}/s",
        *("" if total[str(p)] is None else f"{total[str(p)]:.2f}" for p in PERCENTILES),
        "" if total["99"] is None else f"{total['99'] - model_ms:.2f}",
        f"{run['missed_percent']:.2f} %",
    ]


def simulation(
    faults: str, *, seconds: float | None, rate_hz: float, parts: int, model_ms: float
) -> dict[str, Any]:
    """One run of the simulator with two cameras on small pictures; its report, and the memory over time.

    Args:
        seconds: Its end; None where `parts` says it.
        rate_hz: Triggers per second of each camera.
    """
    with tempfile.TemporaryDirectory() as folder:
        recipe, faults_file = write_line(Path(folder), faults, rate_hz=rate_hz, parts=parts)
        memory: list[float] = []
        watching = threading.Event()
        watch = threading.Thread(target=_watch_memory, args=(memory, watching), daemon=True)
        watch.start()
        report = simulate(recipe, faults_file, Path(folder) / "out", stand_in_ms=model_ms, for_s=seconds)
        watching.set()
        watch.join()
        results = _ids(Path(folder) / "results.jsonl")
    thirds = np.array_split(np.array(memory), 3)
    return {
        **vars(report),
        "in_the_sink": len(results),
        "in_the_sink_twice": len(results) - len(set(results)),
        "memory_mib": [round(float(np.median(third)), 1) for third in thirds if len(third)],
        "is_good": report.is_good and sorted(set(results)) == list(range(1, report.parts + 1)),
    }


def _ids(path: Path) -> list[int]:
    files = [path, *path.parent.glob("results.[0-9]*.jsonl")]
    ids = []
    for file in files:
        with file.open() as lines:
            ids += [int(line[len('{"part_id": ') : line.index(",")]) for line in lines]
    return ids


def _watch_memory(memory: list[float], end: threading.Event) -> None:
    """Resident MiB of the process that is simulated, once a second."""
    while not end.wait(1):
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except (OSError, ValueError):
                continue
            if int(fields["PPid"]) == os.getpid() and "VmRSS" in fields:
                memory.append(int(fields["VmRSS"].split()[0]) / 1024)


def promise(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Many triggers with faults."""
    report = simulation(
        EVERYTHING, seconds=None, rate_hz=arguments.rate / 2, parts=arguments.parts, model_ms=0.2
    )
    return report, _promise_page(report)


def kills(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """`kill -9` at random moments."""
    faults = KILLS.format(seed=arguments.seed)
    seconds = 1.7 * arguments.count
    report = simulation(faults, seconds=seconds, rate_hz=100, parts=0, model_ms=2)
    return report, _promise_page(report)


def soak(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """A long run at rate, with faults."""
    report = simulation(EVERYTHING, seconds=60 * arguments.minutes, rate_hz=60, parts=0, model_ms=5)
    return report, _promise_page(report)


def _promise_page(report: dict[str, Any]) -> str:
    rows = [
        ("triggers", report["parts"]),
        ("without a verdict", len(report["missing"])),
        ("with several", len(report["doubled"])),
        ("verdicts", ", ".join(f"{n} {name}" for name, n in report["verdicts"].items() if n)),
        ("records in the sink that had faults", report["in_the_sink"]),
        ("of these twice", report["in_the_sink_twice"]),
        ("kills", report["kills"]),
        ("seconds", report["seconds"]),
        ("memory in MiB, first, second and last third", report["memory_mib"]),
    ]
    reasons = [(count, reason) for reason, count in report["reasons"].items()]
    return table(["", ""], rows) + "\n\n" + table(["parts", "reason"], reasons)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if what was promised was kept."""
    arguments = _parse(argv)
    return exit_status("line", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    what = {"latency": latency, "promise": promise, "kills": kills, "soak": soak}[arguments.what]
    results, page = what(arguments)
    name = f"line_{arguments.what}"
    write_results(arguments.out / f"{name}.json", name, results)
    write_text(arguments.out / f"{name}.md", page + "\n")
    print(page)
    return 0 if results.get("is_good", True) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="what", required=True)
    sub = verbs.add_parser("latency")
    sub.add_argument("--bundle", type=Path, required=True)
    sub.add_argument("--images", type=Path, required=True, help="folder of frames")
    sub.add_argument("--backend", default="auto")
    sub.add_argument("--stand-in", action="store_true", help="instead of the bundle's own model")
    sub.add_argument("--model-ms", type=float, default=5.0, help="of the stand-in")
    sub.add_argument("--seconds", type=float, default=20.0, help="of each run")
    sub.add_argument("--deadline-ms", type=float, help="(default: ten times the model)")
    sub.add_argument("--out", type=Path, required=True)
    sub = verbs.add_parser("promise")
    sub.add_argument("--parts", type=int, default=1_000_000)
    sub.add_argument("--rate", type=float, default=1000.0, help="triggers per second")
    sub.add_argument("--out", type=Path, required=True)
    sub = verbs.add_parser("kills")
    sub.add_argument("--count", type=int, default=100, help="about how many")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, required=True)
    sub = verbs.add_parser("soak")
    sub.add_argument("--minutes", type=float, default=60)
    sub.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
