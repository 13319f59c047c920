"""Is there an NVIDIA GPU, does its driver answer, and can this process reach it?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgead import jetson
from edgead.doctor.finding import NOTE, OK, PROBLEM, Finding, from_error
from edgead.doctor.probe import Answer

# Device nodes of the driver on a PC and on a Jetson.
_NODES = ("nvidia[0-9]*", "nvidiactl", "nvhost-gpu", "nvhost-ctrl-gpu", "nvgpu", "nvmap")
OLDEST_CAPABILITY = (7, 5)  # Turing
_RESTART = "restart the machine; if it stays so, install the NVIDIA driver again"
# Code of cuInit (CUresult in cuda.h) -> what it means, what to do.
_CODES: dict[int, tuple[str, str]] = {
    3: ("the driver is shutting down", _RESTART),
    34: (
        "libcuda.so.1 is the stub of the CUDA toolkit, which is only for linking",
        "remove the toolkit's folder stubs from LD_LIBRARY_PATH",
    ),
    100: ("the driver finds no GPU", ""),
    802: (
        "the GPUs of this server are not ready",
        "start the fabric manager of its driver version: sudo systemctl start nvidia-fabricmanager",
    ),
    803: (
        "the driver's library and the loaded kernel module are of different versions",
        "restart the machine, so that the kernel module of the installed driver is loaded",
    ),
    804: (
        "CUDA's forward compatibility package is in the way; it does not serve this GPU",
        "remove the package cuda-compat or its folder from LD_LIBRARY_PATH, or update the driver",
    ),
    999: (
        "the driver cannot start",
        "sudo modprobe nvidia_uvm (Jetson: restart it); if it stays so, restart the machine",
    ),
}


@dataclass(frozen=True)
class Hardware:
    """What the files of the system tell.

    Attributes:
        pci_gpus: NVIDIA display or compute devices on the PCI bus (a container sees those of its host).
        nodes: Device nodes of the NVIDIA driver.
        locked_nodes: Those among them that this user may not open.
        board: The Jetson, if it is one.
        is_container: This is a container.
        has_nouveau: The free driver nouveau holds the GPU.
    """

    pci_gpus: int
    nodes: tuple[str, ...]
    locked_nodes: tuple[str, ...]
    board: jetson.Board | None
    is_container: bool
    has_nouveau: bool

    @property
    def has_gpu(self) -> bool:
        """There is an NVIDIA GPU, whether this process can use it or not."""
        return bool(self.pci_gpus or self.board or self.nodes)


def look(root: Path) -> Hardware:
    """Reads the files below `root`."""
    nodes = sorted({path for pattern in _NODES for path in (root / "dev").glob(pattern)})
    return Hardware(
        pci_gpus=sum(map(_is_nvidia_gpu, (root / "sys/bus/pci/devices").glob("*"))),
        nodes=tuple(path.name for path in nodes),
        locked_nodes=tuple(path.name for path in nodes if not os.access(path, os.R_OK | os.W_OK)),
        board=jetson.read_board(root),
        is_container=is_container(root),
        has_nouveau="\nnouveau " in "\n" + text(root / "proc/modules"),
    )


def is_container(root: Path) -> bool:
    marks = (root / ".dockerenv", root / "run/.containerenv")
    if any(path.exists() for path in marks):
        return True
    return any(word in text(root / "proc/1/cgroup") for word in ("docker", "kubepods", "containerd"))


def check_board(board: jetson.Board | None) -> list[Finding]:
    """The release of a Jetson."""
    if board is None:
        return []
    release = f"JetPack {board.jetpack}" if board.jetpack else "JetPack of unknown version"
    found = f"{board.model or 'Jetson'}, {release} (L4T {board.l4t or 'unknown'})"
    if board.jetpack in (4, 5):
        return [
            Finding(
                "jetson",
                PROBLEM,
                f"{found}: its TensorRT 8 is too old, edgead needs 10.0 or newer",
                "flash JetPack 6 or newer (not possible on boards before Orin: use backend onnxruntime)",
            )
        ]
    return [Finding("jetson", OK if board.jetpack else NOTE, found)]


def check_driver(hardware: Hardware, answer: Answer) -> Finding:
    """The driver, or why there is none."""
    facts = answer.facts
    if not answer.error and not hardware.has_gpu and not facts["gpus"]:
        return Finding("gpu", NOTE, "no NVIDIA GPU: the CPU back ends are used")
    if answer.error:
        remedy = f"{_RESTART}. nvidia-smi shows whether the driver works at all"
        return from_error("driver", PROBLEM, f"the driver does not answer: {answer.error}", remedy)
    if not facts["library"]:
        return _no_library(hardware)
    if facts["code"] == 0 and facts["gpus"]:
        count = len(facts["gpus"])
        found = f"supports CUDA {facts['version']}, sees {count} GPU{'s' * (count > 1)}{_visible()}"
        return Finding("driver", OK, found)
    return _no_gpu(hardware, facts)


def _no_library(hardware: Hardware) -> Finding:
    if hardware.is_container:
        option = "--runtime nvidia" if hardware.board else "--gpus all"
        if hardware.nodes:
            found = "this container has the GPU's device nodes, not the driver's library libcuda.so.1"
            remedy = (
                f"start it with {option} and -e NVIDIA_DRIVER_CAPABILITIES=compute,utility; the host "
                "needs the NVIDIA container toolkit"
            )
        else:
            found = "the machine has an NVIDIA GPU, this container was started without it"
            remedy = f"start it with {option}; the host needs the NVIDIA container toolkit"
        return Finding("driver", PROBLEM, found, remedy)
    if hardware.board:
        found = "the driver's library libcuda.so.1 is missing or not found"
        remedy = "sudo apt install --reinstall nvidia-l4t-cuda; look at LD_LIBRARY_PATH as well"
    else:
        free = "; the free driver nouveau holds it, which has no CUDA" if hardware.has_nouveau else ""
        found = f"the machine has an NVIDIA GPU, its driver is not installed (no libcuda.so.1){free}"
        remedy = "install the NVIDIA driver, then restart"
    return Finding("driver", PROBLEM, found, remedy)


def _no_gpu(hardware: Hardware, facts: dict[str, Any]) -> Finding:
    code = facts["code"]
    name = facts.get("code_name", f"code {code}")
    meaning, remedy = _CODES.get(code, ("the driver cannot start", _RESTART))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if code in (0, 100) and hidden is not None:
        meaning = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU"
        remedy = "unset CUDA_VISIBLE_DEVICES, or name a GPU that exists: CUDA_VISIBLE_DEVICES=0"
    elif hardware.locked_nodes:
        group = "video" if hardware.board else "video or render"
        meaning = f"this user may not open /dev/{', /dev/'.join(hardware.locked_nodes)}"
        remedy = f"add the user to the group {group} (sudo usermod -aG video $USER) and log in again"
    elif code in (0, 100):
        meaning, remedy = "the driver finds no GPU", _RESTART
        if hardware.is_container:
            remedy = f"start it with {'--runtime nvidia' if hardware.board else '--gpus all'}"
    return Finding("driver", PROBLEM, f"{meaning} ({name}){_visible()}", remedy)


def _visible() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"


def check_gpu(number: int, gpu: dict[str, Any], state: dict[str, Any]) -> Finding:
    """Name and memory of a GPU, who shares it and whether it is usable as a whole."""
    parts = [gpu["name"], "compute capability {}.{}".format(*gpu["compute_capability"])]
    total, free = state.get("memory_total_mib") or gpu["memory_mib"], state.get("memory_free_mib")
    memory = f"{total / 1024:.1f} GiB"
    if free is not None:
        memory += f", {free / 1024:.1f} GiB free"
    if gpu["is_integrated"]:
        memory += " (shared with the processor)"
    parts.append(memory)
    if state.get("driver"):
        parts.append(f"driver {state['driver']}")
    if state.get("mig"):
        parts.append("MIG on")
    if state.get("processes"):
        parts.append(f"used by {state['processes']} other process{'es' * (state['processes'] > 1)}")
    found = ", ".join(parts)
    if tuple(gpu["compute_capability"]) < OLDEST_CAPABILITY:
        oldest = "{}.{}".format(*OLDEST_CAPABILITY)
        return Finding(
            f"gpu {number}", NOTE, found, f"edgead is made for {oldest} and newer; use a CPU back end"
        )
    if free is not None and free < 1024:
        remedy = "close other programs that use its memory; building an engine may need a gigabyte"
        return Finding(f"gpu {number}", NOTE, found, remedy)
    return Finding(f"gpu {number}", OK, found)


def _is_nvidia_gpu(device: Path) -> bool:
    """10de is NVIDIA's number; class 03 is a display controller (compute cards are 0302)."""
    vendor, kind = text(device / "vendor").strip(), text(device / "class").strip()
    return vendor == "0x10de" and kind.startswith("0x03")


def text(path: Path) -> str:
    """Content of a file; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
