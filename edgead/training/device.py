"""Which device trains, in which precision."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext

import torch

from edgead.errors import TrainingError
from edgead.machine import gains_by_bf16


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" (CUDA when present, else CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        TrainingError: no such name, or a CUDA device was asked for and this torch sees none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TrainingError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "--device cuda: this torch sees no CUDA GPU. Check `nvidia-smi` and that torch is a CUDA"
            " build, or use --device cpu"
        )
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is quicker, else float32."""
    if device.type == "cuda":  # before Ampere a GPU only emulates it
        is_quicker = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        is_quicker = bool(gains_by_bf16())
    return torch.bfloat16 if is_quicker else torch.float32


def exact_convolutions(device: torch.device) -> AbstractContextManager[object]:
    """Inside, a GPU's float32 convolutions keep their precision; by default they are TF32."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> AbstractContextManager[object]:
    """Convolutions in `dtype` (default: `compute_dtype`), parameters and losses in float32."""
    dtype = dtype or compute_dtype(device)
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def keep_memory() -> None:
    """Let the C library keep freed tensors instead of returning them to the system.

    A training step on a CPU allocates and frees gigabytes of short-lived tensors; faulting their pages
    in again took a fifth of the step. Only glibc has the call; elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 << 20)
