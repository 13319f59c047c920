"""What state a GPU is in: clocks, power, temperature, throttling, memory, who else uses it.

Sources, in this order: NVML (the optional package nvidia-ml-py), the driver's tool nvidia-smi, and on a
Jetson the kernel's files. None of them needs a CUDA context, and none is required: what nobody tells is
None. Nothing here identifies the machine: no serial number, no UUID.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgead import jetson

TOOL_TIMEOUT_S = 10.0
FIELDS = (
    "source",
    "name",
    "driver",
    "compute_capability",
    "memory_total_mib",
    "memory_free_mib",
    "sm_clock_mhz",
    "sm_clock_max_mhz",
    "memory_clock_mhz",
    "memory_clock_max_mhz",
    "clocks_locked",
    "power_limit_w",
    "power_draw_w",
    "temperature_c",
    "throttle_reasons",
    "persistence",
    "ecc",
    "mig",
    "processes",
    "power_mode",
)
# Bits of NVML's clock event reasons (nvml.h); nvidia-smi prints the same number in hexadecimal.
THROTTLE_REASONS = {
    0x1: "gpu_idle",
    0x2: "clock_setting",
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "thermal_software",
    0x40: "thermal_hardware",
    0x80: "power_brake",
    0x100: "display_clock_setting",
}


@dataclass(frozen=True)
class Outcome:
    """What a program said. `returncode` is None if it did not end in time."""

    returncode: int | None
    stdout: str
    stderr: str


def read(ordinal: int = 0, *, root: Path = Path("/")) -> dict[str, Any]:
    """State of a GPU now, ready for JSON; never raises.

    Args:
        ordinal: Which GPU, in CUDA's order and after CUDA_VISIBLE_DEVICES. It is looked up by its PCI
            address, because NVML and nvidia-smi count otherwise.
        root: Where /proc, /sys and /etc are.

    Returns:
        `FIELDS` to value, None where unknown. source "nvml", "nvidia-smi" or "files"; name; driver, such
        as "580.159.03"; compute_capability, such as "8.9"; memory, clocks, power and temperature as
        numbers in the unit of the name; clocks_locked True if known to be locked; throttle_reasons the
        values of `THROTTLE_REASONS` that hold the clock down now (an idle GPU has "gpu_idle");
        persistence, ecc and mig bool; processes the number of processes that compute on this GPU;
        power_mode the nvpmodel mode of a Jetson.
    """
    state: dict[str, Any] = dict.fromkeys(FIELDS)
    places: list[str | int] = [ordinal] if (bus := _bus_id(ordinal)) is None else [bus, ordinal]
    state |= _from_nvml(places) or _from_smi(places) or {}
    reasons = state["throttle_reasons"]
    if reasons is not None and "clock_setting" in reasons:
        state["clocks_locked"] = True
    board = jetson.read_board(root) if ordinal == 0 else None
    if board is not None:
        _fill(state, board)
    return state


class EnergyMeter:
    """Energy that a GPU takes between `start` and `stop`, from NVML's counter (Volta and later).

    The counter moves in steps: measure for 60 s or more. `start` again begins anew.

    Args:
        ordinal: As for `read`.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._ordinal = ordinal
        self._begin: int | None = None

    def start(self) -> None:
        self._begin = _energy_mj(self._ordinal)

    def stop(self) -> float | None:
        """Joules since `start`, None where there is no counter."""
        end = _energy_mj(self._ordinal)
        if self._begin is None or end is None or end < self._begin:  # less: the driver was reloaded
            return None
        return (end - self._begin) / 1000


def run_tool(command: Sequence[str], timeout_s: float) -> Outcome:
    """Runs a program; raises OSError if it cannot start.

    A program that hangs inside the driver does not even die when it is killed. It is then left behind:
    waiting for it would hang the caller as well.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
        return Outcome(process.returncode, stdout, stderr)
    except subprocess.TimeoutExpired:
        _kill(process)
        return Outcome(None, "", "")
    except BaseException:
        _kill(process)
        raise


def _kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=1)
    except (OSError, subprocess.TimeoutExpired):
        pass


def _bus_id(ordinal: int) -> str | None:
    """PCI address of a GPU in CUDA's order, from the driver library; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), ordinal)
            or driver.cuDeviceGetPCIBusId(text, len(text), device)
        )
    except (OSError, AttributeError):
        return None
    return None if failed else text.value.decode() or None


@contextmanager
def _nvml() -> Iterator[Any]:
    """The initialised module pynvml, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the alias package pynvml tells to install nvidia-ml-py
            library = importlib.import_module("pynvml")
    except ImportError:
        yield None
        return
    try:
        library.nvmlInit()
    except (library.NVMLError, OSError):
        yield None
        return
    try:
        yield library
    finally:
        try:
            library.nvmlShutdown()
        except library.NVMLError:
            pass


def _nvml_handle(nvml: Any, places: Sequence[str | int]) -> Any:
    for place in places:
        try:
            if isinstance(place, str):
                return nvml.nvmlDeviceGetHandleByPciBusId(place.encode())
            return nvml.nvmlDeviceGetHandleByIndex(place)
        except nvml.NVMLError:
            continue
    return None


def _from_nvml(places: Sequence[str | int]) -> dict[str, Any] | None:
    with _nvml() as nvml:
        gpu = _nvml_handle(nvml, places) if nvml else None
        if gpu is None:
            return None

        def ask(name: str, *arguments: Any, of: Callable[[Any], Any] = lambda value: value) -> Any:
            try:
                return of(getattr(nvml, name)(*arguments))
            except (nvml.NVMLError, AttributeError):  # not for this GPU, driver or package
                return None

        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", gpu)
        if reasons is None:  # its name before CUDA 12.2
            reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", gpu)
        sm, memory = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
        return {
            "source": "nvml",
            "name": ask("nvmlDeviceGetName", gpu, of=_str),
            "driver": ask("nvmlSystemGetDriverVersion", of=_str),
            "compute_capability": ask(
                "nvmlDeviceGetCudaComputeCapability", gpu, of=lambda pair: "{}.{}".format(*pair)
            ),
            "memory_total_mib": ask("nvmlDeviceGetMemoryInfo", gpu, of=lambda m: m.total // 2**20),
            "memory_free_mib": ask("nvmlDeviceGetMemoryInfo", gpu, of=lambda m: m.free // 2**20),
            "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", gpu, sm),
            "sm_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", gpu, sm),
            "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", gpu, memory),
            "memory_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", gpu, memory),
            "power_limit_w": ask("nvmlDeviceGetEnforcedPowerLimit", gpu, of=_watts),
            "power_draw_w": ask("nvmlDeviceGetPowerUsage", gpu, of=_watts),
            "temperature_c": ask("nvmlDeviceGetTemperature", gpu, nvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": None if reasons is None else _reasons(reasons),
            "persistence": ask("nvmlDeviceGetPersistenceMode", gpu, of=bool),
            "ecc": ask("nvmlDeviceGetEccMode", gpu, of=lambda modes: bool(modes[0])),
            "mig": ask("nvmlDeviceGetMigMode", gpu, of=lambda modes: bool(modes[0])),
            "processes": ask("nvmlDeviceGetComputeRunningProcesses", gpu, of=len),
        }


def _energy_mj(ordinal: int) -> int | None:
    with _nvml() as nvml:
        bus = _bus_id(ordinal) if nvml else None
        gpu = _nvml_handle(nvml, [ordinal] if bus is None else [bus, ordinal]) if nvml else None
        if gpu is None:
            return None
        try:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))
        except (nvml.NVMLError, AttributeError):
            return None


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _is_on(text: str) -> bool:
    return {"enabled": True, "disabled": False}[text.lower()]


# Field of nvidia-smi -> ours and how to read it. The reasons go by two names: new drivers and old ones.
_SMI: dict[str, tuple[str, Callable[[str], Any]]] = {
    "name": ("name", str),
    "driver_version": ("driver", str),
    "compute_cap": ("compute_capability", str),
    "memory.total": ("memory_total_mib", _number),
    "memory.free": ("memory_free_mib", _number),
    "clocks.sm": ("sm_clock_mhz", _number),
    "clocks.max.sm": ("sm_clock_max_mhz", _number),
    "clocks.mem": ("memory_clock_mhz", _number),
    "clocks.max.mem": ("memory_clock_max_mhz", _number),
    "enforced.power.limit": ("power_limit_w", _number),
    "power.draw": ("power_draw_w", _number),
    "temperature.gpu": ("temperature_c", _number),
    "persistence_mode": ("persistence", _is_on),
    "ecc.mode.current": ("ecc", _is_on),
    "mig.mode.current": ("mig", _is_on),
    "clocks_event_reasons.active": ("throttle_reasons", lambda text: _reasons(int(text, 16))),
    "clocks_throttle_reasons.active": ("throttle_reasons", lambda text: _reasons(int(text, 16))),
}


def _from_smi(places: Sequence[str | int]) -> dict[str, Any] | None:
    tool = shutil.which("nvidia-smi")
    for place in places if tool else ():
        base = [str(tool), f"--id={place}", "--format=csv,noheader,nounits"]
        row = _smi_row(base)
        if row is None:
            continue
        state: dict[str, Any] = {"source": "nvidia-smi"}
        for field, text in row.items():
            name, convert = _SMI[field]
            try:
                state[name] = convert(text)
            except (ValueError, KeyError):  # "[N/A]", "[Not Supported]", "[Unknown Error]" ...
                pass
        if state.get("name", "[N/A]").startswith("["):
            continue
        try:
            listed = run_tool([*base, "--query-compute-apps=pid"], TOOL_TIMEOUT_S)
        except OSError:
            return state
        lines = listed.stdout.split()
        if listed.returncode == 0 and all(line.isdigit() for line in lines):
            state["processes"] = len(lines)
        return state
    return None


def _smi_row(base: Sequence[str]) -> dict[str, str] | None:
    """Field to text for one GPU. A field that this version of the tool lacks is left out."""
    fields = list(_SMI)
    while fields:
        try:
            answer = run_tool([*base, f"--query-gpu={','.join(fields)}"], TOOL_TIMEOUT_S)
        except OSError:
            return None
        refused = re.search(r'Field "([^"]+)" is not a valid field', answer.stdout + answer.stderr)
        if refused and refused[1] in fields:
            fields.remove(refused[1])
            continue
        cells = [cell.strip() for cell in answer.stdout.strip().split(",")]
        return dict(zip(fields, cells, strict=True)) if len(cells) == len(fields) else None
    return None


def _fill(state: dict[str, Any], board: jetson.Board) -> None:
    """Adds what only the files of a Jetson tell. Its GPU uses the memory of the processor."""
    from_files = {
        "source": "files",
        "name": board.model,
        "memory_total_mib": board.memory_total_mib,
        "memory_free_mib": board.memory_free_mib,
        "sm_clock_mhz": board.clock_mhz,
        "sm_clock_max_mhz": board.clock_max_mhz,
        "clocks_locked": board.clocks_locked,
        "temperature_c": board.temperature_c,
        "power_mode": board.power_mode,
    }
    state |= {key: value for key, value in from_files.items() if state[key] is None}


def _reasons(bits: int) -> list[str]:
    return [name for bit, name in THROTTLE_REASONS.items() if bits & bit]


def _watts(milliwatts: int) -> float:
    return milliwatts / 1000


def _str(text: str | bytes) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else text
