"""Muon: momentum whose direction is made orthogonal, for convolutions and matrices.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon). Written from that description. A kernel is the matrix
[out, in * height * width]; biases and other vectors take Adam's step (Kingma and Ba, arXiv 1412.6980).
On a short run it learns several times as much per image as Adam: docs/teachers.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from edgead.training.device import compute_dtype

# Newton-Schulz iteration of the published method: brings all singular values near to 1, quickly rather
# than exactly (0.7 to 1.2 after five rounds).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Muon for parameters with two or more axes, Adam for the others.

    Args:
        lr: Size of a step of a matrix in its spectral norm; 0.02 suits most networks.
        vector_lr: Adam's learning rate, as a multiple of `lr`.
        momentum: Of matrices, in Nesterov's form.
        betas: Of vectors.
        weight_decay: Decoupled, of matrices only.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        vector_lr: float = 0.05,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        options = {
            "lr": lr,
            "vector_lr": vector_lr,
            "momentum": momentum,
            "betas": betas,
            "weight_decay": weight_decay,
        }
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step with the gradients at hand."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    take = _matrix_step if parameter.ndim > 1 else _vector_step
                    take(parameter, parameter.grad, self.state[parameter], group)


def _matrix_step(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
    momentum.lerp_(gradient, 1 - group["momentum"])
    update = gradient.lerp(momentum, group["momentum"]).reshape(len(parameter), -1)
    rows, columns = update.shape
    direction = orthogonalised(update) * max(1.0, rows / columns) ** 0.5
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.sub_(direction.reshape(parameter.shape).to(parameter.dtype), alpha=group["lr"])


def _vector_step(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    first = state.setdefault("first", torch.zeros_like(parameter))
    second = state.setdefault("second", torch.zeros_like(parameter))
    state["steps"] = steps = state.get("steps", 0) + 1
    beta1, beta2 = group["betas"]
    first.lerp_(gradient, 1 - beta1)
    second.lerp_(gradient.square(), 1 - beta2)
    scale = (second / (1 - beta2**steps)).sqrt_().add_(1e-10)
    parameter.addcdiv_(first, scale, value=-group["lr"] * group["vector_lr"] / (1 - beta1**steps))


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of the matrix U S V^T, in this device's quickest precision."""
    a, b, c = _COEFFICIENTS
    x = matrix.to(compute_dtype(matrix.device))
    if is_tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x
