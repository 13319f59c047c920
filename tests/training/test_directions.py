"""Principal directions against NumPy's singular value decomposition of the same vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from edgead.errors import TrainingError
from edgead.training.directions import SecondMoment, principal_directions

SCALES = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """[8, 6, 7, 7]: six rotated sources of distinct energy, with a shift, so not centred."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    rows = rng.normal(size=(8 * 49, 6)) * SCALES @ rotation.T + 0.3
    return torch.from_numpy(rows.reshape(8, 7, 7, 6)).permute(0, 3, 1, 2)


def test_directions_are_the_right_singular_vectors(features: torch.Tensor) -> None:
    def batches() -> Iterator[torch.Tensor]:  # of unequal size
        yield from (features[:1], features[1:6], features[6:])

    directions, energy = principal_directions(batches())
    rows = features.movedim(1, -1).reshape(-1, 6).numpy()
    _, values, expected = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(energy, values**2 / (values**2).sum(), rtol=1e-5)  # float32 results
    np.testing.assert_allclose(np.abs(directions.numpy().T @ expected.T), np.eye(6), atol=1e-5)
    np.testing.assert_allclose(directions.T @ directions, np.eye(6), atol=1e-6)
    assert directions.dtype == energy.dtype == torch.float32
    assert float(energy.sum()) == pytest.approx(1, abs=1e-6)


def test_signs_are_fixed(features: torch.Tensor) -> None:
    directions, _ = principal_directions([features])
    mirrored, _ = principal_directions([-features])  # the same second moment
    assert torch.equal(directions, mirrored)
    assert (directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all()


def test_sums_are_float64() -> None:
    """In float32 a small direction beside a 10,000 times larger one drowns."""
    rows = torch.zeros(1, 2, 100, 100)
    rows[:, 0], rows[:, 1, ::2], rows[:, 1, 1::2] = 1e4, 1.0, -1.0
    _, energy = principal_directions([rows])
    assert float(energy[1]) == pytest.approx(1e-8, rel=1e-3)


def test_nothing_and_nan_are_errors() -> None:
    with pytest.raises(TrainingError, match="of 0 feature vectors"):
        principal_directions([])
    moment = SecondMoment(3)
    moment.add(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(TrainingError, match="of 4 feature vectors: .* NaN"):
        moment.mean()
