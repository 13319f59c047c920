"""Reading and writing weight files: safetensors and state_dicts, never pickled modules.

A file is unwrapped, its layout is told from keys *and* shapes (never from its name), and then every
key and shape has to match; what is missing, surplus or mis-shaped is listed in the error.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edgead.errors import WeightsError
from edgead.files import whole_file
from edgead.models.mobilenet import MobileNetV2
from edgead.models.pdn import FEATURES, PDN, Size
from edgead.models.resnet import ResNet

log = logging.getLogger(__name__)

DIRECTIONS = ("directions", "energy")
"""Optional tensors of a teacher file: principal directions of its normalised features, their energy."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher")
_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "teacher.", "pdn.")
_SEQUENTIAL = {  # layer index in the nn.Sequential of nelson1425/EfficientAD -> our name
    "s": {"0": "conv1", "3": "conv2", "6": "conv3", "8": "conv4"},
    "m": {"0": "conv1", "3": "conv2", "6": "conv3", "8": "conv4", "10": "conv5", "12": "conv6"},
}


@dataclass(frozen=True)
class WeightsInfo:
    """What is recorded about a weight file in a run and in a bundle."""

    name: str
    sha256: str
    layout: str
    metadata: dict[str, str]

    def record(self) -> dict[str, Any]:
        """As it stands in run.json and in a bundle."""
        return {
            "file": self.name,
            "sha256": self.sha256,
            "layout": self.layout,
            "metadata": self.metadata,
        }


def read_state_dict(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a `.safetensors`, `.pth` or `.pt` file as FP32, and its metadata.

    Wrapping dictionaries and prefixes shared by all keys are removed.

    Raises:
        WeightsError: the file is missing, damaged, a pickled module, or holds NaN or infinite values.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors: object = {key: file.get_tensor(key) for key in file.keys()}
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors (a whole pickled module?), which is code and is not loaded."
            " Save its weights instead: torch.save(module.state_dict(), FILE)"
        ) from error
    except Exception as error:  # safetensors and torch raise many kinds for damaged files
        why = str(error) or type(error).__name__  # an empty file's EOFError says nothing
        raise WeightsError(
            f"{path} cannot be read as weights ({why}): is it complete? Download or copy it again"
        ) from error
    return _clean(tensors, path), metadata


def _clean(tensors: object, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
            break
    if not isinstance(tensors, Mapping) or not tensors:
        raise WeightsError(
            f"{path} holds {type(tensors).__name__}, expected named tensors (a state_dict)"
        )
    state = {str(key): value for key, value in tensors.items()}
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise WeightsError(f"{path}: {', '.join(wrong[:5])} are not tensors; save a plain state_dict")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    state = {key: value.float().contiguous() for key, value in state.items()}
    bad = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if bad:
        raise WeightsError(
            f"{path}: NaN or infinite values in {', '.join(bad[:5])}; the file is damaged or overflowed"
        )
    return state


def load_strict(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load `state` into `module`; every name and shape has to match.

    Raises:
        WeightsError: lists what is missing, surplus and mis-shaped.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    problems = [f"missing {key} {shape}" for key, shape in expected.items() if key not in state]
    problems += [f"surplus {key} {tuple(state[key].shape)}" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightsError(
            f"{path} does not fit {type(module).__name__}: {'; '.join(problems[:8])}{more}"
        )
    module.load_state_dict(dict(state))


def shipped_teacher(size: Size) -> Path:
    """The PDN teacher of this size that comes with the package."""
    name = {"s": "pdn_small", "m": "pdn_medium"}[size]
    return Path(__file__).parents[1] / "weights" / f"{name}.safetensors"


def load_teacher(path: Path | str, *, padding: bool = False) -> tuple[PDN, WeightsInfo]:
    """A PDN teacher from this project's files or the layouts of nelson1425/EfficientAD and anomalib.

    The size (S or M) is told by the 128 or 256 filters of the first convolution.

    Raises:
        WeightsError: the file is not a PDN teacher with 384 output channels.
    """
    path = Path(path)
    state, metadata = read_state_dict(path)
    for key in DIRECTIONS:
        state.pop(key, None)
    first, layout = (
        ("conv1.weight", "conv1..") if "conv1.weight" in state else ("0.weight", "nelson1425")
    )
    shape = tuple(state[first].shape) if first in state else None
    sizes: dict[tuple[int, ...], Size] = {(128, 3, 4, 4): "s", (256, 3, 4, 4): "m"}
    if shape not in sizes:
        raise WeightsError(
            f"{path} is no PDN teacher: expected conv1.weight or 0.weight of shape (128|256, 3, 4, 4),"
            f" got {f'{first} {shape}' if shape else 'keys ' + ', '.join(list(state)[:5])}"
        )
    size = sizes[shape]
    if layout == "nelson1425":
        names = _SEQUENTIAL[size]
        state = {
            ".".join([names.get(key.split(".")[0], key.split(".")[0]), *key.split(".")[1:]]): value
            for key, value in state.items()
        }
    teacher = PDN(size, FEATURES, padding=padding)
    load_strict(teacher, state, path)
    return teacher.eval().requires_grad_(False), WeightsInfo(path.name, sha256(path), layout, metadata)


def load_directions(path: Path | str) -> tuple[Tensor, Tensor] | None:
    """Principal directions that come with a teacher file; None if it has none.

    Returns:
        directions float32 [384, 384] (columns, by falling energy), energy float32 [384] (shares of 1).

    Raises:
        WeightsError: the file has them in other shapes.
    """
    state, _ = read_state_dict(path)
    if not set(DIRECTIONS) & set(state):
        return None
    shapes = [tuple(state[key].shape) if key in state else None for key in DIRECTIONS]
    if shapes != [(FEATURES, FEATURES), (FEATURES,)]:
        raise WeightsError(
            f"{path}: directions and energy have shapes {shapes[0]} and {shapes[1]},"
            f" expected {(FEATURES, FEATURES)} and {(FEATURES,)}; distil the teacher again"
        )
    return state["directions"], state["energy"]


def load_mobilenet(path: Path | str) -> tuple[MobileNetV2, WeightsInfo]:
    """The frozen MobileNetV2 of a file with folded batch norms (see `edgead.models.mobilenet`)."""
    state, metadata = read_state_dict(path)
    return _filled(MobileNetV2(), "mobilenet_v2", state, metadata, Path(path))


def load_backbone(path: Path | str) -> tuple[MobileNetV2 | ResNet, WeightsInfo]:
    """A frozen source network for distillation, recognised by its keys and shapes.

    MobileNetV2 as `load_mobilenet`, or any ResNet or Wide ResNet in torchvision's (and timm's) layout;
    of these the classifier and the last stage may be missing.

    Raises:
        WeightsError: neither of them, or something is missing, surplus or mis-shaped.
    """
    path = Path(path)
    state, metadata = read_state_dict(path)
    if "stem.weight" in state:
        return _filled(MobileNetV2(), "mobilenet_v2", state, metadata, path)
    network = ResNet.of_state_dict(state)
    if network is None:
        raise WeightsError(
            f"{path} is no backbone that can be told by its keys: expected stem.weight (MobileNetV2) or"
            f" conv1.weight of shape (64, 3, 7, 7) (ResNet), got {', '.join(list(state)[:5])}; other"
            " networks go through edgead.training.targets.Source"
        )
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    filled, info = _filled(network, network.name, counters | state, metadata, path)
    ending = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if ending and not info.sha256.startswith(ending[1]):
        log.warning("%s: its SHA-256 begins with %s, not with what its name says: changed or damaged?",
                    path, info.sha256[:8])  # fmt: skip
    return filled, info


_Network = TypeVar("_Network", bound=nn.Module)


def _filled(
    network: _Network, layout: str, state: Mapping[str, Tensor], metadata: dict[str, str], path: Path
) -> tuple[_Network, WeightsInfo]:
    load_strict(network, state, path)
    info = WeightsInfo(path.name, sha256(path), layout, metadata)
    return network.eval().requires_grad_(False), info


def save_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and text metadata; the file appears whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with whole_file(path) as temporary:
        save_file(contiguous, temporary, dict(metadata))


def sha256(path: Path | str) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
