"""What surrounds a graph: from a frame to its input, and from its outputs to a verdict."""

from __future__ import annotations

import math
import time

import numpy as np

from edgead.errors import BackendError, DataError
from edgead.image import as_rgb, resize
from edgead.manifest import RESIZE_IN_GRAPH, Manifest
from edgead.result import Result


class Judge:
    """Prepares frames and gives verdicts. Any thread may call it.

    Attributes:
        calibration: float32 [k], the input of that name.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.calibration = np.array(manifest.calibration.values, np.float32)
        self._threshold = float(manifest.threshold.value)
        self._size_px = (manifest.input.height, manifest.input.width)
        self._fixed_size = manifest.input.resize == RESIZE_IN_GRAPH

    @property
    def threshold(self) -> float:
        """Scores from here on are anomalous. Whoever asks for a verdict passes it on."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"threshold is {value!r}, expected a finite number")
        self._threshold = number

    def prepare(self, frame: np.ndarray, color: str, into: np.ndarray | None = None) -> np.ndarray:
        """Makes the graph's input of a frame.

        Args:
            frame: uint8 [H, W, 3], or [H, W] or [H, W, 1] for grey, 0-255; need not be contiguous.
            color: Order of its channels, "rgb" or "bgr".
            into: uint8 [height, width, 3] to write to; without it the frame itself may be returned.

        Returns:
            uint8 [height, width, 3] RGB at the size of the graph's input.

        Raises:
            DataError: The frame is not such an image, or of a size that the graph does not take.
        """
        image = as_rgb(frame, color=color)
        if image.shape[:2] != self._size_px:
            if self._fixed_size:
                raise DataError(
                    f"the frame is {image.shape[0]}x{image.shape[1]} px (height x width), this bundle "
                    f"was exported for frames of {self._size_px[0]}x{self._size_px[1]} px: set the "
                    "camera to that size or export for this one"
                )
            image = resize(image, *self._size_px)
        if into is None:
            return image
        np.copyto(into, image)
        return into

    def result(
        self, score: float, anomaly_map: np.ndarray, *, threshold: float, start_s: float, source: str
    ) -> Result:
        """Gives the verdict.

        Args:
            score: As the graph gave it.
            anomaly_map: float32 [h, w], as the graph gave it; the result keeps this array.
            threshold: The one that holds for this frame.
            start_s: `time.perf_counter()` of when the frame came.
            source: What computed it, for the error.

        Raises:
            BackendError: The score or the map is not finite.
        """
        if not (math.isfinite(score) and np.isfinite(anomaly_map).all()):
            raise BackendError(
                f"{source} gave score {score} and a map with "
                f"{np.count_nonzero(~np.isfinite(anomaly_map))} values that are not finite: there is no "
                "verdict. Try another back end, and check the bundle with `edgead verify`"
            )
        return Result(
            score=score,
            is_anomalous=score >= threshold,
            threshold=threshold,
            anomaly_map=anomaly_map,
            elapsed_ms=(time.perf_counter() - start_s) * 1e3,
        )
