"""Exact folds of the merged graphs: everything is computed in float64 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalise(images: Tensor) -> Tensor:
    """ImageNet normalisation: uint8 or float RGB 0..255 [..., 3, H, W] -> float of the same shape."""
    device = images.device
    return (images.float() / 255 - IMAGENET_MEAN.to(device)) / IMAGENET_STD.to(device)


def input_scale() -> Tensor:
    """1 / (255 std), float64 [1, 3, 1, 1]: times the weights of a first convolution."""
    return 1 / (255 * IMAGENET_STD.double().view(1, 3, 1, 1))


def bias_of(conv: nn.Conv2d) -> Tensor:
    """Bias float64; zeros if there is none."""
    if conv.bias is None:
        return torch.zeros(conv.out_channels, dtype=torch.float64)
    return conv.bias.double()


def parameters_of(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64."""
    return conv.weight.double(), bias_of(conv)


def fill(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Set parameters that were computed in float64."""
    assert conv.bias is not None and conv.weight.shape == weight.shape
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)


def rotated(weight: Tensor, bias: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters of a convolution whose C outputs are multiplied with a matrix [C, K]; float64."""
    return torch.einsum("cikl,cr->rikl", weight, rotation), rotation.T @ bias


def side_by_side(a: nn.Conv2d, b: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Parameters of the one convolution that gives the outputs of both of the same input."""
    return torch.cat([a.weight, b.weight]).double(), torch.cat([bias_of(a), bias_of(b)])


def grouped(a: nn.Module, b: nn.Module) -> nn.Module:
    """Two equal convolutions, or two equal rows of them, as the two groups of one."""
    if isinstance(a, nn.Sequential):
        assert isinstance(b, nn.Sequential)
        return nn.Sequential(*map(grouped, a, b))
    assert isinstance(a, nn.Conv2d) and isinstance(b, nn.Conv2d)
    conv = nn.Conv2d(
        2 * a.in_channels, 2 * a.out_channels, a.kernel_size, a.stride, a.padding, groups=2 * a.groups
    )
    fill(conv, *side_by_side(a, b))
    return conv


def copy_of(a: nn.Conv2d) -> nn.Conv2d:
    """The same convolution, with a bias in any case."""
    conv = nn.Conv2d(a.in_channels, a.out_channels, a.kernel_size, a.stride, a.padding, groups=a.groups)
    fill(conv, *parameters_of(a))
    return conv


def set_precision(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring convolutions to `dtype` and freeze everything; buffers and other layers stay FP32."""
    module.eval().requires_grad_(False)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(dtype)
