"""The targets and the Markdown page of a GPU acceptance run, from its JSON record and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from edgead.benchmarks.results_file import table

NOT_MEASURED = "not measured"
# For which card, model, input and precision the targets below are stated.
TARGET_GFLOP = 75.9  # of the published 384 channels, which the naive networks have as well
TARGET_GPU, TARGET_METHOD, TARGET_PX, TARGET_PRECISION = "H200", "efficientad-s", [256, 256], "fp16"


def result(record: dict[str, Any], section: str, backend: str) -> dict[str, Any]:
    """Result of a section for a back end; empty if it was not measured."""
    found = record["sections"].get(section, {}).get(backend, {}).get("result", {})
    return dict(found)


def targets(record: dict[str, Any]) -> dict[str, Any]:
    """The targets against the best back end's figures in this file.

    Returns:
        applicable, why_not, and rows of target, measured, backend and met: True, False, or None where
        the figure was not measured or the target is not stated for this machine and model.
    """
    reasons = _why_not_applicable(record)
    rows = [
        _row(record, "batch-1 p50 <= 0.5 ms", _latency("p50_ms"), "<=", 0.5),
        _row(record, "batch-1 p99 <= 1.0 ms", _latency("p99_ms"), "<=", 1.0),
        _row(record, "throughput >= 5,000 images/s", _best_throughput, ">=", 5000),
        _row(record, "infer() over the bare graph launch <= 1.05", _overhead("infer"), "<=", 1.05),
        _row(record, "slot over the bare graph launch <= 1.05", _overhead("slot"), "<=", 1.05),
        _row(record, "batch-1 throughput >= 3 times naive", _times_naive, ">=", 3),
    ]
    if reasons:
        rows = [{**row, "met": None} for row in rows]
    return {"applicable": not reasons, "why_not": "; ".join(reasons), "rows": rows}


def _why_not_applicable(record: dict[str, Any]) -> list[str]:
    facts = record["provenance"]
    gpu = str(facts["gpu"]["name"])
    found = []
    if record["quick"]:
        found.append("a quick run is no result")
    if TARGET_GPU not in gpu:
        found.append(f"stated for an {TARGET_GPU}, the GPU is {gpu}")
    for name, wanted in (
        ("method", TARGET_METHOD), ("input_px", TARGET_PX), ("precision", TARGET_PRECISION)
    ):  # fmt: skip
        if facts["bundle"][name] != wanted:
            found.append(f"stated for {name} {wanted}, the bundle has {facts['bundle'][name]}")
    gflop = facts["bundle"].get("gflop_per_image")
    if gflop is not None and abs(gflop - TARGET_GFLOP) > 1:
        found.append(f"stated for {TARGET_GFLOP} GFLOP per image, the bundle has {gflop}")
    return found


def _latency(name: str) -> Callable[[dict[str, Any], str], float | None]:
    return lambda record, backend: result(record, "latency", backend).get("graph", {}).get(name)


def _best_throughput(record: dict[str, Any], backend: str) -> float | None:
    return result(record, "throughput", backend).get("best", {}).get("images_per_s")


def _overhead(call: str) -> Callable[[dict[str, Any], str], float | None]:
    return lambda record, backend: result(record, "overhead", backend).get(f"{call}_over_bare")


def _times_naive(record: dict[str, Any], backend: str) -> float | None:
    """One slot against the naive form as it is usually written, both in a closed loop."""
    times = result(record, "naive", backend).get("batch_1", {}).get("times_naive", {})
    return times.get("naive", {}).get("by_images_per_s", {}).get("slot")


def _row(
    record: dict[str, Any],
    target: str,
    value_of: Callable[[dict[str, Any], str], float | None],
    sign: str,
    limit: float,
) -> dict[str, Any]:
    values = {name: value_of(record, name) for name in record["backends"]}
    known = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    if not known:
        return {"target": target, "measured": NOT_MEASURED, "backend": None, "met": None}
    choose = min if sign == "<=" else max
    best = choose(known, key=lambda name: known[name])
    met = known[best] <= limit if sign == "<=" else known[best] >= limit
    return {"target": target, "measured": known[best], "backend": best, "met": met}


def limits(record: dict[str, Any]) -> dict[str, Any]:
    """Share of the card's measured FP16 rate that the best throughput of each back end reaches."""
    found = record["sections"].get("matmul", {}).get("result", {"graph": {}, "card": {}})
    flop, tflops = found["graph"].get("flop_per_image"), found["card"].get("tflops")
    if not flop or not tflops:
        return {"why": "the section matmul has no rate of this card or no count of operations"}
    share = {}
    for name in record["backends"]:
        rate = _best_throughput(record, name)
        share[name] = None if rate is None else round(rate * flop / (1e12 * tflops), 4)
    return {"limit_images_per_s": round(1e12 * tflops / flop, 1), "share": share}


def markdown(record: dict[str, Any]) -> str:
    """The whole page."""
    parts = ["# GPU acceptance\n", _head(record), "## Targets\n", _targets(record["targets"])]
    for title, make in (
        ("Contract and parity", _agreement),
        ("Latency, batch 1", _latency_table),
        ("Throughput, images/s", _throughput_tables),
        ("First image after a pause", _gap_table),
        ("Overhead, memory, energy", _resources),
        ("Against three torch networks one after another", _naive_table),
    ):
        text = make(record)
        parts += [f"## {title}\n", text or f"{NOT_MEASURED}\n"]
    gaps = _gaps(record)
    if gaps:
        parts += ["## Not measured, and why\n", table(("section", "back end", "why"), gaps) + "\n"]
    return "\n".join(parts)


def _head(record: dict[str, Any]) -> str:
    facts = record["provenance"]
    bundle, gpu = facts["bundle"], facts["gpu"]
    lines = [
        f"- GPU: {gpu['name']}, driver {gpu['driver']}, clocks locked: {gpu['clocks_locked']}, "
        f"{facts['gpu_sharing']}",
        f"- model: {bundle['method']}, {bundle['precision']}, input {bundle['input_px']}, graph sha256 "
        f"{bundle['graph_sha256'][:12]}, weights: {bundle['weights']}",
        f"- commit {facts['git_commit']}, source {facts['source_sha256'][:12]}, edgead "
        f"{facts['machine']['libraries']['edgead']}, {record['runs'][0]['utc']}",
        f"- provenance that is missing: {', '.join(facts['missing']) or 'none'}",
    ]
    for name, leaf in record["sections"].get("opened", {}).items():
        found = leaf.get("result", {})
        names = ("tensorrt_version", "torch", "cudnn", "cuda_layer")
        versions = [f"{key} {found[key]}" for key in names if key in found]
        lines.append(f"- {name}: {', '.join(versions) or 'see the JSON file'}")
    if record["quick"]:
        lines.insert(0, "**Quick run: it shows that everything works; its figures are no result.**\n")
    return "\n".join(lines) + "\n"


def _targets(found: dict[str, Any]) -> str:
    words = {True: "yes", False: "**no**", None: "–"}
    rows = [(r["target"], r["measured"], r["backend"] or "–", words[r["met"]]) for r in found["rows"]]
    note = "" if found["applicable"] else f"Not judged: {found['why_not']}.\n\n"
    return note + table(("target", "measured", "back end", "met"), rows) + "\n"


def _agreement(record: dict[str, Any]) -> str:
    rows = []
    for name in record["backends"]:
        kept, found = result(record, "contract", name), result(record, "parity", name)
        broken = [check for check, item in kept.get("checks", {}).items() if not item["ok"]]
        verdict = found.get("verdicts", {}).get("median of the reference", {})
        relative = found.get("relative") or {}
        rows.append(
            (
                name,
                ", ".join(broken) if broken else ("kept" if kept else NOT_MEASURED),
                found.get("images", "–"),
                _e(relative.get("score_max")),
                _e(relative.get("map_max")),
                verdict.get("flips", "–"),
                _e(verdict.get("rate_upper_bound")),
            )
        )
    header = (
        "back end", "contract", "images", "score deviation / spread", "map deviation / spread",
        "flips at the median", "upper bound (95 %)",
    )  # fmt: skip
    return table(header, rows) + "\n" if rows else ""


def _latency_table(record: dict[str, Any]) -> str:
    rows = []
    for name in record["backends"]:
        found = result(record, "latency", name)
        for key in ("graph", "as_opened", "no_graph", "detector"):
            timed = found.get(key, {})
            if "p50_ms" in timed:
                what = f"detector, frame {timed['frame'][:2]}" if key == "detector" else f"infer, {key}"
                columns = ("p50_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms", "std_ms", "calls")
                rows.append((name, what, *(timed[column] for column in columns)))
    header = ("back end", "call", "p50 ms", "p90", "p99", "p99.9", "max", "std", "calls")
    return table(header, rows) + "\n" if rows else ""


def _throughput_tables(record: dict[str, Any]) -> str:
    parts = []
    for name in record["backends"]:
        found = result(record, "throughput", name)
        cells = {(c["batch"], c.get("slots")): c.get("images_per_s") for c in found.get("cells", [])}
        if not cells:
            continue
        counts = sorted({slots for _, slots in cells if slots})
        rows = [
            (batch, *(cells.get((batch, slots)) or "failed" for slots in counts))
            for batch in sorted({batch for batch, _ in cells})
        ]
        best = found["best"]
        share = record["limits"].get("share", {}).get(name)
        of_limit = "" if share is None else f", {share:.1%} of the card's measured FP16 rate"
        parts += [
            f"{name}: best {best['images_per_s']} at batch {best['batch']} x {best['slots']} slots"
            f"{of_limit}; with the host's copy into the slot "
            f"{found['best_with_host_copy_images_per_s']}\n",
            table(("batch", *(f"{slots} slots" for slots in counts)), rows) + "\n",
        ]
    return "\n".join(parts)


def _gap_table(record: dict[str, Any]) -> str:
    rows = []
    for name in record["backends"]:
        found = result(record, "idle_gap", name)
        for mode in (key for key in found if key.startswith("keep_warm")):
            for gap in found[mode]["gaps"]:
                power = "–" if gap["mean_power_w"] is None else gap["mean_power_w"]
                values = (gap["median_ms"], gap["max_ms"], gap["times"], power)
                rows.append((name, mode, gap["gap_s"], *values))
    header = ("back end", "mode", "pause s", "median ms", "max ms", "times", "mean power W")
    return table(header, rows) + "\n" if rows else ""


def _resources(record: dict[str, Any]) -> str:
    rows = []
    for name in record["backends"]:
        over, held = result(record, "overhead", name), result(record, "memory", name)
        power = result(record, "energy", name)
        values = (
            over.get("infer_over_bare"),
            over.get("slot_over_bare"),
            held.get("host", {}).get("slope_kib_per_min"),
            held.get("device", {}).get("slope_kib_per_min"),
            held.get("seconds"),
            power.get("mj_per_image"),
            power.get("mj_per_image_without_idle"),
            power.get("idle_w"),
        )
        rows.append((name, *("–" if value is None else value for value in values)))
    header = (
        "back end", "infer / bare", "slot / bare", "host KiB/min", "device KiB/min", "over s",
        "mJ/image", "without idle", "idle W",
    )  # fmt: skip
    return table(header, rows) + "\n" if rows else ""


def _naive_table(record: dict[str, Any]) -> str:
    rows = []
    for name in record["backends"]:
        for batch, found in result(record, "naive", name).items():
            if not isinstance(found, dict):
                continue
            for peer, times in found["times_naive"].items():
                own = times["by_images_per_s"]
                rates = found["images_per_s"]
                rows.append((batch, peer, rates[peer], name, rates["slot"], own["slot"], own["infer"]))
    header = (
        "batch", "peer", "images/s", "back end", "images/s, one slot", "times, one slot", "times, infer",
    )  # fmt: skip
    return table(header, rows) + "\n" if rows else ""


def _gaps(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for section, content in record["sections"].items():
        leaves = {"": content} if "utc" in content else content
        for backend, leaf in leaves.items():
            for why in _reasons(leaf):
                found.append((section, backend, " ".join(why.split())[:300].replace("|", "/")))
    return found


def _reasons(value: Any) -> Iterator[str]:
    """All texts under "error", "not_measured" and "why", at any depth."""
    for key, item in value.items() if isinstance(value, dict) else ():
        if key in ("error", "not_measured", "why") and item:
            yield str(item)
        yield from _reasons(item)
    for item in value if isinstance(value, list) else ():
        yield from _reasons(item)


def _e(value: float | str | None) -> str:
    """A text is what JSON has no number for: "nan", "inf"."""
    return "–" if value is None else value if isinstance(value, str) else f"{value:.2e}"
