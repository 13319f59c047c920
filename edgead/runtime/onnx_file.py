"""An ONNX file as plain Python and NumPy data: what an interpreter needs, and nothing of protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgead.errors import BackendError
from edgead.runtime.backend import TensorSpec

OPSETS = range(18, 21)  # the exporter writes 18; 19 and 20 change no operator that is used here


@dataclass(frozen=True, eq=False)
class Node:
    """One operator.

    Attributes:
        name: As in the file, or its first output where the file gives none.
        op: Such as "Conv"; of another domain than ONNX's own "domain::Op".
        inputs: Names of values; empty for an optional input that is left out.
        outputs: Likewise.
        attributes: int, float, str, array, or a list of these.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A graph whose every value is an input, a constant or the output of an earlier node.

    Attributes:
        opset: Version of the operators' definitions.
        inputs: Without the constants.
        outputs: In the file's order.
        constants: Name to array: initializers and what Constant nodes hold.
        nodes: In an order in which they can run; no Constant among them.
    """

    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, np.ndarray]
    nodes: tuple[Node, ...]


def read_graph(content: bytes, origin: str) -> OnnxGraph:
    """Reads the content of an ONNX file; `origin` names it in errors.

    Raises:
        BackendError: The package onnx is not installed, or this is no complete ONNX graph of the opsets
            `OPSETS`.
    """
    try:
        import onnx
    except Exception as error:  # TypeError, say: it was built for another protobuf
        raise BackendError(
            f"the graph of {origin} cannot be read, the package onnx cannot be imported ({error}): "
            "pip install onnx"
        ) from error
    try:
        model = onnx.load_from_string(content)
        opsets = {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
        if len(opsets) != 1 or not opsets <= set(OPSETS):
            raise ValueError(f"opset {sorted(opsets)}, expected one of {list(OPSETS)}")
        graph = model.graph
        constants = {tensor.name: _array(tensor) for tensor in graph.initializer}
        nodes = []
        for proto in graph.node:
            node = _node(proto)
            if node.op == "Constant":
                constants[node.outputs[0]] = _constant(node)
            else:
                nodes.append(node)
        inputs = tuple(_spec(value) for value in graph.input if value.name not in constants)
        outputs = tuple(_spec(value) for value in graph.output)
        _check_order(nodes, {*constants, *(spec.name for spec in inputs)}, outputs)
    except Exception as error:  # protobuf's exceptions have no common base below Exception
        raise BackendError(
            f"torch-cuda refuses the graph of {origin}: {error}. Export the bundle again"
        ) from error
    return OnnxGraph(opsets.pop(), inputs, outputs, constants, tuple(nodes))


def _node(proto: Any) -> Node:
    name = proto.name or (proto.output[0] if proto.output else "")
    is_standard = proto.domain in ("", "ai.onnx")
    op = proto.op_type if is_standard else f"{proto.domain}::{proto.op_type}"
    attributes = {attribute.name: _value(attribute) for attribute in proto.attribute}
    return Node(name, op, tuple(proto.input), tuple(proto.output), attributes)


def _value(attribute: Any) -> Any:
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return _array(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return list(value)
    return value


def _array(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    if tensor.data_location == tensor.EXTERNAL:
        raise ValueError(f"the weights {tensor.name!r} lie in another file")
    return np.array(numpy_helper.to_array(tensor))  # a copy, which does not hold the file's bytes


def _constant(node: Node) -> np.ndarray:
    dtypes = {"value_float": "f4", "value_floats": "f4", "value_int": "i8", "value_ints": "i8"}
    (name, value), *others = node.attributes.items()
    if others or (name != "value" and name not in dtypes):
        raise ValueError(f"node {node.name!r} (Constant) holds {sorted(node.attributes)}")
    return value if name == "value" else np.array(value, dtypes[name])


def _spec(value: Any) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "unknown"
    sides = (side.dim_value if side.HasField("dim_value") else None for side in tensor.shape.dim)
    return TensorSpec(value.name, dtype, tuple(sides))


def _check_order(nodes: list[Node], known: set[str], outputs: tuple[TensorSpec, ...]) -> None:
    for node in nodes:
        absent = [name for name in node.inputs if name and name not in known]
        if absent:
            raise ValueError(f"node {node.name!r} ({node.op}) reads {absent[0]!r}, which nothing wrote")
        known.update(node.outputs)
    absent = [spec.name for spec in outputs if spec.name not in known]
    if absent:
        raise ValueError(f"nothing writes the output {absent[0]!r}")
