"""Prototypes of normal patch features: FINCH clustering, in blocks, without gradients or parameters.

Source: Sarfraz, Sharma, Stiefelhagen, "Efficient Parameter-Free Clustering Using First Neighbor
Relations" (FINCH), CVPR 2019. That ProtoAD (arXiv 2310.02576) clusters with FINCH is published; which
partition it takes and how it copes with all patches of a data set is not. Blocks, weights and the choice
of the partition are edgead's own definition.

The result depends on no order of summation, hence not on threads, tiles or the device: values are
rounded to multiples of 2^-26, so that float64 holds sums (of up to 2^27 patches) and products exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgead.errors import TrainingError

log = logging.getLogger(__name__)

PROTOTYPES_LIMIT = 4096
"""The largest `max_prototypes`: the maximum over the prototypes is bound by memory."""

BLOCK_PATCHES = 20_000
CENTROIDS_LIMIT = 100_000
_TILE = 1024  # of the matrix of cosines; 4 MiB stay in the cache
_CHANNELS = 32  # that are summed at once in float64
_GRID = 2.0**26
# Float32 cosines closer than this are compared again, exactly. Their error was 1.3e-6 at most on unit
# vectors of 64 to 4096 channels; TF32, which torch leaves off unless told otherwise, would need 1e-3.
_DOUBT = 1e-5


def finch(vectors: Tensor, counts: Tensor | None = None, *, tile: int = _TILE) -> list[Tensor]:
    """Hierarchy of partitions, finest first; the last one is a single cluster.

    Every vector is linked with its first neighbour by cosine (of several the one with the lowest index);
    linked vectors are a cluster. The next partition links the means of the clusters. A mean is that of
    all original members and is not normalised.

    Every cluster has a neighbour, so that the number of clusters at least halves from one partition to
    the next. Memory beyond the input: one tile of cosines and the means, never [N, N].

    Args:
        vectors: Float [N, C], unit rows or means of such; |values| <= 1, finite. CPU or CUDA.
        counts: Patches that each row is the mean of, int64 [N]; default 1.
        tile: Rows and columns of cosines that are computed at once; the result does not depend on it.

    Returns:
        Labels int64 [N], 0..clusters-1, one tensor per partition, on the device of `vectors`.

    Raises:
        TrainingError: there are no vectors.
    """
    if not len(vectors):
        raise TrainingError("FINCH got 0 vectors; expected at least 1: check the training images")
    if counts is None:
        counts = torch.ones(len(vectors), dtype=torch.int64, device=vectors.device)
    labels = _components(first_neighbours(vectors, tile=tile))
    partitions = [labels]
    while int(labels.max()) > 0:
        means, _ = cluster_means(vectors, labels, counts)
        labels = _components(first_neighbours(means, tile=tile))[labels]
        partitions.append(labels)
    return partitions


def first_neighbours(vectors: Tensor, *, tile: int = _TILE) -> Tensor:
    """Index of the other row with the largest cosine, the lowest index of equals.

    Args:
        vectors: Float [N, C], |values| <= 1; a row of zeros has the cosine 0 to every other.

    Returns:
        int64 [N]; [0] for a single row.
    """
    everyone = torch.arange(len(vectors), device=vectors.device)
    index, lead = _search(vectors, everyone, tile, _unit)
    close = (lead <= _DOUBT).nonzero().flatten()
    if len(close):
        index[close], _ = _search(vectors, close, tile, _exact_unit)
    return index


def _search(
    vectors: Tensor, rows: Tensor, tile: int, unit: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """First neighbours of the rows with these indices, and their lead in cosine over the second best."""
    index = torch.zeros_like(rows)
    best = torch.full(rows.shape, -2.0, dtype=torch.float64, device=rows.device)
    second = best.clone()
    for top in range(0, len(rows), tile):
        part = slice(top, top + tile)
        own, left = rows[part], unit(vectors[rows[part]])
        for start in range(0, len(vectors), tile):
            cosines = left @ unit(vectors[start : start + tile]).T
            itself = ((own >= start) & (own < start + tile)).nonzero().flatten()
            cosines[itself, own[itself] - start] = -2
            value, column = cosines.max(1)  # the first of equal ones
            rest = cosines.scatter_(1, column[:, None], -2).amax(1)
            better = value > best[part]
            second[part] = torch.maximum(
                torch.maximum(second[part], rest), torch.minimum(value, best[part])
            )
            index[part] = torch.where(better, column + start, index[part])
            best[part] = torch.where(better, value, best[part])
    return index, best - second


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float())


def _on_grid(vectors: Tensor) -> Tensor:
    return (vectors.double() * _GRID).round_().div_(_GRID)


def _exact_unit(vectors: Tensor) -> Tensor:
    """Unit rows float64 on the grid: products of two are exact, in whatever order they are summed."""
    exact = _on_grid(vectors)
    norms = exact.square().sum(1, keepdim=True).sqrt_()  # of an exact sum
    return _on_grid(exact / norms.clamp_min_(1e-12))


def _components(neighbours: Tensor) -> Tensor:
    """Connected components of the graph with an edge from every node i to neighbours[i].

    Whoever follows the edges ends in the one cycle of his component. The paths double in length with
    each round; when they are longer than N, they end on the cycle and have seen all of it from there.

    Returns:
        Labels int64 [N], 0..components-1.
    """
    target, lowest = neighbours, torch.arange(len(neighbours), device=neighbours.device)
    for _ in range(len(neighbours).bit_length()):
        lowest = torch.minimum(lowest, lowest[target])
        target = target[target]
    return torch.unique(lowest[target], return_inverse=True)[1]


def cluster_means(vectors: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Count-weighted means float32 [K, C] and total counts int64 [K] of the clusters.

    Args:
        vectors: Float [N, C], |values| <= 1.
        labels: int64 [N], every one of 0..K-1 at least once.
        counts: int64 [N], at least 1.
    """
    clusters, channels = int(labels.max()) + 1, vectors.shape[1]
    totals = torch.zeros(clusters, dtype=torch.int64, device=labels.device)
    totals.index_add_(0, labels, counts)
    means = torch.empty(clusters, channels, device=vectors.device)
    for start in range(0, channels, _CHANNELS):
        part = slice(start, min(start + _CHANNELS, channels))
        sums = torch.zeros(clusters, part.stop - start, dtype=torch.float64, device=vectors.device)
        sums.index_add_(0, labels, _on_grid(vectors[:, part]).mul_(counts[:, None]))
        means[:, part] = sums.div_(totals[:, None])
    return means, totals


def _condensed(vectors: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Means and counts of the finest partition."""
    return cluster_means(vectors, _components(first_neighbours(vectors)), counts)


def _rows(parts: list[tuple[Tensor, Tensor]]) -> int:
    return sum(len(counts) for _, counts in parts)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    centroids, counts = zip(*parts, strict=True)
    return torch.cat(centroids), torch.cat(counts)


@dataclass(frozen=True)
class Prototypes:
    """What a data set was condensed to.

    Attributes:
        vectors: Unit rows float32 [K, C].
        counts: Training patches behind each row, int64 [K].
        hierarchy: Clusters of every partition, finest first. The first number counts the centroids of
            all blocks, the last one is 1.
    """

    vectors: Tensor
    counts: Tensor
    hierarchy: tuple[int, ...]


class PrototypeLearner:
    """Clusters a stream of patch features: each block at once, then the centroids of all blocks.

    A block of real patches has 2.7 times as many patches as centroids (MobileNetV2) to 4.4 times (PDN).
    Whenever there are more than CENTROIDS_LIMIT centroids, they are clustered in blocks once more: the
    last step takes all at once, and its time grows with their square. Memory: a block in FP16, and up to
    CENTROIDS_LIMIT centroids in FP32 for each round of clustering.

    Args:
        channels: C of the patches.
        max_prototypes: 1..4096. The finest partition with at most this many clusters is taken.
        block: Patches that are clustered at once. One block is plain FINCH over all patches.
        device: Where blocks and centroids are kept and clustered.

    Raises:
        TrainingError: max_prototypes is out of range.
    """

    def __init__(
        self,
        channels: int,
        *,
        max_prototypes: int = 1024,
        block: int = BLOCK_PATCHES,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= max_prototypes <= PROTOTYPES_LIMIT:
            raise TrainingError(
                f"max_prototypes is {max_prototypes}; expected 1 to {PROTOTYPES_LIMIT}: the time and"
                " memory of an inspection grow with it"
            )
        self.max_prototypes = max_prototypes
        self._block = torch.empty(block, channels, dtype=torch.float16, device=device)
        self._filled = 0
        # Tier 0 holds the centroids of patches, tier 1 centroids of those, and so on.
        self._tiers: list[list[tuple[Tensor, Tensor]]] = []
        self._sizes: list[int] = []

    def add(self, patches: Tensor) -> None:
        """Take the patches of an image, or of several.

        Args:
            patches: Float [P, C], rows of unit length (or zeros); kept in FP16.

        Raises:
            TrainingError: other channels, values that are not finite, or rows longer than 1.
        """
        channels = self._block.shape[1]
        if patches.ndim != 2 or patches.shape[1] != channels:
            raise TrainingError(
                f"patch features have the shape {list(patches.shape)}; expected [patches, {channels}]:"
                " feed all images through the same backbone"
            )
        longest = patches.float().norm(dim=1).max() if len(patches) else torch.zeros(())
        if not longest < 1.001:  # FP16 rows of unit length are off by 5e-4 at most; false for NaN, too
            raise TrainingError(
                f"patch features have a row of length {float(longest):.6g}; expected 1: normalise them,"
                " and check the backbone's weights if they are not finite"
            )
        while len(patches):
            taken = patches[: len(self._block) - self._filled]
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            patches = patches[len(taken) :]
            if self._filled == len(self._block):
                self._condense()

    def _condense(self) -> None:
        block = self._block[: self._filled]
        ones = torch.ones(self._filled, dtype=torch.int64, device=block.device)
        self._keep(0, *_condensed(block, ones))
        self._filled = 0

    def _keep(self, tier: int, centroids: Tensor, counts: Tensor) -> None:
        if tier == len(self._tiers):
            self._tiers.append([])
            self._sizes.append(0)
        self._tiers[tier].append((centroids, counts))
        self._sizes[tier] += len(counts)
        log.info("%d patches -> %d centroids", int(counts.sum()), len(counts))
        if _rows(self._tiers[tier]) > CENTROIDS_LIMIT:
            self._lift(tier)

    def _lift(self, tier: int) -> None:
        """Cluster the centroids of a tier in blocks; theirs go to the next tier."""
        parts, self._tiers[tier] = self._tiers[tier][::-1], []
        while parts:
            group = [parts.pop()]
            while parts and _rows(group) + _rows(parts[-1:]) <= len(self._block):
                group.append(parts.pop())
            self._keep(tier + 1, *_condensed(*_joined(group)))

    def finish(self) -> Prototypes:
        """Cluster the centroids of all blocks. The learner is empty afterwards.

        Raises:
            TrainingError: there were no patches.
        """
        if self._filled:
            self._condense()
        if not self._tiers:
            raise TrainingError("no patches were added; expected some: check the training images")
        tier = 0
        while tier < len(self._tiers) - 1:  # a tier that overflows makes one more
            self._lift(tier)
            tier += 1
        centroids, counts = _joined(self._tiers[-1])
        hierarchy = self._sizes
        self._tiers, self._sizes = [], []

        chosen = torch.arange(len(counts), device=counts.device)
        for labels in finch(centroids, counts) if len(counts) > 1 else ():
            if hierarchy[-1] > self.max_prototypes:
                chosen = labels
            hierarchy.append(int(labels.max()) + 1)
        means, totals = cluster_means(centroids, chosen, counts)
        log.info("%d prototypes out of the hierarchy %s", len(means), hierarchy)
        if len(means) == 1:
            log.warning("all patches are one prototype: allow more than %d", self.max_prototypes)
        return Prototypes(F.normalize(means), totals, tuple(hierarchy))
