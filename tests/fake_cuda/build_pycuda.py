"""Builds pycuda into the Python that runs this, so that the tests of the second CUDA layer run, too.

It needs a CUDA toolkit (headers) and a C++ compiler, but neither a GPU nor a driver: where there is no
libcuda.so to link with, the fake driver serves. Without a toolkit it says so and ends well.

    .venv/bin/python tests/fake_cuda/build_pycuda.py        about 90 seconds
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fake_cuda import build  # noqa: E402

VERSION = "2026.1"


def candidates() -> Iterator[Path]:
    """Folders that may be a CUDA toolkit, the likeliest first."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parents[1]
        # A launcher outside of the toolkit: nvcc itself knows better.
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.MULTILINE)
        if top:
            yield Path(top[1].strip()).resolve()
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)


def find_toolkit() -> Path | None:
    """The first candidate with the header that pycuda needs."""
    return next((folder for folder in candidates() if (folder / "include" / "cuda.h").is_file()), None)


def site_config(toolkit: Path, libraries: list[Path]) -> str:
    """Text of pycuda's siteconf.py."""
    has_curand = (toolkit / "include" / "curand.h").is_file()
    return (
        f"CUDA_ROOT = {str(toolkit)!r}\n"
        f"CUDA_INC_DIR = [{str(toolkit / 'include')!r}]\n"
        f"CUDADRV_LIB_DIR = {list(map(str, libraries))!r}\n"
        f"CUDA_ENABLE_CURAND = {has_curand}\n"
    )


def install(toolkit: Path, folder: Path) -> None:
    """Downloads, configures, compiles and installs pycuda."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    subprocess.run([*pip, *source, "--dest", str(folder), f"pycuda=={VERSION}"], check=True)
    with tarfile.open(next(folder.glob("pycuda-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / f"pycuda-{VERSION}"
    driver = folder / "driver"
    driver.mkdir()
    build(driver).rename(driver / "libcuda.so")
    libraries = [driver, toolkit / "lib64", toolkit / "lib"]
    (unpacked / "siteconf.py").write_text(site_config(toolkit, libraries), encoding="utf-8")
    subprocess.run([*pip, "install", "--quiet", "--no-build-isolation", str(unpacked)], check=True)


def main() -> str:
    """Returns what to tell the user."""
    if importlib.util.find_spec("pycuda"):
        return "pycuda is installed already"
    toolkit = find_toolkit()
    if toolkit is None:
        return "no CUDA toolkit (CUDA_HOME, nvcc, /usr/local/cuda): the tests with pycuda will skip"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler: the tests with pycuda will skip"
    print(f"building pycuda {VERSION} with {toolkit}: about 90 seconds", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        install(toolkit, Path(folder))
    return f"pycuda {VERSION} is installed"


if __name__ == "__main__":
    print(main())
