"""What is shipped: the wheel, and that it works where only the core dependencies are installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("export", "engines", "benchmarks")
DATA = (
    "py.typed",
    "*.jinja",
    "line/status/page.*",
    "line/status/*.js",
    "weights/*.safetensors",
    "weights/*.md",
)
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "edgead", *MAPPED)

# The device's path has to import with the core dependencies alone; modules with these prefixes need not.
NEEDS_EXTRAS = (
    "edgead.models",
    "edgead.training",
    "edgead.export",
    "edgead.benchmarks",
    "edgead.runtime.openvino",
    "edgead.runtime.onnx_torch",
    "edgead.runtime.torch_slot",
)
WITHOUT_TORCH = ("edgead.training.data", "edgead.training.demo_data")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of what the wheel is built from; the repository stays free of build folders."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "benchmarks" / "results").mkdir(exist_ok=True)
    (copy / "benchmarks" / "results" / "planted.json").write_text("{}")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel as it would be published: built from the source archive."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", source, cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def metadata(unpacked: Path) -> Message:
    (path,) = unpacked.glob("edgead-*.dist-info/METADATA")
    return Parser().parsestr(path.read_text(encoding="utf-8"))


def modules(unpacked: Path) -> list[str]:
    """Dotted names of all modules in the unpacked wheel."""
    paths = sorted(path.relative_to(unpacked) for path in unpacked.glob("edgead/**/*.py"))
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def requirement_names(requirements: list[str], extras: tuple[str, ...] = ("",)) -> set[str]:
    """Names of the distributions that these requirements ask for on this machine."""
    names = set()
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            names.add(requirement.name)
    return names


def link_installed(names: set[str], site: Path) -> None:
    """Link installed distributions, with all that they require, into another site-packages folder."""
    waiting, done = set(names), set()
    while waiting:
        name = waiting.pop()
        done.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError as error:
            raise AssertionError(f"{name} is not installed: pip install -e '.[dev]'") from error
        waiting |= requirement_names(found.requires or []) - done
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))


def bare_environment(folder: Path, linked: set[str], *pip_install: str | Path) -> Path:
    """Python of a new environment: the linked distributions, and what `pip install` adds offline."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    link_installed(linked, Path(run(python, "-c", program, cwd=folder).strip()))
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", *pip_install, cwd=folder)
    return python


@pytest.fixture(scope="module")
def core_python(wheel: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel and its core dependencies, and nothing of the extras."""
    core = requirement_names(metadata(unpacked).get_all("Requires-Dist", []))
    return bare_environment(tmp_path_factory.mktemp("core"), core, wheel)


def test_wheel_holds_only_edgead(unpacked: Path) -> None:
    version = metadata(unpacked)["Version"]
    assert {path.name for path in unpacked.iterdir()} == {"edgead", f"edgead-{version}.dist-info"}


def test_wheel_holds_every_module_and_the_data_and_no_more(unpacked: Path) -> None:
    expected = {path.relative_to(ROOT) for path in ROOT.glob("edgead/**/*.py")}
    for name in MAPPED:
        expected |= {Path("edgead") / path.relative_to(ROOT) for path in ROOT.glob(f"{name}/**/*.py")}
    data = {path.relative_to(ROOT) for pattern in DATA for path in (ROOT / "edgead").glob(pattern)}
    assert data >= {Path("edgead/py.typed"), Path("edgead/report.html.jinja")}
    assert any(path.suffix == ".safetensors" for path in data)
    found = {path.relative_to(unpacked) for path in unpacked.glob("edgead/**/*") if path.is_file()}
    assert found == expected | data


def test_metadata(unpacked: Path) -> None:
    found = metadata(unpacked)
    init = (ROOT / "edgead" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{found["Version"]}"' in init
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.10"
    requirements = found.get_all("Requires-Dist", [])
    core = {"imagesize", "numpy", "onnxruntime", "opencv-python-headless"}
    assert requirement_names(requirements) == core
    everything = requirement_names(requirements, tuple(found.get_all("Provides-Extra", [])))
    # `tensorrt` on PyPI fetches from the vendor's index while it builds, and fails where it cannot.
    assert "tensorrt" not in everything and "opencv-python" not in everything


def test_every_module_of_the_wheel_imports(unpacked: Path, tmp_path: Path) -> None:
    program = (
        "import importlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name\n"
    )
    run(sys.executable, "-c", program, unpacked, *modules(unpacked), cwd=tmp_path)


def test_device_path_imports_with_the_core_alone(
    core_python: Path, unpacked: Path, tmp_path: Path
) -> None:
    names = [n for n in modules(unpacked) if n in WITHOUT_TORCH or not n.startswith(NEEDS_EXTRAS)]
    assert {"edgead.detector", "edgead.runtime.ort", "edgead.cli"} <= set(names)
    program = (
        "import importlib, importlib.util, sys\n"
        "extras = ('torch', 'safetensors', 'tqdm', 'onnx', 'openvino', 'jinja2', 'matplotlib')\n"
        "assert not any(map(importlib.util.find_spec, extras))\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
    )
    run(core_python, "-c", program, *names, cwd=tmp_path)


def test_help_of_every_command_works_with_the_core_alone(core_python: Path, tmp_path: Path) -> None:
    overview = run(core_python, "-m", "edgead", "--help", cwd=tmp_path)
    assert run(core_python.with_name("edgead"), "--help", cwd=tmp_path) == overview
    commands = re.findall(r"^    ([a-z-]+)(?:  .*)?$", overview, flags=re.MULTILINE)
    assert {"demo", "verify"} <= set(commands)
    for command in commands:
        assert f"edgead {command}" in run(core_python, "-m", "edgead", command, "--help", cwd=tmp_path)


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folder_refuses_its_top_level_name(name: str) -> None:
    command = [sys.executable, "-c", f"import {name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"ImportError: import edgead.{name}, not {name}" in done.stderr


def test_editable_install_maps_the_folders(source: Path, tmp_path: Path) -> None:
    editable = ("--no-deps", "--no-build-isolation", "--editable", source)
    python = bare_environment(tmp_path / "venv", {"setuptools"}, *editable)
    program = "import edgead.{0} as module; print(module.__file__)"
    for cwd in (tmp_path, source):
        for name in MAPPED:
            path = run(python, "-c", program.format(name), cwd=cwd).strip()
            assert Path(path) == source / name / "__init__.py"
