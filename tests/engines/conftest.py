"""Fixtures of the tests of engines."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from edgead.bundle import Bundle, Golden, write_bundle
from edgead.engines import prepare
from edgead.flavour import Flavour, open_flavour
from edgead.manifest import RESIZE_IN_GRAPH, Calibration, InputSpec, Manifest, OutputSpec, Threshold
from edgead.runtime.cuda import GpuInfo
from tests.real_bindings import api_of, apis, stubs

__all__ = ["api_of", "apis", "stubs"]  # fixtures

FRAME = (480, 640)


@pytest.fixture(scope="session")
def rtx() -> Flavour:
    """The real TensorRT for RTX, which builds without a GPU."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    return open_flavour("tensorrt-rtx")


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of engines of this test, still absent. A GPU is not looked for: engines are not run."""
    folder = tmp_path / "engines"
    monkeypatch.setenv("EDGEAD_CACHE", str(folder))
    if prepare.detect_gpu()[0] is not None:
        monkeypatch.setattr(prepare, "detect_gpu", lambda: (None, "hidden from this test"))
    return folder


@pytest.fixture(scope="session")
def tiny_opened(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def gpu() -> GpuInfo:
    """A GPU that TensorRT for RTX knows; nothing runs on it."""
    return GpuInfo(
        name="NVIDIA RTX A2000",
        compute_capability=(8, 6),
        driver="12.8",
        memory_bytes=6 << 30,
        is_integrated=False,
    )


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes, str], Path]:
    """Function (graph, name) that writes a bundle; its golden answers are not those of the graph."""

    def make(model: bytes, name: str, *, side: tuple[int, int] = (256, 256)) -> Path:
        manifest = Manifest(
            method="efficientad-s",
            name=name,
            precision="fp32",
            input=InputSpec(height=side[0], width=side[1]),
            outputs={"score": OutputSpec(shape=("N",)), "anomaly_map": OutputSpec(shape=("N", 64, 64))},
            calibration=Calibration(
                values=(1.0, 1.0, 0.0), names=("a", "b", "c"), meaning="none: random weights"
            ),
            threshold=Threshold(value=0.5, basis="none: random weights"),
        )
        if side != (256, 256):
            frame = dataclasses.replace(manifest.input, resize=RESIZE_IN_GRAPH)
            manifest = dataclasses.replace(manifest, input=frame)
        golden = Golden(
            np.zeros((1, *side, 3), np.uint8),
            np.zeros(1, np.float32),
            np.zeros((1, 64, 64), np.float32),
        )
        path = tmp_path_factory.mktemp("bundle") / f"{name.replace(' ', '_')}.edgead"
        write_bundle(path, manifest, model, golden)
        return path

    return make


@pytest.fixture(scope="session")
def efficientad(make_bundle: Callable[..., Path]) -> Callable[[str, str, bool], Path]:
    """Function (size, precision, with --frame) that gives a bundle with seeded random weights."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from edgead.export.graph import MergedGraph
    from edgead.export.to_onnx import to_onnx
    from edgead.models.pdn import PDN
    from edgead.training.efficientad import build_model

    @cache
    def get(size: str, precision: str, has_frame: bool) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_model(PDN(size), seed=0).eval()
        dtype = torch.float16 if precision == "fp16" else torch.float32
        graph = MergedGraph(model, dtype=dtype, frame=FRAME if has_frame else None)
        name = f"{size} {precision}{' frame' if has_frame else ''}"
        return make_bundle(to_onnx(graph), name, side=FRAME if has_frame else (256, 256))

    return get
