"""What a figure was measured on: processor, memory, system and library versions.

Nothing here names the machine: no host, user, address, path or serial number.
"""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from edgead.gpu_state import run_tool

# The first name that is installed counts: the same library is published under several.
LIBRARIES = {
    "edgead": ("edgead",),
    "numpy": ("numpy",),
    "opencv": (
        "opencv-python-headless",
        "opencv-python",
        "opencv-contrib-python-headless",
        "opencv-contrib-python",
    ),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "openvino": ("openvino",),
    "torch": ("torch",),
}
# As the kernel writes them, on x86 and on ARM: what decides the speed of float and 8-bit inference.
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
    "amx_int8",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def describe() -> dict[str, Any]:
    """Provenance of a measurement on this machine; reads files and package metadata, imports no library.

    Returns:
        cpu {model, arch, logical_cores, usable_cores, flags}, memory_mib, os, kernel, python,
        libraries {name: version or None}, load_average [1, 5, 15 minutes] or None, gpu [names]. What the
        system does not tell is None.
    """
    cpuinfo = _read("/proc/cpuinfo")
    return {
        "cpu": {
            "model": _cpu_model(cpuinfo),
            "arch": platform.machine(),
            "logical_cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "flags": _cpu_flags(cpuinfo),
        },
        "memory_mib": _memory_mib(),
        "os": _os_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libraries": {name: _version(packages) for name, packages in LIBRARIES.items()},
        "load_average": _load_average(),
        "gpu": _gpu_names(),
    }


def gains_by_bf16() -> bool | None:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX, ARM's BF16); None: it is not told.

    Without, bfloat16 is *slower* than float32: several times where it is emulated, and with the products
    of vectors of AVX-512 (avx512_bf16) on a Xeon whose AMX was hidden 1.6 times in OpenVINO (922 and
    585 ms for EfficientAD-S) and 1.4 times in a training step.
    """
    flags = _cpu_flags(_read("/proc/cpuinfo"))
    return bool({"amx_bf16", "bf16"} & set(flags)) if flags else None


def _cpu_model(cpuinfo: str) -> str | None:
    """The processor, or the board on ARM systems whose kernel names no processor."""
    board = _read("/proc/device-tree/model").strip("\0\n ")
    named = _field(cpuinfo, "model name") or _field(cpuinfo, "Model")
    return named or board or platform.processor() or None


def _cpu_flags(cpuinfo: str) -> list[str]:
    present = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features") or "").split())
    return [flag for flag in CPU_FLAGS if flag in present]


def _usable_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_mib() -> int | None:
    total = _field(_read("/proc/meminfo"), "MemTotal")
    return int(total.split()[0]) // 1024 if total else None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def _version(packages: tuple[str, ...]) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _load_average() -> list[float] | None:
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):  # Windows has none
        return None


def _gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs, from the driver's own tool; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = run_tool(command, timeout_s=10)
    except OSError:
        return []
    if done.returncode != 0:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _field(text: str, key: str) -> str | None:
    """Value of the first `key : value` line."""
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator and name.strip() == key and value.strip():
            return value.strip()
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
