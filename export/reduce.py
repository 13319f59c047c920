"""Fewer directions in the difference convolutions of a trained run: `edgead export --reduce`.

Both raw maps are squared norms of difference vectors over the C target channels. A rotation leaves norms
as they are, and it folds into the weights. What is then cut is not thrown away: of K directions half are
the principal ones, and the other half are sums, with signs, of all that remain. The square of such a
sum is the energy of its parts plus products of directions that are uncorrelated on the images at hand:
in the mean no energy is lost, and a defect that lives in a single weak direction keeps all of its own.
With K = C every sum has one part, and the maps are exactly those of the run. docs/reduced-targets.md
has the proof and what was measured.

The rest is gated: the run's calibration is repeated with the reduced maps, and its verdicts on the
validation and test images have to be those of the whole networks.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgead.errors import ExportError
from edgead.export.parity import MAX_IMAGES, Flip
from edgead.image import list_images, read_image, resize
from edgead.metrics import image_auroc
from edgead.models.base import AnomalyModel
from edgead.models.efficientad import IMAGE_PX, EfficientAD, anomaly_map, anomaly_score
from edgead.models.folding import normalise
from edgead.training.demo_data import render_distractors
from edgead.training.directions import SecondMoment, directions_of
from edgead.training.run import Run
from edgead.training.train import calibration_of

log = logging.getLogger(__name__)

SIZES = (16, 32, 48, 64, 96, 128, 192, 256)
"""What `--reduce auto` tries, from the smallest on."""
MARGIN = 0.01
"""A verdict may flip within this distance from the threshold, in spreads of the scores; as in FP16."""
DEVIATION = 0.05
"""Largest change of a score's distance to its threshold, in spreads of the scores."""
AUROC_LOSS = 0.002
TRAINING_IMAGES = 32
PICTURES = 24
"""Rendered pictures of other things, which show what the networks answer to what they do not know."""


@dataclass(frozen=True)
class Gate:
    """Agreement of reduced networks with the whole ones on real images.

    Attributes:
        directions: K.
        images: How many were compared.
        score_spread: Largest minus smallest score of the whole networks.
        score_deviation: Largest change of a score's distance to its threshold, divided by the spread.
        margin: Distance from the threshold, on the score's scale, within which a verdict may flip.
        auroc: Image AUROC of the whole and of the reduced networks; None without labels of both kinds.
        kept: Smallest and largest share of the squared difference that is left at the strongest cell of
            an image, per raw map.
        beyond_principal: Largest share at such a cell that lies outside of the principal directions, and
            that plain cutting would lose.
        flips: Images with another verdict.
    """

    directions: int
    images: int
    score_spread: float
    score_deviation: float
    margin: float
    auroc: tuple[float, float] | None
    kept: dict[str, tuple[float, float]]
    beyond_principal: dict[str, float]
    flips: tuple[Flip, ...]

    @property
    def failures(self) -> list[str]:
        """What breaks the gate; empty when it passes."""
        found = []
        if not self.score_deviation <= DEVIATION:
            found.append(
                f"a score moves by {self.score_deviation:.3f} of the spread against its threshold,"
                f" allowed is {DEVIATION}"
            )
        if self.auroc and not self.auroc[1] >= self.auroc[0] - AUROC_LOSS:
            found.append(
                f"image AUROC falls from {self.auroc[0]:.4f} to {self.auroc[1]:.4f},"
                f" allowed is a loss of {AUROC_LOSS}"
            )
        return found + [
            f"{flip.image}: score minus threshold {flip.reference:.5g}, reduced {flip.exported:.5g},"
            " another verdict"
            for flip in self.flips
            if not abs(flip.reference) <= self.margin
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"flips": [asdict(flip) for flip in self.flips]}


@dataclass(frozen=True)
class Reduction:
    """A reduction that passed its gate.

    Attributes:
        rotations: For `MergedGraph`, float64 [C, K] each.
        calibration: Of the reduced maps, in place of the run's.
        threshold: The same.
        refused: Smaller sizes that `auto` tried, and what broke their gates.
    """

    rotations: tuple[Tensor, Tensor]
    calibration: dict[str, Any]
    threshold: dict[str, Any]
    gate: Gate
    refused: dict[str, list[str]]


class Reduced(AnomalyModel):
    """The networks with rotated differences in plain form: the reference for the fused graph."""

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


def reduced_map(differences: Tensor, rotation: Tensor) -> Tensor:
    """Raw map [N, h, w] of differences float32 [N, C, h, w]."""
    return torch.einsum("nchw,ck->nkhw", differences, rotation.float()).square().mean(1)


def folding(directions: Tensor, k: int) -> Tensor:
    """The matrix float64 [C, k] of `Reduction.rotations`.

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
    sizes: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Reduction | dict[str, list[str]]:
    """The smallest of some reductions that passes the gate.

    Args:
        images: Validation images, then test images. Of more than 500 test images, 500 are taken.
        labels: 0 or 1 (defective) of the test images, as far as known.
        sizes: Numbers of directions to try, rising, each at least 2 and at most the run's.
        progress: Called with (images compared, images in all).

    Returns:
        The reduction; if none passes, what broke each gate.
    """
    model = run.model
    assert isinstance(model, EfficientAD)
    root = Path(run.record["data"]["root"])
    directions = difference_directions(model, [root / path for path in run.record["data"]["train"]])
    rotations = {k: (folding(directions[0], k), folding(directions[1], k)) for k in sizes}
    good = len(run.record["data"]["validation"])
    test = images[good:]
    taken = np.linspace(0, len(test) - 1, min(len(test), MAX_IMAGES)).round().astype(int)
    chosen = [*images[:good], *(test[i] for i in taken)]
    maps = _Maps(len(chosen), model.cells, rotations, directions)
    for index, path in enumerate(chosen):
        maps.add(index, *_differences(model, path))
        if progress:
            progress(index + 1, len(chosen))
    names = [path.relative_to(root).as_posix() for path in chosen]
    known = [labels.get(path) for path in chosen]
    refused: dict[str, list[str]] = {}
    for k in sizes:
        local, logical = maps.raw[k]
        raw, false_reject = (local[:good], logical[:good]), run.record["config"]["false_reject"]
        calibration, threshold = calibration_of(run.model, raw, false_reject)
        gate = _gate(run, maps, k, names, known, calibration, threshold)
        if not gate.failures:
            return Reduction(rotations[k], calibration, threshold, gate, refused)
        more = len(gate.failures) - 5
        refused[str(k)] = [*gate.failures[:5], *([f"and {more} more"] if more > 0 else [])]
        log.info("reduction to %d directions refused: %s", k, "; ".join(gate.failures))
    return refused


@torch.inference_mode()
def difference_directions(model: EfficientAD, training: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Directions, [C, C], of both kinds of differences, by falling energy.

    They come from training images (what is normal), rendered pictures of other things (what is not), and
    from the teacher's features as well as from the differences, each of the four with the same weight: a
    direction that is weak in all of them is one that the teacher hardly ever uses. Validation and test
    images have no part in it.
    """
    taken = np.linspace(0, len(training) - 1, min(len(training), TRAINING_IMAGES)).round().astype(int)
    moments = [[SecondMoment(model.targets) for _ in range(3)] for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        render_distractors(Path(folder) / "pictures", seed=0, count=PICTURES)
        groups = [training[i] for i in taken], list_images(Path(folder) / "pictures")
        for group, (features, local, logical) in zip(groups, moments, strict=True):
            for path in group:
                x = _image(path)
                features.add(model.teacher_features(normalise(x)))
                for moment, part in zip((local, logical), model.differences(x), strict=True):
                    moment.add(part)
    energies = [[_unit(moment.mean()) for moment in group] for group in moments]
    features = energies[0][0] + energies[1][0]
    local, logical = (directions_of(features + energies[0][i] + energies[1][i])[0] for i in (1, 2))
    return local, logical


def _unit(moment: Tensor) -> Tensor:
    return moment / moment.trace().clamp_min(1e-12)


def _image(path: Path) -> Tensor:
    """uint8 [1, 3, 256, 256]."""
    return torch.from_numpy(resize(read_image(path), IMAGE_PX, IMAGE_PX)[None]).permute(0, 3, 1, 2)


@torch.inference_mode()
def _differences(model: EfficientAD, path: Path) -> tuple[Tensor, Tensor]:
    local, logical = model.differences(_image(path))
    return local, logical


class _Maps:
    """Raw maps of all images, whole and with each reduction, so that the networks run once.

    Attributes:
        whole: Local and logical maps, float32 [N, cells, cells].
        raw: The same per reduction.
        beyond: Per reduction and map, share of the strongest cell's energy outside of the principal
            directions, [N].
    """

    def __init__(
        self,
        count: int,
        cells: int,
        rotations: Mapping[int, tuple[Tensor, Tensor]],
        directions: tuple[Tensor, Tensor],
    ) -> None:
        def empty() -> tuple[np.ndarray, np.ndarray]:
            shape = (count, cells, cells)
            return np.empty(shape, np.float32), np.empty(shape, np.float32)

        self.rotations, self.directions = rotations, directions
        self.whole = empty()
        self.raw = {k: empty() for k in rotations}
        self.beyond = {k: (np.empty(count), np.empty(count)) for k in rotations}

    def add(self, index: int, *differences: Tensor) -> None:
        for i, part in enumerate(differences):
            whole = part.square().mean(1)[0]
            self.whole[i][index] = whole.numpy()
            vector = part[0].flatten(1)[:, whole.argmax()]
            energies = (self.directions[i].T @ vector).square().cumsum(0)
            for k, pair in self.rotations.items():
                self.raw[k][i][index] = reduced_map(part, pair[i])[0].numpy()
                principal = k - k // 2
                total = float(energies[-1])
                self.beyond[k][i][index] = 1 - float(energies[principal - 1]) / total if total else 0.0

    def kept(self, k: int, i: int) -> np.ndarray:
        """Share of the squared difference that is left at the strongest cell of each image, [N]."""
        whole, reduced = (maps[i].reshape(len(maps[i]), -1) for maps in (self.whole, self.raw[k]))
        at = whole.argmax(1)[:, None]
        strongest = np.take_along_axis(whole, at, 1)
        left = np.take_along_axis(reduced, at, 1)
        return np.divide(left, strongest, out=np.ones_like(left), where=strongest > 0)[:, 0]


def _scores(maps: tuple[np.ndarray, np.ndarray], values: Sequence[float]) -> np.ndarray:
    """Image scores float64 [N] of raw maps."""
    calibration = torch.tensor(values, dtype=torch.float32)
    joined = anomaly_map(torch.from_numpy(maps[0]), torch.from_numpy(maps[1]), calibration)
    return anomaly_score(joined).double().numpy()


def _gate(
    run: Run,
    maps: _Maps,
    k: int,
    names: Sequence[str],
    labels: Sequence[int | None],
    calibration: dict[str, Any],
    threshold: dict[str, Any],
) -> Gate:
    whole = _scores(maps.whole, run.record["calibration"]["values"])
    reduced = _scores(maps.raw[k], calibration["values"])
    before, after = whole - run.record["threshold"]["value"], reduced - threshold["value"]
    spread = float(np.ptp(whole)) or max(1.0, abs(float(whole[0])))
    flips = tuple(
        Flip(names[i], float(before[i]), float(after[i]))
        for i in np.flatnonzero((before >= 0) != (after >= 0)).tolist()
    )
    known = np.array([label is not None for label in labels])
    kinds = np.array([label for label in labels if label is not None])
    auroc = None
    if len(set(kinds.tolist())) == 2:
        auroc = image_auroc(whole[known], kinds), image_auroc(reduced[known], kinds)
    shares = {name: maps.kept(k, i) for i, name in enumerate(("local", "logical"))}
    return Gate(
        directions=k,
        images=len(names),
        score_spread=spread,
        score_deviation=float(np.abs(after - before).max()) / spread,
        margin=MARGIN * spread,
        auroc=auroc,
        kept={name: (float(share.min()), float(share.max())) for name, share in shares.items()},
        beyond_principal={
            name: float(maps.beyond[k][i].max()) for i, name in enumerate(("local", "logical"))
        },
        flips=flips,
    )


def sizes_for(reduce: str, channels: int) -> tuple[int, ...]:
    """What `--reduce` asks to try, of a run with so many target channels; nothing for "off".

    Raises:
        ExportError: neither auto nor off nor a fitting number.
    """
    if reduce == "off":
        return ()
    if reduce == "auto":
        return tuple(k for k in SIZES if k < channels)
    if reduce.isdecimal() and 2 <= int(reduce) <= channels:
        return (int(reduce),)
    raise ExportError(
        f"--reduce {reduce}: expected auto, off, or a number of directions from 2 to {channels},"
        " the target channels of this run"
    )
