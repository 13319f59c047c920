"""An ONNX graph run by PyTorch: any graph that edgead exports, on the CPU or an NVIDIA GPU.

Whatever follows from the batch size alone (shapes, and what graphs compute from them) is computed once,
on the host. What remains is a fixed list of PyTorch calls on the device: no value ever comes back to the
host in between, so that a CUDA graph can hold the whole list.

Numbers are what the file says: an FP16 graph runs in FP16, an FP32 graph in FP32. A convolution and the
ReLU behind it become one call.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgead.errors import BackendError
from edgead.runtime.onnx_file import Node, OnnxGraph
from edgead.runtime.onnx_torch.call import Call, Function
from edgead.runtime.onnx_torch.operators import OPERATORS


@contextmanager
def _as_written() -> Iterator[None]:
    """The numbers that the file says, whatever autocast the caller is in."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        with torch.autocast("cuda", enabled=False):
            yield


@dataclass
class _Step:
    """One call: `results = function(*operands)`, after which the `dead` values are not needed."""

    function: Function
    operands: tuple[str, ...]
    results: tuple[str, ...]
    dead: list[str] = field(default_factory=list)


class Program:
    """A graph for one batch size. Holds no state between calls: threads may share it.

    Attributes:
        shapes: Of the outputs, by name.
    """

    def __init__(
        self, constants: dict[str, Tensor], steps: list[_Step], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self._constants, self._steps, self.shapes = constants, steps, shapes

    @_as_written()
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Enqueues the graph on the current stream.

        Args:
            inputs: All inputs of the graph by name, on the program's device, of the shapes that it was
                made for.
        """
        values = {**self._constants, **inputs}
        for step in self._steps:
            operands = (values[name] if name else None for name in step.operands)
            _store(values, step.results, step.function(*operands))
            for name in step.dead:
                del values[name]
        return {name: values[name] for name in self.shapes}


class Network:
    """A graph with its weights on a device, where all programs made of it share them."""

    def __init__(self, graph: OnnxGraph, device: torch.device) -> None:
        """Copies nothing yet.

        Raises:
            BackendError: A node on constants alone is not supported.
        """
        self._device, self._opset = device, graph.opset
        self._outputs = [spec.name for spec in graph.outputs]
        self._known: dict[str, Tensor] = {}
        for name, array in graph.constants.items():
            try:
                self._known[name] = torch.from_numpy(array)
            except TypeError as error:
                raise BackendError(f"the constant {name!r} has the data type {array.dtype}") from error
        self._placed: dict[tuple[str, bool], Tensor] = {}
        with _as_written():  # folded now rather than in each program, so that it is on the device once
            nodes = [node for node in graph.nodes if not self._fold(node, self._known, {})]
        self._nodes = _join_conv_relu(nodes, self._outputs)
        self._last_use = {name: index for index, node in enumerate(self._nodes) for name in node.inputs}

    @_as_written()
    def specialise(self, examples: Mapping[str, Tensor]) -> Program:
        """Makes the program for inputs of the shapes of these examples, and runs it once on them.

        Raises:
            BackendError: A node is not supported, or fails; the text names it.
            RuntimeError: The device failed or is out of memory.
        """
        known, live = dict(self._known), dict(examples)
        placed: dict[str, Tensor] = {}
        steps: list[_Step] = []
        for index, node in enumerate(self._nodes):
            if not self._fold(node, known, live):
                steps.append(self._step(node, known, live, placed))
            dead = [
                name
                for name in {*node.inputs, *node.outputs} & live.keys()
                if self._last_use.get(name, -1) <= index and name not in self._outputs
            ]
            for name in dead:
                del live[name]
            if steps:
                steps[-1].dead += dead
        for name in self._outputs:
            if name not in live:
                live[name] = placed[name] = self._place(name, known[name])
        return Program(placed, steps, {name: tuple(live[name].shape) for name in self._outputs})

    def _fold(self, node: Node, known: dict[str, Tensor], live: Mapping[str, Tensor]) -> bool:
        """Computes a node whose result follows from shapes and constants; on the host."""
        is_shape = node.op == "Shape" and node.inputs[0] in live
        if not is_shape and not all(name in known for name in node.inputs if name):
            return False
        values = [known.get(name, live.get(name)) if name else None for name in node.inputs]
        call = Call(node, self._opset, values, values, torch.device("cpu"))
        function, taken = _build(call, node)
        _store(known, node.outputs, _run(call, function, values[:taken]))
        return True

    def _step(
        self, node: Node, known: Mapping[str, Tensor], live: dict[str, Tensor], placed: dict[str, Tensor]
    ) -> _Step:
        operands: list[str] = []
        tensors: list[Tensor | None] = []
        taken = OPERATORS[node.op][1] if node.op in OPERATORS else 0
        for index, name in enumerate(node.inputs):
            is_operand = taken is None or index < taken
            key = name
            if name in known and is_operand:
                is_weight = index == 1 and node.op.startswith("Conv") and known[name].ndim == 4
                key = f"{name} (channels last)" if is_weight else name
                placed[key] = self._place(name, known[name], channels_last=is_weight)
            tensors.append(placed.get(key, live.get(name, known.get(name))) if name else None)
            operands += [key] * is_operand
        call = Call(node, self._opset, tensors, [known.get(name) for name in node.inputs], self._device)
        function, _ = _build(call, node)
        _store(live, node.outputs, _run(call, function, tensors[: len(operands)]))
        return _Step(function, tuple(operands), node.outputs)

    def _place(self, name: str, value: Tensor, *, channels_last: bool = False) -> Tensor:
        """A constant on the device; those of the file are copied once for all programs."""
        key = name, channels_last
        if key in self._placed:
            return self._placed[key]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        placed = value.to(self._device).contiguous(memory_format=layout)
        if name in self._known:
            self._placed[key] = placed
        return placed


def _join_conv_relu(nodes: list[Node], outputs: list[str]) -> list[Node]:
    """Makes one node of a convolution and the ReLU that alone reads it."""
    uses = Counter([*(name for node in nodes for name in node.inputs), *outputs])
    convolved = {node.outputs[0] for node in nodes if node.op == "Conv"}
    relus = {
        node.inputs[0]: node
        for node in nodes
        if node.op == "Relu" and node.inputs[0] in convolved and uses[node.inputs[0]] == 1
    }
    joined = []
    for node in nodes:
        if node.op == "Conv" and node.outputs[0] in relus:
            outputs_of_both = relus[node.outputs[0]].outputs
            joined.append(dataclasses.replace(node, op="Conv+Relu", outputs=outputs_of_both))
        elif node not in relus.values():
            joined.append(node)
    return joined


def _build(call: Call, node: Node) -> tuple[Function, int | None]:
    """The function of a node and how many of its inputs it takes (None: all)."""
    if node.op not in OPERATORS:
        raise call.error(f"the operator {node.op} is not supported")
    builder, taken = OPERATORS[node.op]
    try:
        function = builder(call)
    except BackendError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise call.error(f"its attributes or constant inputs make no sense ({error})") from error
    call.check_all_read()
    return function, taken


def _run(call: Call, function: Function, tensors: Sequence[Tensor | None]) -> Any:
    try:
        return function(*tensors)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA error" in str(error):
            raise  # not the node's fault
        raise call.error(str(error)) from error


def _store(values: dict[str, Tensor], names: Sequence[str], results: Any) -> None:
    if isinstance(results, Tensor):
        results = (results,)
    values.update((name, result) for name, result in zip(names, results, strict=False) if name)
