"""Back ends: the one place that chooses, and the replay of golden samples that the choice rests on."""

from __future__ import annotations

import importlib.util
import logging
import math
import platform
from dataclasses import dataclass

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.runtime.backend import ANOMALY_MAP, CALIBRATION, IMAGE, SCORE, Backend, TensorSpec

__all__ = ["BACKENDS", "Backend", "Flip", "Replay", "TensorSpec", "open_backend", "replay"]

BACKENDS = ("onnxruntime", "openvino")
TOLERANCE = 0.05  # of the scale of the scores; bfloat16 rounding was measured at 0.007

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flip:
    """A golden sample on which a back end decides otherwise than the reference."""

    index: int
    expected: bool
    got: bool


@dataclass(frozen=True)
class Replay:
    """How a back end answers the golden samples, compared with the FP32 reference.

    Attributes:
        images: Number of samples.
        score_deviation: Largest absolute deviation of a score; infinite if a score is not finite.
        relative_score_deviation: The same divided by the spread (max - min) of the golden scores;
            infinite if there is a deviation and no spread.
        map_deviation: Largest absolute deviation of a map value; infinite if one is not finite.
        margin: Smallest distance of a golden score from the threshold: deviations below it cannot flip a
            verdict.
        flips: Samples with another verdict at the threshold of the manifest.
        tolerance: Deviations above it are a fault and no rounding: 5 % of the spread of the golden
            scores or of the threshold, whichever is larger.
    """

    images: int
    score_deviation: float
    relative_score_deviation: float
    map_deviation: float
    margin: float
    flips: tuple[Flip, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Same verdict on every sample, and scores and maps within the tolerance."""
        deviation = max(self.score_deviation, self.map_deviation)
        return not self.flips and deviation <= self.tolerance


def open_backend(bundle: Bundle, backend: str = "auto", *, threads: int | None = None) -> Backend:
    """Loads the graph of a bundle.

    Args:
        bundle: A verified bundle.
        backend: A name of `BACKENDS`: that one and never another. Or "auto": OpenVINO if it is
            installed, the CPU is x86, and it gives the verdict of the reference on every golden sample;
            otherwise ONNX Runtime. The choice and its reason are logged at level INFO.
        threads: Threads for one inference, at least 1; None leaves the number to the library.

    Raises:
        BackendError: An unknown name, the library is not installed, or it refuses the graph.
    """
    if threads is not None and (
        isinstance(threads, bool) or not isinstance(threads, int) or threads < 1
    ):
        raise BackendError(f"threads is {threads!r}, expected an integer >= 1 or None")
    if backend == "auto":
        return _open_auto(bundle, threads)
    if backend == "onnxruntime":
        from edgead.runtime.ort import OrtBackend

        return OrtBackend(bundle, threads=threads)
    if backend == "openvino":
        from edgead.runtime.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, threads=threads)
    raise BackendError(f"back end {backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")


def replay(backend: Backend, bundle: Bundle) -> Replay:
    """Runs the golden samples of a bundle one by one and compares with the answers of the reference."""
    golden, threshold = bundle.golden(), bundle.manifest.threshold.value
    calibration = np.array(bundle.manifest.calibration.values, np.float32)
    # In float64, as the detector compares with the threshold.
    reference = golden.scores.astype(np.float64)
    scores = np.empty_like(reference)
    map_deviation = 0.0
    for index, image in enumerate(golden.images):
        outputs = backend.infer({IMAGE: image[None], CALIBRATION: calibration})
        scores[index] = outputs[SCORE][0]
        map_deviation = max(map_deviation, _deviation(outputs[ANOMALY_MAP][0], golden.maps[index]))
    score_deviation = _deviation(scores, reference)
    spread = float(np.ptp(reference))
    relative = score_deviation / spread if spread else math.inf
    expected, got = reference >= threshold, scores >= threshold
    return Replay(
        images=len(scores),
        score_deviation=score_deviation,
        relative_score_deviation=relative if score_deviation else 0.0,
        map_deviation=map_deviation,
        margin=float(np.abs(reference - threshold).min()),
        flips=tuple(
            Flip(int(i), bool(expected[i]), bool(got[i])) for i in np.flatnonzero(expected != got)
        ),
        tolerance=TOLERANCE * max(spread, abs(threshold)),
    )


def _deviation(got: np.ndarray, expected: np.ndarray) -> float:
    if got.shape != expected.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.abs(got.astype(np.float64) - expected).max())


def _open_auto(bundle: Bundle, threads: int | None) -> Backend:
    chosen, reason = _try_openvino(bundle, threads)
    if chosen is None:
        chosen = open_backend(bundle, "onnxruntime", threads=threads)
    logger.info("back end %s (%s) for %s: %s", chosen.name, chosen.precision, bundle.path, reason)
    return chosen


def _try_openvino(bundle: Bundle, threads: int | None) -> tuple[Backend | None, str]:
    """Returns OpenVINO if it can be trusted with this bundle, and why or why not."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None, f"OpenVINO is used on x86 only, this is {platform.machine()}"
    if importlib.util.find_spec("openvino") is None:
        return None, "OpenVINO is not installed"
    opened: Backend | None = None
    try:
        opened = open_backend(bundle, "openvino", threads=threads)
        result = replay(opened, bundle)
    except BackendError as error:
        if opened is not None:
            opened.close()
        return None, f"OpenVINO failed ({error})"
    if result.ok:
        return (
            opened,
            f"OpenVINO gives the verdicts of the reference on all {result.images} golden samples",
        )
    opened.close()
    return None, (
        f"OpenVINO ({opened.precision}) does not reproduce the golden samples:"
        f" {len(result.flips)} of {result.images} verdicts differ, scores by up to"
        f" {result.score_deviation:.3g} and maps by up to {result.map_deviation:.3g},"
        f" allowed is {result.tolerance:.3g}"
    )
