"""CUSUM and windows of scores: few false alarms, shifts found soon, memory bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.line.drift import BASELINE, LIMIT, Cusum, Windows, quantile

S = 1_000_000_000


def feed(cusum: Cusum, scores: np.ndarray, start: int = 0) -> int | None:
    """Index of the first alarm; one score per second."""
    for index, score in enumerate(scores.tolist(), start):
        cusum.add(score, index * S)
        if cusum.direction:
            return index
    return None


@pytest.mark.parametrize("draw", ["normal", "lognormal", "uniform", "rounded"])
def test_stationary_scores_raise_no_alarm(draw: str) -> None:
    """Of 2 * 10^5 scores of any distribution; the run length of the module's docstring is far longer."""
    rng = np.random.default_rng(3)
    scores = {
        "normal": rng.normal(0.3, 0.05, 200_000),
        "lognormal": rng.lognormal(-1, 0.8, 200_000),
        "uniform": rng.uniform(0, 1, 200_000),
        "rounded": np.rint(rng.normal(3, 0.7, 200_000)),
    }[draw]
    assert feed(Cusum(), scores) is None


@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_a_shift_of_one_sigma_is_found_within_130_parts(shift: float) -> None:
    """From the simulation in the module's docstring: median 40, 99 % within 83, at most 128 of 1000."""
    delays = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        cusum = Cusum()
        assert feed(cusum, rng.normal(0, 1, BASELINE + 500)) is None
        found = feed(cusum, rng.normal(shift, 1, 300), start=BASELINE + 500)
        assert found is not None
        delays.append(found - BASELINE - 500 + 1)
        assert cusum.direction == ("up" if shift > 0 else "down")
        assert abs(cusum.since_ns / S - (BASELINE + 500)) < 60, "when it began"
    assert 30 < np.median(delays) < 50 and max(delays) <= 130


def test_a_slow_rise_is_found() -> None:
    rng = np.random.default_rng(0)
    cusum = Cusum()
    scores = rng.normal(0, 1, 20_000)
    scores[BASELINE:] += np.linspace(0, 2, 20_000 - BASELINE)
    found = feed(cusum, scores)
    assert found is not None and found < 10_000 and cusum.direction == "up"


def test_an_alarm_ends_when_the_scores_are_back() -> None:
    rng = np.random.default_rng(1)
    cusum = Cusum()
    feed(cusum, rng.normal(0, 1, BASELINE))
    for index, score in enumerate(rng.normal(3, 1, 5000).tolist()):
        cusum.add(score, index)
    assert cusum.direction == "up" and max(cusum.sums) <= 2 * LIMIT
    for index, score in enumerate(rng.normal(0, 1, 300).tolist(), 5000):
        cusum.add(score, index)
    assert cusum.direction == "" and cusum.since_ns == 0


def test_a_new_baseline() -> None:
    rng = np.random.default_rng(2)
    cusum = Cusum()
    feed(cusum, rng.normal(0, 1, BASELINE))
    assert feed(cusum, rng.normal(5, 1, 100)) is not None
    cusum.reset()
    assert (cusum.direction, cusum.sums, cusum.median, cusum.baseline_scores) == (
        "",
        (0, 0),
        None,
        (0, 500),
    )
    assert feed(cusum, rng.normal(5, 1, 5000)) is None
    assert cusum.median == pytest.approx(5, abs=0.2)


def test_equal_scores_are_no_drift() -> None:
    cusum = Cusum(10)
    assert feed(cusum, np.full(10_000, 0.5)) is None
    assert cusum.sums == (0, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**14), st.floats(-1e6, 1e6)), min_size=1, max_size=300),
    st.booleans(),
)
def test_windows_lose_no_score(entries: list[tuple[int, float]], is_sorted: bool) -> None:
    """Whatever the times, forwards or not: counts add up, and quantiles lie within the scores."""
    windows = Windows()
    for time_ns, score in sorted(entries) if is_sorted else entries:
        windows.add(score, time_ns)
    every = windows.all()
    scores = [score for _, score in entries]
    assert sum(window.count for window in every) == len(entries)
    assert all(
        min(scores) <= w.low <= w.middle <= w.high <= max(scores) or len(scores) < 2 for w in every
    )
    starts = [window.start_ns for window in every]
    assert starts == sorted(starts) and len(every) <= 200


def test_windows_cover_everything_in_bounded_memory() -> None:
    rng = np.random.default_rng(0)
    windows = Windows()
    for second, score in enumerate(rng.normal(0, 1, 50_000).tolist()):
        windows.add(score + second / 10_000, second * S)
    every = windows.all()
    assert 50 <= len(every) <= 200
    assert every[0].start_ns == 0 and sum(window.count for window in every) == 50_000
    assert windows.length_ns in {10 * 2**k * S for k in range(12)}
    for window in every[:-1]:
        middle_s = window.start_ns / S + windows.length_ns / S / 2
        assert abs(window.middle - middle_s / 10_000) < 0.35, "4 standard errors"
        # Of normal scores 3.3; 2.7 on average from the first windows, which had 10 scores.
        assert 2.2 < window.high - window.low < 3.9


def test_a_full_window_keeps_a_fair_sample() -> None:
    windows = Windows()
    for score in range(20_000):
        windows.add(score, 5)
    (window,) = windows.all()
    assert window.count == 20_000
    assert window.middle == pytest.approx(10_000, abs=1500)  # 512 samples: standard error 440
    copy = windows.copy()
    windows.add(-1e9, 5)
    assert copy.all() == [window]


def test_quantile_agrees_with_numpy() -> None:
    values = sorted(np.random.default_rng(0).normal(0, 1, 37).tolist())
    for q in (0, 0.05, 0.5, 0.95, 1):
        assert quantile(values, q) == pytest.approx(np.quantile(values, q))
    assert quantile([2.0], 0.95) == 2.0


def test_recent_scores() -> None:
    windows = Windows()
    assert windows.recent is None
    for score in range(1000):
        windows.add(score, score * S)
    assert windows.recent == pytest.approx(tuple(np.quantile(np.arange(900, 1000), (0.05, 0.5, 0.95))))
