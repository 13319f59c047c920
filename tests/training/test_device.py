"""The precision that training chooses, and where it keeps it."""

from __future__ import annotations

import pytest
import torch

from edgead import machine
from edgead.training.device import compute_dtype, exact_convolutions
from edgead.training.distill import _dtype, _tuned_convolutions

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", torch.bfloat16),
        ("flags\t\t: fpu avx512f avx512_bf16 avx512_fp16", torch.float32),  # 1.4 times as slow in bf16
        ("flags\t\t: fpu avx2", torch.float32),
        ("Features\t: fp asimd bf16 i8mm", torch.bfloat16),
    ],
)
def test_precision_on_a_cpu(flags: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: f"processor\t: 0\n{flags}\n")
    assert compute_dtype(CPU) == dtype == _dtype(CPU, "auto")


@pytest.mark.parametrize(
    ("capability", "training", "distilling"),
    [
        ((7, 5), torch.float32, torch.float16),  # distillation scales its losses for it
        ((8, 0), torch.bfloat16, torch.bfloat16),
        ((9, 0), torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision_on_a_gpu(
    capability: tuple[int, int],
    training: torch.dtype,
    distilling: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (compute_dtype(GPU), _dtype(GPU, "auto")) == (training, distilling)


def test_cudnn_is_on_where_its_flags_are_set() -> None:
    """The default of `enabled` in `torch.backends.cudnn.flags` is False."""
    cudnn = torch.backends.cudnn
    with _tuned_convolutions(GPU):
        assert cudnn.enabled and cudnn.benchmark
    with exact_convolutions(GPU):
        assert cudnn.enabled and not cudnn.allow_tf32
    before = cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32
    with exact_convolutions(CPU), _tuned_convolutions(CPU):
        assert (cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32) == before
