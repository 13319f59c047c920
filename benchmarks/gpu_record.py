"""The JSON file of a GPU acceptance run: its provenance, what may be added to it, how it is written."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from edgead import gpu_state, machine
from edgead.benchmarks.gpu_bench import Effort
from edgead.bundle import MODEL, Bundle
from edgead.engine import l4t_release
from edgead.files import write_text

FORMAT = 1
LIBRARIES = ("cuda-bindings", "pycuda", "nvidia-ml-py", "tensorrt", "tensorrt-rtx", "onnx")
# Files of one run may differ in none of these.
SAME = ("graph_sha256", "source_sha256", "gpu", "driver", "quick", "images")


class Refused(Exception):
    """The run cannot begin; the text is for the user."""


def provenance(bundle: Bundle, weights: str, images: str, commit: str | None) -> dict[str, Any]:
    """What was measured on what. Read before anything is opened on the GPU.

    Args:
        weights: Where those of the bundle come from.
        images: Where the images come from.
        commit: To record where git does not tell it.
    """
    manifest, gpu = bundle.manifest, gpu_state.read()
    others = gpu["processes"]
    facts: dict[str, Any] = {
        "machine": machine.describe(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "l4t": l4t_release(),
        "gpu": gpu,
        "gpu_sharing": (
            "shared or exclusive is not known"
            if others is None
            else f"{others} other processes on the GPU before the run, as far as the driver shows them"
        ),
        "git_commit": _git_commit() or commit,
        "source_sha256": source_sha256(),
        "bundle": {
            "name": manifest.name,
            "method": manifest.method,
            "precision": manifest.precision,
            "precision_of": "weights and convolutions; from the squared difference on float32",
            "input_px": [manifest.input.height, manifest.input.width],
            "source_format": f"{manifest.input.dtype} {manifest.input.layout} {manifest.input.color}",
            "gflop_per_image": manifest.model.get("gflop_per_image"),
            "graph_sha256": manifest.members[MODEL].sha256,
            "weights": weights,
        },
        "images": images,
        "host_copies": "included in every figure, unless it says otherwise",
        "ambient_temperature_c": None,
    }
    wanted = {
        "GPU name": gpu["name"],
        "driver": gpu["driver"],
        "clocks": gpu["sm_clock_mhz"],
        "clocks locked or not": gpu["clocks_locked"],
        "GPU shared or exclusive": others,
        "git commit": facts["git_commit"],
    }
    return {**facts, "missing": [name for name, value in wanted.items() if value is None]}


def source_sha256() -> str:
    """One digest over the Python files of the package: what ran, also where there is no git."""
    digest = hashlib.sha256()
    roots = {name: list(module.__path__) for name, module in _packages().items()}
    files = {
        f"{name}/{file.relative_to(root).as_posix()}": file
        for name, folders in roots.items()
        for root in map(Path, folders)
        for file in root.rglob("*.py")
    }
    for name in sorted(files):
        digest.update(f"{name}\0".encode() + files[name].read_bytes() + b"\0")
    return digest.hexdigest()


def _packages() -> dict[str, Any]:
    import edgead
    import edgead.benchmarks
    import edgead.engines
    import edgead.export

    return {
        "edgead": edgead,
        "edgead/benchmarks": edgead.benchmarks,
        "edgead/engines": edgead.engines,
        "edgead/export": edgead.export,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        from edgead.training.run import git_commit
    except ImportError:  # it needs torch, which a board may lack
        return None
    return git_commit()


class Record:
    """The file, and its content.

    Attributes:
        path: Of the JSON file.
        data: Its content; `save` writes it.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def begin(cls, path: Path, facts: dict[str, Any], effort: Effort, *, quick: bool) -> Record:
        """A new file."""
        header = {
            "benchmark": "gpu_acceptance",
            "format": FORMAT,
            "quick": quick,
            "effort": dataclasses.asdict(effort),
            "provenance": facts,
            "runs": [],
            "backends": [],
            "sections": {},
        }
        return cls(path, header)

    @classmethod
    def go_on(cls, path: Path, facts: dict[str, Any], *, quick: bool) -> Record:
        """The file of an earlier call; raises Refused if it is of something else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            before, now = _identity(data["provenance"], data["quick"]), _identity(plain(facts), quick)
            is_ours = data["benchmark"] == "gpu_acceptance" and data["format"] == FORMAT
            if not (is_ours and all(isinstance(data[name], dict) for name in ("sections", "effort"))):
                raise ValueError("no GPU acceptance run of this format")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Refused(f"{path} cannot be gone on with ({error}): name another file") from None
        differences = [
            f"{name} {before[name]!r}, now {now[name]!r}" for name in SAME if before[name] != now[name]
        ]
        if differences:
            raise Refused(
                f"{path} was measured with {'; '.join(differences)}: name another file with --out"
            )
        return cls(path, data)

    def note_run(self, sections: list[str], backends: list[str]) -> None:
        """Adds this call to the list of calls."""
        run = {"utc": utc(), "sections": sections, "backends": backends, "gpu_state": known_state()}
        self.data["runs"].append({**run, "load_average": machine.describe()["load_average"]})
        self.data["backends"] += [name for name in backends if name not in self.data["backends"]]

    def has(self, section: str, backend: str | None = None) -> bool:
        """Whether a section is there and did not fail."""
        found = self.data["sections"].get(section, {})
        leaf = found if backend is None else found.get(backend, {})
        return "result" in leaf or "not_measured" in leaf

    def put(self, leaf: dict[str, Any], section: str, backend: str | None = None) -> None:
        """Takes a section in; `save` writes the file."""
        sections = self.data["sections"]
        if backend is None:
            sections[section] = leaf
        else:
            sections.setdefault(section, {})[backend] = leaf

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.data = plain(self.data)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.data, indent=1, allow_nan=False) + "\n")


def _identity(facts: dict[str, Any], quick: bool) -> dict[str, Any]:
    return {
        "graph_sha256": facts["bundle"]["graph_sha256"],
        "source_sha256": facts["source_sha256"],
        "gpu": facts["gpu"]["name"],
        "driver": facts["gpu"]["driver"],
        "quick": quick,
        "images": facts["images"],
    }


def known_state() -> dict[str, Any]:
    """`gpu_state.read` without what nobody tells."""
    return {name: value for name, value in gpu_state.read().items() if value is not None}


def utc() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """Values that JSON has. Numbers that are not finite become texts; folders of this machine go."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    for folder, name in ((Path(tempfile.gettempdir()), "<tmp>"), (Path.cwd(), "."), (Path.home(), "~")):
        text = text.replace(str(folder), name) if folder != Path(folder.anchor) else text
    return text
