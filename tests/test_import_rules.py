"""Who may import whom. Read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import edgead

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("export", "engines", "benchmarks")  # top-level folders that are installed as edgead.<name>

DEVICE = ("errors", "files", "image", "manifest", "bundle", "result", "runtime")
# Module (and what is below it, unless it has its own line) -> what it may import of edgead.
# None: everything but the command line.
ALLOWED: dict[str, tuple[str, ...] | None] = {
    "": ("errors", "result", "bundle", "detector", "runtime.executor"),
    "errors": (),
    "files": (),
    "image": ("errors", "files"),
    "result": ("errors", "image"),
    "storedzip": ("errors",),
    "manifest": ("errors",),
    "bundle": ("errors", "files", "manifest", "storedzip"),
    "runtime": DEVICE,
    "runtime.tensorrt": (*DEVICE, "flavour"),
    "runtime.open_tensorrt": (*DEVICE, "flavour", "engines.prepare"),  # builds a missing engine
    "runtime.openvino": (*DEVICE, "machine"),  # what the CPU gains by
    "runtime.executor": (*DEVICE, "judge"),
    "runtime.worker": (*DEVICE, "judge"),
    "calibration": ("errors",),
    "heat": ("errors", "image"),
    "image_facts": ("errors",),
    "health": ("errors", "image_facts"),
    "recalibrate": (*DEVICE, "calibration", "health", "judge"),
    "judge": ("errors", "image", "manifest", "result"),
    "detector": (*DEVICE, "judge"),
    "background": ("errors",),
    "metrics": ("errors", "background"),
    "by_size": ("errors", "image", "metrics", "training.data"),
    "machine": ("errors", "gpu_state"),
    "jetson": (),
    "gpu_state": ("jetson",),
    "doctor": (*DEVICE, "doctor", "machine", "jetson", "gpu_state", "flavour"),
    "doctor.child": (*DEVICE, "doctor", "machine", "gpu_state", "flavour", "engines"),
    "doctor.system": ("doctor", "engines.cache", "errors"),
    "evaluate": (*DEVICE, "detector", "metrics", "by_size", "machine", "training.data"),
    "report": (
        *DEVICE,
        "heat",
        "detector",
        "metrics",
        "by_size",
        "machine",
        "evaluate",
        "training.data",
    ),
    "methods": ("errors",),  # and, by the names in its dictionary, what implements them
    "models": ("errors", "files", "image", "models", "training.session"),  # the latter for its type
    "models.protoad": ("errors", "files", "image", "models", "training.finch", "training.session"),
    "training": (
        "errors",
        "calibration",
        "files",
        "health",
        "image",
        "methods",
        "metrics",
        "models",
        "training",
    ),
    "training.data": ("errors", "image"),
    "training.device": ("errors", "machine"),
    "training.demo_data": ("errors", "image", "training.demo_*"),
    "training.demo_*": ("errors", "image", "training.demo_*"),
    "export": (
        "errors",
        "health",
        "image",
        "manifest",
        "bundle",
        "models",
        "training.data",
        "training.run",
        "export",
    ),
    "export.narrow": ("models", "training.directions"),
    "export.reduce": ("errors", "image", "models", "training", "export"),
    "export.reduce_gate": ("metrics", "models", "training.run", "export.parity"),
    "export.parity": ("errors", "image", "bundle", "models", "training.data", "runtime"),
    "line": (*DEVICE, "health", "heat", "judge", "line"),
    "flavour": ("errors",),
    "engine": ("errors", "flavour", "jetson"),
    "engines": (
        "errors",
        "files",
        "manifest",
        "bundle",
        "flavour",
        "engine",
        "engines",
        "runtime.cuda",
    ),
    "benchmarks": None,
}
# May import everything, but inside functions, so that --help is quick and works with the core alone.
COMMAND_LINE = (
    "cli",
    "cli_training",
    "bundle_commands",
    "commands",
    "device_commands",
    "line_commands",
    "demo",
    "__main__",
)

# Library -> modules that may import it. "(lazy)": inside functions only.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": (
        "models",
        "training",
        "export",
        "benchmarks",
        "runtime.torch_cuda (lazy)",
        "runtime.torch_slot",  # these two are imported by runtime.torch_cuda alone, in its functions
        "runtime.onnx_torch",
    ),
    "torchvision": ("training", "benchmarks"),
    "onnx": ("export", "benchmarks", "runtime.onnx_file (lazy)"),
    "onnxruntime": ("runtime.ort", "export.parity", "benchmarks"),
    "openvino": ("runtime.openvino", "benchmarks"),
    "tensorrt": ("flavour", "benchmarks"),
    "tensorrt_rtx": ("flavour", "benchmarks"),
    "cuda": ("runtime.cuda", "engines"),
    "pycuda": ("runtime.cuda", "engines"),
    "pynvml": ("gpu_state (lazy)",),
    "ray": ("benchmarks.accuracy_workers (lazy)",),
    "cv2": ("heat", "image", "line", "training", "benchmarks", "metrics (lazy)", "report (lazy)"),
    "pickle": ("models.files",),  # for the name of the error that torch.load(weights_only=True) raises
    **dict.fromkeys(("marshal", "shelve", "dill", "joblib", "cloudpickle"), ()),
}
NO_TORCH = ("training", "training.data", "training.demo_*")  # "training" is its __init__ alone


@dataclass(frozen=True)
class Import:
    """One imported module; of edgead without the "edgead." in front."""

    name: str
    is_ours: bool
    is_lazy: bool


def sources() -> dict[str, Path]:
    """Module (without "edgead.") -> its file."""
    folders = {"": ROOT / "edgead", **{name: ROOT / name for name in MAPPED}}
    found = {}
    for prefix, folder in folders.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([*filter(None, [prefix]), *parts])] = file
    return found


MODULES = sources()


def imports(tree: ast.Module) -> Iterator[Import]:
    lazy = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        for name in names:
            ours = name.split(".")[0] == "edgead"
            yield Import(module_of(name) if ours else name, ours, id(node) in lazy)


def module_of(name: str) -> str:
    """ "edgead.bundle.Bundle" -> "bundle"; "edgead.load" -> "detector", where it lives."""
    parts = name.split(".")[1:]
    if len(parts) == 1 and parts[0] in edgead._HOME:
        return edgead._HOME[parts[0]].removeprefix("edgead.")
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def matches(module: str, pattern: str) -> bool:
    if pattern.endswith("*"):
        return module.startswith(pattern[:-1])
    return module == pattern or (pattern != "" and module.startswith(pattern + "."))


def rule_of(module: str) -> tuple[str, ...] | None:
    """The line of ALLOWED with the longest name that fits."""
    fitting = [pattern for pattern in ALLOWED if matches(module, pattern)]
    assert fitting, (
        f"edgead.{module} is new: add a line to ALLOWED, see the architecture in CONTRIBUTING.md"
    )
    return ALLOWED[max(fitting, key=len)]


def violations(module: str, source: str) -> list[str]:
    found = []
    is_command_line = module in COMMAND_LINE
    for item in imports(ast.parse(source)):
        if item.is_ours and not is_command_line:
            allowed = rule_of(module)
            is_root = item.name in ("", module)  # edgead itself (for __version__), or the module itself
            fits = item.name not in COMMAND_LINE if allowed is None else is_root
            if not fits and not any(matches(item.name, pattern) for pattern in allowed or ()):
                found.append(f"edgead.{module} imports edgead.{item.name}")
        library = item.name.split(".")[0]
        if not item.is_ours and library in LIBRARIES:
            rules = LIBRARIES[library]
            fits = any(
                matches(module, rule.removesuffix(" (lazy)"))
                and (item.is_lazy or not rule.endswith("(lazy)"))
                for rule in rules
            )
            torch_free = any(
                module == name or ("*" in name and matches(module, name)) for name in NO_TORCH
            )
            if not fits or (library == "torch" and torch_free):
                found.append(f"edgead.{module} imports {library}")
        if is_command_line and item.is_ours and not item.is_lazy:
            if item.name not in ("", "errors", "methods", *COMMAND_LINE):
                found.append(f"edgead.{module} imports edgead.{item.name} outside of a function")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_import_directions(module: str) -> None:
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("bundle", "from edgead.runtime import replay"),
        ("runtime.ort", "from edgead.detector import Detector"),
        ("runtime.ort", "from edgead.judge import Judge"),
        ("runtime.executor", "from edgead.detector import Detector"),
        ("runtime.ort", "def f():\n    from edgead.models import pdn"),
        ("runtime.ort", "from edgead import load"),
        ("runtime.ort", "import torch"),
        ("runtime", "import onnxruntime"),
        ("runtime", "import importlib\ndef f():\n    importlib.import_module('openvino')"),
        ("detector", "import edgead.export.graph"),
        ("metrics", "import cv2"),
        ("training.data", "import torch"),
        ("training.demo_data", "from edgead.training.efficientad import Trainer"),
        ("training", "import torch"),
        ("training.efficientad", "from edgead.bundle import Bundle"),
        ("export.graph", "from edgead.runtime import replay"),
        ("engines.build", "from edgead.export import graph"),
        ("evaluate", "def f():\n    from edgead.cli import main"),
        ("benchmarks.cpu", "from edgead.cli import main"),
        ("cli", "from edgead.detector import load"),
        ("commands", "from edgead.training import data"),
        ("models.pdn", "import pickle"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runtime.ort", "from edgead.bundle import Bundle\nimport onnxruntime"),
        ("metrics", "def f():\n    import cv2"),
        ("evaluate", "from edgead.training.data import Dataset"),
        ("evaluate", "from edgead import metrics, __version__"),
        ("export.parity", "from edgead.runtime.ort import OrtBackend"),
        ("training.efficientad", "import torch.nn.functional as F"),
        ("benchmarks.cpu", "from edgead.models.pdn import PDN\nimport openvino"),
        ("cli", "def f():\n    from edgead.detector import load"),
        ("bundle", "import picklecheck, torchless"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert violations(module, source) == []


HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "cuda", "cv2", "pycuda")
LOADED = f"import sys; print(*[name for name in {HEAVY} if name in sys.modules])"


def run(code: str, *arguments: object) -> list[str]:
    """Runs code in a fresh interpreter and returns the words that it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_edgead_loads_nothing_heavy() -> None:
    assert run(f"import edgead; {LOADED}") == []
    assert run(f"import edgead; edgead.Result; edgead.Bundle; edgead.EdgeADError; {LOADED}") == []


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_verdict_needs_its_own_back_end_only(backend: str, tiny_bundle: Path) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    code = (
        "import edgead, numpy, sys\n"
        "with edgead.load(sys.argv[1], backend=sys.argv[2], threads=1) as detector:\n"
        "    result = detector(numpy.zeros((80, 90, 3), numpy.uint8))\n"
        f"result.map_at(80, 90)\n{LOADED}"
    )
    assert set(run(code, tiny_bundle, backend)) == {backend, "cv2"}
