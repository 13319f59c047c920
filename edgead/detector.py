"""From a camera frame to a verdict."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from types import TracebackType

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError, DataError
from edgead.judge import Judge
from edgead.manifest import Manifest
from edgead.result import Result
from edgead.runtime import Backend, open_backend
from edgead.runtime.backend import ANOMALY_MAP, CALIBRATION, IMAGE, SCORE


def load(path: str | os.PathLike[str], *, backend: str = "auto", threads: int | None = None) -> Detector:
    """Opens a bundle, verifies it and loads its graph.

    Args:
        path: A `*.edgead` file.
        backend: "auto", or a name of `edgead.runtime.BACKENDS` (see `edgead.runtime.open_backend`).
        threads: Threads for one inference; None leaves the number to the back end.

    Raises:
        BundleError: The file is absent, damaged or of another format.
        BackendError: The back end is not installed or refuses the graph.
    """
    bundle = Bundle.open(path)
    return Detector(bundle, open_backend(bundle, backend, threads=threads))


class Detector:
    """Gives verdicts on frames. Any thread may call it; calls wait for each other at the back end.

    Use it as a context manager or call `close`; the detector owns its back end.

    Attributes:
        manifest: What the bundle says about the model; its threshold is the one at the time of loading.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.manifest: Manifest = bundle.manifest
        self._backend = backend
        self._judge = Judge(bundle.manifest)
        self._closed = False

    @property
    def backend(self) -> str:
        """Name of the back end in use."""
        return self._backend.name

    @property
    def precision(self) -> str:
        """Precision that the back end computes in: "fp32", "bf16" or "fp16"."""
        return self._backend.precision

    @property
    def threshold(self) -> float:
        """Scores from here on are anomalous. Setting it acts on the next call, not on the file."""
        return self._judge.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._judge.threshold = value

    def __call__(self, frame: np.ndarray, *, color: str = "rgb") -> Result:
        """Inspects one frame.

        Args:
            frame: uint8 [H, W, 3], or [H, W] or [H, W, 1] for grey, 0-255, of any size (resized on the
                host if need be, unless the graph resizes, which then accepts one size only). Need not be
                contiguous.
            color: Order of the channels, "rgb" or "bgr".

        Returns:
            The verdict; `elapsed_ms` covers this whole call.

        Raises:
            DataError: The frame is not such an image.
            BackendError: The detector is closed, or the back end failed or gave a score that is not
                finite.
        """
        return self._inspect(frame, color, self.threshold)

    def predict_batch(self, frames: Iterable[np.ndarray], *, color: str = "rgb") -> list[Result]:
        """Inspects frames, as in `__call__`, of any sizes; returns the verdicts in their order.

        `frames` may be a generator; its frames are taken and inspected one by one (on a CPU a larger
        batch is not faster, and needs 200 MiB more per image for EfficientAD-S at 256 px). `elapsed_ms`
        is that of each frame by itself, without the time that a generator takes. All verdicts use the
        threshold at the time of the call. Raises as `__call__`, naming the frame; then there are no
        results.
        """
        if isinstance(frames, np.ndarray) and frames.ndim != 4:
            raise DataError(
                f"predict_batch: got one array of shape {frames.shape}, expected several frames (a "
                "list, a generator or [N, H, W, 3]); for one frame call the detector itself"
            )
        threshold = self.threshold
        results: list[Result] = []
        for index, frame in enumerate(frames):
            try:
                results.append(self._inspect(frame, color, threshold))
            except (DataError, BackendError) as error:
                kind = DataError if isinstance(error, DataError) else BackendError
                raise kind(f"predict_batch: frame {index}: {error}") from error
        return results

    def close(self) -> None:
        """Frees the back end after a call in progress; may be repeated. Calls then fail."""
        self._closed = True
        self._backend.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _inspect(self, frame: np.ndarray, color: str, threshold: float) -> Result:
        start_s = time.perf_counter()
        if self._closed:
            raise BackendError("this detector is closed; load the bundle again")
        image = self._judge.prepare(frame, color)
        outputs = self._backend.infer({IMAGE: image[None], CALIBRATION: self._judge.calibration})
        return self._judge.result(
            float(outputs[SCORE][0]),
            outputs[ANOMALY_MAP][0],
            threshold=threshold,
            start_s=start_s,
            source=f"{self.backend} ({self.precision})",
        )
