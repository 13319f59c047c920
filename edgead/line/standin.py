"""A model that takes a set time and says what it is asked to: to see what the line itself costs."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping

import numpy as np

from edgead.bundle import Bundle
from edgead.runtime.backend import ANOMALY_MAP, CALIBRATION, IMAGE, SCORE, Slot, TensorSpec
from edgead.runtime.host_slot import HostSlot


class StandIn:
    """A `Backend` without a network. It answers the bundle's golden samples as the bundle says.

    Any other image gets half of the threshold, or twice that if its first pixel is red (above 200, with
    green and blue below 100); so a test can order verdicts.
    """

    name, precision = "stand-in", "fp32"
    max_batch: int | None = None

    def __init__(self, bundle: Bundle, duration_ms: float) -> None:
        manifest, golden = bundle.manifest, bundle.golden()
        spec = manifest.input
        self._duration_s = duration_ms / 1e3
        self._map = np.zeros(manifest.map_shape, np.float32)
        threshold = manifest.threshold.value
        self._good, self._bad = min(threshold / 2, threshold - 1), max(threshold * 2, threshold + 1)
        samples = zip(golden.images, golden.scores, golden.maps, strict=True)
        self._golden = {zlib.crc32(image.tobytes()): (score, map_) for image, score, map_ in samples}
        self.inputs = {
            IMAGE: TensorSpec(IMAGE, "uint8", (None, spec.height, spec.width, 3)),
            CALIBRATION: TensorSpec(CALIBRATION, "float32", (len(manifest.calibration.values),)),
        }
        self.outputs = {
            SCORE: TensorSpec(SCORE, "float32", (None,)),
            ANOMALY_MAP: TensorSpec(ANOMALY_MAP, "float32", (None, *manifest.map_shape)),
        }

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Waits, then answers."""
        answers = [self._answer(image) for image in inputs[IMAGE]]
        time.sleep(self._duration_s)
        return {
            SCORE: np.array([score for score, _ in answers], np.float32),
            ANOMALY_MAP: np.stack([map_ for _, map_ in answers]),
        }

    def open_slot(self, batch: int = 1) -> Slot:
        """Buffers on the host."""
        zeros = np.zeros(self.inputs[CALIBRATION].shape[0] or 0, np.float32)
        return HostSlot(self, batch, zeros, lambda call: None)

    def close(self) -> None:
        """There is nothing to close."""

    def _answer(self, image: np.ndarray) -> tuple[float, np.ndarray]:
        if (known := self._golden.get(zlib.crc32(image.tobytes()))) is not None:
            return float(known[0]), known[1]
        red, green, blue = image[0, 0].tolist()
        return (self._bad if red > 200 and max(green, blue) < 100 else self._good), self._map
