"""The result type: its checks, and that results can be compared, shown and sent to another process."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

from edgead import DataError, Result

MAP = np.arange(6, dtype=np.float32).reshape(2, 3)
GOOD = {"score": 5.0, "is_anomalous": True, "threshold": 5.0, "anomaly_map": MAP, "elapsed_ms": 1.5}


def test_a_score_at_the_threshold_is_anomalous() -> None:
    assert Result(**GOOD).is_anomalous
    with pytest.raises(DataError, match="score >= threshold"):
        Result(**{**GOOD, "is_anomalous": False})
    with pytest.raises(DataError, match="score >= threshold"):
        Result(**{**GOOD, "score": 4.9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": float("nan"), "is_anomalous": False}, "finite"),
        ({"score": float("inf")}, "finite"),
        ({"threshold": float("nan"), "is_anomalous": False}, "finite"),
        ({"anomaly_map": MAP.astype(np.float64)}, "float64 of shape"),
        ({"anomaly_map": MAP[None]}, "expected float32"),
        ({"anomaly_map": MAP.tolist()}, "list, expected a numpy array"),
        ({"elapsed_ms": -1.0}, "elapsed_ms"),
        ({"elapsed_ms": float("nan")}, "elapsed_ms"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Result(**{**GOOD, **change})


def test_it_is_frozen_comparable_short_and_copyable() -> None:
    result = Result(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.score = 0.0  # type: ignore[misc]
    assert (result == Result(**GOOD)) is False and len(
        {result, result}
    ) == 1  # no element-wise comparison
    assert "anomaly_map" not in repr(result) and "score=5.0" in repr(result)
    copied = copy.deepcopy(result)
    assert (
        copied.score == 5.0 and np.array_equal(copied.anomaly_map, MAP) and copied.anomaly_map is not MAP
    )


def test_map_at_enlarges_with_half_pixel_centres() -> None:
    # By hand: rows 0 and 3 lie at -0.25 (clamped) and 1.25 (clamped), rows 1 and 2 at 0.25 and 0.75.
    result = Result(**{**GOOD, "anomaly_map": np.array([[0.0], [4.0]], np.float32)})
    assert result.map_at(4, 1).tolist() == [[0.0], [1.0], [3.0], [4.0]]
    assert result.map_at(8, 6).shape == (8, 6) and result.map_at(8, 6).dtype == np.float32
