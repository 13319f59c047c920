"""The commands of the line: their arguments, and what they do. Imports are inside, as in `commands`."""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgead.errors import LineError


def add_commands(command: Callable[..., argparse.ArgumentParser], backends: tuple[str, ...]) -> None:
    """Adds them to the command line."""
    sub = command("run", run, "Run a line from its recipe file, or replay images through a bundle.")
    sub.add_argument("what", type=Path, metavar="line.toml|X.edgead")
    sub.add_argument(
        "--check", action="store_true", help="open everything that the recipe file names, then end"
    )
    sub.add_argument("--unit", action="store_true", help="print a systemd unit for the recipe file")
    group = sub.add_argument_group("with a bundle")
    group.add_argument("--source", type=Path, metavar="PATH", help="folder of images, or a video")
    group.add_argument(
        "--rate",
        type=float,
        metavar="HZ",
        help="triggers per second (default: the next as soon as there is room)",
    )
    group.add_argument(
        "--sink",
        type=Path,
        metavar="FILE",
        help="JSON lines, one per part, written anew (default: results.jsonl)",
    )
    group.add_argument("--deadline-ms", type=float, metavar="MS", help="LATE after this (default: 1000)")
    group.add_argument("--backend", choices=("auto", *backends), help="(default: auto)")

    sub = command("simulate", simulate, "Run a line with faults, and report what became of each part.")
    sub.add_argument("recipe", type=Path, metavar="line.toml")
    sub.add_argument("--faults", type=Path, metavar="faults.toml", help="what goes wrong, and when")
    sub.add_argument(
        "--out", type=Path, default=Path("simulation"), metavar="DIR", help="(default: simulation)"
    )
    sub.add_argument(
        "--stand-in", type=float, metavar="MS", help="instead of the models, one that takes this long"
    )
    sub.add_argument("--for", dest="for_s", type=float, metavar="S", help="end after this many seconds")


def simulate(arguments: argparse.Namespace) -> int:
    """`edgead simulate`: 1 if a part has no verdict, or several."""
    from edgead.line.simulate import simulate

    report = simulate(
        arguments.recipe,
        arguments.faults,
        arguments.out,
        stand_in_ms=arguments.stand_in,
        for_s=arguments.for_s,
    )
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in report.verdicts.items() if count)
    print(f"{report.parts} parts in {report.seconds:g} s, {report.kills} kills: {verdicts or 'none'}")
    for reason, count in report.reasons.items():
        print(f"{count:10} {reason}")
    if not report.is_good:
        print(f"WRONG: {len(report.missing)} without a verdict, {len(report.doubled)} with several")
    print(f"each part: {arguments.out / 'fates.jsonl'}; all of this: {arguments.out / 'report.json'}")
    return int(not report.is_good)


def run(arguments: argparse.Namespace) -> int:
    """`edgead run`. Ends the process by itself, see `edgead.line.run.end`."""
    from edgead.line.assembly import open_line
    from edgead.line.recipe import load
    from edgead.line.run import end, run

    if arguments.what.suffix == ".edgead":
        return _replay(arguments)
    for name in ("source", "rate", "sink", "deadline_ms", "backend"):
        if vars(arguments)[name]:
            option = name.replace("_", "-")
            raise LineError(f"--{option} goes with a bundle; write it in {arguments.what} instead")
    if arguments.unit:
        print(_unit(arguments.what), end="")
        return 0
    recipe = load(arguments.what)
    if arguments.check:
        open_line(recipe, start=False)
        cameras = ", ".join(f"{camera.name} ({camera.kind})" for camera in recipe.cameras)
        sinks = ", ".join(sink.name for sink in recipe.sinks)
        print(f"{arguments.what}: good. Cameras: {cameras}. Sinks: {sinks}.")
        return end(0)
    line, status = run(recipe)
    print(summary(line.statistics))
    return end(status)


def _replay(arguments: argparse.Namespace) -> int:
    from edgead.line.assembly import open_line, open_sink
    from edgead.line.run import DEADLINE_MS, end, replay_recipe, run
    from edgead.line.sinks.jsonl import late_path

    if arguments.check or arguments.unit:
        raise LineError("--check and --unit go with a recipe file, such as line.toml")
    if arguments.source is None:
        raise LineError(f"{arguments.what}: name a folder of images or a video: --source PATH")
    if not arguments.source.exists():
        raise LineError(f"--source {arguments.source}: there is no such folder or file")
    results = arguments.sink or Path("results.jsonl")
    if results.is_dir():
        raise LineError(f"--sink {results}: is a folder, name a file")
    earlier = [results, late_path(results)]

    def open_anew(config: Any, controls: Any) -> Any:
        """The sink is opened last: what it replaces goes when nothing else can fail any more."""
        while earlier:  # once: after a hang the sink is opened again
            earlier.pop().unlink(missing_ok=True)
        return open_sink(config, controls)

    with tempfile.TemporaryDirectory(prefix="edgead-") as folder:
        recipe = replay_recipe(
            arguments.what,
            arguments.source,
            results,
            Path(folder),
            rate_hz=arguments.rate,
            deadline_ms=DEADLINE_MS if arguments.deadline_ms is None else arguments.deadline_ms,
            backend=arguments.backend or "auto",
        )
        line, status = run(recipe, opened=lambda recipe: open_line(recipe, sink=open_anew))
    print(f"{summary(line.statistics)}; {results}")
    return end(status)


def summary(statistics: Any) -> str:
    """One line for people: counts and latencies over all cameras, of a `Statistics`."""
    from edgead.line.statistics import Histogram

    total, longest = Histogram(), 0.0
    for stages in statistics.latencies().values():
        total.counts = [a + b for a, b in zip(total.counts, stages["total"].counts, strict=True)]
        longest = max(longest, stages["total"].max_ms)
    total.max_ms = longest
    counts: Counter[str] = Counter()
    for verdicts in statistics.counts().values():
        counts.update(verdicts)
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    if not counts.total():
        return "no parts"
    p50, p99 = total.percentile(50), total.percentile(99)
    times = (
        "" if p50 is None else f"; trigger to verdict p50 {p50:.1f}, p99 {p99:.1f}, max {longest:.1f} ms"
    )
    return f"{counts.total()} parts: {parts}{times}"


def _unit(recipe: Path) -> str:
    import getpass
    import shutil
    import sys

    from edgead.line.service import UNIT

    path = recipe.absolute()
    if not path.is_file():
        raise LineError(f"{recipe}: there is no such file")
    command = shutil.which("edgead") or f"{sys.executable} -m edgead"
    return UNIT.format(command=command, recipe=path, folder=path.parent, user=getpass.getuser())
