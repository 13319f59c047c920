"""The libraries that can run a graph: their versions, whether they load, whether they fit the driver."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgead.doctor.finding import NOTE, OK, PROBLEM, Finding, from_error
from edgead.doctor.hardware import text
from edgead.doctor.probe import Answer
from edgead.machine import LIBRARIES

# What TensorRT for RTX builds engines for. None of them is a Jetson or a data-centre GPU but the A100.
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "opencv": "cv2"}
CUDA_PACKAGES = {"cuda.bindings": "cuda-bindings", "pycuda": "pycuda"}


@dataclass(frozen=True)
class Box:
    """What decides which library can serve this machine.

    Attributes:
        has_gpu: There is an NVIDIA GPU, working or not.
        is_jetson: It is the one of a Jetson.
        capability: Compute capability of GPU 0; None if it cannot be reached.
        cuda: CUDA version of the driver, such as (12, 6); None without one.
    """

    has_gpu: bool
    is_jetson: bool
    capability: tuple[int, int] | None
    cuda: tuple[int, int] | None

    @property
    def update(self) -> str:
        """How a newer driver comes to this box."""
        return "install a newer JetPack" if self.is_jetson else "update the NVIDIA driver"

    @property
    def remedy(self) -> str:
        """How a GPU back end comes to this box."""
        if self.is_jetson:
            return (
                "use JetPack's TensorRT: make the environment with /usr/bin/python3 -m venv "
                '--system-site-packages, then pip install "edgead[tensorrt]"'
            )
        if self.capability in RTX_CAPABILITIES:
            return 'pip install "edgead[tensorrt-rtx]"'
        return (
            "install TensorRT from NVIDIA's index and "
            'pip install "edgead[tensorrt]", or install PyTorch with CUDA'
        )


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def is_installed(module: str) -> bool:
    """Whether a module can be found; does not import it (only the package that it is in)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def chosen_layer() -> str | None:
    """The CUDA layer that the runtime takes; None without one, an unknown name as it is."""
    named = os.environ.get("EDGEAD_CUDA")
    if named:
        return "cuda.bindings" if named in ("cuda-bindings", "cuda") else named
    return next((layer for layer in CUDA_PACKAGES if is_installed(layer)), None)


def check_layer(box: Box, answer: Answer | None) -> Finding:
    """The CUDA layers. `answer` is that of opening the GPU with the chosen one, if there is a GPU."""
    chosen, installed = chosen_layer(), []
    for layer, package in CUDA_PACKAGES.items():
        if is_installed(layer):
            mark = " (used)" if layer == chosen else ""
            installed.append(f"{layer} {version_of(package) or 'of unknown version'}{mark}")
    found = ", ".join(installed) or "none installed: TensorRT needs one"
    if named := os.environ.get("EDGEAD_CUDA"):
        found += f"; EDGEAD_CUDA={named}"
    install = 'pip install "edgead[tensorrt]" (brings cuda-bindings)'
    if chosen is None:
        return Finding("cuda layer", NOTE, found, install if box.has_gpu else "")
    if chosen not in CUDA_PACKAGES:
        remedy = f"unset EDGEAD_CUDA, or set it to {' or '.join(CUDA_PACKAGES)}"
        return Finding("cuda layer", PROBLEM, f"{found}: there is no layer of this name", remedy)
    if not is_installed(chosen):
        remedy = f"unset EDGEAD_CUDA, or pip install {CUDA_PACKAGES[chosen]}"
        return Finding("cuda layer", PROBLEM, f"{found}, which is not installed", remedy)
    wants = _major(version_of("cuda-bindings")) if chosen == "cuda.bindings" else None
    if box.cuda and wants and wants > box.cuda[0]:
        remedy = (
            f'pip install "cuda-bindings<{box.cuda[0] + 1}", or {box.update} to one for CUDA {wants}'
        )
        return Finding("cuda layer", PROBLEM, f"{found}: {_too_old(box.cuda, wants)}", remedy)
    if answer is not None and answer.error:
        return from_error("cuda layer", PROBLEM, f"{found}; opening the GPU: {answer.error}", install)
    return Finding("cuda layer", OK, found + ("; opens the GPU" if answer is not None else ""))


def check_flavour(name: str, box: Box, answer: Answer, root: Path) -> Finding:
    """A TensorRT. `answer` is that of loading it."""
    if answer.error:
        if not is_installed(name.replace("-", "_")):
            return _missing_flavour(name, box, root)
        state = PROBLEM if box.has_gpu else NOTE
        return from_error(name, state, answer.error, f"install {name} again; or {box.remedy}")
    found = answer.facts["version"]
    wants = _cuda_of_flavour(name)
    if box.cuda and wants and wants > box.cuda[0]:
        remedy = (
            f"{box.update} to one for CUDA {wants}, or take the package {name}-cu{box.cuda[0]} instead"
        )
        return Finding(name, PROBLEM, f"{found}: {_too_old(box.cuda, wants)}", remedy)
    if name != "tensorrt-rtx" or box.capability is None or box.capability in RTX_CAPABILITIES:
        ahead = "; no GPU here: edgead build --target makes engines for others"
        return Finding(name, OK, found + (ahead if name == "tensorrt-rtx" and not box.has_gpu else ""))
    mine = "{}.{}".format(*box.capability)
    targets = ", ".join("{}.{}".format(*pair) for pair in RTX_CAPABILITIES)
    found += f" has no target for this GPU's compute capability {mine} (only {targets})"
    return Finding(name, NOTE, found, "" if is_installed("tensorrt") else f"on this GPU: {box.remedy}")


def _missing_flavour(name: str, box: Box, root: Path) -> Finding:
    """Not installed, or hidden from this environment: JetPack installs it for the system's Python."""
    systems = sorted((root / "usr/lib").glob("python3*/dist-packages/tensorrt/__init__.py"))
    if name == "tensorrt" and systems:
        version = systems[0].parts[-4].removeprefix("python")
        mine = ".".join(platform.python_version_tuple()[:2])
        found = (
            f"this environment (Python {mine}) does not see the system's, which is for Python {version}"
        )
        remedy = "make the environment with /usr/bin/python3 -m venv --system-site-packages"
        return Finding(name, PROBLEM if box.is_jetson else NOTE, found, remedy)
    return Finding(name, NOTE, "not installed")


def torch_facts() -> tuple[str, str | None] | None:
    """Version of torch and its CUDA version (None in a CPU build), without importing it."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin:
        return None
    found: dict[str, str | None] = {"__version__": version_of("torch"), "cuda": None}
    try:
        tree = ast.parse(text(Path(spec.origin).parent / "version.py"))
    except SyntaxError:
        tree = ast.Module([], [])
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id in found and isinstance(value, ast.Constant):
            found[target.id] = None if value.value is None else str(value.value)
    return found["__version__"] or "of unknown version", found["cuda"]


def check_torch(box: Box) -> Finding:
    """PyTorch, which is a back end only where it has CUDA and a GPU."""
    facts = torch_facts()
    if facts is None:
        return Finding("torch", NOTE, "not installed (training and the back end torch-cuda need it)")
    version, cuda = facts
    if cuda is None:
        return Finding("torch", NOTE if box.has_gpu else OK, f"{version}, without CUDA")
    if box.cuda and _major(cuda) > box.cuda[0]:
        remedy = f"{box.update}, or install the build of PyTorch for CUDA {box.cuda[0]}"
        return Finding("torch", NOTE, f"{version}: {_too_old(box.cuda, _major(cuda))}", remedy)
    return Finding("torch", OK, f"{version}, with CUDA {cuda}")


def check_cpu_library(name: str, answer: Answer) -> Finding | None:
    """ONNX Runtime, OpenVINO or OpenCV. `answer` is that of importing it."""
    packages = [package for package in LIBRARIES[name] if version_of(package)]
    package = packages[0] if packages else LIBRARIES[name][0]
    if not is_installed(MODULES[name]):
        if name != "openvino":
            return Finding(name, PROBLEM, "not installed, edgead needs it", f"pip install {package}")
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        hint = 'pip install "edgead[openvino]": a second CPU back end, for x86'
        return Finding(name, NOTE, "not installed", hint) if is_x86 else None
    version = version_of(package) or answer.facts.get("version") or "of unknown version"
    if answer.error:
        remedy = f"pip install --force-reinstall {package}"
        if "libGL" in answer.error:
            remedy = f"pip uninstall {package}, then pip install opencv-python-headless"
        return Finding(
            name, PROBLEM, f"{version} does not load: {' '.join(answer.error.split())}", remedy
        )
    if len(packages) > 1:
        found = f"{' and '.join(packages)} are installed and overwrite each other's files"
        remedy = f"pip uninstall {' '.join(packages)}, then pip install the one that you need"
        return Finding(name, NOTE, found, remedy)
    return Finding(name, OK, version)


def _cuda_of_flavour(name: str) -> int | None:
    """CUDA major version that the installed package was made for, from its name: tensorrt-cu13-libs."""
    stem = name.replace("-", "[-_]")
    pattern = re.compile(rf"{stem}[-_]cu(\d+)(?:[-_]libs)?", re.IGNORECASE)
    names = (distribution.metadata["Name"] or "" for distribution in metadata.distributions())
    return max((int(found[1]) for each in names if (found := pattern.fullmatch(each))), default=None)


def _too_old(cuda: tuple[int, int], wants: int) -> str:
    return f"it is made for CUDA {wants}, the driver supports {cuda[0]}.{cuda[1]} only"


def _major(version: str | None) -> int:
    found = re.match(r"\d+", version or "")
    return int(found[0]) if found else 0
