"""The command line of edgead: its arguments, and how errors reach the user."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edgead import (
    __version__,
    bundle_commands,
    cli_training,
    commands,
    device_commands,
    line_commands,
)
from edgead.errors import EdgeADError

SIZE_BINS = ("cumulative", "disjoint")
BACKENDS = ("tensorrt", "tensorrt-rtx", "torch-cuda", "openvino", "onnxruntime")
_EXTRA = {  # module that is missing -> extra that brings it
    "torch": "train",
    "safetensors": "train",
    "tqdm": "train",
    "onnx": "export",
    "onnxscript": "export",
    "jinja2": "report",
    "matplotlib": "report",
}

_Command = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    level = logging.INFO if arguments.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `edgead predict ... | head`: what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (EdgeADError, OSError, ModuleNotFoundError) as error:
        message = _explain(error)
        if arguments.debug or message is None:
            raise
        print(f"edgead {arguments.command}: error: {message}", file=sys.stderr)
        return 1


def _explain(error: Exception) -> str | None:
    """One line for the user; None for what is a fault of edgead itself."""
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRA.get(error.name or "")
        if extra is None:
            return None
        return f'this command needs {error.name}, which is not installed: pip install "edgead[{extra}]"'
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="edgead", description="Visual anomaly detection: train on good images, deploy one file."
    )
    parser.add_argument("--version", action="version", version=f"edgead {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = _adder(subparsers)
    cli_training.add_commands(command)
    _add_bundle_commands(command)
    _add_inspection_commands(command)
    _add_build(command)
    _add_doctor(command)
    line_commands.add_commands(command, BACKENDS)
    text = "Show or tidy the engines that were built on this device."
    engines = subparsers.add_parser("engines", help=text, description=text)
    _add_engine_commands(_adder(engines.add_subparsers(dest="verb", required=True, metavar="VERB")))
    return parser


def _adder(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> _Command:
    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str
    ) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--verbose", action="store_true", help="log what is chosen and why")
        return sub

    return command


def _add_bundle_commands(command: _Command) -> None:
    sub = command(
        "export",
        commands.export,
        "Export a run as one bundle file, if graph and networks agree on real images.",
    )
    sub.add_argument("run_folder", type=Path, metavar="RUN")
    sub.add_argument("--out", type=Path, required=True, metavar="X.edgead")
    sub.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    sub.add_argument(
        "--frame", type=_frame, metavar="HxW", help="camera frame size; the graph then resizes itself"
    )
    sub.add_argument("--name", help="recipe name (default: the data set's)")
    sub.add_argument(
        "--reduce",
        default="off",
        metavar="auto|K|off",
        help="fewer operations at equal verdicts: K directions in the last convolutions; auto: there and"
        " in conv-2 as few as the verdicts on the run's images allow, takes minutes (default: off)",
    )

    sub = command(
        "inspect", bundle_commands.inspect, "Show what a bundle holds, after checking all of it."
    )
    _add_bundle(sub, backend=False)
    sub.add_argument("--json", action="store_true", help="print the manifest")

    sub = command("verify", bundle_commands.verify, "Replay a bundle's golden samples on this device.")
    _add_bundle(sub)

    sub = command(
        "recalibrate",
        commands.recalibrate,
        "Set map scale and threshold of a bundle anew, from good images of the line.",
    )
    _add_bundle(sub)
    group = sub.add_mutually_exclusive_group(required=True)
    group.add_argument(
        "--good", type=Path, metavar="FOLDER", help="images of good parts, searched recursively"
    )
    group.add_argument("--undo", action="store_true", help="bring back what was before")
    sub.add_argument("--out", type=Path, metavar="Y.edgead", help="write here, not to the same file")
    sub.add_argument(
        "--false-reject", type=float, help="target share of good parts rejected (default: as before)"
    )

    sub = command("set-threshold", bundle_commands.set_threshold, "Change the threshold in a bundle.")
    _add_bundle(sub, backend=False)
    sub.add_argument("value", type=float, metavar="VALUE", help="scores at or above it are NG")


def _add_inspection_commands(command: _Command) -> None:
    sub = command(
        "predict",
        commands.predict,
        "Inspect images; one line each. Status 1 if one could not be inspected.",
    )
    _add_bundle(sub)
    sub.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="image, or folder searched recursively"
    )
    sub.add_argument("--json", action="store_true", help="one JSON object per line")
    sub.add_argument(
        "--heatmaps", type=Path, metavar="DIR", help="write every image with its heat map here"
    )

    sub = command(
        "evaluate",
        commands.evaluate,
        "Measure a bundle on the test images of a data set. Status 1 if one could not be inspected.",
    )
    _add_bundle(sub)
    sub.add_argument("data", type=Path, metavar="DATA")
    sub.add_argument("--json", type=Path, metavar="FILE")
    sub.add_argument("--html", type=Path, metavar="FILE")
    sub.add_argument(
        "--by-size", action="store_true", help="also AU-PRO by size of the defects, large to tiny"
    )
    sub.add_argument(
        "--bins",
        choices=SIZE_BINS,
        help="with --by-size: each size bin with all smaller defects (cumulative, as published; default)"
        " or without them (disjoint)",
    )
    sub.add_argument(
        "--thresholds",
        type=int,
        metavar="N",
        help="with --by-size: integrate over N thresholds instead of exactly; 99 to compare with"
        " published figures",
    )


def _add_build(command: _Command) -> None:
    sub = command("build", device_commands.build, "Build the TensorRT engine of a bundle.")
    _add_flavour(sub)
    sub.add_argument(
        "--target",
        type=_targets,
        default="current",
        metavar="SM,...",
        help="current (the GPU at hand), or capabilities such as sm86,sm89; other than the current one "
        "with tensorrt-rtx only (default: current)",
    )
    sub.add_argument(
        "--batch",
        type=_batches,
        metavar="N,...",
        help="batch sizes to build for, such as 1,4,16 (default: 1, or those of the engine before)",
    )
    sub.add_argument(
        "--workspace", type=int, metavar="MiB", help="limit for scratch memory (default: the device's)"
    )
    sub.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="kernel times to reuse; classic TensorRT only"
    )
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="write engine and sidecar here, not to the cache"
    )


def _add_doctor(command: _Command) -> None:
    sub = command("doctor", device_commands.doctor, "Look this box over: driver, libraries, clocks.")
    sub.add_argument(
        "bundle",
        type=Path,
        nargs="?",
        metavar="X.edgead",
        help="also say which back end this bundle gets here and why",
    )
    sub.add_argument("--json", action="store_true", help="print the findings as JSON")


def _add_engine_commands(command: _Command) -> None:
    command("list", device_commands.list_engines, "List the engines in the cache of this device.")

    sub = command("prune", device_commands.prune_engines, "Delete engines that are of no more use.")
    sub.add_argument("--all", action="store_true", help="delete every engine")
    sub.add_argument("--dry-run", action="store_true", help="only tell what would be deleted")

    sub = command(
        "report", device_commands.report_engine, "Show layers, precisions and memory of an engine."
    )
    _add_flavour(sub)


def _add_flavour(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", type=Path, metavar="X.edgead")
    sub.add_argument("--backend", choices=("auto", "tensorrt", "tensorrt-rtx"), default="auto")


def _add_bundle(sub: argparse.ArgumentParser, *, backend: bool = True) -> None:
    sub.add_argument("bundle", type=Path, metavar="X.edgead")
    if backend:
        sub.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
        sub.add_argument("--threads", type=int, help="threads per inference (default: the back end's)")


def _targets(text: str) -> list[str]:
    targets = text.lower().split(",")
    if not all(re.fullmatch(r"current|sm\d{2,3}", target) for target in targets):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write current, or compute capabilities such as sm86 or sm86,sm89,sm120"
        )
    return list(dict.fromkeys(targets))


def _batches(text: str) -> tuple[int, ...]:
    sizes = text.split(",")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: write batch sizes such as 1 or 1,4,16")
    return tuple(map(int, sizes))


def _frame(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write HEIGHTxWIDTH in pixels, such as 1080x1920"
        )
    return int(height), int(width)
