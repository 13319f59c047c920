"""ONNX operators (opset 18 to 20) as PyTorch functions; what is not here, `edgead` does not export.

Each builder gets a `Call`: one node whose constant inputs and shapes are known. It returns a function of
the node's tensors, in which nothing depends on values on the device, so that a CUDA graph can hold it.
https://onnx.ai/onnx/operators/ defines the operators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.runtime.onnx_torch import spatial
from edgead.runtime.onnx_torch.call import Call, Function, chain, picked

_DTYPES = {  # numbers of onnx.TensorProto.DataType
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def _plain(function: Function) -> Callable[[Call], Function]:
    """Builder of an operator without attributes."""
    return lambda call: function


def _fold(function: Function) -> Callable[[Call], Function]:
    """Builder of a binary operator that takes any number of inputs."""
    return lambda call: lambda *tensors: functools.reduce(function, tensors)


def _div(call: Call) -> Function:
    if call.x.is_floating_point():
        return torch.div
    return functools.partial(torch.div, rounding_mode="trunc")


def _pow(call: Call) -> Function:
    exponent = call.known[1]
    if exponent is not None and exponent.numel() == 1 and exponent.ndim <= call.x.ndim:
        value = exponent.item()  # a square as such, not as a logarithm and an exponential
        return lambda x, _: torch.pow(x, value).to(x.dtype)
    return lambda x, y: torch.pow(x, y).to(x.dtype)


def _cast(call: Call) -> Function:
    call.attribute("saturate", 1)  # of float8 only
    number = call.attribute("to")
    if number not in _DTYPES:
        raise call.error(f"the data type number {number} is not supported")
    dtype = _DTYPES[number]
    return lambda x: x.to(dtype)


# --- shapes


def _transpose(call: Call) -> Function:
    order = call.attribute("perm", list(range(call.x.ndim))[::-1])
    return lambda x: x.permute(order)


def _shape(call: Call) -> Function:
    start, end = call.attribute("start", 0), call.attribute("end", None)
    sides = list(call.x.shape)[start:end]
    return lambda x: torch.tensor(sides, dtype=torch.int64, device="cpu")


def _reshaped(sides: Sequence[int]) -> Function:
    return lambda x: x.reshape(sides)


def _reshape(call: Call) -> Function:
    keeps_zero = call.attribute("allowzero", 0)
    sides = call.numbers(1) or []
    if not keeps_zero:
        sides = [call.x.shape[axis] if side == 0 else side for axis, side in enumerate(sides)]
    return _reshaped(sides)


def _flatten(call: Call) -> Function:
    axis = call.attribute("axis", 1)
    axis = axis + call.x.ndim if axis < 0 else axis
    return _reshaped([math.prod(call.x.shape[:axis]), math.prod(call.x.shape[axis:])])


def _squeeze(call: Call) -> Function:
    sides = list(call.x.shape)
    given = call.numbers(1)
    axes = {axis for axis, side in enumerate(sides) if side == 1}
    if given is not None:
        wanted = {call.axis(axis) for axis in given}
        if not wanted <= axes:
            raise call.error(f"axes {given} of a tensor of shape {sides} are not all of size 1")
        axes = wanted
    return _reshaped([side for axis, side in enumerate(sides) if axis not in axes])


def _unsqueeze(call: Call) -> Function:
    given = call.numbers(1) or []
    rank = call.x.ndim + len(given)
    axes = {call.axis(axis, rank) for axis in given}
    sides = iter(call.x.shape)
    return _reshaped([1 if axis in axes else next(sides) for axis in range(rank)])


def _expand(call: Call) -> Function:
    sides = torch.broadcast_shapes(call.x.shape, tuple(call.numbers(1) or ()))
    return lambda x: x.expand(sides)


def _constant_of_shape(call: Call) -> Function:
    value = torch.from_numpy(call.attribute("value", np.zeros(1, np.float32))).reshape(())
    sides = call.numbers(0) or []
    return lambda x: value.expand(sides).to(x.device)


def _concat(call: Call) -> Function:
    axis = call.axis(call.attribute("axis"))
    return lambda *tensors: torch.cat(tensors, axis)


def _split(call: Call) -> Function:
    axis = call.axis(call.attribute("axis", 0))
    count, sizes = call.attribute("num_outputs", None), call.numbers(1)
    if sizes is None:
        if count is None:
            raise call.error("neither sizes nor num_outputs are given")
        side = call.x.shape[axis]
        size = -(-side // count)
        sizes = [size] * (count - 1) + [side - size * (count - 1)]
    return lambda x: torch.split(x, sizes, axis)


def _slice(call: Call) -> Function:
    starts, ends = call.numbers(1) or [], call.numbers(2) or []
    axes = call.numbers(3) or list(range(len(starts)))
    steps = call.numbers(4) or [1] * len(starts)
    functions: list[Function] = []
    window = [slice(None)] * call.x.ndim
    for start, end, axis, step in zip(starts, ends, map(call.axis, axes), steps, strict=True):
        side = call.x.shape[axis]
        if step > 0:
            window[axis] = slice(*slice(start, end, step).indices(side))
        else:  # torch has no negative steps, and NumPy clamps a start before the first place otherwise
            first, last = (place + side * (place < 0) for place in (start, end))
            first, last = min(max(first, 0), side - 1), min(max(last, -1), side - 1)
            functions.append(picked(call, axis, np.arange(first, last, step)))
    return chain([lambda x: x[tuple(window)], *functions])


def _gather(call: Call) -> Function:
    axis = call.axis(call.attribute("axis", 0))
    numbers, indices = call.numbers(1) or [], call.input(1)
    side = call.x.shape[axis]
    if not all(-side <= index < side for index in numbers):
        raise call.error(f"indices {numbers} of an axis of size {side}")
    places = np.array(numbers, np.int64) % side
    if indices.ndim == 0:
        return lambda x: x.select(axis, int(places[0]))
    sides = [*call.x.shape[:axis], *indices.shape, *call.x.shape[axis + 1 :]]
    return chain([picked(call, axis, places), _reshaped(sides)])


# --- reductions and the like


def _reduce(function: Function) -> Callable[[Call], Function]:
    """Builder for a function (x, axes, keepdim)."""

    def builder(call: Call) -> Function:
        keeps = bool(call.attribute("keepdims", 1))
        call.expect("noop_with_empty_axes", 0)
        axes = [call.axis(axis) for axis in call.numbers(1) or range(call.x.ndim)]
        return lambda x: function(x, axes, keeps)

    return builder


def _sum(x: Tensor, axes: list[int], keeps: bool) -> Tensor:
    return x.sum(axes, keeps, dtype=x.dtype)


def _norm(x: Tensor, axes: list[int], keeps: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 2, axes, keeps)


def _clip(call: Call) -> Function:
    least, most = call.numbers(1), call.numbers(2)
    if least is None and most is None:
        return lambda x: x
    return functools.partial(torch.clamp, min=least and least[0], max=most and most[0])


def _softmax(call: Call) -> Function:
    return functools.partial(torch.softmax, dim=call.axis(call.attribute("axis", -1)))


def _top_k(call: Call) -> Function:
    axis = call.axis(call.attribute("axis", -1))
    is_largest, is_sorted = bool(call.attribute("largest", 1)), bool(call.attribute("sorted", 1))
    count = (call.numbers(1) or [0])[0]
    return lambda x: tuple(torch.topk(x, count, axis, is_largest, is_sorted))


def _layer_norm(call: Call) -> Function:
    call.attribute("stash_type", 1)  # torch sums up FP16 in FP32, too
    axis, epsilon = call.axis(call.attribute("axis", -1)), call.attribute("epsilon", 1e-5)
    sides = call.x.shape[axis:]

    def function(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        shift = shift if shift is None else shift.expand(sides)
        return F.layer_norm(x, sides, scale.expand(sides), shift, epsilon)

    return function


def _gemm(call: Call) -> Function:
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    flip_a, flip_b = call.attribute("transA", 0), call.attribute("transB", 0)

    def function(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.T if flip_a else a, b.T if flip_b else b
        if c is not None:
            return torch.addmm(c, a, b, beta=beta, alpha=alpha)
        return a @ b if alpha == 1 else alpha * (a @ b)

    return function


# Operator -> its builder and how many of its inputs the function takes (None: all). The others are
# settings and must be constants.
OPERATORS: dict[str, tuple[Callable[[Call], Function], int | None]] = {
    "Abs": (_plain(torch.abs), None),
    "Add": (_plain(torch.add), None),
    "AveragePool": (spatial.average_pool, None),
    "Cast": (_cast, None),
    "Ceil": (_plain(torch.ceil), None),
    "Clip": (_clip, 1),
    "Concat": (_concat, None),
    "ConstantOfShape": (_constant_of_shape, 1),
    "Conv": (spatial.conv, None),
    "Conv+Relu": (functools.partial(spatial.conv, has_relu=True), None),
    "Div": (_div, None),
    "Equal": (_plain(torch.eq), None),
    "Erf": (_plain(torch.erf), None),
    "Exp": (_plain(torch.exp), None),
    "Expand": (_expand, 1),
    "Flatten": (_flatten, None),
    "Floor": (_plain(torch.floor), None),
    "Gather": (_gather, 1),
    "Gemm": (_gemm, None),
    "GlobalAveragePool": (spatial.global_average_pool, None),
    "Identity": (_plain(lambda x: x), None),
    "LayerNormalization": (_layer_norm, None),
    "MatMul": (_plain(torch.matmul), None),
    "Max": (_fold(torch.maximum), None),
    "MaxPool": (spatial.max_pool, None),
    "Min": (_fold(torch.minimum), None),
    "Mul": (_plain(torch.mul), None),
    "Neg": (_plain(torch.neg), None),
    "Pad": (spatial.pad, 1),
    "Pow": (_pow, None),
    "ReduceL2": (_reduce(_norm), 1),
    "ReduceMax": (_reduce(torch.amax), 1),
    "ReduceMean": (_reduce(torch.mean), 1),
    "ReduceMin": (_reduce(torch.amin), 1),
    "ReduceSum": (_reduce(_sum), 1),
    "Relu": (_plain(torch.relu), None),
    "Reshape": (_reshape, 1),
    "Resize": (spatial.resize, 1),
    "Round": (_plain(torch.round), None),
    "Shape": (_shape, None),
    "Sigmoid": (_plain(torch.sigmoid), None),
    "Slice": (_slice, 1),
    "Softmax": (_softmax, None),
    "Split": (_split, 1),
    "Sqrt": (_plain(torch.sqrt), None),
    "Squeeze": (_squeeze, 1),
    "Sub": (_plain(torch.sub), None),
    "Tanh": (_plain(torch.tanh), None),
    "TopK": (_top_k, 1),
    "Transpose": (_transpose, None),
    "Unsqueeze": (_unsqueeze, 1),
    "Where": (_plain(torch.where), None),
}
