"""The parity gate: an exported graph must give the verdicts of the trained networks, image by image.

The reference is the plain PyTorch definition in FP32 (`AnomalyModel.forward`), not the merged module
that was exported, so that a wrong fold is caught as well as a wrong export.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from edgead.bundle import Golden
from edgead.errors import ExportError
from edgead.image import read_image, resize
from edgead.models.base import AnomalyModel
from edgead.runtime.replay import ROUNDING

TOLERANCE = {"fp32": 1e-4, "fp16": ROUNDING}
"""Largest deviation of a score, and of a map value, relative to the spread of the scores.

In FP32 no verdict may flip, in FP16 only scores nearer to the threshold than this; see also `RESIZED`.
"""
RESIZED = 0.01
"""Largest share of the pixels' values that a graph with a frame may round to the next grey level.

For many sizes a value often lies exactly between two levels, and the order of a float32 sum decides. A
verdict that flips by that alone, right at the threshold, is told and stops nothing.
Measured: up to 0.0032 in photographs (384x512 to 256x256), 0.0061 in black and white noise.
"""
LEAST_IMAGES = 20
MAX_IMAGES = 500
MAX_PIXELS = MAX_IMAGES * 256 * 256
"""Of all images: a frame in 16 tiles takes both networks on a small box half a minute."""
GOLDEN_IMAGES = 4
MAX_GOLDEN_BYTES = 32 << 20


@dataclass(frozen=True)
class Flip:
    """An image on which graph and reference decide differently.

    Attributes:
        by_resize: On the pixels of the graph's own resize the reference decides as the graph does.
    """

    image: str
    reference: float
    exported: float
    by_resize: bool = False


@dataclass(frozen=True)
class Parity:
    """Agreement of an exported graph with the networks it came from.

    Attributes:
        images: How many real images were compared.
        score_spread: Largest minus smallest reference score.
        score_deviation: Largest absolute deviation of a score, divided by the spread.
        map_deviation: Largest absolute deviation of a map value, divided by the spread.
        margin: Distance from the threshold, on the score's scale, within which FP16 may flip a verdict.
        flips: Images with another verdict.
        resized: Largest share of an image's values that the graph's own resize rounds to the next grey
            level. The deviations are those on the graph's pixels, the flips those on the host's.
    """

    precision: str
    images: int
    score_spread: float
    score_deviation: float
    map_deviation: float
    tolerance: float
    margin: float
    flips: tuple[Flip, ...]
    resized: float = 0.0

    @property
    def failures(self) -> list[str]:
        """What breaks the gate; empty when it passes."""
        found = [
            f"the largest {kind} deviation is {value:.2e} of the score spread,"
            f" allowed is {self.tolerance:.0e}"
            for kind, value in (("score", self.score_deviation), ("map", self.map_deviation))
            if not value <= self.tolerance
        ]
        if not self.resized <= RESIZED:
            found.append(
                f"the graph's resize gives another grey level on {self.resized:.2%} of the pixels'"
                f" values, allowed is {RESIZED:.0%}"
            )
        allowed = self.margin if self.precision == "fp16" else 0.0
        return found + [
            f"{flip.image}: reference score {flip.reference:.5g}, exported {flip.exported:.5g},"
            " another verdict"
            for flip in self.flips
            if not flip.by_resize and not abs(flip.reference - flip.exported) <= allowed
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"flips": [asdict(flip) for flip in self.flips]}


def compare(
    model: AnomalyModel,
    onnx_content: bytes,
    images: Sequence[Path],
    *,
    precision: str,
    calibration: np.ndarray,
    threshold: float,
    frame: tuple[int, int] | None = None,
    root: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Parity, Golden]:
    """Run reference and graph on real images.

    Args:
        model: The networks in plain form.
        images: Image files. Of more than 500, 500 at equal distances are taken; fewer where the networks
            take images of more than 256x256 px, but never fewer than 20.
        frame: Size of the graph's input where the graph resizes; images of another size are fitted
            first.
        root: Folder that image names are given relative to.

    Returns:
        The figures, and golden samples chosen from the images: the lowest and the highest score and
        those next to the threshold on either side, as far as they lie more than the margin away from it.

    Raises:
        ExportError: there are no images, or the gate fails; the message lists how.
    """
    if not images:
        raise ExportError(
            "the parity gate needs images and the run has none;"
            " train on a data set with validation or test images"
        )
    chosen = [images[i] for i in taken(len(images), model.input_px)]
    size = frame or model.input_px
    found = _run_both(model, onnx_content, chosen, frame, calibration=calibration, progress=progress)
    names = [
        path.relative_to(root).as_posix() if root and path.is_relative_to(root) else path.name
        for path in chosen
    ]
    parity = _parity(names, found, precision, threshold)
    if parity.failures:
        more = f"; and {len(parity.failures) - 5} more" if len(parity.failures) > 5 else ""
        raise ExportError(
            f"{precision} export fails the parity gate on {len(chosen)} images:"
            f" {'; '.join(parity.failures[:5])}{more}"
        )
    margin = ROUNDING * parity.score_spread
    picked = choose_golden(found.reference, threshold, margin, bytes_per_image=size[0] * size[1] * 3)
    return parity, _golden(model, [chosen[i] for i in picked], size, calibration)


def taken(count: int, input_px: tuple[int, int]) -> list[int]:
    """Which of `count` images the gate looks at, for networks that take this size."""
    most = max(LEAST_IMAGES, MAX_PIXELS // (input_px[0] * input_px[1]))
    places: list[int] = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    return places


@dataclass
class _Found:
    """Of N images, float64 [N] each: scores (`expected`: of the reference on the graph's pixels), the
    largest deviations of map values, and shares of pixels rounded otherwise."""

    reference: np.ndarray
    exported: np.ndarray
    expected: np.ndarray
    map_deviations: np.ndarray
    resized: np.ndarray


def _run_both(
    model: AnomalyModel,
    onnx_content: bytes,
    paths: list[Path],
    frame: tuple[int, int] | None,
    *,
    calibration: np.ndarray,
    progress: Callable[[int, int], None] | None,
) -> _Found:
    if frame:
        onnx_content = _with_resized(onnx_content)
    session = onnxruntime.InferenceSession(onnx_content, providers=["CPUExecutionProvider"])
    found = _Found(*np.zeros((5, len(paths))))
    for index, path in enumerate(paths):
        fitted = resize(read_image(path), *(frame or model.input_px))
        score, cells, *resized = session.run(None, {"image": fitted[None], "calibration": calibration})
        host = resize(fitted, *model.input_px)
        expected_score, expected_cells = _reference(model, host, calibration)
        found.reference[index], found.exported[index] = expected_score, score[0]
        if frame:
            pixels = resized[0][0]
            if not (np.abs(pixels - host) <= 1).all():
                raise ExportError(
                    f"{path.name}: the graph's resize differs from the host's by more than one grey"
                    " level"
                )
            found.resized[index] = (pixels != host).mean()
            if found.resized[index]:
                expected_score, expected_cells = _reference(model, pixels.astype(np.uint8), calibration)
        found.expected[index] = expected_score
        found.map_deviations[index] = np.abs(cells[0] - expected_cells).max()
        if progress:
            progress(index + 1, len(paths))
    return found


def _with_resized(content: bytes) -> bytes:
    """A graph that takes frames, with the pixels after its resize as one more output."""
    model = onnx.load_from_string(content)
    # The first one: the resize stands before the networks.
    rounded = next(node.output[0] for node in model.graph.node if node.op_type == "Round")
    model.graph.output.append(onnx.ValueInfoProto(name=rounded))
    return model.SerializeToString()


def _parity(names: list[str], found: _Found, precision: str, threshold: float) -> Parity:
    reference, exported, expected = found.reference, found.exported, found.expected
    # Maps as well as scores: ONNX Runtime's maximum passes over NaN, and such a map would score as a
    # good one.
    if not np.isfinite([reference, exported, found.map_deviations]).all():
        raise ExportError(
            f"{precision} export: NaN or infinite scores or maps;"
            " the training diverged, or FP16 overflows: export with --precision fp32"
        )
    spread = float(np.ptp(reference)) or max(1.0, abs(float(reference[0])))
    flips = tuple(
        Flip(
            names[i],
            float(reference[i]),
            float(exported[i]),
            by_resize=bool((expected[i] >= threshold) == (exported[i] >= threshold)),
        )
        for i in np.flatnonzero((reference >= threshold) != (exported >= threshold))
    )
    tolerance = TOLERANCE[precision]
    return Parity(
        precision,
        len(names),
        spread,
        float(np.abs(exported - expected).max()) / spread,
        float(found.map_deviations.max()) / spread,
        tolerance,
        tolerance * spread,
        flips,
        float(found.resized.max()),
    )


def choose_golden(
    scores: np.ndarray, threshold: float, margin: float, *, bytes_per_image: int
) -> list[int]:
    """Indices of the samples to keep.

    They are the nearest above and below the threshold outside the margin, the highest and the lowest.
    Scores inside the margin are left out as long as there are others: a device with another rounding may
    well decide differently there, and a replay has to tell a broken device from a rounding one.
    """
    clear: list[int] = np.flatnonzero(np.abs(scores - threshold) >= margin).tolist()
    order = sorted(clear or range(len(scores)), key=lambda i: scores[i])
    above = [i for i in order if scores[i] >= threshold]
    below = [i for i in order if scores[i] < threshold]
    wanted = [*above[:1], *below[-1:], *above[-1:], *below[:1]]
    limit = int(np.clip(MAX_GOLDEN_BYTES // bytes_per_image, 1, GOLDEN_IMAGES))
    return list(dict.fromkeys(wanted))[:limit]


def _golden(
    model: AnomalyModel, paths: list[Path], size: tuple[int, int], calibration: np.ndarray
) -> Golden:
    images = np.stack([resize(read_image(path), *size) for path in paths])
    answers = [_reference(model, image, calibration) for image in images]
    return Golden(
        images,
        np.array([score for score, _ in answers], np.float32),
        np.stack([cells for _, cells in answers]),
    )


@torch.inference_mode()
def _reference(
    model: AnomalyModel, frame: np.ndarray, calibration: np.ndarray
) -> tuple[float, np.ndarray]:
    """Score and map float32 [*map_cells] of a frame uint8 [H, W, 3]."""
    image = resize(frame, *model.input_px)
    raw = model(torch.from_numpy(image.copy()[None]).permute(0, 3, 1, 2))
    maps = model.anomaly_map(raw, torch.from_numpy(calibration))
    return float(model.score(maps)[0]), maps[0].numpy()
