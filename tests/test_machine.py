"""Provenance: what the machine tells, and that it tells nothing that identifies it."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgead import machine


def test_versions_and_cores_are_those_of_this_process() -> None:
    facts = machine.describe()
    assert facts["libraries"]["numpy"] == np.__version__
    assert facts["python"] == platform.python_version()
    assert facts["kernel"] == platform.release()
    assert 1 <= facts["cpu"]["usable_cores"] <= facts["cpu"]["logical_cores"] == os.cpu_count()


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the kernel has no /proc/meminfo")
def test_memory_is_what_the_system_reports() -> None:
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.describe()["memory_mib"] == pytest.approx(total_bytes / 2**20, rel=0.01)


def test_it_is_json_and_identifies_nobody() -> None:
    leaves = _leaves(json.loads(json.dumps(machine.describe(), allow_nan=False)))
    strings = [leaf for leaf in leaves if isinstance(leaf, str)]
    assert strings
    assert not [text for text in strings if text.startswith(("/", "\\")) or str(Path.cwd()) in text]
    assert not {socket.gethostname(), getpass.getuser()} & set(strings)


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def test_flags_come_from_the_kernels_list_on_x86_and_arm() -> None:
    x86 = "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu avx2 amx_bf16 avx512_bf16\n"
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\n"
    assert machine._cpu_flags(x86) == ["avx2", "avx512_bf16", "amx_bf16"]
    assert machine._cpu_flags(arm) == ["asimddp", "i8mm", "bf16"]
    assert machine._cpu_flags("") == []
    assert machine._cpu_model(x86) == "Some CPU @ 2.00GHz"


def test_a_library_under_any_of_its_names_is_found() -> None:
    assert machine._version(("no-such-package-0", "numpy")) == importlib.metadata.version("numpy")
    assert machine._version(("no-such-package-0",)) is None


@pytest.mark.skipif(os.name == "nt", reason="writes a POSIX shell script as the tool")
@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'Some GPU 16GB'; echo 'Other GPU'", ["Some GPU 16GB", "Other GPU"]), ("exit 9", [])],
)
def test_gpu_names_come_from_the_drivers_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: list[str]
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._gpu_names() == expected


def test_without_the_tool_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._gpu_names() == []


def test_describing_imports_no_library() -> None:
    code = (
        "import sys; from edgead.machine import describe; describe()\n"
        "sys.exit(int(bool({'cv2', 'onnxruntime', 'openvino', 'torch'} & set(sys.modules))))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
