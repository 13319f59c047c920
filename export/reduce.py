"""Fewer operations of a trained run at equal verdicts: `edgead export --reduce`.

Both raw maps are squared norms of difference vectors over the C target channels. A rotation leaves norms
as they are, and it folds into the weights. What is then cut is not thrown away: of K directions half are
the principal ones, and the other half are sums, with signs, of all that remain. The square of such a
sum is the energy of its parts plus products of directions that are uncorrelated on the images at hand:
in the mean no energy is lost, and a defect that lives in a single weak direction keeps all of its own.
With K = C every sum has one part, and the maps are exactly those of the run. docs/reduced-targets.md
has the proof and what was measured.

Then the second convolutions, the largest ones, read fewer channels (`edgead.export.narrow`).

All of it is gated: the run's calibration is repeated with the reduced maps, and its verdicts on the
validation and test images have to be those of the whole networks (`edgead.export.reduce_gate`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgead.errors import ExportError
from edgead.export.graph import MergedGraph, flop_per_frame
from edgead.export.narrow import narrowed, watched, whole_inputs
from edgead.export.parity import MAX_IMAGES
from edgead.export.reduce_gate import Gate, Maps, compare, reduced_map
from edgead.image import list_images, read_image, resize
from edgead.models.base import AnomalyModel
from edgead.models.efficientad import IMAGE_PX, EfficientAD
from edgead.models.folding import normalise
from edgead.training.demo_data import render_distractors
from edgead.training.directions import SecondMoment, directions_of
from edgead.training.run import Run
from edgead.training.train import calibration_of

log = logging.getLogger(__name__)

SIZES = (16, 32, 48, 64, 96, 128, 192, 256)
"""Directions that `--reduce auto` tries; and all of them."""
SHARES = (0.75, 0.5, 0.375, 0.25)
"""Shares of the channels that conv-2 reads, which it tries with each of them; and all channels."""
TRAINING_IMAGES = 32
PICTURES = 24
"""Rendered pictures of other things, which show what the networks answer to what they do not know."""


class Size(NamedTuple):
    """What is left of a run's networks.

    Attributes:
        directions: In the difference convolutions.
        inputs: Channels that the second convolution of each PDN reads.
    """

    directions: int
    inputs: int

    def __str__(self) -> str:
        return f"{self.directions} directions, {self.inputs} inputs of conv-2"


@dataclass(frozen=True)
class Reduction:
    """A reduction that passed its gate.

    Attributes:
        model: The reduced networks in plain form.
        calibration: Of the reduced maps, in place of the run's.
        threshold: The same.
    """

    model: Reduced
    calibration: dict[str, Any]
    threshold: dict[str, Any]
    gate: Gate


class Reduced(AnomalyModel):
    """The networks with rotated differences in plain form: the reference for the fused graph.

    Args:
        rotations: For `EfficientAD.merged`, float64 [C, K] each.
    """

    input_px, map_cells, raw_names = EfficientAD.input_px, EfficientAD.map_cells, EfficientAD.raw_names
    meaning = EfficientAD.meaning

    def __init__(self, model: EfficientAD, rotations: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.model, self.rotations, self.blind_cells = model, rotations, model.blind_cells

    def architecture(self) -> dict[str, Any]:
        return self.model.architecture()

    def merged(self, dtype: torch.dtype) -> nn.Module:
        return self.model.merged(dtype, rotations=self.rotations)

    def anomaly_map(self, raw: tuple[Tensor, ...], calibration: Tensor) -> Tensor:
        return self.model.anomaly_map(raw, calibration)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw maps as those of `EfficientAD.forward`."""
        local, logical = self.model.differences(images)
        return reduced_map(local, self.rotations[0]), reduced_map(logical, self.rotations[1])


def folding(directions: Tensor, k: int) -> Tensor:
    """The matrix float64 [C, k] of `Reduced.rotations`.

    Its first columns are the first ceil(k / 2) directions; the other directions are summed up with
    random signs in the remaining columns, in turn, so that each gets strong and weak ones. All of it is
    scaled by sqrt(k / C), because the graph takes means over k where the run took them over C.

    Args:
        directions: Orthonormal columns by falling energy, [C, C].
        k: 2 <= k <= C.
    """
    channels = len(directions)
    principal = k - k // 2
    rest = channels - principal
    signs = np.random.default_rng(channels).choice((-1.0, 1.0), rest)
    turned = directions[:, principal:].double() * torch.from_numpy(signs)
    sums = torch.zeros(channels, k // 2, dtype=torch.float64)
    sums.index_add_(1, torch.arange(rest) % (k // 2), turned)
    return torch.cat([directions[:, :principal].double(), sums], 1) * (k / channels) ** 0.5


def reduce_run(
    run: Run,
    images: Sequence[Path],
    labels: Mapping[Path, int],
    *,
    sizes: Sequence[Size],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Reduction | None, dict[Size, list[str]]]:
    """The reduction of the fewest operations among those that pass the gate.

    Where some directions pass, more are not tried with as many inputs of the second convolutions; where
    none do, no fewer inputs.

    Args:
        images: Validation images, then test images. Of more than 500 test images, 500 are taken.
        labels: 0 or 1 (defective) of the test images, as far as known.
        sizes: What to try, directions rising.
        progress: Called with (images compared, images in all).

    Returns:
        The reduction, None if nothing passes; and what broke the gates of the others.
    """
    model = run.model
    assert isinstance(model, EfficientAD)
    root = Path(run.record["data"]["root"])
    good = len(run.record["data"]["validation"])
    test = images[good:]
    taken = np.linspace(0, len(test) - 1, min(len(test), MAX_IMAGES)).round().astype(int)
    chosen = [*images[:good], *(test[i] for i in taken)]
    names = [path.relative_to(root).as_posix() for path in chosen]
    known = [labels.get(path) for path in chosen]
    directions, inputs = statistics(model, [root / path for path in run.record["data"]["train"]])
    rotations = {k: (folding(directions[0], k), folding(directions[1], k)) for k, _ in sizes}
    maps = Maps(len(chosen), model.cells, rotations, directions)
    whole = whole_inputs(model)
    widths = [whole, *sorted({n for _, n in sizes} - {whole}, reverse=True)]
    passed: list[Reduction] = []
    refused: dict[Size, list[str]] = {}
    for turn, n in enumerate(widths):
        networks = model if n == whole else narrowed(model, inputs, n)
        for index, path in enumerate(chosen):
            maps.add(index, _differences(networks, path), whole=n == whole)
            if progress:
                progress(turn * len(chosen) + index + 1, len(widths) * len(chosen))
        for size in (size for size in sizes if size.inputs == n):
            raw, false_reject = maps.raw[size.directions], run.record["config"]["false_reject"]
            calibrated = calibration_of(model, (raw[0][:good], raw[1][:good]), false_reject)
            gate = compare(run, maps, *size, names, known, *calibrated)
            if not gate.failures:
                reduced = Reduced(networks, rotations[size.directions])
                passed.append(Reduction(reduced, *calibrated, gate))
                break
            more = len(gate.failures) - 5
            refused[size] = [*gate.failures[:5], *([f"and {more} more"] if more > 0 else [])]
            log.info("%s refused: %s", size, "; ".join(gate.failures))
        else:
            if n < whole:
                break
    best = min(passed, key=lambda found: flop_per_frame(MergedGraph(found.model)), default=None)
    return best, refused


Moments = list[tuple[Tensor, Tensor]]


@torch.inference_mode()
def statistics(model: EfficientAD, training: Sequence[Path]) -> tuple[tuple[Tensor, Tensor], Moments]:
    """What the reduction is made from.

    It comes from training images (what is normal) and rendered pictures of other things (what is not);
    the directions moreover from the teacher's features as well as from the differences, each of the four
    with the same weight: a direction that is weak in all of them is one that the teacher hardly ever
    uses. Validation and test images have no part in it.

    Returns:
        Directions, [C, C], of both kinds of differences, by falling energy, and per group of images the
        moments of what the second convolutions read, for `narrowed`.
    """
    taken = np.linspace(0, len(training) - 1, min(len(training), TRAINING_IMAGES)).round().astype(int)
    moments = [[SecondMoment(model.targets) for _ in range(3)] for _ in range(2)]
    inputs: Moments = []
    with tempfile.TemporaryDirectory() as folder:
        render_distractors(Path(folder) / "pictures", seed=0, count=PICTURES)
        groups = [training[i] for i in taken], list_images(Path(folder) / "pictures")
        for group, (features, local, logical) in zip(groups, moments, strict=True):
            with watched(model) as (teacher, student):
                for path in group:
                    x = _image(path)
                    features.add(model.teacher_features(normalise(x)))
                    for moment, part in zip((local, logical), model.differences(x), strict=True):
                        moment.add(part)
            inputs.append((teacher.mean(), student.mean()))
    energies = [[_unit(moment.mean()) for moment in group] for group in moments]
    features = energies[0][0] + energies[1][0]
    local, logical = (directions_of(features + energies[0][i] + energies[1][i])[0] for i in (1, 2))
    return (local, logical), inputs


def _unit(moment: Tensor) -> Tensor:
    return moment / moment.trace().clamp_min(1e-12)


def _image(path: Path) -> Tensor:
    """uint8 [1, 3, 256, 256]."""
    return torch.from_numpy(resize(read_image(path), IMAGE_PX, IMAGE_PX)[None]).permute(0, 3, 1, 2)


@torch.inference_mode()
def _differences(model: EfficientAD, path: Path) -> tuple[Tensor, Tensor]:
    local, logical = model.differences(_image(path))
    return local, logical


def sizes_for(reduce: str, model: EfficientAD) -> tuple[Size, ...]:
    """What `--reduce` asks to try of a run; nothing for "off".

    Raises:
        ExportError: neither auto nor off nor a fitting number.
    """
    channels, whole = model.targets, whole_inputs(model)
    if reduce == "off":
        return ()
    if reduce == "auto":
        directions = [*(k for k in SIZES if k < channels), channels]
        inputs = [whole, *(int(share * whole) for share in SHARES)]
        return tuple(Size(k, n) for n in inputs for k in directions if (k, n) != (channels, whole))
    if reduce.isdecimal() and 2 <= int(reduce) <= channels:
        return (Size(int(reduce), whole),)
    raise ExportError(
        f"--reduce {reduce}: expected auto, off, or a number of directions from 2 to {channels},"
        " the target channels of this run"
    )
