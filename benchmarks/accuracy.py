"""Accuracy of detectors on whole data sets: every category, method and seed of a list.

    python -m edgead.benchmarks.accuracy LIST.toml --data ROOT --out DIR [--plot FILE.svg]
    python -m edgead.benchmarks.accuracy LIST.toml --data ROOT --out DIR --ray local --workers 2

Trains, exports and evaluates; each figure comes from the packed bundle through the runtime. Writes
DIR/accuracy.md and DIR/accuracy.json after each job. Call it again to go on: what is finished is kept,
a training that was killed goes on from its checkpoint, what failed is tried again. The list's format is
in `edgead.benchmarks.accuracy_list`, what a job leaves behind in `edgead.benchmarks.accuracy_job`. With
--ray ADDRESS the jobs run on a Ray cluster, which has to see DIR and ROOT under the same paths. Jobs
whose length is given in minutes want the machine for themselves: not several at a time on one CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgead.benchmarks import accuracy_job, accuracy_table, accuracy_workers
from edgead.benchmarks.accuracy_list import read_list
from edgead.benchmarks.command import exit_status
from edgead.benchmarks.results_file import write_results
from edgead.files import write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when each job of the list has a result, 1 when one failed or the list is wrong."""
    arguments = _parse(argv)
    return exit_status("accuracy", lambda: _run(arguments), resumes=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("list", type=Path, metavar="LIST.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--data", type=Path, metavar="ROOT", help="what the list's paths are relative to (default: it)"
    )
    parser.add_argument("--ray", metavar="ADDRESS|local", help="run the jobs side by side with Ray")
    parser.add_argument(
        "--workers", type=_count, metavar="N", help="jobs at a time with --ray local (default: the GPUs)"
    )
    parser.add_argument(
        "--threads", type=_count, metavar="N", help="CPU cores of one job (default: its share)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="picture of accuracy against minutes of training"
    )
    arguments = parser.parse_args(argv)
    if arguments.workers and arguments.ray != "local":
        parser.error(
            "--workers needs --ray local: without Ray jobs run one after another,"
            " and a cluster has its own number of workers"
        )
    return arguments


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 on")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        accuracy_table.check_plot()
    root = arguments.data or arguments.list.parent
    jobs = read_list(arguments.list)
    folders = [accuracy_job.prepare(arguments.out, job, root) for job in jobs]
    open_folders = [folder for folder in folders if not _is_finished(folder)]
    done = len(folders) - len(open_folders)
    if done:
        print(f"{done} of {len(folders)} jobs were finished before", flush=True)
    _write(arguments, folders)
    for folder in _work(arguments, open_folders):
        done += 1
        print(f"{done} of {len(folders)}: {_line(folder)}", flush=True)
        _write(arguments, folders)
    print((arguments.out / "accuracy.md").read_text(encoding="utf-8"))
    return 0 if all(map(_is_finished, folders)) else 1


def _is_finished(folder: Path) -> bool:
    return (folder / accuracy_job.RESULT_FILE).exists()


def _work(arguments: argparse.Namespace, folders: list[Path]) -> Iterator[Path]:
    if not folders:
        return iter(())
    if arguments.ray is None:
        return accuracy_workers.one_by_one(folders, threads=arguments.threads)
    return accuracy_workers.on_ray(
        folders, address=arguments.ray, workers=arguments.workers, threads=arguments.threads
    )


def _line(folder: Path) -> str:
    outcome = accuracy_job.read_outcome(folder) or {"error": "nothing was recorded"}
    if "error" in outcome:
        return f"{folder.name}: FAILED: {outcome['error']}"
    figures, train = outcome["figures"], outcome["train"]
    texts = ", ".join(
        f"{accuracy_table.HEADER[name]} {figures[name]:.4f}"
        for name in ("image_auroc", "au_pro_30")
        if figures[name] is not None
    )
    return f"{folder.name}: {texts}; {train['steps']} steps in {train['seconds']:.0f} s"


def _write(arguments: argparse.Namespace, folders: list[Path]) -> None:
    """The table so far, as JSON and Markdown, and the picture."""
    results: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for folder in folders:
        outcome = accuracy_job.read_outcome(folder)
        if outcome and "error" in outcome:
            failures[folder.name] = outcome["error"]
        elif outcome:
            results.append(outcome)
    record = {
        "list": arguments.list.name,
        "jobs": len(folders),
        "summary": accuracy_table.summary(results),
        "published_source": accuracy_table.SOURCE,
        "results": results,
        "failures": failures,
    }
    file = arguments.out / "accuracy.json"
    write_results(file, "accuracy", record)
    header = json.loads(file.read_text(encoding="utf-8"))
    write_text(arguments.out / "accuracy.md", _page(header, failures))
    if arguments.plot and results:
        accuracy_table.plot(results, arguments.plot)


def _page(record: dict[str, Any], failures: dict[str, str]) -> str:
    results = record["results"]
    lines = [
        f"# Accuracy: {record['list']}",
        "",
        f"{len(results)} of {record['jobs']} jobs. Every figure is from the packed bundle through the"
        " runtime; the threshold is the calibrated one (good validation images only).",
        "",
        *(f"* {text}" for text in accuracy_table.machines(results)),
        f"* {record['utc']}, runs at commit {_commits(results)}",
    ]
    if any(group["published"] for group in record["summary"]):
        lines.append(f"* published: {accuracy_table.SOURCE}")
    if results:
        lines += ["", accuracy_table.results_table(results)]
    if failures:
        lines += ["", accuracy_table.failures_table(failures)]
    return "\n".join(lines) + "\n"


def _commits(results: list[dict[str, Any]]) -> str:
    found = dict.fromkeys(str((result.get("made") or {}).get("git_commit")) for result in results)
    return ", ".join("(of an installed edgead)" if name == "None" else name for name in found) or "–"


if __name__ == "__main__":
    sys.exit(main())
