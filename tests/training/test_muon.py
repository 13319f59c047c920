from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.training.muon import Muon, orthogonalised


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_orthogonalised_keeps_directions_and_evens_their_strengths(
    rows: int, columns: int, seed: int
) -> None:
    """0.7 to 1.2 for singular values that are not tiny, by the published coefficients; bf16 adds 0.1."""
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=g))
    v, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=g))
    strengths = torch.rand(min(rows, columns), generator=g) * 0.9 + 0.1
    result = orthogonalised(u @ torch.diag(strengths) @ v.T).float()
    in_basis = u.T @ result @ v
    assert result.shape == (rows, columns)
    assert ((in_basis.diagonal() > 0.55) & (in_basis.diagonal() < 1.35)).all()
    assert float((in_basis - torch.diag(in_basis.diagonal())).abs().max()) < 0.15


def test_a_zero_gradient_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 3, 2, 2))
    optimizer = Muon([weight], 0.02)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.ones(4, 3, 2, 2))


def test_a_step_has_the_length_of_the_rate() -> None:
    """In the spectral norm; tall matrices by the root of rows over columns longer."""
    for shape, factor in (((8, 2, 4, 4), 1.0), ((32, 2, 2, 1), (32 / 4) ** 0.5)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        optimizer = Muon([weight], 0.5)
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        norm = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
        assert float(norm) == pytest.approx(0.5 * factor, rel=0.3)


def test_vectors_take_the_step_of_adam() -> None:
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    muon = Muon([ours], 0.02, vector_lr=0.5)
    adam = torch.optim.Adam([theirs], 0.01, betas=(0.9, 0.95), eps=1e-10)
    for step in range(5):
        for parameter in (ours, theirs):
            parameter.grad = (parameter.detach() + step).clone()
        muon.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_decay_is_decoupled_and_of_matrices_only() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Muon([matrix, vector], 0.1, weight_decay=0.5)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(vector.detach(), torch.ones(2))


def test_state_survives_saving() -> None:
    def run(parameter: torch.nn.Parameter, optimizer: Muon, steps: range) -> None:
        for step in steps:
            g = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, generator=g)
            optimizer.step()

    whole = torch.nn.Parameter(torch.zeros(6, 4))
    run(whole, Muon([whole], 0.02), range(6))
    half = torch.nn.Parameter(torch.zeros(6, 4))
    first = Muon([half], 0.02)
    run(half, first, range(3))
    second = Muon([half], 0.3)
    second.load_state_dict(first.state_dict())
    run(half, second, range(3, 6))
    assert torch.equal(whole, half)
