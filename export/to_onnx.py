"""PyTorch module -> ONNX file content, and what must hold for it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator

import onnx
import torch

from edgead.errors import ExportError
from edgead.export.graph import MergedGraph

OPSET = 18
MAX_BATCH = 64
INPUTS = ["image", "calibration"]
OUTPUTS = ["score", "anomaly_map"]


def to_onnx(graph: MergedGraph) -> bytes:
    """Serialise the merged graph, dynamic in the batch only, and check it.

    Raises:
        ExportError: the exporter gave another opset, double precision, training nodes or a node that
            TensorRT's parsers refuse.
    """
    height, width = graph.frame or graph.input_px
    example = (
        torch.zeros(2, height, width, 3, dtype=torch.uint8),
        torch.zeros(graph.calibration_values),
    )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    with _quiet():
        model = _export(graph, example) if version >= (2, 5) else _export_torch_2_4(graph, example)
    # The exporters call the batch s0 or batch, and lose sizes: one name and the known sizes for all.
    for value in [*model.graph.input, *model.graph.output]:
        sizes = value.type.tensor_type.shape.dim
        if sizes[0].dim_param:
            sizes[0].dim_param = "batch"
        if value.name == "anomaly_map":
            for size, cells in zip(sizes[1:], graph.map_cells, strict=True):
                size.dim_value = cells
    check(model)
    return model.SerializeToString()


def _export(graph: MergedGraph, example: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    program = torch.onnx.export(
        graph,
        example,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}, None),
        external_data=False,
        input_names=INPUTS,
        output_names=OUTPUTS,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _export_torch_2_4(graph: MergedGraph, example: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """The older exporter: torch 2.4 has the newer one only behind another interface."""
    buffer = io.BytesIO()
    batch = {0: "batch"}
    torch.onnx.export(
        graph,
        example,
        buffer,
        dynamo=False,
        opset_version=OPSET,
        dynamic_axes={INPUTS[0]: batch, OUTPUTS[0]: batch, OUTPUTS[1]: batch},
        input_names=INPUTS,
        output_names=OUTPUTS,
    )
    return onnx.load_from_string(buffer.getvalue())


def check(model: onnx.ModelProto) -> None:
    """Refuse graphs that are invalid or that TensorRT's parsers would misread.

    The error names the nodes.
    """
    onnx.checker.check_model(model, full_check=True)
    opsets = {
        entry.domain: entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")
    }
    if set(opsets.values()) != {OPSET}:
        raise ExportError(
            f"the exporter wrote opset {opsets}, expected {OPSET};"
            " use the torch version named in the README"
        )
    inferred = onnx.shape_inference.infer_shapes(model).graph
    double = [
        value.name
        for value in [*inferred.value_info, *inferred.input, *inferred.output]
        if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    ]
    double += [
        tensor.name for tensor in inferred.initializer if tensor.data_type == onnx.TensorProto.DOUBLE
    ]
    if double:
        raise ExportError(
            "double precision in the graph, which TensorRT silently makes float:"
            f" {', '.join(double[:5])}"
        )
    uses = [node for node in model.graph.node if "image" in node.input]
    if [node.op_type for node in uses] != ["Cast"]:
        raise ExportError(
            f"the uint8 image goes into {[node.op_type for node in uses]};"
            " TensorRT takes nothing but a Cast there"
        )
    forbidden = {"Dropout", "NonZero", "Unique", "Loop", "If"} & {
        node.op_type for node in model.graph.node
    }
    if forbidden:
        raise ExportError(
            f"the graph holds {', '.join(sorted(forbidden))}; TensorRT refuses or misreads these"
        )


def describe(content: bytes) -> dict[str, object]:
    """Nodes by type, weights and opset of an ONNX file: what `edgead inspect` shows."""
    model = onnx.load_from_string(content)
    types = Counter(node.op_type for node in model.graph.node)
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    return {
        "opset": model.opset_import[0].version,
        "nodes": dict(types.most_common()),
        "weights_bytes": weights,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints and warns about its own internals.

    Errors are exceptions and still come through.
    """
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
