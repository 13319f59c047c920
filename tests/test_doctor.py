"""The doctor on boxes of all kinds: files as they are there, a stand-in driver, real libraries."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from edgead import doctor
from edgead.bundle import MODEL, Bundle
from edgead.cli import build_parser, main
from edgead.doctor import backends, clocks, hardware, libraries, probe, system
from edgead.doctor.finding import NOTE, OK, PROBLEM, Finding, from_error
from edgead.doctor.probe import Answer
from edgead.engine import EngineKey, this_platform
from edgead.engines import cache
from edgead.gpu_state import FIELDS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX scripts and a shared library")

TESTS = Path(__file__).resolve().parent
GPU_PACKAGES = ("tensorrt", "torch", "functorch", "cuda", "pycuda", "pynvml", "nvidia")
ORIN, RTX, H200, THOR = (8, 7), (8, 9), (9, 0), (11, 0)

# Configures the driver of tests/fake_cuda from the environment: the doctor's questions are answered by
# processes of their own.
FROM_ENVIRONMENT = """
#include <stdlib.h>
int fake_cuda_reset(int);
void fake_cuda_set(const char *, long);
void fake_cuda_set_device(int, const char *, int, int, int, size_t);
int fake_cuda_fail(const char *, long, int, int, long);
static long number(const char *name) { const char *text = getenv(name); return text ? atol(text) : 0; }
__attribute__((constructor)) static void configure(void) {
    fake_cuda_reset(1);
    fake_cuda_set("driver_version", number("FAKE_VERSION"));
    fake_cuda_set_device(0, getenv("FAKE_NAME"), number("FAKE_MAJOR"), number("FAKE_MINOR"),
                         number("FAKE_INTEGRATED"), (size_t)number("FAKE_MIB") << 20);
    if (number("FAKE_CODE")) fake_cuda_fail("cuInit", 1, number("FAKE_CODE"), 0, -1);
}
"""


@pytest.fixture(scope="session")
def driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in for libcuda.so.1."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which builds the stand-in for the driver, is not installed")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "environment.c").write_text(FROM_ENVIRONMENT)
    # The last file's constructor runs last.
    sources = [*sorted((TESTS / "fake_cuda").glob("*.c")), folder / "environment.c"]
    command = ["gcc", "-shared", "-fPIC", "-pthread", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, *map(str, sources)], check=True, capture_output=True)
    return folder


class Box:
    """A machine: files below `root`, packages on `path`, programs in `tools`, a driver or none."""

    def __init__(self, folder: Path) -> None:
        self.root, self.tools, self.packages = (folder / name for name in ("root", "bin", "packages"))
        for path in (self.root, self.tools, self.packages):
            path.mkdir()
        self.environment = {
            "PATH": str(self.tools),
            "HOME": str(folder / "home"),
            "EDGEAD_CACHE": str(folder / "home" / "engines"),
            "LC_ALL": "C.UTF-8",
        }
        (folder / "home").mkdir()
        self.own = [path for path in self._site() if not path.name.startswith(GPU_PACKAGES)]

    @staticmethod
    def _site() -> list[Path]:
        folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
        return [path for folder in sorted(folders) for path in sorted(Path(folder).glob("*"))]

    def file(self, name: str, content: str = "") -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def tool(self, script: str) -> None:
        (self.tools / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (self.tools / "nvidia-smi").chmod(0o755)

    def installed(self, *prefixes: str) -> None:
        """Takes packages of this environment over."""
        found = [path for path in self._site() if path.name.startswith(prefixes)]
        if not found:
            pytest.skip(f"{prefixes[0]} is not installed")
        self.own += found

    def package(self, name: str, number: str, **files: str) -> None:
        """Makes a package up."""
        folder = self.packages / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        for file, content in files.items():
            path = self.packages / name / f"{file}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)

    def tensorrt(self, version: str) -> None:
        self.package("tensorrt", version, __init__=f"__version__ = {version!r}\nclass Builder: pass\n")

    def driver(
        self,
        folder: Path,
        name: str,
        capability: tuple[int, int],
        cuda: str,
        *,
        mib: int = 8192,
        code: int = 0,
    ) -> None:
        major, minor = cuda.split(".")
        self.environment |= {
            "LD_LIBRARY_PATH": str(folder),
            "FAKE_NAME": name,
            "FAKE_VERSION": str(int(major) * 1000 + int(minor) * 10),
            "FAKE_MAJOR": str(capability[0]),
            "FAKE_MINOR": str(capability[1]),
            "FAKE_INTEGRATED": str(int(capability in (ORIN, THOR))),
            "FAKE_MIB": str(mib),
            "FAKE_CODE": str(code),
        }

    def card(self) -> None:
        """An NVIDIA card on the bus, and the device nodes of its driver."""
        self.file("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
        self.file("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
        self.file("sys/bus/pci/devices/0000:01:00.1/vendor", "0x10de\n")  # its sound
        self.file("sys/bus/pci/devices/0000:01:00.1/class", "0x040300\n")
        for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
            self.file(f"dev/{name}")

    def jetson(
        self, release: str, model: str, *, mode: str = "0002", minimum: str = "306000000"
    ) -> None:
        self.file("etc/nv_tegra_release", f"{release}, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
        self.file("proc/device-tree/model", model + "\0")
        self.file(
            "etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
        )
        self.file("var/lib/nvpmodel/status", f"pmode:{mode} fmode:quiet")
        self.file("sys/class/devfreq/17000000.gpu/min_freq", minimum)
        self.file("sys/class/devfreq/17000000.gpu/cur_freq", "918000000")
        self.file("sys/class/devfreq/17000000.gpu/max_freq", "918000000")
        self.file("proc/meminfo", "MemTotal: 7802664 kB\nMemAvailable: 5120000 kB\n")
        self.file("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 3901332 0 5\n")
        for name in ("nvhost-gpu", "nvmap"):
            self.file(f"dev/{name}")

    def look(self, bundle: Path | None = None) -> dict[str, Finding]:
        """What the doctor finds, in a process that sees this box and no other."""
        farm = self.packages.parent / "site"
        farm.mkdir(exist_ok=True)
        for path in self.own:
            if not (farm / path.name).exists():
                (farm / path.name).symlink_to(path)
        standard = [
            path for path in sys.path if path and "-packages" not in path and Path(path) != TESTS.parent
        ]
        code = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
            "from pathlib import Path; from edgead import doctor\n"
            "bundle = Path(sys.argv[3]) if sys.argv[3:] else None\n"
            "print(doctor.to_json(doctor.check(bundle, root=Path(sys.argv[2]))))\n"
        )
        path = json.dumps([str(self.packages), str(farm), *standard])
        command = [sys.executable, "-c", code, path, str(self.root), *([str(bundle)] if bundle else [])]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and not done.stderr, done.stderr
        report = json.loads(done.stdout)
        findings = [Finding(**row) for row in report["findings"]]
        assert report["healthy"] == all(finding.state != PROBLEM for finding in findings)
        assert all(finding.remedy for finding in findings if finding.state == PROBLEM)
        assert all("\n" not in finding.found + finding.remedy for finding in findings)
        return {finding.check: finding for finding in findings}


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def problems(findings: dict[str, Finding]) -> set[str]:
    return {check for check, finding in findings.items() if finding.state == PROBLEM}


def smi(box: Box, **changes: str) -> None:
    """nvidia-smi of a card, which is asked for 17 fields and for the processes."""
    row = {
        "name": "NVIDIA GeForce RTX 4070",
        "driver": "580.95.05",
        "capability": "8.9",
        "total": "12282",
        "free": "11623",
        "sm": "210",
        "sm_max": "3105",
        "memory": "405",
        "memory_max": "10501",
        "limit": "200.00",
        "draw": "12.34",
        "temperature": "41",
        "persistence": "Disabled",
        "ecc": "[N/A]",
        "mig": "[N/A]",
        "reasons": "0x0000000000000001",
    } | changes
    cells = ", ".join([*row.values(), row["reasons"]])
    box.tool(f"case \"$*\" in *compute-apps*) ;; *) echo '{cells}' ;; esac")


def test_a_cpu_box_is_healthy(box: Box) -> None:
    findings = box.look()
    assert not problems(findings)
    assert findings["gpu"] == Finding("gpu", NOTE, "no NVIDIA GPU: the CPU back ends are used")
    assert findings["tensorrt"].found == findings["tensorrt-rtx"].found == "not installed"
    assert findings["back ends"].found.endswith("onnxruntime")
    assert "driver" not in findings and "clocks 0" not in findings


def test_jetson_orin_with_jetpack_6(box: Box, driver_folder: Path) -> None:
    box.jetson(
        "# R36 (release), REVISION: 4.3", "NVIDIA Jetson Orin Nano Developer Kit Super", mode="0000"
    )
    box.driver(driver_folder, "Orin", ORIN, "12.6", mib=7620)
    box.installed("cuda")
    box.package("cuda_bindings", "12.9.10")
    box.tensorrt("10.3.0")
    findings = box.look()
    assert not problems(findings)
    assert (
        findings["jetson"].found == "NVIDIA Jetson Orin Nano Developer Kit Super, JetPack 6 (L4T 36.4.3)"
    )
    assert findings["driver"].found == "supports CUDA 12.6, sees 1 GPU"
    assert findings["gpu 0"].found == (
        "Orin, compute capability 8.7, 7.4 GiB, 4.9 GiB free (shared with the processor)"
    )
    assert findings["tensorrt"] == Finding("tensorrt", OK, "10.3.0")
    assert findings["cuda layer"].found == "cuda.bindings 12.9.10 (used); opens the GPU"
    assert findings["back ends"].found.startswith("tensorrt, ")
    # What it could do better, with the command for it.
    assert (findings["power mode"].state, findings["clocks 0"].state) == (NOTE, NOTE)
    assert findings["power mode"].found == "15W limits the clocks; MAXN_SUPER does not"
    assert "sudo nvpmodel -m 2" in findings["power mode"].remedy
    assert findings["clocks 0"].found == "GPU 918 MHz, moves between 306 and 918"
    assert "sudo jetson_clocks" in findings["clocks 0"].remedy
    assert findings["memory"].found == "7.4 GiB, swap 0.0 GiB: building an engine may be killed"
    assert "mkswap" in findings["memory"].remedy


def test_jetson_whose_environment_does_not_see_jetpacks_tensorrt(box: Box, driver_folder: Path) -> None:
    box.jetson("# R36 (release), REVISION: 4.3", "NVIDIA Jetson AGX Orin", minimum="918000000")
    box.driver(driver_folder, "Orin", ORIN, "12.6")
    box.file("usr/lib/python3.10/dist-packages/tensorrt/__init__.py")
    box.file("proc/meminfo", "MemTotal: 64349184 kB\n")
    findings = box.look()
    assert problems(findings) == {"tensorrt", "back ends"}
    assert "does not see the system's, which is for Python 3.10" in findings["tensorrt"].found
    assert "--system-site-packages" in findings["tensorrt"].remedy
    assert findings["back ends"].remedy.startswith("solve the problems above")
    assert findings["cuda layer"].remedy.startswith('pip install "edgead[tensorrt]"')
    assert findings["clocks 0"] == Finding("clocks 0", OK, "GPU locked at 918 MHz")
    assert findings["power mode"] == Finding("power mode", OK, "MAXN_SUPER")
    assert findings["memory"].state == OK


def test_jetson_thor_with_jetpack_7(box: Box, driver_folder: Path) -> None:
    box.jetson("# R39 (release), REVISION: 2.2", "NVIDIA Jetson AGX Thor Developer Kit")
    box.driver(driver_folder, "NVIDIA Thor", THOR, "13.2", mib=125772)
    box.installed("cuda")
    box.installed("tensorrt_rtx")
    box.tensorrt("11.4.1")
    findings = box.look()
    assert not problems(findings)
    assert "JetPack 7 (L4T 39.2.2)" in findings["jetson"].found
    assert "no target for this GPU's compute capability 11.0" in findings["tensorrt-rtx"].found
    assert findings["back ends"].found.split(", ")[0] == "tensorrt"
    assert "tensorrt-rtx" not in findings["back ends"].found


def test_jetpack_5_is_too_old(box: Box) -> None:
    box.jetson("# R35 (release), REVISION: 4.1", "NVIDIA Jetson AGX Xavier Developer Kit")
    (finding,) = hardware.check_board(hardware.look(box.root).board)
    assert "JetPack 5 (L4T 35.4.1): its TensorRT 8 is too old" in finding.found
    assert finding.state == PROBLEM and "JetPack 6" in finding.remedy


def test_rtx_pc_with_everything(box: Box, driver_folder: Path) -> None:
    box.card()
    box.driver(driver_folder, "NVIDIA GeForce RTX 4070", RTX, "13.0", mib=12282)
    box.installed("cuda")
    box.installed("tensorrt_rtx")
    version = "__version__ = '2.13.0+cu130'\ncuda: str | None = '13.0'\n"
    box.package("torch", "2.13.0+cu130", __init__="raise SystemExit('imported')", version=version)
    smi(box)
    findings = box.look()
    assert not problems(findings)
    assert findings["gpu 0"].found == (
        "NVIDIA GeForce RTX 4070, compute capability 8.9, 12.0 GiB, 11.4 GiB free, driver 580.95.05"
    )
    assert findings["torch"] == Finding("torch", OK, "2.13.0+cu130, with CUDA 13.0")
    assert findings["back ends"].found.startswith("tensorrt-rtx, torch-cuda, ")
    assert findings["clocks 0"].found == (
        "not known to be locked: SM 210 of 3105 MHz, memory 405 of 10501 MHz, 41 °C, 12 of 200 W, "
        "persistence off"
    )
    assert "nvidia-smi -lgc MHZ, at most 3105" in findings["clocks 0"].remedy


def test_a_driver_that_is_older_than_the_packages(box: Box, driver_folder: Path) -> None:
    box.card()
    box.driver(driver_folder, "NVIDIA GeForce RTX 4070", RTX, "12.2")
    box.installed("cuda")
    box.package("cuda_bindings", "13.0.3")
    box.installed("tensorrt_rtx")  # made for CUDA 13
    version = "__version__ = '2.13.0+cu130'\ncuda = '13.0'\n"
    box.package("torch", "2.13.0+cu130", __init__="", version=version)
    findings = box.look()
    assert problems(findings) == {"cuda layer", "tensorrt-rtx", "back ends"}
    for check in ("cuda layer", "tensorrt-rtx", "torch"):
        assert "made for CUDA 13, the driver supports 12.2 only" in findings[check].found
        assert "NVIDIA driver" in findings[check].remedy
    assert 'pip install "cuda-bindings<13"' in findings["cuda layer"].remedy
    assert "none uses the GPU" in findings["back ends"].found


def test_a_gpu_without_a_back_end_for_it(box: Box, driver_folder: Path) -> None:
    box.card()
    box.driver(driver_folder, "NVIDIA GeForce RTX 4070", RTX, "13.0")
    findings = box.look()
    assert problems(findings) == {"back ends"}
    assert findings["back ends"].found.endswith("onnxruntime; none uses the GPU")
    assert findings["back ends"].remedy.startswith('pip install "edgead[tensorrt-rtx]"')
    assert findings["clocks 0"].found == "not available: neither NVML nor nvidia-smi answers"


@pytest.mark.parametrize(
    ("capability", "states", "remedy"),
    [
        (H200, {}, "install TensorRT from NVIDIA's index"),
        (H200, {"tensorrt-rtx": OK}, "install TensorRT from NVIDIA's index"),  # has no target for it
        (H200, {"tensorrt": OK}, "pip the layer"),
        (RTX, {"tensorrt-rtx": OK}, "pip the layer"),
        (RTX, {"tensorrt-rtx": PROBLEM, "cuda layer": OK}, "solve the problems above"),
        (None, {"tensorrt": OK}, "first get the driver to work"),
    ],
)
def test_what_to_do_for_a_gpu_back_end(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    states: dict[str, str],
    remedy: str,
) -> None:
    monkeypatch.setattr(backends, "torch_facts", lambda: None)
    checks = ("cuda layer", "tensorrt", "tensorrt-rtx", "torch", "onnxruntime")
    states = dict.fromkeys(checks, NOTE) | {"onnxruntime": OK} | states
    findings = {check: Finding(check, state, "", "pip the layer") for check, state in states.items()}
    finding = backends.check_usable(libraries.Box(True, False, capability, None), findings)
    assert finding.state == PROBLEM and finding.found == "onnxruntime; none uses the GPU"
    assert finding.remedy.startswith(remedy)


def test_libraries_that_crash_and_a_tool_that_fails(box: Box, driver_folder: Path) -> None:
    box.card()
    box.driver(driver_folder, "NVIDIA RTX A2000", (8, 6), "13.0")
    box.package(
        "tensorrt", "10.13.3.9", __init__="import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    box.package("openvino", "2026.1.0", __init__="raise RuntimeError('no such\\nplug-in')\n")
    box.package("cv2", "5.0.0", __init__="import os, sys\nprint('{}', flush=True)\nos._exit(3)\n")
    box.tool("echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
    box.environment["EDGEAD_CUDA"] = "pycude"
    box.file("proc/meminfo", "nonsense")
    findings = box.look()
    assert problems(findings) == {"tensorrt", "openvino", "opencv", "cuda layer", "back ends"}
    assert findings["tensorrt"].found == "it crashed the process (SIGSEGV)"
    assert "RuntimeError: no such plug-in" in findings["openvino"].found
    assert "ended the process with status 3" in findings["opencv"].found
    assert "EDGEAD_CUDA=pycude: there is no layer of this name" in findings["cuda layer"].found
    assert "unset EDGEAD_CUDA" in findings["cuda layer"].remedy
    assert findings["memory"].state == NOTE


def test_container_without_the_gpu_of_its_host(box: Box) -> None:
    box.card()
    shutil.rmtree(box.root / "dev")
    box.file(".dockerenv")
    driver = box.look()["driver"]
    assert driver.state == PROBLEM
    assert driver.found == "the machine has an NVIDIA GPU, this container was started without it"
    assert driver.remedy.startswith("start it with --gpus all")


# The driver by itself: files below a root, and answers as `edgead.doctor.child.driver` gives them.


def check_driver(root: Path, **facts: Any) -> Finding:
    return hardware.check_driver(hardware.look(root), Answer({"library": True, "gpus": [], **facts}))


def test_container_with_devices_and_without_libraries(box: Box) -> None:
    box.card()
    box.file("proc/1/cgroup", "12:memory:/kubepods/burstable/pod1\n")
    found = check_driver(box.root, library=False)
    assert "device nodes, not the driver's library" in found.found
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in found.remedy


def test_container_on_a_jetson(box: Box) -> None:
    box.file(".dockerenv")
    box.file("proc/device-tree/compatible", "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    assert "--runtime nvidia" in check_driver(box.root, library=False).remedy


def test_card_without_a_driver(box: Box) -> None:
    box.card()
    box.file("proc/modules", "snd_hda_intel 53248 0 - Live 0x0\nnouveau 2342912 4 - Live 0x0\n")
    found = check_driver(box.root, library=False)
    assert "nouveau" in found.found and "install the NVIDIA driver" in found.remedy
    box.file("proc/modules", "xnouveau 1 0 - Live 0x0\n")
    assert "nouveau" not in check_driver(box.root, library=False).found


@pytest.mark.parametrize(
    ("code", "found", "remedy"),
    [
        (34, "stub of the CUDA toolkit", "LD_LIBRARY_PATH"),
        (100, "finds no GPU (CUDA_ERROR_X)", "restart"),
        (802, "not ready", "nvidia-fabricmanager"),
        (803, "different versions", "restart"),
        (804, "forward compatibility", "cuda-compat"),
        (999, "cannot start", "modprobe nvidia_uvm"),
        (12345, "cannot start (CUDA_ERROR_X)", "restart"),
    ],
)
def test_codes_of_the_driver(
    box: Box, monkeypatch: pytest.MonkeyPatch, code: int, found: str, remedy: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    box.card()
    finding = check_driver(box.root, code=code, code_name="CUDA_ERROR_X", version="12.6")
    assert finding.state == PROBLEM and found in finding.found and remedy in finding.remedy


def test_a_real_code_of_the_driver(box: Box, driver_folder: Path) -> None:
    box.card()
    box.driver(driver_folder, "NVIDIA H200", H200, "13.0", code=803)
    findings = box.look()
    assert problems(findings) == {"driver", "back ends"}
    assert "kernel module are of different versions" in findings["driver"].found
    assert findings["back ends"].remedy == "first get the driver to work, see above"


def test_hidden_and_forbidden_gpus(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    box.card()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides the GPU" in check_driver(box.root, code=100).found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    # Whoever runs the tests as root may open everything, whatever the mode says.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "nvidiactl")
    found = check_driver(box.root, code=999)
    assert "may not open /dev/nvidiactl" in found.found and "usermod -aG video" in found.remedy


def test_a_driver_that_hangs_or_cannot_be_asked(box: Box) -> None:
    box.card()
    finding = hardware.check_driver(
        hardware.look(box.root), Answer({}, "no answer within 60 s, it hangs")
    )
    assert finding.state == PROBLEM and "it hangs" in finding.found and finding.remedy


# Single checks.


def state_of(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = dict.fromkeys(FIELDS)
    return state | {"source": "nvml", "sm_clock_mhz": 1200, "sm_clock_max_mhz": 1980} | changes


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({"throttle_reasons": ["thermal_hardware", "hardware_slowdown"]}, PROBLEM, "too hot"),
        ({"throttle_reasons": ["thermal_software"]}, PROBLEM, "too hot"),
        ({"throttle_reasons": ["power_brake"]}, PROBLEM, "power supply"),
        ({"throttle_reasons": ["hardware_slowdown"]}, NOTE, "by the hardware"),
        ({"throttle_reasons": ["power_cap"]}, NOTE, "power limit"),
        ({"throttle_reasons": ["gpu_idle"]}, NOTE, "not known to be locked: SM 1200 of 1980 MHz"),
        ({"throttle_reasons": ["clock_setting"], "clocks_locked": True}, OK, "SM 1200 of 1980 MHz"),
        ({"sm_clock_mhz": None}, NOTE, "no figures"),
        ({"source": None}, NOTE, "not available"),
    ],
)
def test_clocks(changes: dict[str, Any], state: str, text: str) -> None:
    finding = clocks.check_gpu(0, state_of(**changes))
    assert finding.state == state and text in finding.found
    assert finding.remedy or finding.state == OK


def test_processor_clock(tmp_path: Path) -> None:
    assert clocks.check_cpu(tmp_path) == []  # a virtual machine tells nothing
    for core, governor in enumerate(("schedutil", "performance")):
        path = tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"
        path.parent.mkdir(parents=True)
        path.write_text(governor + "\n")
    source = tmp_path / "sys/devices/system/clocksource/clocksource0/current_clocksource"
    source.parent.mkdir(parents=True)
    source.write_text("hpet\n")
    governor_finding, source_finding = clocks.check_cpu(tmp_path)
    assert governor_finding.found == "governor performance, schedutil" and governor_finding.remedy
    assert source_finding.state == NOTE and source_finding.found.startswith("hpet")
    (tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").write_text("performance\n")
    source.write_text("tsc\n")
    assert clocks.check_cpu(tmp_path) == [Finding("cpu clock", OK, "governor performance")]


def test_memory_limit_of_a_container_and_swap(tmp_path: Path) -> None:
    for name, content in {
        "proc/meminfo": "MemTotal: 33554432 kB\n",
        "proc/swaps": "Filename Type Size Used Priority\n"
        "/swapfile file 8388604 0 -2\n/dev/zram0 partition 99 0 5\n",
        "sys/fs/cgroup/memory.max": "2147483648\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    found = system.check_memory(tmp_path, is_jetson=True).found
    assert found == "32.0 GiB, swap 8.0 GiB, this container may use 2.0 GiB"
    (tmp_path / "proc/swaps").unlink()
    assert system.check_memory(tmp_path, is_jetson=True).state == NOTE
    assert system.check_memory(tmp_path, is_jetson=False).state == OK  # a PC builds on its own memory


def test_engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EDGEAD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    finding = system.check_cache()
    assert finding.state == OK and finding.found.startswith("~/.cache/edgead/engines: no engines, ")
    assert list(tmp_path.iterdir()) == []  # looking makes nothing
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEAD_CACHE", str(tmp_path / "file"))
    finding = system.check_cache()
    assert finding.state == PROBLEM and "EDGEAD_CACHE" in finding.remedy
    monkeypatch.setenv("EDGEAD_CACHE", "~no-such-user/engines")
    finding = system.check_cache()
    assert finding.state == PROBLEM and "EDGEAD_CACHE" in finding.remedy
    monkeypatch.setenv("EDGEAD_CACHE", str(tmp_path))
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**20, 2**20))
    assert system.check_cache().state == PROBLEM


def test_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    here = libraries.Box(True, False, RTX, (13, 0))
    monkeypatch.setenv("EDGEAD_CUDA", "pycuda")
    if not libraries.is_installed("pycuda"):
        finding = libraries.check_layer(here, None)
        assert finding.state == PROBLEM and "not installed" in finding.found
        assert finding.remedy == "unset EDGEAD_CUDA, or pip install pycuda"
    monkeypatch.delenv("EDGEAD_CUDA")
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    failed = Answer({}, "cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY. Close other programs")
    finding = libraries.check_layer(here, failed)
    assert finding.state == PROBLEM
    assert finding.found.endswith("opening the GPU: cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY")
    assert finding.remedy == "Close other programs"


def test_errors_split_into_what_and_remedy() -> None:
    long = "the module tensorrt cannot be imported: libnvinfer.so.10: no\ncause: a\nremedy: b"
    assert from_error("x", NOTE, long, "c") == Finding(
        "x", NOTE, "the module tensorrt cannot be imported: libnvinfer.so.10: no (a)", "b"
    )
    assert from_error("x", NOTE, "tensorrt 8.6 is too old. Get another", "c") == Finding(
        "x", NOTE, "tensorrt 8.6 is too old", "Get another"
    )
    assert from_error("x", NOTE, "just so\n", "c") == Finding("x", NOTE, "just so", "c")


def test_questions_that_hang_or_do_not_exist() -> None:
    answer = probe.ask("library", "asyncio", timeout_s=0.0)
    assert answer == Answer({}, "no answer within 0 s, it hangs")
    assert probe.ask("library", "no_such_module_0").error == (
        "ModuleNotFoundError: No module named 'no_such_module_0'"
    )
    assert "KeyError" in probe.ask("no question").error
    assert probe.ask("library", "json").facts == {"version": "2.0.9"}


# With a bundle.


def test_a_bundle_on_this_machine(tiny_bundle: Path) -> None:
    """Whatever this machine has: auto takes something that gives the verdicts of the reference."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    here = libraries.Box(False, False, None, None)
    whole, auto = backends.check_bundle(tiny_bundle, here)
    assert whole.found.startswith("tiny.edgead: every byte is as exported (")
    assert auto.state == OK
    chosen = re.match(r"takes ([a-z-]+): (\w+), gives the verdicts of the reference on all", auto.found)
    assert chosen, auto.found


def test_a_bundle_that_is_damaged_or_absent(tiny_bundle: Path, tmp_path: Path) -> None:
    here = libraries.Box(False, False, None, None)
    damaged = tmp_path / "damaged.edgead"
    content = bytearray(tiny_bundle.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    for path in (damaged, tmp_path / "absent.edgead"):
        (finding,) = backends.check_bundle(path, here)
        assert finding.state == PROBLEM and path.name in finding.found and finding.remedy


def test_a_back_end_that_decides_otherwise_is_passed_over(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Golden samples that no back end reproduces: ONNX Runtime is the last resort, with the warning."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from dataclasses import replace

    path = tiny.write(
        tmp_path / "odd.edgead", golden=replace(tiny.golden, scores=tiny.golden.scores[::-1].copy())
    )
    (_, auto) = backends.check_bundle(path, libraries.Box(False, False, None, None))
    assert auto.state == PROBLEM
    assert auto.found.startswith("takes onnxruntime: fp32, does not reproduce the golden samples")
    assert "edgead verify odd.edgead" in auto.remedy


def test_auto_on_a_gpu_box_does_not_build(box: Box, driver_folder: Path, tiny_bundle: Path) -> None:
    box.card()
    box.driver(driver_folder, "NVIDIA GeForce RTX 4070", RTX, "13.0")
    box.installed("cuda")
    box.installed("tensorrt_rtx")
    auto = box.look(tiny_bundle)["auto"]
    assert auto.state == NOTE
    assert auto.found.startswith(
        "takes tensorrt-rtx: there is no engine for this box yet; the first start"
    )
    assert auto.found.endswith("(not tensorrt: tensorrt is not installed)")
    assert auto.remedy == "edgead build tiny.edgead --backend tensorrt-rtx"
    assert not (Path(box.environment["HOME"]) / "engines").exists()


def test_auto_with_an_engine_in_the_cache(box: Box, driver_folder: Path, tiny_bundle: Path) -> None:
    """One of an older driver is stale; one that fits is loaded, which the made-up library cannot."""
    box.jetson("# R36 (release), REVISION: 4.3", "NVIDIA Jetson AGX Orin")
    box.driver(driver_folder, "Orin", ORIN, "12.6")
    box.installed("cuda")
    box.package("cuda_bindings", "12.9.10")
    box.tensorrt("10.3.0")
    keep_engine(box, tiny_bundle, driver="12.2")
    auto = box.look(tiny_bundle)["auto"]
    assert auto.found == (
        "takes tensorrt: the engine in the cache fits no more (driver 12.2, now 12.6); the first start "
        "builds one, which can take minutes"
    )
    keep_engine(box, tiny_bundle, driver="12.6")
    keep_engine(box, tiny_bundle, driver="12.2", name="a-copied-one")  # does not stand in its way
    findings = box.look(tiny_bundle)
    assert "2 engines, " in findings["engine cache"].found
    assert findings["auto"].state == PROBLEM
    assert re.match(
        r"takes (openvino|onnxruntime): .*\(not tensorrt: it fails \(", findings["auto"].found
    )
    assert findings["auto"].remedy.startswith("edgead verify tiny.edgead --backend tensorrt")


def keep_engine(box: Box, bundle: Path, *, driver: str, name: str = "tiny") -> None:
    graph = Bundle.open(bundle).manifest.members[MODEL].sha256
    key = EngineKey(
        graph_sha256=graph,
        flavour="tensorrt",
        version="10.3.0",
        target="sm87",
        gpu="Orin",
        driver=driver,
        platform=this_platform("tensorrt"),
        batches=(1,),
        workspace_mib=None,
    )
    plan = b"no plan"
    cache.store(Path(box.environment["EDGEAD_CACHE"]), plan, cache.describe(plan, key, name, 1.0))


# The command.


def test_the_command(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    status = main(["doctor", str(tiny_bundle)])
    text = capsys.readouterr().out
    counts = re.search(r"^(\d+) problems?, \d+ notes?$", text, re.MULTILINE)
    assert counts and status == (0 if counts[1] == "0" else 1)
    assert "takes " in text and str(Path.home()) not in text
    assert main(["doctor", "absent.edgead", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["healthy"]
    assert {row["state"] for row in report["findings"]} <= {OK, NOTE, PROBLEM}
    assert "absent.edgead" in report["findings"][-1]["found"]


def test_the_table() -> None:
    long = " ".join(["word"] * 60)
    text = doctor.to_text(
        [Finding("a", OK, "fine"), Finding("longer", PROBLEM, long, "do it"), Finding("b", NOTE, "n")]
    )
    lines = text.splitlines()
    assert lines[0] == "ok       a       fine"
    assert lines[1].startswith("problem  longer  word word") and lines[2].startswith(" " * 17 + "word")
    assert max(map(len, lines)) <= 105
    assert " " * 17 + "-> do it" in lines
    assert lines[-1] == "1 problem, 1 note"


def test_commands_in_the_description_of_boxes_parse() -> None:
    text = (TESTS.parent / "docs" / "boxes.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (edgead [^#\n]*)", text, re.MULTILINE) + re.findall(
        r"`(edgead [a-z][^`]*)`", text
    )
    assert len(commands) > 10
    for command in commands:
        for part in command.split("&&"):
            words = shlex.split(part)[1:]
            if len(words) > 1 or words == ["doctor"]:
                assert callable(build_parser().parse_args(words).run)
