"""ONNX operators on images, as PyTorch functions: convolution, pooling, padding, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.runtime.onnx_torch.call import Call, Function, chain, picked


def pad(call: Call) -> Function:
    mode = call.attribute("mode", "constant")
    widths = call.numbers(1) or []
    axes = [call.axis(axis) for axis in call.numbers(3) or range(len(widths) // 2)]
    pairs = dict(
        zip(axes, zip(widths[: len(axes)], widths[len(axes) :], strict=True), strict=True)
    )  # axis -> (before, after)
    if mode == "constant":
        value = (call.numbers(2) or [0])[0]
        torch_widths = [
            width for axis in reversed(range(call.x.ndim)) for width in pairs.get(axis, (0, 0))
        ]
        return lambda x: F.pad(x, torch_widths, value=value)
    if mode not in ("reflect", "edge", "wrap") or min(widths, default=0) < 0:
        raise call.error(f"mode {mode!r} with pads {widths} is not supported")
    sources: Any = np.pad  # its modes have the names of ONNX; with a text, mypy wants a literal
    return chain(
        [
            picked(call, axis, sources(np.arange(call.x.shape[axis]), pair, mode))
            for axis, pair in pairs.items()
            if pair != (0, 0)
        ]
    )


# --- windows


def _begin_end(call: Call, kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """Pads before and after each of the two axes."""
    call.expect("auto_pad", "NOTSET", "VALID")
    if call.x.ndim != 4 or len(kernel) != 2:
        raise call.error(f"the input has the shape {list(call.x.shape)}, expected four axes")
    pads = call.attribute("pads", [0] * 4)
    return pads[:2], pads[2:]


def _outside(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """The same pads in the order of torch.nn.functional.pad."""
    return [begin[1], end[1], begin[0], end[0]]


def conv(call: Call, *, has_relu: bool = False) -> Function:
    weight = call.input(1)
    call.attribute("kernel_shape", None)  # that of the weight
    begin, end = _begin_end(call, weight.shape[2:])
    stride, dilation = call.attribute("strides", [1, 1]), call.attribute("dilations", [1, 1])
    groups = call.attribute("group", 1)
    padding = begin if begin == end else [0, 0]

    def plain(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, w, b, stride, padding, dilation, groups)
        return y.relu_() if has_relu else y

    def fused(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return torch.cudnn_convolution_relu(x, w, b, stride, padding, dilation, groups)

    if begin != end:
        return lambda x, *weights: plain(F.pad(x, _outside(begin, end)), *weights)
    if has_relu and call.device.type == "cuda" and _ms(fused, call.tensors) < _ms(plain, call.tensors):
        return fused
    return plain


def _ms(function: Function, tensors: Sequence[Tensor | None]) -> float:
    """Time of ten calls on the GPU; infinite if cuDNN has no such kernel or PyTorch no cuDNN.

    Fused kernels are mostly quicker, but not for every shape (github.com/pytorch/pytorch/issues/68506).
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    try:
        for _ in range(3):  # in the first one cuDNN chooses
            function(*tensors)
        start.record()
        for _ in range(10):
            function(*tensors)
        end.record()
        end.synchronize()
    except RuntimeError:
        return math.inf
    return start.elapsed_time(end)


def _window(call: Call) -> tuple[list[int], list[int], list[int], list[int], bool]:
    """kernel, stride, pads before, pads after, ceil_mode"""
    kernel = call.attribute("kernel_shape")
    begin, end = _begin_end(call, kernel)
    stride, ceil_mode = call.attribute("strides", [1, 1]), bool(call.attribute("ceil_mode", 0))
    if ceil_mode and not _pools_in_torch(kernel, begin, end):
        raise call.error(f"ceil_mode with the pads {begin + end} is not supported")
    return kernel, stride, begin, end, ceil_mode


def _pools_in_torch(kernel: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> bool:
    """Its pooling pads both sides alike, by no more than half the kernel."""
    return begin == end and all(2 * pad <= side for pad, side in zip(begin, kernel, strict=True))


def average_pool(call: Call) -> Function:
    kernel, stride, begin, end, ceil_mode = _window(call)
    call.expect("dilations", [1, 1])
    counts_pad = bool(call.attribute("count_include_pad", 0))
    if _pools_in_torch(kernel, begin, end):
        return lambda x: F.avg_pool2d(x, kernel, stride, begin, ceil_mode, counts_pad)
    if not counts_pad:
        raise call.error(f"pads {begin + end} without count_include_pad are not supported")
    outside = _outside(begin, end)
    return lambda x: F.avg_pool2d(F.pad(x, outside), kernel, stride, 0, ceil_mode)


def max_pool(call: Call) -> Function:
    kernel, stride, begin, end, ceil_mode = _window(call)
    dilation = call.attribute("dilations", [1, 1])
    call.expect("storage_order", 0)
    if _pools_in_torch(kernel, begin, end):
        return lambda x: F.max_pool2d(x, kernel, stride, begin, dilation, ceil_mode)
    outside = _outside(begin, end)
    return lambda x: F.max_pool2d(
        F.pad(x, outside, value=-math.inf), kernel, stride, 0, dilation, ceil_mode
    )


def global_average_pool(call: Call) -> Function:
    axes = list(range(2, call.x.ndim))
    return lambda x: x.mean(axes, keepdim=True)


# --- resize


def resize(call: Call) -> Function:
    mode = call.attribute("mode", "nearest")
    places = call.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = call.attribute("nearest_mode", "round_prefer_floor")
    call.expect("antialias", 0)
    call.expect("exclude_outside", 0)
    call.expect("keep_aspect_ratio_policy", "stretch")
    for name in ("cubic_coeff_a", "extrapolation_value"):  # of modes that are refused below
        call.attribute(name, None)
    if mode not in ("nearest", "linear") or places not in _PLACES or rounding not in _ROUNDINGS:
        raise call.error(f"the mode {mode} ({places}, {rounding}) is not supported")
    axes = _resized_axes(call)
    quick = _interpolate(call, axes, f"{mode} {places}" + f" {rounding}" * (mode == "nearest"))
    if quick is not None:
        return quick
    sources = {axis: _PLACES[places](np.arange(end.size), end) for axis, end in axes.items()}
    if mode == "linear":
        return _linear(call, sources)
    return chain(
        [
            picked(call, axis, _ROUNDINGS[rounding](source).clip(0, axes[axis].side - 1))
            for axis, source in sources.items()
        ]
    )


class _Resized(NamedTuple):
    """An axis of length `side` that gets the length `size`; one step is `near / far` in the input."""

    side: int
    size: int
    near: float
    far: float


def _resized_axes(call: Call) -> dict[int, _Resized]:
    """Axis -> how it changes, for those that do."""
    sides = call.x.shape
    axes = [call.axis(axis) for axis in call.attribute("axes", range(call.x.ndim))]
    scales, sizes = call.numbers(2), call.numbers(3)
    if (scales is None) == (sizes is None):
        raise call.error("expected either scales or sizes")
    resized = {}
    for axis, given in zip(axes, sizes or scales or [], strict=True):
        side = sides[axis]
        if sizes is not None:
            resized[axis] = _Resized(side, given, side, given)
        else:  # the new size is a product in float32, as in other runtimes: 5 x 1.4 is 7
            size = math.floor(np.float32(side) * np.float32(given))
            resized[axis] = _Resized(side, size, 1, given)
    return {axis: end for axis, end in resized.items() if end.near != end.far}


# Place in the input of the output pixels i. Multiplied before divided: half a pixel stays exact.
_PLACES: dict[str, Callable[[np.ndarray, _Resized], np.ndarray]] = {
    "half_pixel": lambda i, axis: (i + 0.5) * axis.near / axis.far - 0.5,
    "pytorch_half_pixel": lambda i, axis: (
        (i + 0.5) * axis.near / axis.far - 0.5 if axis.size > 1 else 0.0 * i
    ),
    "align_corners": lambda i, axis: i * (axis.side - 1) / max(axis.size - 1, 1),
    "asymmetric": lambda i, axis: i * axis.near / axis.far,
}
_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda places: np.ceil(places - 0.5),
    "round_prefer_ceil": lambda places: np.floor(places + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _interpolate(call: Call, axes: dict[int, _Resized], what: str) -> Function | None:
    """One kernel of torch, where there is one that computes the same."""
    is_exact = all(end.size * end.near == end.side * end.far for end in axes.values())
    if call.x.ndim != 4 or not axes or not axes.keys() <= {2, 3} or not is_exact:
        return None
    size = [axes[axis].size if axis in axes else call.x.shape[axis] for axis in (2, 3)]
    if what == "nearest asymmetric floor":
        # torch multiplies by side / size, which is exact for powers of two alone
        if all(end.size in (2 * end.side, 4 * end.side) for end in axes.values()):
            return lambda x: F.interpolate(x, size, mode="nearest")
    elif what == "linear align_corners":
        return lambda x: F.interpolate(x, size, mode="bilinear", align_corners=True)
    elif what == "linear half_pixel" or (what == "linear pytorch_half_pixel" and min(size) > 1):
        return lambda x: F.interpolate(x, size, mode="bilinear", align_corners=False)
    return None


def _linear(call: Call, sources: dict[int, np.ndarray]) -> Function:
    """Linear between the two neighbours, one axis after the other, in float32."""

    def along(axis: int, places: np.ndarray) -> Function:
        side = call.x.shape[axis]
        places = places.clip(0, side - 1)
        low = np.floor(places)
        pick_low, pick_high = (picked(call, axis, near) for near in (low, np.minimum(low + 1, side - 1)))
        sides = [-1 if other == axis else 1 for other in range(call.x.ndim)]
        share = torch.from_numpy((places - low).astype(np.float32).reshape(sides)).to(call.device)
        return lambda x: torch.lerp(pick_low(x), pick_high(x), share)

    steps = chain([along(axis, places) for axis, places in sources.items()])
    return lambda x: steps(x.float()).to(x.dtype)
