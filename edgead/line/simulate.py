"""A line on a bad day: `edgead simulate line.toml --faults faults.toml`.

The line is the real one, with its own sources, sinks and models (or a stand-in for the models), and the
faults of the file. It runs in a process of its own, which a fault may kill; then it is started again. In
the end each part's fate is read from what was written, and checked: part ids without a gap, one verdict
each.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgead.bundle import Bundle
from edgead.errors import LineError
from edgead.files import write_text
from edgead.line import assembly
from edgead.line.faults import KINDS, Day, Fault, FaultyBackend, FaultySink, FaultySource, load_faults
from edgead.line.inspector import bundle_opener
from edgead.line.interfaces import Controls, Sink, Source
from edgead.line.line import Line
from edgead.line.recipe import CameraConfig, Recipe, SinkConfig, load
from edgead.line.run import end, run
from edgead.line.sinks import sink_module
from edgead.line.standin import StandIn
from edgead.line.verdicts import Verdict

FATES = "fates.jsonl"
UNWRITTEN = 3  # status of a process whose sinks did not take everything
SETTLE_S = 2.0
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True)
class Report:
    """What became of all parts.

    Attributes:
        parts: Triggers that the line accepted.
        verdicts: How many parts got which.
        reasons: How many parts got which reason, numbers left out.
        missing: Part ids without a verdict.
        doubled: Part ids with more than one.
        late_results: Answers that came after the deadline, beside the verdict.
        kills: How often the process was killed.
        hits: How often each fault struck, in processes that were not killed.
    """

    parts: int
    verdicts: dict[str, int]
    reasons: dict[str, int]
    missing: list[int]
    doubled: list[int]
    late_results: int
    kills: int
    hits: dict[str, int]
    seconds: float

    @property
    def is_good(self) -> bool:
        """Exactly one verdict for each trigger."""
        return not self.missing and not self.doubled


def simulate(
    recipe_file: Path,
    faults_file: Path | None,
    out: Path,
    *,
    stand_in_ms: float | None = None,
    for_s: float | None = None,
) -> Report:
    """Runs a line with faults until its sources end, or for a time, and reports.

    Args:
        out: Folder for the fate of each part (`fates.jsonl`), the report, and the journal.
        stand_in_ms: Instead of the models, one that takes this long.
        for_s: How long; needed where the process is killed, because files start anew then.

    Raises:
        LineError: The recipe or the faults are wrong, or the line cannot start.
    """
    recipe = load(recipe_file)
    faults, _ = _faults(recipe, faults_file)
    if for_s is None and any(fault.kind == "kill" for fault in faults):
        raise LineError("faults that kill need an end: say for how many seconds with --for")
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("fates*.jsonl"), *out.glob("journal/*"), *out.glob("hits-*.json")):
        old.unlink()
    start_ns = time.monotonic_ns()
    life = {
        "recipe": str(recipe_file),
        "faults": None if faults_file is None else str(faults_file),
        "out": str(out),
        "start_ns": start_ns,
        "stand_in_ms": stand_in_ms,
        "for_s": for_s,
    }
    kills = 0
    while (status := _live(life)) == -signal.SIGKILL:
        kills += 1
    if status == UNWRITTEN:  # a sink was down to the end; the next start has to make up for it
        end_s = (time.monotonic_ns() - start_ns) / 1e9 + SETTLE_S
        status = _live(life | {"faults": None, "for_s": end_s})
    if status:
        raise LineError(f"the line ended with status {status}, see above")
    report = _report(out, kills, (time.monotonic_ns() - start_ns) / 1e9)
    write_text(out / "report.json", json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return report


def _live(life: dict[str, Any]) -> int:
    """One life of the process that is simulated; returns how it ended."""
    return subprocess.run([sys.executable, "-m", "edgead.line.simulate", json.dumps(life)]).returncode


def _faults(recipe: Recipe, file: Path | None) -> tuple[tuple[Fault, ...], int]:
    if file is None:
        return (), 0
    cameras, sinks = {c.name for c in recipe.cameras}, {s.name for s in recipe.sinks}
    return load_faults(file, cameras, sinks)


def _report(out: Path, kills: int, seconds: float) -> Report:
    counts: Counter[int] = Counter()
    verdicts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for entry in _lines(out, FATES):
        counts[entry["part_id"]] += 1
        verdicts[entry["verdict"]] += 1
        reasons[_NUMBER.sub("#", entry["reason"])[:100]] += 1
    last = max(counts, default=0)
    hits: Counter[str] = Counter()
    for file in out.glob("hits-*.json"):
        hits.update(json.loads(file.read_text()))
    return Report(
        parts=last,
        verdicts={verdict.value: verdicts[verdict.value] for verdict in Verdict},
        reasons=dict(reasons.most_common(30)),
        missing=[part for part in range(1, last + 1) if part not in counts][:1000],
        doubled=[part for part, count in counts.items() if count > 1][:1000],
        late_results=sum(1 for _ in _lines(out, "fates.late.jsonl")),
        kills=kills,
        hits={kind: hits[kind] for kind in KINDS if hits[kind]} | ({"kill": kills} if kills else {}),
        seconds=round(seconds, 1),
    )


def _lines(out: Path, name: str) -> Iterator[dict[str, Any]]:
    path = out / name
    if path.exists():
        with path.open() as file:
            yield from map(json.loads, file)


def _child(life: dict[str, Any]) -> int:
    """In that process; see `simulate` for what it is told."""
    out, start_ns, stand_in_ms, for_s = (
        life[key] for key in ("out", "start_ns", "stand_in_ms", "for_s")
    )
    recipe = load(Path(life["recipe"]))
    faults, seed = _faults(recipe, Path(life["faults"]) if life["faults"] else None)
    day = Day(faults, seed, start_ns)
    fates = sink_module("jsonl").Config(path=Path(out) / FATES, rotate_mib=100_000)
    recipe = dataclasses.replace(
        recipe,
        settings=dataclasses.replace(recipe.settings, journal=Path(out) / "journal"),
        sinks=(*recipe.sinks, SinkConfig("fates", "jsonl", fates)),
    )
    models = bundle_opener(recipe.settings.backend, recipe.settings.threads)

    def open_model(bundle: Bundle) -> FaultyBackend:
        if stand_in_ms is None:
            return FaultyBackend(models(bundle), day)
        return FaultyBackend(StandIn(bundle, stand_in_ms), day)

    def source(config: CameraConfig) -> Source:
        return FaultySource(assembly.open_source(config), config.name, day)

    def sink(config: SinkConfig, controls: Controls) -> Sink:
        opened = assembly.open_sink(config, controls)
        return opened if config.name == "fates" else FaultySink(opened, config.name, day)

    def opened(recipe: Recipe) -> Line:
        line = assembly.open_line(recipe, open_model=open_model, source=source, sink=sink)
        if for_s is not None:
            end_s = for_s - (time.monotonic_ns() - start_ns) / 1e9
            threading.Timer(max(end_s, 0.1), signal.raise_signal, (signal.SIGTERM,)).start()
        day.kill_when_due()
        return line

    try:
        _, status = run(recipe, opened=opened)
    except LineError as error:
        print(f"edgead simulate: error: {error}", file=sys.stderr)
        return 1
    hits = Path(out) / f"hits-{time.monotonic_ns()}.json"
    write_text(hits, json.dumps(day.hits))
    return end(UNWRITTEN if status else 0)


if __name__ == "__main__":
    sys.exit(_child(json.loads(sys.argv[1])))
