"""The gate of `edgead export --reduce`: reduced networks against the whole ones on real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgead.export.parity import Flip
from edgead.metrics import image_auroc
from edgead.models.efficientad import anomaly_map, anomaly_score
from edgead.training.run import Run

MARGIN = 0.01
"""A verdict may flip within this distance from the threshold, in spreads of the scores; as in FP16."""
DEVIATION = 0.05
"""Largest change of a score's distance to its threshold, in spreads of the scores."""
AUROC_LOSS = 0.002


@dataclass(frozen=True)
class Gate:
    """Agreement of reduced networks with the whole ones on real images.

    Attributes:
        directions: K.
        inputs: Channels that each second convolution reads.
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
    inputs: int
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


def reduced_map(differences: Tensor, rotation: Tensor) -> Tensor:
    """Raw map [N, h, w] of differences float32 [N, C, h, w]."""
    return torch.einsum("nchw,ck->nkhw", differences, rotation.float()).square().mean(1)


class Maps:
    """Raw maps of all images, whole and with each rotation, so that the networks run once for all.

    Attributes:
        whole: Local and logical maps, float32 [N, cells, cells].
        raw: The same per K, of the networks that `add` was last called with.
        beyond: Per K and map, share of the strongest cell's energy in the whole networks outside of the
            principal directions, [N].
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

    def add(self, index: int, differences: tuple[Tensor, Tensor], *, whole: bool) -> None:
        """Count one image.

        Args:
            index: Of the image.
            differences: float32 [1, C, cells, cells] each.
            whole: They are those of the whole networks, which have to come first.
        """
        for i, part in enumerate(differences):
            if whole:
                self._add_whole(index, i, part)
            for k, pair in self.rotations.items():
                self.raw[k][i][index] = reduced_map(part, pair[i])[0].numpy()

    def _add_whole(self, index: int, i: int, part: Tensor) -> None:
        energy = part.square().mean(1)[0]
        self.whole[i][index] = energy.numpy()
        vector = part[0].flatten(1)[:, energy.argmax()]
        energies = (self.directions[i].T @ vector).square().cumsum(0)
        total = float(energies[-1])
        for k in self.rotations:
            principal = k - k // 2
            self.beyond[k][i][index] = 1 - float(energies[principal - 1]) / total if total else 0.0

    def kept(self, k: int, i: int) -> np.ndarray:
        """Share of the squared difference that is left at the strongest cell of each image, [N]."""
        whole, reduced = (maps[i].reshape(len(maps[i]), -1) for maps in (self.whole, self.raw[k]))
        at = whole.argmax(1)[:, None]
        strongest = np.take_along_axis(whole, at, 1)
        left = np.take_along_axis(reduced, at, 1)
        return np.divide(left, strongest, out=np.ones_like(left), where=strongest > 0)[:, 0]


def compare(
    run: Run,
    maps: Maps,
    k: int,
    inputs: int,
    names: Sequence[str],
    labels: Sequence[int | None],
    calibration: dict[str, Any],
    threshold: dict[str, Any],
) -> Gate:
    """The gate of one reduction.

    Args:
        run: With the whole networks' calibration and threshold.
        maps: Of all images.
        k, inputs: The reduction.
        names: Of the images.
        labels: 0, 1 (defective) or None of the images.
        calibration, threshold: Of the reduced networks.
    """
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
        inputs=inputs,
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


def _scores(maps: tuple[np.ndarray, np.ndarray], values: Sequence[float]) -> np.ndarray:
    """Image scores float64 [N] of raw maps."""
    calibration = torch.tensor(values, dtype=torch.float32)
    joined = anomaly_map(torch.from_numpy(maps[0]), torch.from_numpy(maps[1]), calibration)
    return anomaly_score(joined).double().numpy()
