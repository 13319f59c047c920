"""Map scale and threshold; bounds are checked against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgead.calibration import (
    MapScale,
    binomial_upper_bound,
    choose_threshold,
    graph_constants,
    odd_images,
)
from edgead.errors import TrainingError


def test_low_quantile_maps_to_0_and_high_to_a_tenth() -> None:
    rng = np.random.default_rng(0)
    local, logical = MapScale.of(rng.random((5, 56, 56))), MapScale.of(7 * rng.random((5, 56, 56)))
    a, b, offset = graph_constants(local, logical).astype(np.float64)
    assert a * local.low + b * logical.low + offset == pytest.approx(0, abs=1e-6)
    assert a * local.high + b * logical.high + offset == pytest.approx(0.1, abs=1e-6)


def test_quantiles_interpolate_linearly() -> None:
    values = np.arange(1001.0).reshape(1, 7, 143)
    assert MapScale.of(values) == MapScale(900.0, 995.0)


def test_an_odd_image_among_few_has_no_part_in_the_scale() -> None:
    """As on cookies, where one good photo of four shows the edge of the tray: it took the scale of the
    student's map to ten times the usual one, and AU-PRO from 0.82 to 0.16."""
    rng = np.random.default_rng(0)
    usual, other = rng.random((3, 56, 56)), rng.random((4, 56, 56))
    odd = 10 * rng.random((1, 56, 56))
    maps = np.concatenate([usual[:2], odd, usual[2:]])
    assert odd_images(maps) == odd_images(other, maps) == [2]
    assert MapScale.of(maps) == MapScale.of(usual)
    assert odd_images(np.concatenate([usual, 0.4 * odd])) == [3]
    assert odd_images(np.concatenate([usual, 0.25 * odd])) == []


def test_where_each_map_finds_another_image_odd_none_is() -> None:
    """Of three images or five nothing would be left to choose a threshold from."""
    maps = np.ones((3, 3, 8, 8)) + np.random.default_rng(0).random((3, 3, 8, 8))
    for index in range(3):
        maps[index, index] *= 20
    assert odd_images(maps[0]) == [0] and odd_images(*maps) == []
    assert choose_threshold(np.array([0.1, 0.2, 0.3]), odd=odd_images(*maps)).value > 0.3


def test_where_most_images_give_zeros_none_is_odd() -> None:
    maps = np.zeros((4, 8, 8))
    maps[1] = 1
    assert odd_images(maps) == []
    assert MapScale.of(maps).high == 1


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_identical_good_images_give_a_finite_scale(value: float) -> None:
    scale = MapScale.of(np.full((3, 56, 56), value))
    constants = graph_constants(scale, scale)
    assert np.isfinite(constants).all() and (constants[:2] > 0).all()


@pytest.mark.parametrize("maps", [np.empty((0, 56, 56)), np.full((1, 2, 2), np.nan)])
def test_no_or_bad_maps_are_an_error(maps: np.ndarray) -> None:
    with pytest.raises(TrainingError, match="calibration maps"):
        MapScale.of(maps)


scores = st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=400).map(np.array)


@given(scores, st.sampled_from([0.001, 0.01, 0.05, 0.2]))
def test_no_more_good_images_are_rejected_than_asked_for(values: np.ndarray, rate: float) -> None:
    threshold = choose_threshold(values, false_reject=rate)
    rejected = int((values >= threshold.value).sum())
    assert rejected <= math.floor(len(values) * rate + 1e-9)
    assert np.float32(threshold.value) == threshold.value  # survives the float32 of graphs and files
    assert threshold.upper_bound == pytest.approx(binomial_upper_bound(rejected, len(values)), abs=1e-9)


def test_an_odd_image_does_not_raise_the_threshold_above_all_defects() -> None:
    usual = np.array([0.08, 0.09, 0.07])
    scores = np.append(usual, 2.3)
    threshold = choose_threshold(scores, odd=[3])
    assert threshold.value == choose_threshold(usual).value
    assert threshold.good_images == 4
    assert threshold.upper_bound == pytest.approx(binomial_upper_bound(1, 4))  # it is rejected
    assert threshold.basis.endswith("1 odd left out")


def test_with_enough_images_odd_ones_count_among_the_rejected() -> None:
    scores = np.append(np.arange(199.0), 5000.0)
    assert choose_threshold(scores, odd=[199]).value == choose_threshold(scores).value


def test_order_statistic_with_enough_images() -> None:
    values = np.arange(200.0)
    threshold = choose_threshold(values, false_reject=0.01)
    assert threshold.value == 197.5  # between the samples
    assert threshold.basis.startswith("order statistic: 2 of 200")


@pytest.mark.parametrize("values", [[0.2, 0.21, 0.5], [1.0] * 300, [1.0] * 290 + [2.0] * 10, [3.0]])
def test_threshold_keeps_clear_of_every_sample(values: list[float]) -> None:
    """A verdict must not hang on the last digit of a sum.

    That digit differs between torch and an exported graph.
    """
    scores = np.array(values)
    threshold = choose_threshold(scores, false_reject=0.05).value
    assert np.abs(scores - threshold).min() > 1e-3 * scores.mean()


def test_extrapolation_hits_the_rate_on_average_for_gumbel_scores() -> None:
    """Maxima follow a Gumbel law.

    Over 300 calibrations with 21 images the true rate is near the 1 % asked for.
    """
    rng = np.random.default_rng(1)
    values = [choose_threshold(rng.gumbel(3, 0.5, 21)).value for _ in range(300)]
    rates = [-math.expm1(-math.exp(-(value - 3) / 0.5)) for value in values]
    assert 0.004 < float(np.median(rates)) < 0.025


@pytest.mark.parametrize("events", [0, 1, 5])
@pytest.mark.parametrize("n", [6, 21, 300])
def test_upper_bound_is_clopper_pearson(events: int, n: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy, the oracle, is not installed")
    expected = stats.beta.ppf(0.95, events + 1, n - events)
    assert binomial_upper_bound(events, n, 0.95) == pytest.approx(expected)


def test_claim_says_what_the_images_support() -> None:
    few, many = choose_threshold(np.arange(21.0)), choose_threshold(np.arange(1000.0), false_reject=0.05)
    assert "at most 13.3% (95% confidence); asked for was 1.00%, which takes at least 299" in few.claim
    assert "takes at least" not in choose_threshold(np.arange(400.0), false_reject=0.2).claim
    assert many.upper_bound == pytest.approx(0.063, abs=0.002)


def test_one_image_leaves_room_above_its_score() -> None:
    assert choose_threshold(np.array([2.0])).value > 2.05


@pytest.mark.parametrize(
    ("values", "rate", "message"),
    [
        ([], 0.01, "got 0 scores"),
        ([1, math.inf], 0.01, "finite scores"),
        ([1, 2], 0.0, "out of range"),
        ([1], 0.7, "out of range"),
    ],
)
def test_bad_input(values: list[float], rate: float, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        choose_threshold(np.array(values), false_reject=rate)
