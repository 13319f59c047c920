"""The measurements of the GPU acceptance run that are made with one back end at a time.

Each function takes a `Bench` and returns plain values for the JSON file. What cannot be measured is not
left out: it is None with a reason, or `NotMeasured` for a whole section. The loops are in `gpu_measure`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgead.benchmarks.gpu_bench import (
    Bench,
    NotMeasured,
    bare_launch,
    describe,
    device_memory,
)
from edgead.benchmarks.gpu_measure import (
    gc_off,
    percentiles,
    resident_bytes,
    sample_calls,
    saturate,
    slope_per_minute,
)
from edgead.benchmarks.timing import interleave
from edgead.detector import Detector
from edgead.errors import BackendError
from edgead.gpu_state import EnergyMeter
from edgead.runtime import Backend
from edgead.runtime.backend import IMAGE
from edgead.runtime.executor import Executor


def opened(bench: Bench) -> dict[str, Any]:
    """Time to open the back end; the first one includes the build of the engine if there is none yet."""
    times = []
    found: dict[str, Any] = {}
    for _ in range(2):
        start = time.perf_counter()
        with bench.open() as backend:
            times.append(round(time.perf_counter() - start, 3))
            found = describe(backend)
    return {**found, "first_open_s": times[0], "second_open_s": times[1]}


def latency(bench: Bench) -> dict[str, Any]:
    """Single images in a closed loop, from the host's uint8 frame to the host's score and map."""
    effort = bench.effort
    feeds = bench.feeds()
    found: dict[str, Any] = {
        "what": "backend.infer, batch 1: uint8 frame in host memory to score and map in host memory, "
        "all copies included, one call after the other",
        "frame": list(feeds[0][IMAGE].shape[1:]),
    }
    with bench.open() as backend:
        key = "graph" if bench.is_gpu else "as_opened"
        found[key] = sample_calls(backend.infer, feeds, calls=effort.calls, warmup=effort.warmup)
        found["detector"] = _detector(bench, backend)
    if bench.is_gpu:
        with bench.open(graph=False) as backend:
            found["no_graph"] = sample_calls(
                backend.infer, feeds, calls=effort.calls, warmup=effort.warmup
            )
    else:
        found["no_graph"] = {"why": f"{bench.name} has no CUDA graph"}
    return found


def _detector(bench: Bench, backend: Backend) -> dict[str, Any]:
    detector, effort = Detector(bench.bundle, backend), bench.effort
    frames = list(bench.images.large)
    height, width, _ = frames[0].shape
    timed = sample_calls(
        detector, frames, calls=effort.detector_calls, warmup=min(20, effort.detector_calls)
    )
    what = "detector(frame), with the resize on the host where the graph has none, and the result object"
    return {"what": what, "frame": [height, width, 3], **timed}


def throughput(bench: Bench) -> dict[str, Any]:
    """Images per second for each batch size and number of slots in flight."""
    effort = bench.effort
    cells: list[dict[str, Any]] = []
    with bench.open(effort.batches) as backend:
        for batch in effort.batches:
            try:
                with bench.slots(backend, max(effort.slots), batch) as slots:
                    for count in effort.slots:
                        done, seconds = saturate(
                            slots[:count], batch, seconds=effort.cell_s, settle_s=effort.settle_s
                        )
                        rate = round(done / seconds, 1)
                        cells.append({"batch": batch, "slots": count, "images_per_s": rate})
            except BackendError as error:  # out of memory at a large batch, say
                cells.append({"batch": batch, "error": str(error)})
        measured = [cell for cell in cells if "images_per_s" in cell]
        if not measured:
            raise BackendError(f"no batch size can be measured: {cells}")
        best = max(measured, key=lambda cell: float(cell["images_per_s"]))
        with_copy = _with_host_copy(bench, backend, best["batch"], best["slots"])
    return {
        "what": "slots in flight round robin; the frames lie in the slots' page-locked buffers, copies "
        f"to and from the device included; {effort.cell_s} s each after {effort.settle_s} s",
        "cells": cells,
        "best": best,
        "best_with_host_copy_images_per_s": with_copy,
    }


def _with_host_copy(bench: Bench, backend: Backend, batch: int, count: int) -> float:
    """The best cell again, where each frame is also copied into the slot by the one thread."""
    frames = np.resize(bench.images.frames, (batch, *bench.images.frames.shape[1:]))
    with bench.slots(backend, count, batch) as slots:
        done, seconds = saturate(
            slots, batch, seconds=bench.effort.cell_s, settle_s=bench.effort.settle_s, frames=frames
        )
    return round(done / seconds, 1)


def idle_gap(bench: Bench) -> dict[str, Any]:
    """Latency of the first image after a pause, through the executor, keep-warm off and on."""
    found: dict[str, Any] = {
        "what": "executor.submit(frame).result() after a pause of the length given; frames of the "
        "graph's size; the pause is a sleep of the one submitting thread"
    }
    for label, keep_warm_ms in (("keep_warm_off", None), ("keep_warm_5_ms", 5.0)):
        executor = Executor(
            bench.bundle.manifest,
            bench.open_unmanaged(),
            reopen=bench.open_unmanaged,
            slots=2,
            keep_warm_ms=keep_warm_ms,
        )
        with executor:
            for frame in bench.images.frames[:8]:
                executor.submit(frame).result()
            gaps = [_gap(bench, executor, gap_s, times) for gap_s, times in bench.effort.gaps]
            stats = executor.stats
        if stats.recoveries or stats.failed:
            raise BackendError(f"the back end failed during the measurement: {stats}")
        found[label] = {"gaps": gaps, "heartbeats": stats.heartbeats}
    return found


def _gap(bench: Bench, executor: Executor, gap_s: float, times: int) -> dict[str, Any]:
    samples = np.empty(times, np.int64)
    frames, clock, meter = bench.images.frames, time.perf_counter_ns, EnergyMeter()
    with gc_off():
        meter.start()
        begin = clock()
        for index in range(times):
            if gap_s:
                time.sleep(gap_s)
            frame = frames[index % len(frames)]
            start = clock()
            executor.submit(frame).result()
            samples[index] = clock() - start
        seconds = (clock() - begin) / 1e9
        joules = meter.stop()
    timed = percentiles(samples)
    return {
        "gap_s": gap_s,
        "times": times,
        "median_ms": timed["p50_ms"],
        "min_ms": round(float(samples.min()) / 1e6, 4),
        "max_ms": timed["max_ms"],
        # The counter moves in steps of about 0.1 s: shorter runs say nothing.
        "mean_power_w": round(joules / seconds, 1) if joules is not None and seconds > 2 else None,
    }


def overhead(bench: Bench) -> dict[str, Any]:
    """What `infer` and the slot add to the device's own launch and wait, interleaved."""
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(bench.open())
        slot = stack.enter_context(bench.slots(backend, 1, 1))[0]
        feed = bench.feeds(1)[0]

        def slot_loop() -> None:
            slot.launch()
            slot.wait()

        functions: dict[str, Callable[[], object]] = {
            "infer": lambda: backend.infer(feed),
            "slot": slot_loop,
        }
        bare: dict[str, Any] = {}
        try:
            functions["bare"], bare["what"] = stack.enter_context(bare_launch(slot))
        except NotMeasured as reason:
            bare["why"] = str(reason)
        with gc_off():
            timings = interleave(functions, rounds=bench.effort.rounds, warmup=bench.effort.warmup)
    medians = {name: timing.p50 for name, timing in timings.items()}
    floor = medians.get("bare")
    return {
        "p50_ms": {name: round(value, 4) for name, value in medians.items()},
        "calls_each": timings["infer"].calls,
        "bare": bare,
        "infer_over_bare": round(medians["infer"] / floor, 4) if floor else None,
        "slot_over_bare": round(medians["slot"] / floor, 4) if floor else None,
        "infer_over_slot": round(medians["infer"] / medians["slot"], 4),
    }


def memory(bench: Bench) -> dict[str, Any]:
    """Memory of host and device during continuous inference, and its slope."""
    effort = bench.effort
    seconds, host, device, calls = [], [], [], 0
    with bench.open() as backend:
        feeds, used = bench.feeds(), device_memory(backend)
        for index in range(effort.warmup):
            backend.infer(feeds[index % len(feeds)])
        start = due = time.perf_counter()
        while (now := time.perf_counter()) < start + effort.memory_s or calls == 0:
            backend.infer(feeds[calls % len(feeds)])
            calls += 1
            if now >= due:
                due += effort.memory_every_s
                seconds.append(round(now - start, 2))
                host.append(resident_bytes())
                device.append(used() if used else None)
    return {
        "what": "backend.infer without a pause; device memory is what is in use on the whole device, by "
        "all processes",
        "seconds": round(now - start, 1),
        "calls": calls,
        "warmup_calls": effort.warmup,
        "host": _series(seconds, host, "this system does not tell the resident memory"),
        "device": _series(seconds, device, f"{bench.name} has no device memory"),
    }


def _series(seconds: list[float], values: list[int | None], why: str) -> dict[str, Any]:
    known = [value / 1024 for value in values if value is not None]
    if not known or len(known) != len(seconds):
        return {"slope_kib_per_min": None, "why": why}
    slope = slope_per_minute(seconds, known)
    return {
        "slope_kib_per_min": None if slope is None else round(slope, 2),
        "first_kib": known[0],
        "last_kib": known[-1],
        "samples_s_kib": [[second, round(value)] for second, value in zip(seconds, known, strict=True)],
    }


def energy(bench: Bench) -> dict[str, Any]:
    """Energy per image at saturation, and idle power with the back end open."""
    effort, (batch, count, basis) = bench.effort, bench.best_cell
    meter = EnergyMeter()
    with bench.open(effort.batches) as backend, bench.slots(backend, count, batch) as slots:
        saturate(slots, batch, seconds=effort.settle_s)
        time.sleep(min(2.0, effort.idle_s))  # clocks and power come down before idle power is taken
        meter.start()
        start = time.perf_counter()
        time.sleep(effort.idle_s)
        idle_s = time.perf_counter() - start
        idle_j = meter.stop()
        saturate(slots, batch, seconds=effort.settle_s)
        meter.start()
        # Counted over the whole call: also the few images in flight at both ends take energy.
        start = time.perf_counter()
        images, counted_s = saturate(slots, batch, seconds=effort.energy_s)
        busy_s = time.perf_counter() - start
        busy_j = meter.stop()
    images += batch * count
    found: dict[str, Any] = {
        "what": "NVML's total energy counter of the whole card, at saturation",
        "batch": batch,
        "slots": count,
        "configuration_from": basis,
        "images": images,
        "seconds": round(busy_s, 2),
        "idle_seconds": round(idle_s, 2),
        "images_per_s": round((images - batch * count) / counted_s, 1),
        "mj_per_image": None,
        "mj_per_image_without_idle": None,
        "idle_w": None,
    }
    if busy_j is None or idle_j is None:
        return {**found, "why": "there is no energy counter: no NVIDIA GPU, or one without NVML"}
    idle_w = idle_j / idle_s
    return {
        **found,
        "mj_per_image": round(1e3 * busy_j / images, 3),
        "mj_per_image_without_idle": round(1e3 * (busy_j - idle_w * busy_s) / images, 3),
        "power_w": round(busy_j / busy_s, 1),
        "idle_w": round(idle_w, 1),
    }
