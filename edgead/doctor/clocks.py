"""Clocks, power mode and throttling: what makes the same inference take 2 ms now and 5 ms later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgead import jetson
from edgead.doctor.finding import NOTE, OK, PROBLEM, Finding
from edgead.doctor.hardware import text

# Value of gpu_state.THROTTLE_REASONS -> state, what it means, what to do. The first active one wins.
_THROTTLED: dict[str, tuple[str, str, str]] = {
    **dict.fromkeys(
        ("thermal_hardware", "thermal_software"),
        (
            PROBLEM,
            "slowed down now because it is too hot",
            "look at fan, filter, air flow and the temperature in the cabinet",
        ),
    ),
    "power_brake": (
        PROBLEM,
        "slowed down now by a signal of the power supply",
        "look at the power supply, its cables and its load",
    ),
    "hardware_slowdown": (
        NOTE,
        "slowed down now by the hardware (heat or power supply; may also be a change of clock)",
        "run edgead doctor again under load; if it stays, look at cooling and power supply",
    ),
    "power_cap": (
        NOTE,
        "held at its power limit now",
        "if the cooling allows it raise the limit: sudo nvidia-smi -pl WATTS",
    ),
}
GOOD_CLOCK_SOURCES = ("tsc", "arch_sys_counter", "kvm-clock", "xen", "hyperv_clocksource_tsc_page")


def check_gpu(number: int, state: dict[str, Any]) -> Finding:
    """Clocks of a GPU that is not a Jetson's."""
    check = f"clocks {number}"
    if state.get("source") is None:
        remedy = "pip install nvidia-ml-py, or put nvidia-smi on PATH"
        return Finding(check, NOTE, "not available: neither NVML nor nvidia-smi answers", remedy)
    found = _figures(state)
    for reason, (level, meaning, remedy) in _THROTTLED.items():
        if reason in (state["throttle_reasons"] or ()):
            return Finding(check, level, f"{meaning}: {found}", remedy)
    if state["clocks_locked"]:
        return Finding(check, OK, found)
    highest = state["sm_clock_max_mhz"]
    mhz = f"MHZ, at most {highest}" if highest is not None else "MHZ"
    remedy = (
        "for steady latency keep the driver loaded (sudo nvidia-smi -pm 1) and hold the clock at what "
        f"the cooling bears (sudo nvidia-smi -lgc {mhz}; -rgc undoes it)"
    )
    return Finding(check, NOTE, f"not known to be locked: {found}", remedy)


def _figures(state: dict[str, Any]) -> str:
    parts = []
    for title, key in (("SM", "sm_clock"), ("memory", "memory_clock")):
        now, highest = state[f"{key}_mhz"], state[f"{key}_max_mhz"]
        if now is not None:
            parts.append(f"{title} {now}{f' of {highest}' if highest is not None else ''} MHz")
    if state["temperature_c"] is not None:
        parts.append(f"{state['temperature_c']:g} °C")
    if state["power_draw_w"] is not None:
        limit = state["power_limit_w"]
        parts.append(f"{state['power_draw_w']:.0f}{f' of {limit:.0f}' if limit else ''} W")
    if state["persistence"] is not None:
        parts.append(f"persistence {'on' if state['persistence'] else 'off'}")
    return ", ".join(parts) or "no figures"


def check_board(board: jetson.Board) -> list[Finding]:
    """Power mode and clocks of a Jetson."""
    return [_power_mode(board), _board_clocks(board)]


def _power_mode(board: jetson.Board) -> Finding:
    if board.power_mode is None:
        found = "unknown: /var/lib/nvpmodel/status cannot be read"
        return Finding("power mode", NOTE, found, "sudo nvpmodel -q shows it")
    others = {number: name for number, name in board.power_modes.items() if name.startswith("MAXN")}
    if board.power_mode.startswith("MAXN") or not others:
        return Finding("power mode", OK, board.power_mode)
    # Not the number 0: on the Orin Nano Super that is 15W.
    number, name = max(others.items(), key=lambda mode: len(mode[1]))
    remedy = f"if power supply and cooling allow it: sudo nvpmodel -m {number} ({name})"
    return Finding("power mode", NOTE, f"{board.power_mode} limits the clocks; {name} does not", remedy)


def _board_clocks(board: jetson.Board) -> Finding:
    if board.clock_mhz is None or board.clocks_locked is None:
        return Finding("clocks 0", NOTE, "not available: no clock of the GPU below /sys/class/devfreq")
    heat = f", {board.temperature_c:g} °C" if board.temperature_c is not None else ""
    if board.clocks_locked:
        return Finding("clocks 0", OK, f"GPU locked at {board.clock_mhz} MHz{heat}")
    found = (
        f"GPU {board.clock_mhz} MHz, moves between {board.clock_min_mhz} and {board.clock_max_mhz}{heat}"
    )
    remedy = "for steady latency: sudo jetson_clocks (after every start of the board and every nvpmodel)"
    return Finding("clocks 0", NOTE, found, remedy)


def check_cpu(root: Path) -> list[Finding]:
    """Governor and clock source of the processor; nothing where the system does not tell."""
    findings = []
    policies = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    governors = sorted({text(path).strip() for path in policies} - {""})
    if governors == ["performance"]:
        findings.append(Finding("cpu clock", OK, "governor performance"))
    elif governors:
        remedy = "for steady latency: sudo cpupower frequency-set -g performance (Jetson: jetson_clocks)"
        findings.append(Finding("cpu clock", NOTE, f"governor {', '.join(governors)}", remedy))
    source = text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource").strip()
    if source and source not in GOOD_CLOCK_SOURCES:
        found = f"{source}: reading the time is slow, measured latencies are too long"
        remedy = "sudo dmesg | grep -i clocksource shows why the kernel does not use the CPU's counter"
        findings.append(Finding("clock source", NOTE, found, remedy))
    return findings
