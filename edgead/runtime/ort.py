"""ONNX Runtime on the CPU: the back end that runs everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.runtime.backend import TensorSpec, check_graph, check_inputs, expected_specs

_ERRORS_ONLY = 3


class OrtBackend:
    """The graph in ONNX Runtime's CPU provider, any batch size. One thread at a time.

    `precision` is that of the weights: ONNX Runtime computes an FP16 graph in FP32 where the CPU has no
    FP16 kernels.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Loads the graph; `threads` None leaves their number to ONNX Runtime (one per physical core).

        Raises:
            BackendError: ONNX Runtime is not installed or refuses the graph.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                f"back end onnxruntime cannot be imported ({error}): pip install onnxruntime"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        # Planning memory ahead needs a third more (EfficientAD-S: 525 MiB, not 390) and saves no time.
        options.enable_mem_pattern = False
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(
                bundle.model_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no common base below Exception
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} refuses the graph of {bundle.path}: {error}"
            ) from error
        check_graph(_specs(session.get_inputs()), _specs(session.get_outputs()), bundle.manifest)
        self.precision = bundle.manifest.precision
        self.inputs, self.outputs = expected_specs(bundle.manifest)
        self._names = list(self.outputs)
        self._session: Any = session

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Backend.infer`."""
        if self._session is None:
            raise BackendError("infer: this back end (onnxruntime) is closed")
        check_inputs(inputs, self.inputs)
        try:
            values = self._session.run(self._names, dict(inputs))
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {error}") from error
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        """See `Backend.close`."""
        self._session = None


def _specs(nodes: list[Any]) -> list[TensorSpec]:
    """ONNX Runtime names a free size by a text or None, and a dtype as in "tensor(float)"."""
    names = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
    return [
        TensorSpec(
            node.name,
            names.get(node.type, node.type),
            tuple(side if isinstance(side, int) else None for side in node.shape),
        )
        for node in nodes
    ]
