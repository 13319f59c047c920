"""What the GPU acceptance run measures with: timed calls, slots in flight, slopes, the card itself."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgead.runtime import Slot


@contextmanager
def gc_off() -> Iterator[None]:
    """Keeps Python's garbage collector out of what is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def sample_calls(
    call: Callable[[Any], object], arguments: Sequence[Any], *, calls: int, warmup: int
) -> dict[str, Any]:
    """Times single calls one after the other; the arguments take turns.

    Returns:
        The percentiles of the wall time (`percentiles`), and apart from them what the warm-up took.
    """
    samples = np.empty(calls, np.int64)
    clock, turns = time.perf_counter_ns, len(arguments)
    start = clock()
    call(arguments[0])
    first_ns = clock() - start
    with gc_off():
        for index in range(warmup):
            call(arguments[index % turns])
        for index in range(calls):
            argument = arguments[index % turns]
            start = clock()
            call(argument)
            samples[index] = clock() - start
    apart = {"warmup_calls": 1 + warmup, "first_call_ms": round(first_ns / 1e6, 4)}
    return {**percentiles(samples), **apart}


def percentiles(samples_ns: np.ndarray) -> dict[str, Any]:
    """Percentiles, maximum, mean and standard deviation in milliseconds, and the number of calls."""
    ms = np.asarray(samples_ns, np.float64) / 1e6
    p50, p90, p99, p999 = np.percentile(ms, (50, 90, 99, 99.9))
    values = {
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "p99_9_ms": p999,
        "max_ms": ms.max(),
        "mean_ms": ms.mean(),
        "std_ms": ms.std(),
    }
    return {**{name: round(float(value), 4) for name, value in values.items()}, "calls": len(ms)}


def saturate(
    slots: Sequence[Slot], batch: int, *, seconds: float, settle_s: float = 0.0, frames: Any = None
) -> tuple[int, float]:
    """Keeps slots in flight, round robin: waits for the oldest and launches it again.

    Args:
        slots: All are busy all the time.
        batch: Images of each launch.
        seconds: Counted time; at least one round is counted.
        settle_s: Time before it that is not counted.
        frames: uint8 [batch, H, W, 3] that are copied into a slot before each launch; None leaves what
            the slots hold.

    Returns:
        Images finished in the counted time, and that time in seconds. As many are in flight when it
        begins as when it ends.
    """
    clock = time.perf_counter_ns
    with gc_off():
        for slot in slots:
            slot.launch(batch)
        done, start = 0, clock()
        counting, until = settle_s == 0, start + int(1e9 * (settle_s or seconds))
        while True:
            for slot in slots:
                slot.wait()
                if frames is not None:
                    np.copyto(slot.images[:batch], frames)
                slot.launch(batch)
            done += batch * len(slots)
            now = clock()
            if now >= until:
                if counting:
                    break
                counting, done, start, until = True, 0, now, now + int(1e9 * seconds)
        for slot in slots:
            slot.wait()
    return done, (now - start) / 1e9


def slope_per_minute(seconds: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of the least-squares line, per minute; None for fewer than two points in time."""
    if len(set(seconds)) < 2:
        return None
    x = np.asarray(seconds, np.float64) / 60
    return float(np.polyfit(x - x.mean(), np.asarray(values, np.float64), 1)[0])


def resident_bytes() -> int | None:
    """Resident memory of this process, None where the system does not tell it so."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def count_flop(model_bytes: bytes) -> dict[str, Any]:
    """Counts the floating-point operations of one image (batch 1) in the nodes of an ONNX graph.

    Returns:
        flop_per_image: two per multiply-add of all Conv, ConvTranspose, MatMul and Gemm nodes; nodes
        their number; counted says so. Everything else (pooling, resizing, element-wise) is left out.
    """
    import onnx

    model = onnx.load_from_string(model_bytes)
    for value in model.graph.input:
        for side in value.type.tensor_type.shape.dim:
            if side.HasField("dim_param"):
                side.dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sides = value.type.tensor_type.shape.dim
        # A free side that is left is the batch: the exporter names it anew behind some nodes.
        shapes[value.name] = tuple(side.dim_value if side.HasField("dim_value") else 1 for side in sides)
    counts = [_flop(node, shapes) for node in graph.node if node.op_type in _COUNTED]
    return {
        "flop_per_image": int(sum(counts)),
        "nodes": len(counts),
        "counted": f"2 per multiply-add in the ONNX graph's {', '.join(_COUNTED)} nodes",
    }


_COUNTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def _flop(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    first, second = shapes[node.input[0]], shapes[node.input[1]]
    out = shapes[node.output[0]]
    if node.op_type == "Conv":  # weight [out, in / groups, *kernel]: one product per output and weight
        return 2 * int(np.prod(out)) * int(np.prod(second[1:]))
    if node.op_type == "ConvTranspose":  # weight [in, out / groups, *kernel]: per input and weight
        return 2 * int(np.prod(first)) * int(np.prod(second[1:]))
    inner = first[-1]
    if node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        inner = first[0]
    return 2 * int(np.prod(out)) * inner


def matmul_rate(device: str, *, side: int, repeats: int, groups: int) -> dict[str, Any]:
    """Measures the FP16 matrix product of a device: two square matrices of random numbers, with torch.

    Args:
        device: A torch device, "cuda".
        side: Rows and columns.
        repeats: Products between two synchronisations.
        groups: Timed groups; the median counts.
    """
    import torch

    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(side, side, generator=generator, device=device, dtype=torch.float32).half()
        for _ in range(2)
    )
    out = torch.empty_like(a)

    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    tflops = []
    for group in range(groups + 1):  # the first one warms up
        synchronize()
        start = time.perf_counter_ns()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        synchronize()
        seconds = (time.perf_counter_ns() - start) / 1e9
        if group:
            tflops.append(2 * side**3 * repeats / seconds / 1e12)
    return {
        "tflops": float(f"{np.median(tflops):.5g}"),
        "tflops_min": float(f"{min(tflops):.5g}"),
        "tflops_max": float(f"{max(tflops):.5g}"),
        "method": f"torch {torch.__version__} mm, float16 {side}x{side}x{side}, accumulated in float32, "
        f"random normal data, median of {groups} groups of {repeats} products",
    }
