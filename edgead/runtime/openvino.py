"""OpenVINO on x86 CPUs: about twice as fast as ONNX Runtime where the CPU multiplies bfloat16."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.machine import gains_by_bf16
from edgead.runtime.backend import (
    ANOMALY_MAP,
    CALIBRATION,
    IMAGE,
    SCORE,
    TensorSpec,
    check_graph,
    check_inputs,
    expected_specs,
)
from edgead.runtime.host_slot import HostSlot


class OpenVinoBackend:
    """The graph compiled once for batch 1; a batch is a loop.

    Precision is bfloat16 exactly where the CPU gains by it (`edgead.machine.gains_by_bf16`; OpenVINO
    itself takes it wherever there is an instruction for it), otherwise float32, whatever the precision
    of the weights in the graph.
    """

    name = "openvino"
    max_batch: int | None = None

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Compiles the graph; `threads` None leaves the number of threads to OpenVINO.

        Raises:
            BackendError: OpenVINO is not installed or refuses the graph.
        """
        try:
            from openvino import Core, __version__  # a folder of this name imports, but has neither
        except Exception as error:  # AttributeError, say: it was built for another NumPy
            raise BackendError(
                f"back end openvino cannot be imported ({error}): pip install openvino"
            ) from error
        manifest = bundle.manifest
        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            core = _the_one(Core)
            takes_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            takes_bf16 = takes_bf16 and gains_by_bf16() is not False
            config["INFERENCE_PRECISION_HINT"] = "bf16" if takes_bf16 else "f32"
            model = core.read_model(bundle.model_bytes())
            check_graph(_specs(model.inputs), _specs(model.outputs), manifest)
            model.reshape({IMAGE: [1, manifest.input.height, manifest.input.width, 3]})
            request = core.compile_model(model, "CPU", config).create_infer_request()
        except BackendError:
            raise
        except Exception as error:  # RuntimeError and its kin; pybind11 has no narrower type
            raise BackendError(
                f"OpenVINO {__version__} refuses the graph of {bundle.path}: {error}"
            ) from error
        self.precision = "bf16" if takes_bf16 else "fp32"
        self.inputs, self.outputs = expected_specs(manifest)
        self._map_shape = manifest.map_shape
        self._calibration = np.array(manifest.calibration.values, np.float32)
        self._lock = threading.Lock()  # of the request and its tensors; `close` waits for it
        self._request: Any = request
        # NumPy views of the tensors that the request owns: set once, only their content changes.
        self._tensors = {
            name: request.get_tensor(name).data for name in (IMAGE, CALIBRATION, SCORE, ANOMALY_MAP)
        }

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Backend.infer`."""
        batch = check_inputs(inputs, self.inputs)
        scores = np.empty(batch, np.float32)
        maps = np.empty((batch, *self._map_shape), np.float32)
        with self._lock:
            self._check_open("infer")
            tensors = self._tensors
            tensors[CALIBRATION][:] = inputs[CALIBRATION]
            try:
                for index, image in enumerate(inputs[IMAGE]):
                    tensors[IMAGE][0] = image
                    self._request.infer(share_outputs=True)  # read through the views, not copied twice
                    scores[index] = tensors[SCORE][0]
                    maps[index] = tensors[ANOMALY_MAP][0]
            except RuntimeError as error:
                raise BackendError(f"OpenVINO failed: {error}") from error
        return {SCORE: scores, ANOMALY_MAP: maps}

    def open_slot(self, batch: int = 1) -> HostSlot:
        """See `Backend.open_slot`."""
        self._check_open("open_slot")
        return HostSlot(self, batch, self._calibration, self._check_open)

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._tensors = {}  # the views keep the request's memory alive
            self._request = None

    def _check_open(self, call: str) -> None:
        if self._request is None:
            raise BackendError(f"{call}: this back end (openvino) is closed")


_cores: list[Any] = []
_cores_lock = threading.Lock()


def _the_one(core: Callable[[], Any]) -> Any:
    """The one `Core` of this process, which is never given back.

    Its CPU plugin gives the thread that loads it another stack for signal handlers, and unmaps that
    when it is destroyed, in whatever thread: the next signal, such as SIGTERM, would end the process by
    SIGSEGV.
    """
    with _cores_lock:
        if not _cores:
            _cores.append(core())
        return _cores[0]


def _specs(ports: list[Any]) -> list[TensorSpec]:
    """Before the reshape to batch 1, so that a free size is still free."""
    names = {"f32": "float32", "u8": "uint8"}
    return [
        TensorSpec(
            port.get_any_name(),
            names.get(port.get_element_type().get_type_name(), port.get_element_type().get_type_name()),
            tuple(None if side.is_dynamic else side.get_length() for side in port.get_partial_shape()),
        )
        for port in ports
    ]
