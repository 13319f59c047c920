"""Metrics: worked examples, an explicit trapezoid over all thresholds, scikit-learn, and invariants."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead import metrics
from edgead.errors import DataError

# Examples A (no ties) and B (ties): a 4x4 mask of two components, areas 3 and 1. Values worked by hand
# from the definitions (per-region overlap against the rate over 12 background pixels), to 6 digits.
MASK = np.zeros((4, 4), dtype=bool)
MASK[[0, 0, 1, 3], [0, 1, 0, 3]] = True
MAP_A = np.array(
    [[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.3, 0.05], [0.0, 0.15, 0.95, 0.25], [0.12, 0.22, 0.35, 0.5]],
    dtype=np.float32,
)
MAP_B = np.array([[1, 1, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5]], dtype=np.float32)


@pytest.mark.parametrize(
    ("anomaly_map", "limit", "expected"),
    [
        (MAP_A, 0.30, 0.583333),
        (MAP_A, 0.10, 0.083333),
        (MAP_A, 0.05, 0.0),
        (MAP_A, 1.0, 0.875),
        (MAP_B, 0.30, 0.583333),
        (MAP_B, 0.10, 0.2),  # 0.194444 without the rule for tied blocks that straddle the limit
        (MAP_B, 0.05, 0.1),  # 0.055556 without it
        (MAP_B, 1.0, 0.875),
    ],
)
def test_au_pro_of_worked_examples(anomaly_map: np.ndarray, limit: float, expected: float) -> None:
    assert metrics.au_pro([anomaly_map], [MASK], limits=(limit,)) == pytest.approx((expected,), abs=1e-6)


@pytest.mark.parametrize("anomaly_map", [MAP_A, MAP_B])
def test_pixel_auroc_of_worked_examples(anomaly_map: np.ndarray) -> None:
    assert metrics.pixel_auroc([anomaly_map], [MASK]) == pytest.approx(0.895833, abs=1e-6)


def trapezoid_au_pro(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    """AU-PRO from an explicit curve through every distinct threshold, the definition written out."""
    regions, background = [], []
    for anomaly_map, mask in zip(maps, masks, strict=True):
        regions += [anomaly_map[region] for region in flood_fill_regions(mask)]
        background.append(anomaly_map[~mask])
    negatives = np.concatenate(background)
    fpr, pro = [], []
    values = sorted({float(v) for m in maps for v in m.ravel()}, reverse=True)
    for threshold in [np.inf, *values, -np.inf]:
        fpr.append(np.mean(negatives > threshold))
        pro.append(np.mean([np.mean(region > threshold) for region in regions]))
    inside = [i for i, rate in enumerate(fpr) if rate <= limit]
    # The curve is vertical where only defect pixels are passed: the last point at a rate is the highest.
    x, y = [fpr[i] for i in inside], [pro[i] for i in inside]
    if x[-1] < limit:
        after = inside[-1] + 1
        step = (limit - fpr[after - 1]) / (fpr[after] - fpr[after - 1])
        x.append(limit)
        y.append(pro[after - 1] + step * (pro[after] - pro[after - 1]))
    area = sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))
    return float(area / limit)


def flood_fill_regions(mask: np.ndarray) -> list[np.ndarray]:
    """8-connected components by a plain search, as boolean masks."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        region, front = np.zeros_like(mask), [left.pop()]
        while front:
            y, x = front.pop()
            region[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        regions.append(region)
    return regions


@st.composite
def pixel_sets(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One to three small quantised maps with masks; at least one defect and one background pixel."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 21, 256]))
    maps, masks = [], []
    for _ in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(2, 7)), draw(st.integers(2, 7)))
        maps.append((rng.integers(0, levels, shape) / levels).astype(np.float32))
        masks.append(rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.5])))
    masks[0][0, 0], masks[0][-1, -1] = True, False
    return maps, masks


LIMITS = st.sampled_from([0.01, 0.05, 0.1, 0.3, 1.0])


@settings(deadline=None)
@given(pixel_sets(), LIMITS)
def test_au_pro_is_the_trapezoid_over_all_thresholds(pixels: tuple[list, list], limit: float) -> None:
    maps, masks = pixels
    expected = trapezoid_au_pro(maps, masks, limit)
    assert metrics.au_pro(maps, masks, limits=(limit,))[0] == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(pixel_sets(), LIMITS)
def test_increasing_transforms_and_order_change_nothing(pixels: tuple[list, list], limit: float) -> None:
    maps, masks = pixels
    expected = metrics.au_pro(maps, masks, limits=(limit,))[0], metrics.pixel_auroc(maps, masks)
    warped = [np.exp(3 * m) - 7 for m in maps]
    assert metrics.au_pro(warped, masks, limits=(limit,))[0] == expected[0]
    assert metrics.pixel_auroc(warped, masks) == expected[1]
    turned = metrics.au_pro(maps[::-1], masks[::-1], limits=(limit,))[0]
    assert turned == pytest.approx(expected[0], abs=1e-12)
    assert metrics.pixel_auroc(maps[::-1], masks[::-1]) == pytest.approx(expected[1], abs=1e-12)


@settings(deadline=None)
@given(pixel_sets(), LIMITS)
def test_perfect_and_constant_maps(pixels: tuple[list, list], limit: float) -> None:
    _, masks = pixels
    perfect = [mask.astype(np.float32) for mask in masks]
    assert metrics.au_pro(perfect, masks, limits=(limit,))[0] == pytest.approx(1.0)
    assert metrics.pixel_auroc(perfect, masks) == 1.0
    constant = [np.full(mask.shape, 0.3, dtype=np.float32) for mask in masks]
    assert metrics.au_pro(constant, masks, limits=(limit,))[0] == pytest.approx(limit / 2)
    assert metrics.pixel_auroc(constant, masks) == pytest.approx(0.5)


def bounded(maps: list[np.ndarray], masks: list[np.ndarray], share: float) -> metrics.PixelScores:
    """Scores of which only the highest share of all pixels is kept."""
    keep_px = int(share * sum(mask.size for mask in masks)) + 2
    pixels = metrics.PixelScores(keep_px=keep_px)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        pixels.add(anomaly_map, mask)
    return pixels


@settings(deadline=None)
@given(pixel_sets(), st.sampled_from([0.01, 0.05, 0.1, 0.3]))
def test_a_bound_on_memory_changes_no_au_pro(pixels: tuple[list, list], limit: float) -> None:
    maps, masks = pixels
    few = bounded(maps, masks, limit)
    assert few.au_pro(limit) == pytest.approx(metrics.au_pro(maps, masks, limits=(limit,))[0], abs=1e-12)
    # Levels are further apart than the bins of the histogram: the same ties, the same figure.
    assert few.auroc() == pytest.approx(metrics.pixel_auroc(maps, masks), abs=1e-12)


def test_a_limit_beyond_what_was_kept_is_refused() -> None:
    rng = np.random.default_rng(3)
    maps, masks = [rng.random((40, 50), dtype=np.float32)], [np.zeros((40, 50), dtype=bool)]
    masks[0][3:6, 7:9] = True
    pixels = bounded(maps, masks, 0.1)
    assert pixels.au_pro(0.1) == metrics.au_pro(maps, masks, limits=(0.1,))[0]
    with pytest.raises(DataError, match="were kept, 598 are needed"):
        pixels.au_pro(0.3)


def test_auroc_of_a_histogram_is_near_the_exact_one() -> None:
    rng = np.random.default_rng(4)
    mask = rng.random((400, 500)) < 0.05
    anomaly_map = (0.2 + 0.1 * rng.normal(size=mask.shape) + 0.1 * mask).astype(np.float32)
    exact = metrics.pixel_auroc([anomaly_map], [mask])
    # In a bin of 2e-4 or less meet one in 1,000 pairs at most; which of the two is higher is chance.
    assert bounded([anomaly_map], [mask], 0.3).auroc() == pytest.approx(exact, abs=2e-6)


def recipe_au_pro(
    maps: list[np.ndarray], masks: list[np.ndarray], limit: float, thresholds: int
) -> float:
    """The published recipe, written out: FPR by rank, PRO by `>`, the point (1, 1), trapezoid to L."""
    regions = [
        anomaly_map[region]
        for anomaly_map, mask in zip(maps, masks, strict=True)
        for region in flood_fill_regions(mask)
    ]
    negatives = np.sort(np.concatenate([m[~mask] for m, mask in zip(maps, masks, strict=True)]))
    x, y = [1.0], [1.0]
    for rank in np.linspace(0, negatives.size - 1, thresholds, dtype=int):
        x.append(1 - (rank + 1) / negatives.size)
        y.append(float(np.mean([np.mean(region > negatives[rank]) for region in regions])))
    x, y = x[::-1], y[::-1]
    inside = [i for i, rate in enumerate(x) if rate <= limit]
    last, end = inside[-1], x[inside[-1]]
    xs, ys = x[: last + 1], y[: last + 1]
    if end < limit:
        slope = (y[last + 1] - y[last]) / (x[last + 1] - x[last])
        xs, ys = [*xs, limit], [*ys, y[last] + (limit - end) * slope]
    return sum((xs[i + 1] - xs[i]) * (ys[i + 1] + ys[i]) / 2 for i in range(len(xs) - 1)) / limit


@settings(deadline=None)
@given(pixel_sets(), st.sampled_from([0.01, 0.05, 0.1, 0.3]), st.sampled_from([2, 3, 10, 99]))
def test_thresholds_follow_the_published_recipe(
    pixels: tuple[list, list], limit: float, thresholds: int
) -> None:
    maps, masks = pixels
    few = bounded(maps, masks, min(1.0, limit + 1 / (thresholds - 1)))
    values = few.region_au_pro((limit,), thresholds=thresholds)
    expected = recipe_au_pro(maps, masks, limit, thresholds)
    assert values.mean() == pytest.approx(expected, abs=1e-9)


def test_regions_know_their_image_place_and_peak() -> None:
    pixels = metrics.PixelScores()
    pixels.add(np.zeros((4, 4)), np.zeros((4, 4), dtype=bool))
    pixels.add(MAP_A, MASK)
    first, second = pixels.list_regions()
    assert (first.image, first.area_px, first.box_px) == (1, 3, (0, 0, 2, 2))
    assert (second.image, second.area_px, second.box_px) == (1, 1, (3, 3, 1, 1))
    assert (first.peak, second.peak) == pytest.approx((0.9, 0.5))
    assert pixels.background_px == 16 + 12
    alone = metrics.PixelScores()
    alone.add(MAP_A, MASK)
    values = alone.region_au_pro((0.3, 0.1))
    assert values.shape == (2, 2)
    # By hand: the small one counts from 2 of 12 background pixels on; the mean of the two is 0.583333.
    assert values[:, 0] == pytest.approx((0.722222, 0.444444), abs=1e-6)


@settings(deadline=None)
@given(pixel_sets())
def test_au_pro_at_1_of_a_single_region_is_its_pixel_auroc(pixels: tuple[list, list]) -> None:
    maps, masks = pixels
    single = [np.zeros_like(mask) for mask in masks]
    single[0][0, 0] = single[0][0, 1] = True
    expected = metrics.pixel_auroc(maps, single)
    assert metrics.au_pro(maps, single, limits=(1.0,))[0] == pytest.approx(expected)


def test_a_low_good_image_only_adds_background() -> None:
    # Example A with 12 more background pixels below every defect: all rates halve, so a limit of 0.05
    # cuts where 0.10 did.
    low = np.full((3, 4), -1.0, dtype=np.float32)
    masks = [MASK, np.zeros((3, 4), dtype=bool)]
    values = metrics.au_pro([MAP_A, low], masks, limits=(0.15, 0.05, 0.025))
    assert values == pytest.approx((0.583333, 0.083333, 0.0), abs=1e-6)


def test_figures_stay_right_when_images_are_added_after_reading_them() -> None:
    pixels = metrics.PixelScores()
    pixels.add(MAP_A, MASK)
    assert pixels.au_pro(0.3) == pytest.approx(0.583333, abs=1e-6)
    pixels.add(MAP_B, MASK)
    assert pixels.regions == 4
    assert pixels.au_pro(0.3) == pytest.approx(trapezoid_au_pro([MAP_A, MAP_B], [MASK, MASK], 0.3))


def test_regions_are_8_connected_and_split_per_image() -> None:
    diagonal = np.eye(4, dtype=bool)
    pixels = metrics.PixelScores()
    for _ in range(2):
        pixels.add(np.zeros((4, 4)), diagonal)
    assert pixels.regions == 2


@pytest.mark.parametrize(("name", "expected"), [("mvtec_bottle", 68), ("cookies", 38)])
def test_component_counts_of_the_shared_data(shared: Path, name: str, expected: int) -> None:
    # Counted with scipy.ndimage.label and a 3x3 structure of ones; 4-connectivity gives 70 and 41.
    import cv2

    pixels = metrics.PixelScores()
    for path in sorted((shared / "data" / name / "ground_truth").rglob("*.png")):
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127
        pixels.add(np.zeros(mask.shape, dtype=np.float32), mask)
    assert pixels.regions == expected


SCORED = st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 1)), min_size=2, max_size=40).filter(
    lambda rows: {label for _, label in rows} == {0, 1}
)


@settings(deadline=None)
@given(SCORED)
def test_image_auroc_counts_pairs(rows: list[tuple[int, int]]) -> None:
    scores, labels = zip(*rows, strict=True)
    pairs = [(s > g) + 0.5 * (s == g) for s, y in rows if y == 1 for g, x in rows if x == 0]
    assert metrics.image_auroc(scores, labels) == pytest.approx(np.mean(pairs), abs=1e-12)


@settings(deadline=None, max_examples=25)  # scikit-learn takes milliseconds per call
@given(SCORED)
def test_image_figures_agree_with_scikit_learn(rows: list[tuple[int, int]]) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    expected_auroc = sklearn_metrics.roc_auc_score(labels, scores)
    assert metrics.image_auroc(scores, labels) == pytest.approx(expected_auroc)

    f1, threshold = metrics.f1_max(scores, labels)
    all_f1 = {t: sklearn_metrics.f1_score(labels, scores >= t) for t in np.unique(scores)}
    assert f1 == pytest.approx(max(all_f1.values()))
    assert threshold == max(t for t, value in all_f1.items() if value == pytest.approx(f1))

    false_rejects, detections, thresholds = metrics.roc_curve(scores, labels)
    expected = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip((false_rejects, detections, thresholds), expected, strict=True):
        np.testing.assert_allclose(ours, theirs)
    for t, false_reject, detection in zip(thresholds, false_rejects, detections, strict=True):
        assert metrics.false_reject_rate(scores, labels, t) == pytest.approx(false_reject)
        assert metrics.missed_defect_rate(scores, labels, t) == pytest.approx(1 - detection)


def test_pixel_auroc_agrees_with_scikit_learn() -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    maps = [rng.integers(0, 50, (40, 30)).astype(np.float32) for _ in range(3)]
    masks = [rng.random((40, 30)) < share for share in (0.0, 0.1, 0.4)]
    expected = sklearn_metrics.roc_auc_score(np.ravel(masks), np.ravel(maps))
    assert metrics.pixel_auroc(maps, masks) == pytest.approx(expected, abs=1e-12)


def test_a_score_at_the_threshold_is_a_reject() -> None:
    scores, labels = [0.2, 0.5, 0.5, 0.9], [0, 0, 1, 1]
    assert metrics.false_reject_rate(scores, labels, 0.5) == 0.5
    assert metrics.missed_defect_rate(scores, labels, 0.5) == 0.0
    assert metrics.missed_defect_rate(scores, labels, 0.51) == 0.5


def test_an_absent_class_is_nan_and_explained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="edgead.metrics"):
        assert np.isnan(metrics.image_auroc([1.0, 2.0], [0, 0]))
        assert np.isnan(metrics.f1_max([1.0, 2.0], [0, 0])).all()
        assert np.isnan(metrics.missed_defect_rate([1.0], [0], 0.5))
        assert np.isnan(metrics.false_reject_rate([1.0], [1], 0.5))
        assert np.isnan(metrics.pixel_auroc([MAP_A], [np.zeros_like(MASK)]))
        assert np.isnan(metrics.au_pro([MAP_A], [np.ones_like(MASK)])).all()
    assert "no defect image" in caplog.messages[0]
    assert "no good image" in caplog.messages[3]
    assert "no defect pixel" in caplog.messages[4]
    assert "no background pixel" in caplog.messages[5]
    assert np.isnan(metrics.roc_curve([1.0, 2.0], [1, 1])[0]).all()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, np.nan], [0, 1], "1 of 2 scores are not finite"),
        ([1.0, np.inf], [0, 1], "not finite"),
        ([1.0, 2.0], [0, 2], r"labels hold \[2\]"),
        ([1.0, 2.0], [0], r"shape \(2,\) and labels \(1,\)"),
        ([[1.0, 2.0]], [[0, 1]], "expected"),
    ],
)
def test_wrong_image_scores_are_refused(scores: list, labels: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.image_auroc(scores, labels)


@pytest.mark.parametrize(
    ("anomaly_map", "mask", "message"),
    [
        (np.where(MASK, np.nan, MAP_A), MASK, "4 values that are not finite"),
        (MAP_A[:2], MASK, "never resize the mask"),
        (MAP_A, MASK.astype(np.uint8) * 255, "expected bool"),
        (MAP_A[None], MASK[None], "expected"),
    ],
)
def test_wrong_maps_are_refused(anomaly_map: np.ndarray, mask: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.PixelScores().add(anomaly_map, mask)


def test_wrong_limits_and_thresholds_are_refused() -> None:
    for limit in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="AU-PRO limit"):
            metrics.au_pro([MAP_A], [MASK], limits=(limit,))
    with pytest.raises(DataError, match="threshold is NaN"):
        metrics.false_reject_rate([1.0], [0], float("nan"))
    with pytest.raises(ValueError, match="shorter"):
        metrics.pixel_auroc([MAP_A, MAP_A], [MASK])


def test_importing_metrics_loads_no_opencv() -> None:
    code = "import sys, edgead.metrics; sys.exit(int('cv2' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
