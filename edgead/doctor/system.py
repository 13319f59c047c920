"""Python, memory, swap, and the folder of the engines."""

from __future__ import annotations

import platform
import re
import shutil
import tempfile
from pathlib import Path

from edgead import __version__
from edgead.doctor.finding import NOTE, OK, PROBLEM, Finding
from edgead.doctor.hardware import is_container, text
from edgead.doctor.probe import Answer
from edgead.errors import EngineError

SMALL_MEMORY_MIB = 12 * 1024  # builds that were killed are reported from boards with 8 GB
LITTLE_SPACE_MIB = 1024
NO_SPACE_MIB = 100  # an engine of EfficientAD-S for TensorRT for RTX has 18 MB in FP16, 35 in FP32


def check_system(root: Path, answer: Answer) -> Finding:
    """`answer` is that of `edgead.machine.describe`."""
    arch = platform.machine()
    parts = [f"edgead {__version__}", f"Python {platform.python_version()}"]
    if answer.error:
        parts.append(f"{platform.system()} {platform.release()}, {arch}")
    else:
        cpu, cores = answer.facts["cpu"], answer.facts["cpu"]["usable_cores"]
        parts.append(f"{answer.facts['os']}, {arch}")
        parts.append(f"{cpu['model'] or 'processor unknown'}, {cores} core{'s' * (cores != 1)}")
    if is_container(root):
        parts.append("in a container")
    found = ", ".join(parts)
    if arch.lower() not in ("x86_64", "amd64", "aarch64", "arm64"):
        return Finding("system", NOTE, found, "edgead is made for x86-64 and 64-bit ARM")
    return Finding("system", OK, found)


def check_memory(root: Path, is_jetson: bool) -> Finding:
    """Memory and swap: a build that exhausts them is ended by the kernel, with the word Killed."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", text(root / "proc/meminfo"), re.M))
    total = int(sizes.get("MemTotal", 0)) // 1024
    if not total:
        return Finding("memory", NOTE, "unknown: /proc/meminfo cannot be read")
    swap = _disk_swap_mib(root)
    limit = text(root / "sys/fs/cgroup/memory.max").strip()
    allowed = min(total, int(limit) // 2**20) if limit.isdigit() else total
    found = f"{total / 1024:.1f} GiB, swap {swap / 1024:.1f} GiB"
    if allowed < total:
        found += f", this container may use {allowed / 1024:.1f} GiB"
    if is_jetson and allowed < SMALL_MEMORY_MIB and swap < 1024:
        remedy = (
            "before edgead build add swap on a disk: sudo fallocate -l 8G /swapfile && sudo chmod 600 "
            "/swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
        )
        return Finding("memory", NOTE, f"{found}: building an engine may be killed", remedy)
    return Finding("memory", OK, found)


def _disk_swap_mib(root: Path) -> int:
    """Swap that is not compressed memory (zram), which does not help a build that needs all memory."""
    rows = [line.split() for line in text(root / "proc/swaps").splitlines()[1:]]
    return sum(int(row[2]) for row in rows if len(row) > 2 and "zram" not in row[0]) // 1024


def check_cache() -> Finding:
    """Whether engines can be kept."""
    from edgead.engines.cache import default_folder, entries

    try:
        folder = default_folder()
    except EngineError as error:
        return Finding("engine cache", PROBLEM, str(error), "set EDGEAD_CACHE to a folder")
    name = show(folder)
    place = next(path for path in (folder, *folder.parents) if path.exists())
    elsewhere = "make it writable, or set EDGEAD_CACHE to a folder that is"
    try:
        tempfile.TemporaryFile(dir=place).close()
        free = shutil.disk_usage(place).free // 2**20
    except OSError as error:
        return Finding("engine cache", PROBLEM, f"{name}: {error.strerror}", elsewhere)
    count = len(entries(folder)) if place == folder else 0
    found = f"{name}: {count or 'no'} engine{'s' * (count != 1)}, {free / 1024:.1f} GiB free"
    if free < NO_SPACE_MIB:
        remedy = "make room, or set EDGEAD_CACHE to another disk: an engine may take 50 MB"
        return Finding("engine cache", PROBLEM, found, remedy)
    return Finding("engine cache", NOTE if free < LITTLE_SPACE_MIB else OK, found)


def show(path: Path) -> str:
    """A path without the name of the user."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)
