"""State of a GPU from NVML, from nvidia-smi and from the files of a Jetson."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgead import gpu_state, jetson

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX scripts as tools")

# One row as `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` prints it for a GeForce card.
RTX = {
    "name": "NVIDIA GeForce RTX 4070",
    "driver_version": "580.95.05",
    "compute_cap": "8.9",
    "memory.total": "12282",
    "memory.free": "11623",
    "clocks.sm": "210",
    "clocks.max.sm": "3105",
    "clocks.mem": "405",
    "clocks.max.mem": "10501",
    "enforced.power.limit": "200.00",
    "power.draw": "12.34",
    "temperature.gpu": "41",
    "persistence_mode": "Enabled",
    "ecc.mode.current": "[N/A]",
    "mig.mode.current": "[N/A]",
    "clocks_event_reasons.active": "0x0000000000000001",
    "clocks_throttle_reasons.active": "0x0000000000000001",
}
# On JetPack 6 nvidia-smi knows the name, the driver and the compute capability, and [N/A].
ORIN = {key: "[N/A]" for key in RTX} | {
    "name": "Orin (nvgpu)",
    "driver_version": "540.4.0",
    "compute_cap": "8.7",
}


def write_tool(
    folder: Path, rows: list[dict[str, str]], *, pids: str = "", bus: str = "0000:01:00.0"
) -> None:
    """A nvidia-smi that refuses unknown fields and unknown GPUs in the words of the real one."""
    folder.mkdir(exist_ok=True)
    tool = folder / "nvidia-smi"
    tool.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"rows, pids, bus = {rows!r}, {pids!r}, {bus!r}\n"
        "options = dict(argument.partition('=')[::2] for argument in sys.argv[1:])\n"
        "place = options['--id']\n"
        "place = 0 if place == bus else int(place) if place.isdigit() else 99\n"
        "if place >= len(rows):\n"
        "    print('No devices were found'); sys.exit(6)\n"
        "if '--query-compute-apps' in options:\n"
        "    print(pids, end=''); sys.exit(0)\n"
        "fields = options['--query-gpu'].split(',')\n"
        "for field in fields:\n"
        "    if field not in rows[place]:\n"
        "        print(f'Field \"{field}\" is not a valid field to query.'); sys.exit(2)\n"
        "print(', '.join(rows[place][field] for field in fields))\n"
    )
    tool.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; NVML is not there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "pynvml", None)  # import pynvml raises ImportError
    return folder


def test_without_a_gpu_nothing_is_known(tools: Path, tmp_path: Path) -> None:
    state = gpu_state.read(root=tmp_path)
    assert tuple(state) == gpu_state.FIELDS
    assert set(state.values()) == {None}
    meter = gpu_state.EnergyMeter()
    meter.start()
    assert meter.stop() is None


def test_nvidia_smi_of_a_geforce_card(tools: Path, tmp_path: Path) -> None:
    write_tool(tools, [RTX], pids="4242\n4243\n")
    state = gpu_state.read(root=tmp_path)
    assert state == {
        "source": "nvidia-smi",
        "name": "NVIDIA GeForce RTX 4070",
        "driver": "580.95.05",
        "compute_capability": "8.9",
        "memory_total_mib": 12282,
        "memory_free_mib": 11623,
        "sm_clock_mhz": 210,
        "sm_clock_max_mhz": 3105,
        "memory_clock_mhz": 405,
        "memory_clock_max_mhz": 10501,
        "clocks_locked": None,  # cannot be told
        "power_limit_w": 200,
        "power_draw_w": 12.34,
        "temperature_c": 41,
        "throttle_reasons": ["gpu_idle"],
        "persistence": True,
        "ecc": None,
        "mig": None,
        "processes": 2,
        "power_mode": None,
    }
    json.dumps(state, allow_nan=False)


@pytest.mark.parametrize("missing", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_a_tool_that_lacks_fields_still_tells_the_others(
    tools: Path, tmp_path: Path, missing: str
) -> None:
    row = {key: text for key, text in RTX.items() if key not in (missing, "compute_cap")}
    write_tool(tools, [row])
    state = gpu_state.read(root=tmp_path)
    assert state["compute_capability"] is None
    assert state["throttle_reasons"] == ["gpu_idle"]
    assert state["temperature_c"] == 41


def test_reasons_are_the_bits_of_nvml(tools: Path, tmp_path: Path) -> None:
    # nvml.h: 0x4 SwPowerCap, 0x8 HwSlowdown, 0x40 HwThermalSlowdown, 0x2 ApplicationsClocksSetting
    write_tool(
        tools,
        [RTX | dict.fromkeys(("clocks_event_reasons.active", "clocks_throttle_reasons.active"), "0x4e")],
    )
    state = gpu_state.read(root=tmp_path)
    assert state["throttle_reasons"] == [
        "clock_setting",
        "power_cap",
        "hardware_slowdown",
        "thermal_hardware",
    ]
    assert state["clocks_locked"] is True


@pytest.mark.parametrize(
    "script",
    [
        "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
        "echo 'NVIDIA-SMI has failed because it could not communicate with the driver.' >&2; exit 9",
        "echo 'one, two, three'",
        "printf '\\377\\376'",
        "kill -SEGV $$",
        "exit 0",
    ],
)
def test_a_broken_tool_tells_nothing(tools: Path, tmp_path: Path, script: str) -> None:
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tools / "nvidia-smi").chmod(0o755)
    assert set(gpu_state.read(root=tmp_path).values()) == {None}


def test_a_tool_that_hangs_is_killed_with_its_children(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\n/bin/sleep 1000 &\necho $! > {pid_file}\nwait\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(gpu_state, "TOOL_TIMEOUT_S", 0.5)
    assert gpu_state.read(root=tmp_path)["source"] is None
    status = Path(f"/proc/{int(pid_file.read_text())}/stat")
    for _ in range(100):  # the kernel takes its time
        if not status.exists() or ") Z " in status.read_text():
            break
        time.sleep(0.02)
    else:
        pytest.fail("the tool's child still runs")


def test_ordinals_are_cudas_also_where_the_tool_counts_otherwise(tmp_path: Path) -> None:
    """A driver whose GPU 1 is what nvidia-smi calls 0."""
    source = tmp_path / "cuda.c"
    source.write_text(
        "#include <string.h>\n"
        "int cuInit(unsigned flags) { return 0; }\n"
        "int cuDeviceGet(int *device, int number) { *device = number; return number > 1 ? 101 : 0; }\n"
        "int cuDeviceGetPCIBusId(char *text, int size, int device)\n"
        '{ strncpy(text, device ? "0000:01:00.0" : "0000:09:00.0", size); return 0; }\n'
    )
    compile_library(source, tmp_path / "libcuda.so.1")
    write_tool(tmp_path / "bin", [RTX, RTX | {"name": "NVIDIA T400", "compute_cap": "7.5"}])
    code = (
        "import sys, json; sys.modules['pynvml'] = None\n"
        "from pathlib import Path; from edgead.gpu_state import read\n"
        f"root = Path({str(tmp_path)!r})\n"
        "print(json.dumps([read(number, root=root)['name'] for number in (0, 1, 2)]))"
    )
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    # 0 is at another address, which the tool does not know: then by number. There is no GPU 2.
    assert json.loads(done.stdout) == ["NVIDIA GeForce RTX 4070", "NVIDIA GeForce RTX 4070", None]


def compile_library(source: Path, target: Path) -> None:
    command = ["gcc", "-shared", "-fPIC", "-o", str(target), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("gcc, which builds the stand-in for the driver, is not installed")


class FakeNvml:
    """What is used of pynvml (nvidia-ml-py 13), answered as a card with an energy counter does."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self) -> None:
        self.opened = 0
        self.energy_mj = [1_000_000, 1_450_500]

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index:
            raise self.NVMLError("Invalid Argument")
        return "gpu0"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers: dict[tuple[object, ...], Any] = {
            ("nvmlDeviceGetName", "gpu0"): b"NVIDIA H200",  # bytes in packages before 12
            ("nvmlSystemGetDriverVersion",): "580.159.03",
            ("nvmlDeviceGetCudaComputeCapability", "gpu0"): (9, 0),
            ("nvmlDeviceGetMemoryInfo", "gpu0"): SimpleNamespace(total=143771 << 20, free=140000 << 20),
            ("nvmlDeviceGetClockInfo", "gpu0", 1): 345,
            ("nvmlDeviceGetMaxClockInfo", "gpu0", 1): 1980,
            ("nvmlDeviceGetClockInfo", "gpu0", 2): 3201,
            ("nvmlDeviceGetMaxClockInfo", "gpu0", 2): 3201,
            ("nvmlDeviceGetEnforcedPowerLimit", "gpu0"): 700_000,
            ("nvmlDeviceGetPowerUsage", "gpu0"): 76_500,
            ("nvmlDeviceGetTemperature", "gpu0", 0): 31,
            ("nvmlDeviceGetCurrentClocksThrottleReasons", "gpu0"): 0x1,  # the old name only
            ("nvmlDeviceGetPersistenceMode", "gpu0"): 1,
            ("nvmlDeviceGetEccMode", "gpu0"): [1, 1],
            ("nvmlDeviceGetMigMode", "gpu0"): [0, 0],
            ("nvmlDeviceGetComputeRunningProcesses", "gpu0"): [SimpleNamespace(pid=7)],
        }

        def ask(*arguments: object) -> Any:
            if name == "nvmlDeviceGetTotalEnergyConsumption" and self.energy_mj:
                return self.energy_mj.pop(0)
            try:
                return answers[(name, *arguments)]
            except KeyError:
                raise self.NVMLError("Not Supported") from None

        return ask


@pytest.fixture
def nvml(tools: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    return fake


def test_nvml_comes_before_the_tool(nvml: FakeNvml, tools: Path, tmp_path: Path) -> None:
    write_tool(tools, [RTX])
    assert gpu_state.read(root=tmp_path) == {
        "source": "nvml",
        "name": "NVIDIA H200",
        "driver": "580.159.03",
        "compute_capability": "9.0",
        "memory_total_mib": 143771,
        "memory_free_mib": 140000,
        "sm_clock_mhz": 345,
        "sm_clock_max_mhz": 1980,
        "memory_clock_mhz": 3201,
        "memory_clock_max_mhz": 3201,
        "clocks_locked": None,
        "power_limit_w": 700.0,
        "power_draw_w": 76.5,
        "temperature_c": 31,
        "throttle_reasons": ["gpu_idle"],
        "persistence": True,
        "ecc": True,
        "mig": False,
        "processes": 1,
        "power_mode": None,
    }
    assert nvml.opened == 0
    assert gpu_state.read(1, root=tmp_path)["source"] is None  # neither NVML nor the tool has a second
    assert nvml.opened == 0


def test_energy_is_the_difference_of_nvmls_counter(nvml: FakeNvml) -> None:
    meter = gpu_state.EnergyMeter()
    assert meter.stop() is None  # never started
    nvml.energy_mj = [1_000_000, 1_450_500]
    meter.start()
    assert meter.stop() == 450.5
    nvml.energy_mj = [500, 400]  # the driver was loaded anew in between
    meter.start()
    assert meter.stop() is None
    meter.start()
    assert meter.stop() is None  # no counter any more
    assert nvml.opened == 0


def test_the_names_exist_in_the_real_package() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    source = Path(gpu_state.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"\bnvml[A-Z]\w+|\bNVML(?:Error|_[A-Z_]+)", source))
    assert len(names) > 20
    assert {name for name in names if not hasattr(pynvml, name)} == set()


def write_board(root: Path, **files: str) -> Path:
    """A Jetson Orin Nano with JetPack 6.2, contents as users of such boards post them."""
    texts = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, "
        "EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
        "proc/meminfo": "MemTotal:  7802664 kB\nMemFree:    512000 kB\nMemAvailable:  5120000 kB\n",
        "etc/nvpmodel.conf": "# comment < POWER_MODEL ID=9 NAME=NO >\n< POWER_MODEL ID=0 NAME=15W >\n"
        "CPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
        "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet",
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "612000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "918000000\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48906\n",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "49406\n",
    }
    for name, content in (texts | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_files_of_a_jetson_with_jetpack_6(tmp_path: Path) -> None:
    board = jetson.read_board(write_board(tmp_path))
    assert board is not None
    assert (board.l4t, board.jetpack) == ("36.4.3", 6)
    assert board.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert board.power_mode == "25W"
    assert board.power_modes == {0: "15W", 1: "25W", 2: "MAXN_SUPER"}
    assert (board.clock_min_mhz, board.clock_mhz, board.clock_max_mhz) == (306, 612, 918)
    assert board.clocks_locked is False
    assert board.temperature_c == 49.406
    assert (board.memory_total_mib, board.memory_free_mib) == (7619, 5000)


def test_files_fill_what_nvidia_smi_of_jetpack_6_does_not_know(tools: Path, tmp_path: Path) -> None:
    write_tool(tools, [ORIN])
    write_board(tmp_path, **{"sys/class/devfreq/17000000.gpu/min_freq": "918000000"})
    state = gpu_state.read(root=tmp_path)
    assert (state["source"], state["name"], state["driver"]) == ("nvidia-smi", "Orin (nvgpu)", "540.4.0")
    assert (state["sm_clock_mhz"], state["sm_clock_max_mhz"], state["clocks_locked"]) == (612, 918, True)
    assert (state["memory_total_mib"], state["memory_free_mib"]) == (7619, 5000)
    assert (state["temperature_c"], state["power_mode"]) == (49.406, "25W")
    assert state["throttle_reasons"] is state["power_limit_w"] is None
    (tools / "nvidia-smi").unlink()
    state = gpu_state.read(root=tmp_path)
    assert state["source"] == "files" and str(state["name"]).startswith("NVIDIA Jetson Orin Nano")


@pytest.mark.parametrize(
    ("release", "l4t", "jetpack"),
    [
        ("# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic\n", "38.2.0", 7),  # Thor
        ("# R39 (release), REVISION: 2.1, GCID: 1\n", "39.2.1", 7),
        ("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref\n", "35.4.1", 5),
        ("# R77 (release), REVISION: 0.0\n", "77.0.0", None),
        ("something else\n", None, None),
    ],
)
def test_releases(tmp_path: Path, release: str, l4t: str | None, jetpack: int | None) -> None:
    board = jetson.read_board(write_board(tmp_path, **{"etc/nv_tegra_release": release}))
    assert board is not None and (board.l4t, board.jetpack) == (l4t, jetpack)


def test_a_container_on_a_jetson_shows_the_device_tree_only(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    assert jetson.read_board(tmp_path) is None
    (tmp_path / "proc/device-tree/compatible").write_bytes(
        b"nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0"
    )
    board = jetson.read_board(tmp_path)
    assert board is not None
    assert (board.l4t, board.power_mode, board.clock_mhz, board.clocks_locked) == (None,) * 4


def test_odd_files_of_a_jetson(tmp_path: Path) -> None:
    odd = {
        "var/lib/nvpmodel/status": "pmode:0007",
        "sys/class/devfreq/17000000.gpu/max_freq": "<unknown>",
        "sys/class/thermal/thermal_zone1/temp": "",
        "proc/meminfo": "",
    }
    board = jetson.read_board(write_board(tmp_path, **odd))
    assert board is not None
    assert board.power_mode == "mode 7"  # not in nvpmodel.conf
    assert (
        board.clock_max_mhz
        is board.clocks_locked
        is board.temperature_c
        is board.memory_total_mib
        is None
    )


def test_thor_has_its_clock_elsewhere(tmp_path: Path) -> None:
    for name, content in {
        "min_freq": "315000000",
        "cur_freq": "1575000000",
        "max_freq": "1575000000",
    }.items():
        path = tmp_path / "sys/class/devfreq/gpu-gpc-0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R38 (release), REVISION: 2.0\n")
    board = jetson.read_board(tmp_path)
    assert board is not None and (board.clock_min_mhz, board.clock_max_mhz) == (315, 1575)
