"""What the files of an NVIDIA Jetson tell: release, power mode, clock and temperature of its GPU.

Plain files that need no root and no tool of NVIDIA's; on JetPack 6 nvidia-smi knows hardly more than the
name of the GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

JETPACK = {32: 4, 35: 5, 36: 6, 38: 7, 39: 7}  # major release of Jetson Linux (L4T) -> JetPack


@dataclass(frozen=True)
class Board:
    """A Jetson; None is unknown.

    Attributes:
        model: Of the board, from the device tree.
        l4t: Release of Jetson Linux, such as "36.4.3".
        power_mode: Active nvpmodel mode, such as "MAXN_SUPER".
        power_modes: Number to name of all modes that the board offers.
        clock_min_mhz, clock_mhz, clock_max_mhz: Of the GPU. The limits are those of the power mode; they
            are equal after `jetson_clocks`.
        temperature_c: Of the GPU.
        memory_total_mib, memory_free_mib: Of the board; GPU and processor share it.
    """

    model: str | None
    l4t: str | None
    power_mode: str | None
    power_modes: dict[int, str]
    clock_min_mhz: int | None
    clock_mhz: int | None
    clock_max_mhz: int | None
    temperature_c: float | None
    memory_total_mib: int | None
    memory_free_mib: int | None

    @property
    def jetpack(self) -> int | None:
        """Major version of JetPack."""
        return JETPACK.get(int(self.l4t.split(".")[0])) if self.l4t else None

    @property
    def clocks_locked(self) -> bool | None:
        if self.clock_min_mhz is None or self.clock_max_mhz is None:
            return None
        return self.clock_min_mhz == self.clock_max_mhz


def l4t_release(path: Path = Path("/etc/nv_tegra_release")) -> str | None:
    """Release of Jetson Linux, such as "36.4.3"; None on other boxes."""
    # "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: ..."
    numbers = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(path))
    return f"{numbers[1]}.{numbers[2]}".rstrip(".") if numbers else None


def read_board(root: Path = Path("/")) -> Board | None:
    """Reads the files below `root`; None if this is no Jetson."""
    release_file = root / "etc/nv_tegra_release"
    release = _text(release_file)
    model = _text(root / "proc/device-tree/model").strip("\0\n ")
    if not release and "nvidia,tegra" not in _text(root / "proc/device-tree/compatible"):
        return None
    modes = {
        int(number): name
        for number, name in re.findall(
            r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", _text(root / "etc/nvpmodel.conf"), re.M
        )
    }
    active = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    low, now, high = _devfreq(root)
    return Board(
        model=model or None,
        l4t=l4t_release(release_file),
        power_mode=modes.get(int(active[1]), f"mode {int(active[1])}") if active else None,
        power_modes=modes,
        clock_min_mhz=low,
        clock_mhz=now,
        clock_max_mhz=high,
        temperature_c=_gpu_temperature(root),
        memory_total_mib=_memory_mib(root, "MemTotal"),
        memory_free_mib=_memory_mib(root, "MemAvailable"),
    )


def _devfreq(root: Path) -> tuple[int | None, int | None, int | None]:
    """Lowest, current and highest clock of the GPU of a Jetson in MHz."""
    folder = root / "sys/class/devfreq"
    # Orin: 17000000.gpu, before JetPack 6 17000000.ga10b; Thor: gpu-gpc-0.
    for path in (path for name in ("*.gpu", "*.ga10b", "gpu-gpc-0") for path in folder.glob(name)):
        texts = [_text(path / name).strip() for name in ("min_freq", "cur_freq", "max_freq")]
        low, now, high = (int(text) // 10**6 if text.isdigit() else None for text in texts)
        return low, now, high
    return None, None, None


def _gpu_temperature(root: Path) -> float | None:
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        if _text(zone / "type").strip().lower() in ("gpu-thermal", "gpu-therm"):
            text = _text(zone / "temp").strip()
            return int(text) / 1000 if text.lstrip("-").isdigit() else None
    return None


def _memory_mib(root: Path, key: str) -> int | None:
    line = re.search(rf"^{key}:\s+(\d+) kB", _text(root / "proc/meminfo"), re.M)
    return int(line[1]) // 1024 if line else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
