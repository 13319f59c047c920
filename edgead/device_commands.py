"""What the commands of `edgead` do that are about engines and the device.

Each imports what it needs when it runs: `--help` works with core only.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgead.errors import EngineError

CURRENT = "current"


def build(arguments: argparse.Namespace) -> None:
    from edgead.bundle import Bundle
    from edgead.engines.prepare import choose_flavour, choose_target, detect_gpu, prepare_engine

    bundle = Bundle.open(arguments.bundle)
    gpu, why_no_gpu = detect_gpu()
    flavour = choose_flavour(arguments.backend, gpu)
    if CURRENT in arguments.target and gpu is None:
        raise EngineError(
            f"there is no GPU here ({why_no_gpu}): name the target, such as "
            "--backend tensorrt-rtx --target sm86"
        )
    # All of them before the first build, which takes minutes.
    targets = [
        choose_target(flavour, gpu, None if target == CURRENT else target) for target in arguments.target
    ]
    for sm in targets:
        with progress_line(f"{flavour.name} {sm}") as progress:
            prepared = prepare_engine(
                bundle,
                flavour,
                gpu,
                target=sm,
                batches=arguments.batch,
                workspace_mib=arguments.workspace,
                timing_cache=arguments.timing_cache,
                folder=None,
                progress=progress,
            )
        path, remark = _keep(bundle, flavour, gpu, prepared, arguments.out)
        size = len(prepared.plan) / 2**20
        origin = "built in" if prepared.is_new else "from the cache, was built in"
        print(f"{path}: {size:.1f} MiB, {origin} {prepared.sidecar.seconds:.1f} s, {remark}")


def _keep(bundle: Any, flavour: Any, gpu: Any, prepared: Any, out: Path | None) -> tuple[Path, str]:
    """Stores an engine, after it has answered the golden samples if it is for the GPU at hand."""
    from edgead.engines.prepare import keep

    if prepared.verified:
        return keep(prepared, out=out), "verified"
    if gpu is None or gpu.sm != prepared.key.target:
        return keep(prepared, out=out), "to be verified when its box loads it first"
    figures = _prove(bundle, flavour, prepared)
    return keep(prepared, figures, out=out), "verified on the golden samples"


def _prove(bundle: Any, flavour: Any, prepared: Any) -> dict[str, Any]:
    """Figures of the golden samples on the GPU at hand; refuses an engine that decides otherwise."""
    from edgead.runtime.cuda import open_device
    from edgead.runtime.open_tensorrt import prove
    from edgead.runtime.tensorrt import TensorRTBackend

    backend = TensorRTBackend(bundle, flavour, open_device(), prepared.plan)
    try:
        return prove(backend, bundle)
    finally:
        backend.close()


def doctor(arguments: argparse.Namespace) -> int:
    from edgead.doctor import check, is_healthy, to_json, to_text

    findings = check(arguments.bundle)
    print(to_json(findings) if arguments.json else to_text(findings))
    return 0 if is_healthy(findings) else 1


def _engines_folder() -> Path:
    """Of the cache; it need not be there yet. Raises OSError if it cannot be read."""
    from edgead.engines.cache import default_folder

    folder = default_folder()
    with suppress(FileNotFoundError):
        next(folder.iterdir(), None)
    return folder


def list_engines(arguments: argparse.Namespace) -> None:
    from edgead.engines import cache
    from edgead.engines.prepare import Box

    folder = _engines_folder()
    box = Box.here()
    rows = []
    for entry in cache.entries(folder):
        key, sidecar = entry.sidecar.key, entry.sidecar
        batches = ",".join(map(str, key.batches))
        rows.append(
            (
                sidecar.bundle,
                key.graph_sha256[:8],
                f"{key.flavour} {key.version}",
                key.target,
                key.gpu or "any",
                batches,
                f"{sidecar.size_bytes / 2**20:.1f} MiB",
                "yes" if sidecar.verified else "no",
                _age(entry.engine_path),
                box.why_not(key) or "yes",
            )
        )
    print(f"{folder}: {len(rows)} engine{'' if len(rows) == 1 else 's'}")
    if rows:
        header = "bundle graph library target GPU batches size verified age usable-here".split()
        print("\n".join(table(header, rows)))


def prune_engines(arguments: argparse.Namespace) -> None:
    from edgead.engines import cache
    from edgead.engines.prepare import Box

    folder = _engines_folder()
    found = cache.prune(
        folder, Box.here().why_stale, everything=arguments.all, dry_run=arguments.dry_run
    )
    for path, why in found:
        print(f"{path.name}: {why}")
    count = f"{len(found)} file{'' if len(found) == 1 else 's'}"
    print(f"{folder}: {count} {'would be ' if arguments.dry_run else ''}deleted")


def report_engine(arguments: argparse.Namespace) -> None:
    from edgead.bundle import MODEL, Bundle
    from edgead.engines import cache, report
    from edgead.engines.prepare import Box, choose_flavour

    bundle = Bundle.open(arguments.bundle)
    box = Box.here()
    flavour = choose_flavour(arguments.backend, box.gpu)
    graph, folder = bundle.manifest.members[MODEL].sha256, _engines_folder()
    found = [
        entry
        for entry in cache.entries(folder)
        if entry.sidecar.key.graph_sha256 == graph and entry.sidecar.key.flavour == flavour.name
    ]
    for entry in found:
        print("\n".join(_describe(entry)))
    if not found:
        print(f"no engine of {flavour.name} for {bundle.path} in {folder}")
    usable = next((entry for entry in found if not box.why_not(entry.sidecar.key)), None)
    if usable is None:
        why = "no engine for this GPU: edgead build makes one" if box.gpu else box.why_no_gpu
        print(f"the kernels of an engine cannot be shown: {why}")
        layers = report.network_layers(bundle.model_bytes(), flavour)
        print(f"{len(layers)} layers of the graph as {flavour.name} {flavour.version} reads it:")
    else:
        layers, memory_bytes = report.engine_layers(usable.read_plan(), flavour)
        print(f"{len(layers)} layers, {memory_bytes / 2**20:.1f} MiB of device memory per context:")
    columns = ["name", "kind", "precision", "shape", "tactic", "time"]
    used = [name for name in columns if any(getattr(layer, name) for layer in layers)]
    print("\n".join(table(used, [[getattr(layer, name) for name in used] for layer in layers])))
    counts = Counter(layer.precision for layer in layers if layer.precision)
    print("outputs: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))


def _describe(entry: Any) -> Iterator[str]:
    """An engine as its sidecar has it."""
    sidecar, key = entry.sidecar, entry.sidecar.key
    yield f"{entry.engine_path}"
    yield (
        f"  {key.flavour} {key.version}, {key.target}, {key.gpu or 'any GPU of that capability'}, "
        f"batches {','.join(map(str, key.batches))}, {sidecar.size_bytes / 2**20:.1f} MiB, built in "
        f"{sidecar.seconds:.1f} s at {sidecar.utc} by edgead {sidecar.edgead}"
    )
    if sidecar.verified is None:
        yield "  not verified yet: it answers the golden samples when its box loads it first"
        return
    figures = sidecar.verified.replay
    yield (
        f"  verified at {sidecar.verified.utc} on {sidecar.verified.gpu}, driver "
        f"{sidecar.verified.driver}: {figures.get('images')} golden samples, scores differ by up to "
        f"{figures.get('score_deviation')}, maps by {figures.get('map_deviation')}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _age(path: Path) -> str:
    try:
        seconds = max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:
        return "missing"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def progress_line(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """One line on standard error that follows a build; it stays as it is where that is no terminal."""
    last = -math.inf
    is_terminal = sys.stderr.isatty()

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last < 0.1 or (last > 0 and not is_terminal):
            return
        last = time.monotonic()
        if is_terminal:
            line = f"\rbuilding: {title}, {phase} {done}/{total}\033[K"
            print(line, end="", file=sys.stderr, flush=True)
        else:
            print(f"building: {title}", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if is_terminal and last > 0:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
