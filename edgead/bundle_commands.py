"""What the commands of `edgead` do with one bundle: show it, prove it, change its threshold.

Each imports what it needs when it runs: `--help` works with core only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def inspect(arguments: argparse.Namespace) -> None:
    from edgead.bundle import Bundle
    from edgead.recalibrate import HISTORY

    bundle = Bundle.open(arguments.bundle)
    manifest = bundle.manifest
    if arguments.json:
        print(manifest.to_json(), end="")
        return
    limit, parity = manifest.threshold, manifest.parity
    rows = {
        "bundle": (
            f"{arguments.bundle} ({arguments.bundle.stat().st_size / 2**20:.1f} MiB),"
            f" format {manifest.format[0]}.{manifest.format[1]}"
        ),
        "recipe": f"{manifest.name}, {manifest.method}, {manifest.precision}",
        "input": (
            f"uint8 [N, {manifest.input.height}, {manifest.input.width}, 3] {manifest.input.color};"
            f" resize: {manifest.input.resize}"
        ),
        "threshold": f"{limit.value:.6g} ({limit.basis})",
        "calibration": ", ".join(
            f"{n} {v:.5g}"
            for n, v in zip(manifest.calibration.names, manifest.calibration.values, strict=True)
        ),
        "graph": _graph_text(bundle.model_bytes()),
        "golden": (
            f"{len(bundle.golden().scores)} samples,"
            f" scores {', '.join(f'{s:.4g}' for s in bundle.golden().scores)}"
        ),
    }
    if limit.upper_bound is not None:
        rows["false rejects"] = _false_rejects_text(limit)
    if parity:
        since = ", before it was recalibrated" if manifest.provenance.get(HISTORY) else ""
        rows["parity"] = f"at export{since}: {_or_as_it_is(_parity_text, parity)}"
    if reduction := manifest.model.get("reduction"):
        rows["reduction"] = _or_as_it_is(_reduction_text, reduction)
    rows |= {
        f"{part}.{key}": _cut(json.dumps(value))
        for part in ("model", "provenance")
        for key, value in getattr(manifest, part).items()
    }
    for member, entry in manifest.members.items():
        rows[f"member {member}"] = f"{entry.bytes} bytes, sha256 {entry.sha256[:16]}… checked"
    width = max(map(len, rows))
    for key, text in rows.items():
        print(f"{key:<{width}}  {text}")


def _cut(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[:most]} … (--json shows all)"


def _or_as_it_is(text: Callable[[Any], str], value: Any) -> str:
    """The text of what `edgead export` writes; the format leaves it free to other tools."""
    try:
        return text(value)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return _cut(json.dumps(value))


def _false_rejects_text(limit: Any) -> str:
    about = {
        "{:.0%} confidence": limit.confidence,
        "{} good images": limit.good_images,
        "target {:.2%}": limit.target_false_reject_rate,
    }
    said = [text.format(value) for text, value in about.items() if value is not None]
    return ", ".join([f"at most {limit.upper_bound:.1%}", *said])


def _parity_text(parity: dict[str, Any]) -> str:
    return (
        f"{parity['images']} images, score deviation {parity['score_deviation']:.1e} of the spread,"
        f" {len(parity['flips'])} flips"
    )


def _reduction_text(reduction: dict[str, Any]) -> str:
    text = (
        f"{reduction['directions']} of {reduction['directions_of']} directions, conv-2 reads"
        f" {reduction['inputs']} of {reduction['inputs_of']} channels (asked for: {reduction['asked']})"
    )
    if "gate" not in reduction:
        return f"{text}; all {len(reduction['refused'])} smaller sizes failed the gate"
    gate = reduction["gate"]
    auroc = "" if gate["auroc"] is None else " image AUROC {:.4f} -> {:.4f},".format(*gate["auroc"])
    return (
        f"{text}; {gate['images']} images,{auroc} score deviation {gate['score_deviation']:.1e} of the"
        f" spread, {len(gate['flips'])} flips within the margin"
    )


def _graph_text(content: bytes) -> str:
    try:
        from edgead.export.to_onnx import describe
    except ModuleNotFoundError:
        return f'{len(content) / 2**20:.1f} MiB of ONNX; for its nodes: pip install "edgead[export]"'
    try:
        graph = describe(content)
    except Exception as error:  # of protobuf: nothing of the graph is checked when a bundle is opened
        return f"{len(content) / 2**20:.1f} MiB that are no ONNX graph ({error})"
    nodes: Any = graph["nodes"]
    return f"opset {graph['opset']}, {sum(nodes.values())} nodes: " + ", ".join(
        f"{count} {name}" for name, count in nodes.items()
    )


def verify(arguments: argparse.Namespace) -> int:
    from edgead.bundle import Bundle
    from edgead.runtime import open_backend, replay

    bundle = Bundle.open(arguments.bundle)
    backend = open_backend(bundle, arguments.backend, threads=arguments.threads)
    result = replay(backend, bundle)
    backend.close()
    print(
        f"{backend.name} ({backend.precision}): {result.images} golden samples, largest deviation"
        f" of a score {result.score_deviation:.3g}"
        f" ({result.relative_score_deviation:.1e} of their spread), of a map"
        f" {result.map_deviation:.3g}, allowed {result.tolerance:.3g};"
        f" nearest score to the threshold {result.margin:.3g} away"
    )
    for flip in result.flips:
        print(
            f"sample {flip.index}: expected {'NG' if flip.expected else 'OK'},"
            f" got {'NG' if flip.got else 'OK'}"
        )
    if not result.ok:
        print("FAILED: this device does not reproduce the reference")
        return 1
    print(f"same verdicts as the reference{result.near}")
    return 0


def set_threshold(arguments: argparse.Namespace) -> None:
    from edgead.bundle import Bundle, set_threshold

    before = Bundle.open(arguments.bundle).manifest.threshold.value
    set_threshold(arguments.bundle, arguments.value)
    print(f"{arguments.bundle}: threshold {before:.6g} -> {arguments.value:.6g}")
