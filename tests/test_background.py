"""Background scores: the highest are known exactly, however many tie and in whatever order they come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.background import Background, Histogram
from edgead.errors import DataError

SCORES = st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.25, 1.0, 1.5, 3.0]), min_size=1, max_size=60)


def filled(scores: np.ndarray, keep: int | None, part: int) -> Background:
    background = Background(keep)
    for start in range(0, scores.size, part):
        background.add(scores[start : start + part])
    return background


@settings(deadline=None)
@given(SCORES, st.integers(1, 60), st.integers(1, 20))
def test_the_highest_are_exact_and_ties_at_the_cut_are_whole(
    values: list[float], keep: int, part: int
) -> None:
    scores = np.array(values, dtype=np.float32)
    background = filled(scores, keep, part)
    descending = np.sort(scores)[::-1]
    known = min(keep, scores.size)
    assert background.count == scores.size
    np.testing.assert_array_equal(background.highest(np.arange(known)), descending[:known])
    asked = np.unique(scores)
    above, at_least = background.shares(asked)
    for score, a, b in zip(asked, above, at_least, strict=True):
        if score >= descending[known - 1]:
            assert (a, b) == (np.mean(scores > score), np.mean(scores >= score))
        else:  # exact, or beyond all that is kept
            assert a in (1.0, np.mean(scores > score)) and a >= known / scores.size


def test_more_than_was_kept_is_refused() -> None:
    background = filled(np.arange(100, dtype=np.float32), 10, 7)
    background.require(10)
    assert background.highest(np.array([0, 9])).tolist() == [99, 90]
    with pytest.raises(DataError, match="highest of 100 background scores were kept, 90 are needed"):
        background.require(90)
    with pytest.raises(DataError, match="there were more pixels than expected"):
        background.highest(np.array([80]))


def test_nothing_is_dropped_without_a_bound() -> None:
    scores = np.random.default_rng(0).random(5000, dtype=np.float32)
    background = filled(scores, None, 130)
    background.require(5000)
    np.testing.assert_array_equal(background.highest(np.arange(5000)), np.sort(scores)[::-1])


def test_many_ties_take_no_room() -> None:
    background = filled(np.full(100_000, 0.5, dtype=np.float32), 30, 1000)
    assert background._used == 0 and background._stored.size < 40
    assert [share.item() for share in background.shares(np.float32([0.5]))] == [0.0, 1.0]


def test_histogram_keeps_the_order_of_float32() -> None:
    """Numbers that differ by more than 1/2048 are told apart, whatever sign and size they have."""
    values = np.float32([-1e30, -7.0, -6.99, -1e-3, -1e-40, 0.0, 1e-30, 0.1, 0.1001, 1.0, 3e38])
    for index in range(1, values.size):
        histogram = Histogram()
        histogram.add(values[:index], is_defect=False)
        histogram.add(values[index:], is_defect=True)
        assert histogram.auroc() == pytest.approx(1.0, abs=1e-12)


def test_histogram_counts_zeros_of_either_sign_as_ties() -> None:
    histogram = Histogram()
    histogram.add(np.float32([0.0]), is_defect=False)
    histogram.add(np.float32([-0.0]), is_defect=True)
    assert histogram.auroc() == 0.5
