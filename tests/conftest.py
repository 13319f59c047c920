"""Fixtures that several test files use."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.bundle import Golden, write_bundle
from edgead.manifest import Calibration, InputSpec, Manifest, OutputSpec, Threshold

pytest_plugins = ["tests.fake_cuda"]

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY_SIDE_PX = 64


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the real data sets and weights; users do not have it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder with the real data sets and weights (../shared) is absent")
    return SHARED


@dataclass(frozen=True)
class Tiny:
    """A model small enough to compute in NumPy: bright spots on the surroundings raise its score."""

    manifest: Manifest
    model: bytes
    golden: Golden

    @staticmethod
    def frames(count: int, *, spots: bool, seed: int = 0) -> np.ndarray:
        """uint8 [count, 64, 64, 3]: dim noise, with one bright 5x5 spot each if asked for."""
        rng = np.random.default_rng(seed)
        frames = rng.integers(60, 80, (count, TINY_SIDE_PX, TINY_SIDE_PX, 3), dtype=np.uint8)
        for frame in frames if spots else ():
            row, column = rng.integers(8, TINY_SIDE_PX - 8, 2)
            frame[row : row + 5, column : column + 5] = rng.integers(180, 256)
        return frames

    def reference(
        self, images: np.ndarray, calibration: tuple[float, ...] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 [N] and maps float32 [N, 64, 64], computed in float64 without any back end."""
        first, second, offset = calibration or self.manifest.calibration.values
        grey = images.astype(np.float64).mean(axis=3) / 255
        local, wide = _box(grey, 3), _box(grey, 9)
        maps = first * np.maximum(local - wide, 0) + second * np.maximum(grey - local, 0) + offset
        return maps.max(axis=(1, 2)).astype(np.float32), maps.astype(np.float32)

    def write(
        self, path: Path, *, model: bytes | None = None, golden: Golden | None = None, **changes: object
    ) -> Path:
        """Writes the bundle; `changes` are fields of the manifest."""
        write_bundle(path, replace(self.manifest, **changes), model or self.model, golden or self.golden)  # type: ignore[arg-type]
        return path


def _box(grey: np.ndarray, side: int) -> np.ndarray:
    """Mean over side x side pixels, with zeros outside of the image."""
    pad = side // 2
    padded = np.pad(grey, ((0, 0), (pad, pad), (pad, pad)))
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2)).mean(axis=(3, 4))


def tiny_model(side_px: int = TINY_SIDE_PX, *, batch: str | int = "N", score: str = "score") -> bytes:
    """ONNX graph of `Tiny.reference`; the arguments make graphs that contradict the manifest."""
    onnx = pytest.importorskip("onnx", reason="onnx (to make the tiny test graph) is not installed")
    make, dtypes = onnx.helper.make_node, onnx.TensorProto
    constants = {
        "to_grey": np.full((1, 3, 1, 1), 1 / (3 * 255), np.float32),
        "box3": np.full((1, 1, 3, 3), 1 / 9, np.float32),
        "box9": np.full((1, 1, 9, 9), 1 / 81, np.float32),
        "channel": np.array([1], np.int64),
        "pixels": np.array([1, 2], np.int64),
        **{f"c{index}": np.array(index, np.int64) for index in range(3)},
    }
    nodes = [
        make("Cast", ["image"], ["float"], to=dtypes.FLOAT),
        make("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        make("Conv", ["nchw", "to_grey"], ["grey"]),
        make("Conv", ["grey", "box3"], ["local"], pads=[1] * 4),
        make("Conv", ["grey", "box9"], ["wide"], pads=[4] * 4),
        make("Sub", ["local", "wide"], ["student_difference"]),
        make("Relu", ["student_difference"], ["student"]),
        make("Sub", ["grey", "local"], ["autoencoder_difference"]),
        make("Relu", ["autoencoder_difference"], ["autoencoder"]),
        *(make("Gather", ["calibration", f"c{index}"], [f"k{index}"]) for index in range(3)),
        make("Mul", ["student", "k0"], ["scaled_student"]),
        make("Mul", ["autoencoder", "k1"], ["scaled_autoencoder"]),
        make("Add", ["scaled_student", "scaled_autoencoder"], ["sum"]),
        make("Add", ["sum", "k2"], ["map4"]),
        make("Squeeze", ["map4", "channel"], ["anomaly_map"]),
        make("ReduceMax", ["anomaly_map", "pixels"], [score], keepdims=0),
    ]
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "tiny",
        [
            tensor("image", dtypes.UINT8, [batch, side_px, side_px, 3]),
            tensor("calibration", dtypes.FLOAT, [3]),
        ],
        [
            tensor(score, dtypes.FLOAT, [batch]),
            tensor("anomaly_map", dtypes.FLOAT, [batch, side_px, side_px]),
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., bytes]:
    """`tiny_model`, for tests that need a graph other than the manifest says."""
    return tiny_model


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """Parts of the tiny bundle, to write variants of it."""
    manifest = Manifest(
        method="tiny-blob",
        name="blob",
        precision="fp32",
        input=InputSpec(height=TINY_SIDE_PX, width=TINY_SIDE_PX),
        outputs={
            "score": OutputSpec(shape=("N",)),
            "anomaly_map": OutputSpec(shape=("N", TINY_SIDE_PX, TINY_SIDE_PX)),
        },
        calibration=Calibration(
            values=(2.0, 1.0, -0.05),
            names=("student_scale", "autoencoder_scale", "offset"),
            meaning="map = student_scale * student + autoencoder_scale * autoencoder + offset",
        ),
        threshold=Threshold(value=0.4, basis="between the scores with and without a spot"),
        provenance={"seed": 0},
    )
    nothing = np.empty(0, np.float32)
    parts = Tiny(manifest, tiny_model(), Golden(nothing, nothing, nothing))
    images = np.concatenate([parts.frames(2, spots=False, seed=1), parts.frames(2, spots=True, seed=2)])
    return replace(parts, golden=Golden(images, *parts.reference(images)))


@pytest.fixture(scope="session")
def tiny_bundle(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid bundle, shared by all tests: copy it before you change it."""
    return tiny.write(tmp_path_factory.mktemp("tiny") / "tiny.edgead")


@pytest.fixture(scope="session")
def rewrite_manifest(tiny_bundle: Path) -> Callable[..., Path]:
    """Function (path, edit) that writes the tiny bundle with another manifest.

    `edit` changes the parsed manifest in place, or returns the text to write instead.
    """

    def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
        with zipfile.ZipFile(tiny_bundle) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                content = source.read(name)
                if name == "manifest.json":
                    data = json.loads(content)
                    text = edit(data)
                    content = text if isinstance(text, bytes) else json.dumps(data).encode()
                target.writestr(name, content)
        return path

    return rewrite


@pytest.fixture(scope="session")
def demo_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered data set, MVTec layout: 6 good training, 2 good and 7 defective test images."""
    from edgead.training.demo_data import render_demo

    root = tmp_path_factory.mktemp("images") / "tray"
    render_demo(root, seed=3, train=6, good=2, defective=7)
    return root


@pytest.fixture(scope="session")
def natural_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rendered pictures that stand in for natural images."""
    from edgead.training.demo_data import render_distractors

    folder = tmp_path_factory.mktemp("natural") / "images"
    render_distractors(folder, seed=1, count=6)
    return folder


@pytest.fixture(scope="session")
def random_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileNetV2 file with seeded random weights."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from edgead.models.files import save_safetensors
    from edgead.models.mobilenet import MobileNetV2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = MobileNetV2()
        for parameter in network.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    path = tmp_path_factory.mktemp("backbone") / "mobilenet.safetensors"
    save_safetensors(path, network.state_dict(), {})
    return path


@pytest.fixture(scope="session")
def random_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PDN-S teacher file with seeded random weights, scaled so that its features are of order 1."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from edgead.models.files import save_safetensors
    from edgead.models.pdn import PDN

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        teacher = PDN("s")
        for parameter in teacher.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_safetensors(path, teacher.state_dict(), {"kind": "random"})
    return path


@pytest.fixture(scope="session")
def trained_run(
    demo_images: Path,
    natural_images: Path,
    random_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished EfficientAD-S run of 3 steps: real in all parts, hardly trained. Leave it as it is."""
    from edgead.training.data import open_dataset
    from edgead.training.efficientad import TrainConfig
    from edgead.training.train import train

    run = tmp_path_factory.mktemp("run") / "tray"
    config = TrainConfig(steps=3)
    dataset = open_dataset(demo_images, seed=config.seed)
    train(dataset, run, config, teacher=random_teacher, penalty=natural_images)
    return run


@pytest.fixture(scope="session")
def trained_bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FP32 bundle of `trained_run`. Copy it before you change it."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from edgead.export.pack import export_run

    path = tmp_path_factory.mktemp("bundle") / "tray.edgead"
    export_run(trained_run, path)
    return path
