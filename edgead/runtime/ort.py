"""ONNX Runtime on the CPU: the back end that runs everywhere."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.runtime.backend import TensorSpec, check_graph, check_inputs, expected_specs
from edgead.runtime.host_slot import HostSlot

_ERRORS_ONLY = 3


class OrtBackend:
    """The graph in ONNX Runtime's CPU provider, any batch size.

    `precision` is that of the weights: ONNX Runtime computes an FP16 graph in FP32 where the CPU has no
    FP16 kernels.
    """

    name = "onnxruntime"
    max_batch: int | None = None

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Loads the graph; `threads` None leaves their number to ONNX Runtime (one per physical core).

        Raises:
            BackendError: ONNX Runtime is not installed or refuses the graph.
        """
        try:
            import onnxruntime
        except Exception as error:  # AttributeError, say: it was built for another NumPy
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
        self._calibration = np.array(bundle.manifest.calibration.values, np.float32)
        self._lock = threading.Lock()  # one inference at a time has all cores, and `close` waits for it
        self._session: Any = session

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Backend.infer`."""
        check_inputs(inputs, self.inputs)
        with self._lock:
            self._check_open("infer")
            try:
                values = self._session.run(self._names, dict(inputs))
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed: {error}") from error
        return dict(zip(self._names, values, strict=True))

    def open_slot(self, batch: int = 1) -> HostSlot:
        """See `Backend.open_slot`."""
        self._check_open("open_slot")
        return HostSlot(self, batch, self._calibration, self._check_open)

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._session = None

    def _check_open(self, call: str) -> None:
        if self._session is None:
            raise BackendError(f"{call}: this back end (onnxruntime) is closed")


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
