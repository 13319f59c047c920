"""New map scale and threshold from good images of the line, on the device: no training, no new engine.

The constants of the map are an input of the graph, and the map is linear in them: with one of them 1 and
the others 0 the graph gives one raw map. So every back end that runs a bundle can measure what training
measured (see `edgead.calibration`). What was before stays in the bundle, and `undo` brings it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from edgead import calibration
from edgead.bundle import Bundle, Golden, rewrite_bundle
from edgead.errors import BackendError, BundleError, DataError
from edgead.health import HEALTH, HealthProfile
from edgead.image import read_image
from edgead.judge import Judge
from edgead.manifest import Calibration, Manifest, Threshold
from edgead.runtime import open_backend
from edgead.runtime.backend import ANOMALY_MAP, CALIBRATION, IMAGE, SCORE, Backend
from edgead.runtime.replay import replay

HISTORY = "recalibrations"
KEPT = 20
"""Earlier calibrations that a bundle keeps, from the oldest on."""


@dataclass(frozen=True)
class Recalibration:
    """What a recalibration changed.

    Attributes:
        images: Good images that were used.
        before, after: Thresholds.
        claim: What the number of images supports, one sentence.
        rejected: How many of the images the old calibration would have rejected.
    """

    images: int
    before: float
    after: float
    claim: str
    rejected: int


def recalibrate(
    path: Path,
    images: Sequence[Path],
    *,
    out: Path | None = None,
    false_reject: float | None = None,
    backend: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recalibration:
    """Calibrate a bundle anew.

    Args:
        path: The bundle.
        images: Files of good parts, as the camera gives them.
        out: Where to write; default: `path` itself, atomically.
        false_reject: Target share of good parts rejected; default: that of the bundle, or 0.01.
        backend: As in `edgead.load`. It must give the verdicts of the golden samples.
        progress: Called with (passes over images done, in all).

    Raises:
        DataError: no images, or one that cannot be read. TrainingError: a rate out of range.
        BundleError: also when another command changed the bundle meanwhile. BackendError.
    """
    if not images:
        raise DataError(f"{path}: recalibration needs images of good parts, and there are none")
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    rate = false_reject
    if rate is None:
        rate = manifest.threshold.target_false_reject_rate or 0.01
    calibration.check_rate(rate)  # before the passes over all images
    with closing(open_backend(bundle, backend, threads=threads)) as runner:
        answers = replay(runner, bundle)
        if not answers.ok:
            raise BackendError(
                f"{path}: {runner.name} does not give the verdicts of the golden samples ({answers}),"
                " so it cannot calibrate; use another --backend"
            )
        measure = _Measure(runner, manifest, images, progress)
        scales, odd = measure.scales()
        constants = calibration.graph_constants(*scales)
        scores, old = measure.scores(constants, _constants(manifest))
        threshold = calibration.choose_threshold(scores, odd=odd, false_reject=rate)
    stands = asdict(threshold)
    names = manifest.calibration.names
    after = replace(
        manifest,
        calibration=replace(
            manifest.calibration,
            values=tuple(float(value) for value in constants),
            quantiles={n.removesuffix("_scale"): asdict(s) for n, s in zip(names, scales, strict=False)},
        ),
        threshold=Threshold(**stands | {"basis": f"recalibrated: {threshold.basis}"}),
        model=manifest.model | {HEALTH: HealthProfile.of(map(read_image, images)).to_dict()},
        provenance=manifest.provenance | {HISTORY: [*_history(manifest), _state(manifest)][-KEPT:]},
    )
    rewrite_bundle(bundle, out or path, after, _answered(bundle, constants))
    rejected = int((old >= manifest.threshold.value).sum())
    return Recalibration(
        len(images), manifest.threshold.value, threshold.value, threshold.claim, rejected
    )


def undo(path: Path, *, out: Path | None = None) -> Recalibration:
    """Bring back the calibration before the last one.

    Args:
        path: The bundle.
        out: Where to write; default: `path` itself, atomically.

    Raises:
        BundleError: the bundle was never recalibrated, or another command changed it meanwhile.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    history = _history(manifest)
    if not history:
        raise BundleError(f"{path} was never recalibrated: there is nothing to bring back")
    state = history[-1]
    before = Calibration(**state["calibration"] | {"names": tuple(state["calibration"]["names"])})
    before = replace(before, values=tuple(before.values))
    golden = _answered(bundle, np.array(before.values, np.float32))
    threshold = Threshold(**state["threshold"])
    provenance = manifest.provenance | {HISTORY: history[:-1]}
    restored = replace(
        manifest,
        calibration=before,
        threshold=threshold,
        model={name: value for name, value in manifest.model.items() if name != HEALTH} | state["model"],
        provenance=provenance,
    )
    rewrite_bundle(bundle, out or path, restored, golden)
    return Recalibration(0, manifest.threshold.value, threshold.value, threshold.basis, 0)


class _Measure:
    """Raw maps and scores of images on a back end."""

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        images: Sequence[Path],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.backend, self.images, self.progress = backend, images, progress
        self.judge = Judge(manifest)
        self.raw_maps = len(manifest.calibration.values) - 1
        self.done = 0

    def scales(self) -> tuple[list[calibration.MapScale], list[int]]:
        """Of each raw map, over the cells that the method inspects, and which images are odd."""
        units = np.eye(self.raw_maps + 1, dtype=np.float32)
        maps: list[list[np.ndarray]] = [[] for _ in range(self.raw_maps)]
        inside: np.ndarray | None = None
        for image in self._each():
            if inside is None:  # cells that are not inspected have no offset either
                inside = self._run(image, units[-1])[1] == 1
            for index, values in enumerate(maps):
                values.append(self._run(image, units[index])[1][inside])
        raw = [np.stack(values) for values in maps]
        odd = calibration.odd_images(*raw)
        calibration.warn_of_odd(self.images, odd)
        return [calibration.MapScale.of(values) for values in raw], odd

    def scores(self, *constants: np.ndarray) -> np.ndarray:
        """Image scores with each of K constants, float64 [K, N]."""
        return np.array([[self._run(image, c)[0] for c in constants] for image in self._each()]).T

    def _each(self) -> Iterator[np.ndarray]:
        for path in self.images:
            image = read_image(path)
            try:
                frame = self.judge.prepare(image, "rgb")
            except DataError as error:  # of a frame, which does not know its file
                raise DataError(f"{path}: {error}") from error
            yield frame
            self.done += 1
            if self.progress:
                self.progress(self.done, 2 * len(self.images))

    def _run(self, image: np.ndarray, constants: np.ndarray) -> tuple[float, np.ndarray]:
        outputs = self.backend.infer({IMAGE: image[None], CALIBRATION: constants})
        return float(outputs[SCORE][0]), outputs[ANOMALY_MAP][0]


def _answered(bundle: Bundle, constants: np.ndarray) -> Golden:
    """The golden samples with the answers of ONNX Runtime that belong to these constants."""
    golden = bundle.golden()
    with closing(open_backend(bundle, "onnxruntime")) as backend:
        inputs = ({IMAGE: image[None], CALIBRATION: constants} for image in golden.images)
        answers = [backend.infer(one) for one in inputs]
    return Golden(
        golden.images,
        np.array([answer[SCORE][0] for answer in answers], np.float32),
        np.stack([answer[ANOMALY_MAP][0] for answer in answers]),
    )


def _constants(manifest: Manifest) -> np.ndarray:
    return np.array(manifest.calibration.values, np.float32)


def _history(manifest: Manifest) -> list[dict[str, Any]]:
    return list(manifest.provenance.get(HISTORY, []))


def _state(manifest: Manifest) -> dict[str, Any]:
    """What `undo` needs."""
    until = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "until_utc": until,
        "calibration": asdict(manifest.calibration),
        "threshold": asdict(manifest.threshold),
        "model": {name: value for name, value in manifest.model.items() if name == HEALTH},
    }
