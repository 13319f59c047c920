"""Operations of reduced graphs, counted by hand; the times are nothing to test."""

from __future__ import annotations

import pytest
import torch

from edgead.benchmarks.reduced import gflop
from edgead.models.pdn import PDN
from edgead.training.efficientad import build_model


@pytest.mark.parametrize(("k", "expected"), [(384, 75.89), (64, 50.07)])
def test_operations(k: int, expected: float) -> None:
    """A target channel costs 56^2 * (512 * 16 + 256 * 16 + 64 * 9) multiplications and additions.

    Source of 75.89: table 2.3 of the specification, twice 37.95 GMAC; 320 channels fewer are 25.82 less.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(PDN("s").eval(), seed=0, targets=k).eval()
    saved = 2 * 56**2 * (512 * 16 + 256 * 16 + 64 * 9) * (384 - k) / 1e9
    assert gflop(model) == pytest.approx(75.89 - saved, abs=0.02)
    assert gflop(model) == pytest.approx(expected, abs=0.02)
