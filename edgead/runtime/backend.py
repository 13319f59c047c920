"""The contract of all back ends: named tensors in, named tensors out, at once or in slots.

Pre- and post-processing are inside the graph, so a back end knows nothing of images or thresholds.
`Backend.infer` is the simple call. A `Slot` is the one for a line: buffers that are allocated once,
filled in place by a camera, launched without waiting and awaited by another thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgead.errors import BackendError
from edgead.manifest import Manifest

IMAGE, CALIBRATION, SCORE, ANOMALY_MAP = "image", "calibration", "score", "anomaly_map"


@dataclass(frozen=True)
class TensorSpec:
    """Name, NumPy dtype name and shape of a tensor; None in the shape is any size (the batch)."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        sides = ("N" if side is None else str(side) for side in self.shape)
        return f"{self.name} {self.dtype} [{', '.join(sides)}]"


class Slot(Protocol):
    """Room for one inference in flight. Its arrays live as long as the slot object, even when closed.

    A slot goes in turns: fill `images`, `launch`, `wait`, read, fill again. One thread at a time; one
    may launch and another wait. Slots of one back end are independent of each other.

    Attributes:
        images: uint8 [B, H, W, 3] to be filled in place; page-locked where that makes copies quicker.
    """

    images: np.ndarray

    def calibrate(self, values: np.ndarray) -> None:
        """Sets the calibration, float32 [k], for all launches from now on; nothing may be in flight."""
        ...

    def launch(self, count: int = 1) -> None:
        """Starts the inference of the first `count` images, 1 <= count <= B, and does not wait for it.

        Raises:
            BackendError: The slot is closed, or the library or the device failed.
        """
        ...

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """Waits for what was launched, without holding the GIL.

        Returns:
            score float32 [count] and anomaly_map float32 [count, h, w]: views that the next launch
            overwrites.

        Raises:
            BackendError: The library or the device failed.
        """
        ...

    def close(self) -> None:
        """Frees what the slot holds on the device, after what is in flight; may be called again."""
        ...


class Backend(Protocol):
    """A loaded graph. Any thread may call it.

    Attributes:
        name: A name of `edgead.runtime.BACKENDS`.
        precision: What the network computes in: "fp32", "bf16" or "fp16".
        max_batch: Largest batch of `infer` and of a slot; None is any.
        inputs: Name to spec.
        outputs: Name to spec.
    """

    name: str
    precision: str
    max_batch: int | None
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph; the arrays returned are the caller's. Calls wait for each other.

        Args:
            inputs: Exactly the tensors of `self.inputs`, with N >= 1; need not be contiguous.

        Raises:
            BackendError: Wrong names, dtypes or shapes, a closed back end, or a failure of the library.
        """
        ...

    def open_slot(self, batch: int = 1) -> Slot:
        """Returns a new slot for up to `batch` images, calibrated as the manifest says.

        Raises:
            BackendError: Closed, no memory, or `batch` is not within 1 .. max_batch.
        """
        ...

    def close(self) -> None:
        """Frees graph and slots; may be called again. Every call but this then raises BackendError."""
        ...


def expected_specs(manifest: Manifest) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Returns the inputs and outputs that the graph of this manifest must have."""
    frame = manifest.input
    inputs = (
        TensorSpec(frame.name, frame.dtype, (None, frame.height, frame.width, 3)),
        TensorSpec(manifest.calibration.input, "float32", (len(manifest.calibration.values),)),
    )
    outputs = (
        TensorSpec(SCORE, "float32", (None,)),
        TensorSpec(ANOMALY_MAP, "float32", (None, *manifest.map_shape)),
    )
    return {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}


def check_graph(inputs: list[TensorSpec], outputs: list[TensorSpec], manifest: Manifest) -> None:
    """Raises BackendError if the graph is not the one that the manifest describes.

    A size of an output that the graph leaves open is accepted: exporters do not always infer it.
    """
    expected_inputs, expected_outputs = expected_specs(manifest)
    _check_tensors("inputs", inputs, expected_inputs, open_sizes=False)
    _check_tensors("outputs", outputs, expected_outputs, open_sizes=True)


def _check_tensors(
    kind: str, found: list[TensorSpec], expected: Mapping[str, TensorSpec], *, open_sizes: bool
) -> None:
    def fits(spec: TensorSpec) -> bool:
        wanted = expected.get(spec.name)
        return (
            wanted is not None
            and spec.dtype == wanted.dtype
            and len(spec.shape) == len(wanted.shape)
            and all(
                side == size or (open_sizes and side is None)
                for side, size in zip(spec.shape, wanted.shape, strict=True)
            )
        )

    if len(found) != len(expected) or not all(map(fits, found)):
        raise BackendError(
            f"the graph's {kind} are {', '.join(map(str, found)) or 'none'}; the manifest describes "
            f"{', '.join(map(str, expected.values()))}. Export the bundle again"
        )


def check_calibration(values: np.ndarray, expected: TensorSpec) -> None:
    """Checks the argument of `Slot.calibrate`; raises BackendError."""
    if values.dtype != expected.dtype or values.shape != expected.shape:
        raise BackendError(
            f"calibrate: got {values.dtype} {list(values.shape)}, expected {expected.dtype} "
            f"{list(expected.shape)}"
        )


def check_inputs(inputs: Mapping[str, np.ndarray], expected: Mapping[str, TensorSpec]) -> int:
    """Checks the arguments of `infer` and returns the batch size; raises BackendError."""
    if inputs.keys() != expected.keys():
        raise BackendError(f"infer: got the inputs {sorted(inputs)}, expected {sorted(expected)}")
    for name, spec in expected.items():
        array = inputs[name]
        if not isinstance(array, np.ndarray):
            raise BackendError(
                f"infer: {name} is {type(array).__name__}, expected a numpy array ({spec})"
            )
        fits = array.dtype == spec.dtype and array.ndim == len(spec.shape)
        if not fits or any(
            size not in (None, side) for side, size in zip(array.shape, spec.shape, strict=True)
        ):
            raise BackendError(f"infer: {name} is {array.dtype} {list(array.shape)}, expected {spec}")
    batch = len(inputs[IMAGE])
    if batch == 0:
        raise BackendError("infer: the batch is empty, expected at least one image")
    return batch
