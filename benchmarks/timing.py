"""Timing of callables against each other. Knows nothing of models or images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Wall time of single calls in milliseconds; `calls` excludes the warm-up."""

    p50: float
    p90: float
    p99: float
    max: float
    calls: int

    @classmethod
    def of(cls, samples_ms: list[float]) -> Timing:
        p50, p90, p99 = (float(value) for value in np.percentile(samples_ms, (50, 90, 99)))
        return cls(p50, p90, p99, max(samples_ms), len(samples_ms))

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


def interleave(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 3, block: int = 5
) -> dict[str, Timing]:
    """Time functions in turn, a few calls of each per round, so that a drifting machine slows all alike.

    Args:
        functions: Name to function without arguments.
        rounds: Rounds over all functions.
        warmup: Calls of each function before the first round.
        block: Timed calls of one function in a row; one more before them is not counted, because the
            first call after another function finds the caches and threads of that one.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(warmup):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            for _ in range(block):
                start = time.perf_counter()
                function()
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: Timing.of(values) for name, values in samples.items()}
