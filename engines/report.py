"""What is inside an engine: its layers, their precisions and kernels, and its memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgead.engines.build import parse_network
from edgead.errors import EngineError
from edgead.flavour import Flavour, failure


@dataclass(frozen=True)
class Layer:
    """One layer; what is not known is "".

    Attributes:
        name: As in the ONNX graph, or of what TensorRT fused.
        kind: Such as "CONVOLUTION".
        precision: Of its first output, with the memory layout in an engine.
        shape: Of its first output, such as "Nx256x56x56".
        tactic: The kernel that was chosen.
        time: What TensorRT says about its time, in its own unit.
    """

    name: str
    kind: str
    precision: str
    shape: str
    tactic: str = ""
    time: str = ""


def network_layers(model: bytes, flavour: Flavour) -> list[Layer]:
    """The layers of a graph as TensorRT reads it, before it fuses any; needs no GPU.

    Raises:
        EngineError: TensorRT does not take the graph.
    """
    _builder, network, _parser = parse_network(model, flavour, flavour.new_log())
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensor = layer.get_output(0) if layer.num_outputs else None
        precision = tensor.dtype.name if tensor is not None else ""
        shape = _shape(tensor.shape) if tensor is not None else ""
        layers.append(Layer(layer.name, layer.type.name, precision, shape))
    return layers


def engine_layers(plan: bytes, flavour: Flavour) -> tuple[list[Layer], int]:
    """The layers of an engine and the device memory in bytes that one context of it takes.

    Args:
        plan: An engine of this GPU and library. Loading it runs code in it: check its origin before.

    Raises:
        EngineError: TensorRT refuses it. BackendError: TensorRT cannot start; it needs a GPU.
    """
    trt: Any = flavour.module
    log = flavour.new_log()
    runtime = flavour.new_runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise failure("the engine cannot be loaded", log)
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise failure("the engine cannot be inspected", log)
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return parse_information(text), int(engine.device_memory_size_v2)


def parse_information(text: str) -> list[Layer]:
    """Reads the inspector's JSON, with the names alone ("Layers": ["a", ...]) or with details.

    Raises:
        EngineError: It is something else.
    """
    try:
        return [_layer(item) for item in json.loads(text)["Layers"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"TensorRT's inspector gave no list of layers ({error!r}) but {text[:200]!r}: report this "
            "as a fault of edgead, with the version of TensorRT"
        ) from error


def _layer(item: Any) -> Layer:
    if isinstance(item, str):
        return Layer(item, "", "", "")
    outputs = item.get("Outputs") or [{}]
    time = next((str(value) for key, value in item.items() if "time" in key.lower()), "")
    return Layer(
        name=item["Name"],
        kind=item.get("LayerType", ""),
        precision=outputs[0].get("Format/Datatype", ""),
        shape=_shape(outputs[0].get("Dimensions", ())),
        tactic=str(item.get("TacticName") or item.get("TacticValue") or ""),
        time=time,
    )


def _shape(sides: Sequence[int]) -> str:
    return "x".join("N" if side < 0 else str(side) for side in sides)
