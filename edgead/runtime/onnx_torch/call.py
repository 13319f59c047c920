"""A node of an ONNX graph on its way to a PyTorch function; what all operators share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgead.errors import BackendError
from edgead.runtime.onnx_file import Node

Function = Callable[..., Any]
_REQUIRED = object()


class Call:
    """A node together with what is known of its inputs when the batch size is known.

    Attributes:
        tensors: The inputs with their real shapes; None where one is left out. Those that the function
            takes are on `device`.
        known: The values of the inputs that are constants, on the host; None for the others.
        device: Where the function will run.
    """

    def __init__(
        self,
        node: Node,
        opset: int,
        tensors: Sequence[Tensor | None],
        known: Sequence[Tensor | None],
        device: torch.device,
    ) -> None:
        self.tensors, self.known, self.device = tensors, known, device
        self._node, self._opset = node, opset
        self._unread = dict(node.attributes)

    @property
    def x(self) -> Tensor:
        """The first input."""
        return self.input(0)

    def input(self, index: int) -> Tensor:
        """An input that must be there."""
        tensor = self.tensors[index] if index < len(self.tensors) else None
        if tensor is None:
            raise self.error(f"input {index} is missing")
        return tensor

    def attribute(self, name: str, default: Any = _REQUIRED) -> Any:
        """Its value, or the default of the operator's definition."""
        value = self._unread.pop(name, default)
        if value is _REQUIRED:
            raise self.error(f"the attribute {name} is missing")
        return value

    def expect(self, name: str, *values: Any) -> None:
        """Refuses other values of an attribute than these; the first is the default."""
        value = self.attribute(name, values[0])
        if value not in values:
            expected = " or ".join(map(repr, values))
            raise self.error(f"{name} is {value!r}, this interpreter knows only {expected}")

    def numbers(self, index: int) -> list[Any] | None:
        """The value of a constant input as a flat list; None if it is left out or empty."""
        if index >= len(self.tensors) or self.tensors[index] is None:
            return None
        value = self.known[index]
        if value is None:
            raise self.error(
                f"input {index} depends on the content of the image; only graphs whose shapes follow "
                "from the batch size can run here"
            )
        return value.flatten().tolist() or None

    def axis(self, value: int, rank: int | None = None) -> int:
        """An axis counted from the front."""
        rank = self.x.ndim if rank is None else rank
        if not -rank <= value < max(rank, 1):
            raise self.error(f"axis {value} of a tensor with {rank} axes")
        return value % rank if rank else 0

    def error(self, text: str) -> BackendError:
        """The error that names this node."""
        node = self._node
        return BackendError(f"node {node.name!r} ({node.op}, opset {self._opset}): {text}")

    def check_all_read(self) -> None:
        """Refuses attributes that no builder asked for: they could change the result."""
        if self._unread:
            raise self.error(f"the attributes {sorted(self._unread)} are not supported")


def picked(call: Call, axis: int, indices: np.ndarray) -> Function:
    """The function that takes x at these places of an axis."""
    places = torch.from_numpy(np.array(indices, np.int64)).to(call.device)
    return lambda x: x.index_select(axis, places)


def chain(functions: Sequence[Function]) -> Function:
    """The functions one after the other."""
    return lambda x: functools.reduce(lambda y, function: function(y), functions, x)
