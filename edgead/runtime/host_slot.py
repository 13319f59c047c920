"""Slots of a back end that computes on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgead.errors import BackendError
from edgead.runtime.backend import ANOMALY_MAP, CALIBRATION, IMAGE, SCORE, Backend, check_calibration


class HostSlot:
    """A `Slot` over `Backend.infer`: `launch` only notes what is to do, `wait` computes it.

    So inferences do not compete for the cores: one after the other gets all of them.
    """

    def __init__(
        self,
        backend: Backend,
        batch: int,
        calibration: np.ndarray,
        check_open: Callable[[str], None],
    ) -> None:
        """Makes the buffers.

        Args:
            backend: What computes.
            batch: B, the most images.
            calibration: float32 [k].
            check_open: Raises BackendError, which names the call given to it, if the back end is closed.

        Raises:
            BackendError: `batch` is not an integer within 1 .. `backend.max_batch`.
        """
        most = backend.max_batch
        is_integer = isinstance(batch, int) and not isinstance(batch, bool)
        if not is_integer or batch < 1 or (most is not None and batch > most):
            raise BackendError(
                f"open_slot: batch is {batch!r}, expected an integer >= 1"
                + ("" if most is None else f" and <= {most}")
            )
        self._backend = backend
        self._check_open = check_open
        self._count = 0
        self._is_closed = False
        _, *frame = backend.inputs[IMAGE].shape
        self.images = np.zeros((batch, *(side or 0 for side in frame)), np.uint8)
        self.calibrate(calibration)

    def calibrate(self, values: np.ndarray) -> None:
        """See `Slot.calibrate`."""
        check_calibration(values, self._backend.inputs[CALIBRATION])
        self._calibration = values.copy()

    def launch(self, count: int = 1) -> None:
        """See `Slot.launch`."""
        self._check("launch")
        if self._count:
            raise BackendError("launch: this slot is in flight; wait for it first")
        if not 1 <= count <= len(self.images):
            raise BackendError(f"launch: count is {count}, this slot has room for {len(self.images)}")
        self._count = count

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Slot.wait`."""
        self._check("wait")
        if not self._count:
            raise BackendError("wait: nothing was launched in this slot")
        count, self._count = self._count, 0
        outputs = self._backend.infer({IMAGE: self.images[:count], CALIBRATION: self._calibration})
        return outputs[SCORE], outputs[ANOMALY_MAP]

    def close(self) -> None:
        """See `Slot.close`."""
        self._is_closed = True

    def _check(self, call: str) -> None:
        if self._is_closed:
            raise BackendError(f"{call}: this slot ({self._backend.name}) is closed")
        self._check_open(call)
