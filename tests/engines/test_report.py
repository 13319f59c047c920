"""What is told about the inside of an engine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgead.bundle import Bundle
from edgead.engines.build import build_engine
from edgead.engines.prepare import detect_gpu
from edgead.engines.report import Layer, engine_layers, network_layers, parse_information
from edgead.errors import EngineError
from edgead.flavour import Flavour
from tests.fake_tensorrt import make


def test_the_layers_of_the_tiny_graph(rtx: Flavour, tiny_opened: Bundle) -> None:
    """The operators of `tests/conftest.py: tiny_model`, as TensorRT's parser reads them."""
    layers = network_layers(tiny_opened.model_bytes(), rtx)
    kinds = Counter(layer.kind for layer in layers)
    assert kinds["CONVOLUTION"] == 3 and kinds["REDUCE"] == 1 and layers[0].kind == "CAST"
    convolutions = [layer for layer in layers if layer.kind == "CONVOLUTION"]
    assert {(layer.precision, layer.shape) for layer in convolutions} == {("FLOAT", "Nx1x64x64")}
    assert all(layer.name for layer in layers)


def test_half_precision_shows(rtx: Flavour, efficientad: Any) -> None:
    bundle = Bundle.open(efficientad("s", "fp16", False))
    layers = network_layers(bundle.model_bytes(), rtx)
    convolutions = [layer for layer in layers if layer.kind in ("CONVOLUTION", "DECONVOLUTION")]
    assert len(convolutions) == 19  # as `edgead inspect` counts them in the ONNX file
    assert {layer.precision for layer in convolutions} == {"HALF"}
    assert layers[0] == Layer(layers[0].name, "CAST", "FLOAT", "Nx256x256x3")


def test_a_graph_that_is_refused(rtx: Flavour) -> None:
    with pytest.raises(EngineError, match="does not take the graph"):
        network_layers(b"no graph", rtx)


# In the form that NVIDIA's public documentation of the engine inspector shows.
DETAILED = {
    "Layers": [
        {
            "Name": "node_conv2d + node_relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "image", "Dimensions": [1, 3, 256, 256], "Format/Datatype": "Half"}],
            "Outputs": [
                {
                    "Name": "x",
                    "Location": "Device",
                    "Dimensions": [-1, 256, 253, 253],
                    "Format/Datatype": "Channel major FP16 format where channel % 8 == 0",
                }
            ],
            "TacticName": "sm80_xmma_fprop_implicit_gemm_f16",
            "TacticValue": "0x51b7cfa7b8ad0a3c",
            "StreamId": 0,
        },
        {"Name": "shape", "LayerType": "NoOp", "Outputs": [], "TacticValue": "0x0", "AverageTime": 0.25},
        "only a name",
    ],
    "Bindings": ["image", "score"],
}


def test_the_inspector_of_an_engine() -> None:
    assert parse_information(json.dumps(DETAILED)) == [
        Layer(
            "node_conv2d + node_relu",
            "CaskConvolution",
            "Channel major FP16 format where channel % 8 == 0",
            "Nx256x253x253",
            "sm80_xmma_fprop_implicit_gemm_f16",
        ),
        Layer("shape", "NoOp", "", "", "0x0", "0.25"),
        Layer("only a name", "", "", ""),
    ]


@pytest.mark.parametrize("text", ["", "Layers: a, b", "[]", "{}", '{"Layers": [7]}', '{"Layers": 7}'])
def test_what_is_no_list_of_layers(text: str) -> None:
    with pytest.raises(EngineError, match="inspector gave no list of layers"):
        parse_information(text)


def test_an_engine_is_loaded_and_asked(tiny_opened: Bundle) -> None:
    """On a stand-in for TensorRT: real engines load on their GPU only."""
    classic = Flavour("tensorrt", make("tensorrt", None), "10.13.3.9")
    plan = build_engine(tiny_opened.model_bytes(), classic, target="sm87")
    layers, memory_bytes = engine_layers(plan, classic)
    assert layers == [Layer("everything", "fake", "", "")] and memory_bytes == 1 << 20
    with pytest.raises(EngineError, match="cannot be loaded.*\n.*magic tag does not match"):
        engine_layers(b"no engine", classic)


def test_without_a_gpu_an_engine_cannot_be_loaded(
    rtx: Flavour, tiny_opened: Bundle, tmp_path: Path
) -> None:
    if detect_gpu()[0] is not None:
        pytest.skip("there is a GPU")
    plan = build_engine(tiny_opened.model_bytes(), rtx, target="sm86")
    with pytest.raises(EngineError, match="(?s)cannot be loaded.*cause: there is no NVIDIA driver"):
        engine_layers(plan, rtx)
