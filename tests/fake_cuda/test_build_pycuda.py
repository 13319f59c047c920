"""Where the script that builds pycuda finds the CUDA toolkit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_cuda import build_pycuda


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    folder = tmp_path / "toolkit"
    for name in ("include", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "include" / "cuda.h").touch()
    return folder


def test_named_by_the_environment(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert build_pycuda.find_toolkit() == toolkit


@pytest.mark.parametrize("kind", ["link", "launcher"])
def test_by_nvcc(kind: str, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvcc` on the path: a link into the toolkit, or a script outside of it that calls the real one."""
    real, found = toolkit / "bin" / "nvcc", tmp_path / "path" / "nvcc"
    real.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n", encoding="utf-8")
    real.chmod(0o755)
    found.parent.mkdir()
    if kind == "link":
        found.symlink_to(real)
    else:
        found.write_text(f'#!/bin/sh\nexec {real} "$@"\n', encoding="utf-8")
        found.chmod(0o755)
    monkeypatch.setenv("PATH", f"{found.parent}:/usr/bin:/bin")
    assert build_pycuda.find_toolkit() == toolkit


def test_the_configuration_leaves_out_what_the_toolkit_lacks(toolkit: Path) -> None:
    settings: dict[str, object] = {}
    exec(build_pycuda.site_config(toolkit, [Path("a"), Path("b")]), settings)
    assert settings["CUDA_ENABLE_CURAND"] is False and settings["CUDA_ROOT"] == str(toolkit)
    assert settings["CUDADRV_LIB_DIR"] == ["a", "b"]
    (toolkit / "include" / "curand.h").touch()
    assert "CUDA_ENABLE_CURAND = True" in build_pycuda.site_config(toolkit, [])
