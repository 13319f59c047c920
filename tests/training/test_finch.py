"""FINCH and the prototypes: against finch-clust, against brute force, and in blocks."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgead.errors import TrainingError
from edgead.training import finch as module
from edgead.training.finch import PrototypeLearner, cluster_means, finch, first_neighbours

SEEDS = st.integers(0, 2**32 - 1)


def curved(seed: int, count: int = 4000) -> Tensor:
    """Unit rows float32 [count, 32] on a bent surface of 4 dimensions, never negative like a ReLU's."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4)) @ rng.normal(size=(4, 32)) + 0.1 * rng.normal(size=(count, 32))
    x = np.maximum(x, 0)
    return torch.from_numpy((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def hierarchy(partitions: list[Tensor]) -> list[int]:
    return [int(labels.max()) + 1 for labels in partitions]


def same_clusters(a: Tensor, b: Tensor) -> bool:
    """Whether two labellings differ in the names alone."""
    pairs = torch.unique(torch.stack([a, b]), dim=1).shape[1]
    return pairs == len(a.unique()) == len(b.unique())


def test_hierarchy_is_that_of_finch_clust_on_4000_points() -> None:
    """Golden values: finch-clust 0.2.3, FINCH(points.numpy()), which leaves the single cluster out.

    The closest two candidates for a first neighbour differ by 9e-7 in cosine, in float64.
    """
    partitions = finch(curved(seed=1))
    assert hierarchy(partitions) == [1071, 283, 75, 24, 8, 3, 1]
    assert sorted(partitions[-2].bincount().tolist()) == [955, 1144, 1901]


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.filterwarnings("ignore:pynndescent is not installed")
def test_partitions_are_those_of_finch_clust(seed: int) -> None:
    oracle = pytest.importorskip("finch", reason="finch-clust, the oracle, is not installed")
    points = curved(seed)
    expected, clusters, _ = oracle.FINCH(points.numpy(), verbose=False)
    partitions = finch(points)
    assert hierarchy(partitions) == [*clusters, 1]
    for level in range(len(clusters)):
        assert same_clusters(partitions[level], torch.from_numpy(expected[:, level]).long())


def test_three_blobs_are_three_clusters_of_a_partition() -> None:
    generator = torch.Generator().manual_seed(0)
    blob = torch.randint(3, (600,), generator=generator)
    points = F.normalize(10 * torch.eye(16)[blob] + torch.randn(600, 16, generator=generator))
    (three,) = (labels for labels in finch(points) if int(labels.max()) == 2)
    assert same_clusters(three, blob)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_partitions_are_nested_and_the_input_is_left_alone(dtype: torch.dtype) -> None:
    points = curved(0, 500).to(dtype)
    before = points.clone()
    partitions = finch(points)
    assert torch.equal(points, before)
    sizes = hierarchy(partitions)
    assert sizes[-1] == 1 and all(2 * b <= a for a, b in zip(sizes, sizes[1:], strict=False))
    for fine, coarse in zip(partitions, partitions[1:], strict=False):
        assert fine.dtype == torch.int64 and sorted(fine.unique()) == list(range(int(fine.max()) + 1))
        assert len(torch.unique(torch.stack([fine, coarse]), dim=1).T) == len(fine.unique())


@given(SEEDS, st.integers(1, 90), st.integers(2, 6))
@settings(deadline=None)
def test_order_of_the_points_is_of_no_matter(seed: int, count: int, channels: int) -> None:
    rng = np.random.default_rng(seed)
    points = F.normalize(torch.from_numpy(rng.normal(size=(count, channels))))
    order = torch.from_numpy(rng.permutation(count))
    counts = torch.from_numpy(rng.integers(1, 50, count))
    partitions, shuffled = finch(points, counts), finch(points[order], counts[order])
    assert hierarchy(partitions) == hierarchy(shuffled)
    assert all(same_clusters(a[order], b) for a, b in zip(partitions, shuffled, strict=True))


@given(SEEDS, st.integers(2, 60), st.integers(5, 70))
@settings(deadline=None)
def test_first_neighbours_with_ties(seed: int, count: int, tile: int) -> None:
    """Rows of +-0.5 have length 1 and products that float32 holds exactly; 16 different ones exist."""
    signs = np.random.default_rng(seed).integers(0, 2, (count, 4))
    points = (signs - 0.5).astype(np.float32)
    cosines = points @ points.T
    np.fill_diagonal(cosines, -2)
    found = first_neighbours(torch.from_numpy(points), tile=tile)
    np.testing.assert_array_equal(found.numpy(), cosines.argmax(1))  # the first of equal ones


def crowded(seed: int) -> Tensor:
    """Unit rows with cosines so close to each other that float32 products cannot order them."""
    noise = torch.rand(400, 96, generator=torch.Generator().manual_seed(seed))
    return F.normalize(noise[:1] + 2e-2 * noise)


@pytest.mark.parametrize("tile", [50, 1024])
def test_first_neighbours_where_float32_cannot_decide(tile: int) -> None:
    """Rounding unit rows to 2^-26 may cost 5e-8; float32 products alone were seen to lose 2.8e-7."""
    points = crowded(0).double()
    points /= points.norm(dim=1, keepdim=True)
    cosines = (points @ points.T).fill_diagonal_(-2)
    found = cosines.gather(1, first_neighbours(points, tile=tile)[:, None])
    assert float((cosines.amax(1, keepdim=True) - found).max()) < 5e-8


@given(SEEDS, st.integers(20, 150))
@settings(deadline=None, max_examples=15)
def test_tiles_change_nothing(seed: int, tile: int) -> None:
    points = crowded(seed)
    whole, tiled = finch(points), finch(points, tile=tile)
    assert len(whole) == len(tiled)
    assert all(torch.equal(a, b) for a, b in zip(whole, tiled, strict=True))


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield torch.set_num_threads(2)
    torch.set_num_threads(threads)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=80))
@settings(deadline=None)
def test_components_of_any_graph_with_one_edge_per_node(edges: list[int]) -> None:
    """Also with cycles longer than the two nodes that first neighbours make."""
    neighbours = [edge % len(edges) for edge in edges]
    names = list(range(len(edges)))
    for _ in names:  # the lowest index spreads along the edges, both ways
        for i, j in enumerate(neighbours):
            names[i] = names[j] = min(names[i], names[j])
    assert same_clusters(module._components(torch.tensor(neighbours)), torch.tensor(names))


def test_means_weigh_by_counts() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    means, totals = cluster_means(points, torch.tensor([0, 0, 1]), torch.tensor([3, 1, 7]))
    torch.testing.assert_close(means, torch.tensor([[0.75, 0.25], [0.6, 0.8]]))
    assert totals.tolist() == [4, 7]


@pytest.mark.parametrize(("counts", "joined"), [((50, 1), [0, 0, 0, 1, 1]), ((1, 50), [0, 1, 1, 0, 0])])
def test_counts_decide_which_clusters_merge(counts: tuple[int, int], joined: list[int]) -> None:
    """Pairs on a circle, in degrees: the mean of the first is near 3 or 7, next to -2 or to 12."""
    angles = torch.deg2rad(torch.tensor([3, 7, -2, -1.9, -5, -4.9, 12, 12.1, 15, 15.1]).double())
    points = torch.stack([angles.cos(), angles.sin()], 1)
    first, second = finch(points, torch.tensor([*counts, 1, 1, 1, 1, 1, 1, 1, 1]))[:2]
    assert first.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert same_clusters(second[::2], torch.tensor(joined))


def test_one_point_and_two() -> None:
    assert [labels.tolist() for labels in finch(torch.tensor([[0.6, 0.8]]))] == [[0]]
    assert [labels.tolist() for labels in finch(torch.eye(2))] == [[0, 0]]
    with pytest.raises(TrainingError, match="0 vectors"):
        finch(torch.empty(0, 8))


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_features_are_one_cluster(value: float) -> None:
    assert hierarchy(finch(torch.full((3000, 16), value, dtype=torch.float16))) == [1]


def test_duplicates_share_a_cluster() -> None:
    points = curved(0, 300)
    twice = torch.cat([points, points[:100]])
    labels = finch(twice)[0]
    assert torch.equal(labels[300:], labels[:100])
    assert torch.equal(first_neighbours(twice)[:100], torch.arange(300, 400))


def images(seed: int = 0) -> list[Tensor]:
    return list(curved(seed).split(400))


def learn(parts: list[Tensor], **options: int) -> module.Prototypes:
    learner = PrototypeLearner(32, **options)
    for patches in parts:
        learner.add(patches)
    return learner.finish()


def test_one_block_is_finch_over_all_patches() -> None:
    patches = curved(0).half()  # that is what a block keeps
    partitions = finch(patches)
    found = learn(images(), max_prototypes=100)
    assert list(found.hierarchy) == hierarchy(partitions)
    chosen = next(labels for labels in partitions if int(labels.max()) < 100)
    means, counts = cluster_means(patches, chosen, torch.ones(4000, dtype=torch.int64))
    assert sorted(found.counts.tolist()) == sorted(counts.tolist())
    nearest = (F.normalize(means) @ found.vectors.T).max(1)
    assert len(nearest.indices.unique()) == len(counts) == len(found.counts)
    assert torch.equal(found.counts[nearest.indices], counts)
    assert float(nearest.values.min()) > 1 - 1e-6  # centroids are rounded to float32 in between


def test_finest_partition_that_is_small_enough() -> None:
    sizes = learn(images()).hierarchy
    for most in (4096, sizes[0], sizes[0] - 1, sizes[1], sizes[1] - 1, 1):
        found = learn(images(), max_prototypes=most)
        assert len(found.vectors) == len(found.counts) == max(size for size in sizes if size <= most)
        assert found.hierarchy == sizes and int(found.counts.sum()) == 4000
        assert found.vectors.dtype == torch.float32 and found.counts.dtype == torch.int64
        torch.testing.assert_close(found.vectors.norm(dim=1), torch.ones(len(found.counts)))


def test_blocks_do_not_depend_on_how_patches_arrive() -> None:
    found = learn(images(), block=1500, max_prototypes=200)
    one_by_one = learn([*curved(0).split(7), torch.empty(0, 32)], block=1500, max_prototypes=200)
    assert torch.equal(found.vectors, one_by_one.vectors)
    assert found.hierarchy == one_by_one.hierarchy
    assert found.hierarchy[0] == sum(hierarchy(finch(b.half()))[0] for b in curved(0).split(1500))
    assert int(found.counts.sum()) == 4000


def test_too_many_centroids_are_clustered_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = learn(images(), block=1000, max_prototypes=60)
    monkeypatch.setattr(module, "CENTROIDS_LIMIT", 200)
    kept = []
    original = PrototypeLearner._keep

    def keep(self: PrototypeLearner, tier: int, centroids: Tensor, counts: Tensor) -> None:
        original(self, tier, centroids, counts)
        kept.append([module._rows(parts) for parts in self._tiers])

    monkeypatch.setattr(PrototypeLearner, "_keep", keep)
    found = learn(images(), block=1000, max_prototypes=60)
    assert max(len(tiers) for tiers in kept) >= 3 and max(max(tiers) for tiers in kept) <= 200
    assert int(found.counts.sum()) == 4000 and 1 < len(found.counts) <= 60
    assert all(b < a for a, b in zip(found.hierarchy, found.hierarchy[1:], strict=False))
    assert found.hierarchy[0] == plain.hierarchy[0]
    # blocks are another clustering, not a worse one: patches are as near to their prototypes
    cosines = [(curved(0) @ p.vectors.T).amax(1).mean() for p in (plain, found)]
    assert float(cosines[1]) > float(cosines[0]) - 0.02


def test_threads_change_nothing(two_threads: None) -> None:
    many = learn(images())
    torch.set_num_threads(1)
    assert torch.equal(many.vectors, learn(images()).vectors)


def test_learner_starts_again_after_finish() -> None:
    learner = PrototypeLearner(32)
    results = []
    for _ in range(2):
        learner.add(curved(0, 300))
        results.append(learner.finish())
    assert results[0].hierarchy == results[1].hierarchy and int(results[1].counts.sum()) == 300
    with pytest.raises(TrainingError, match="no patches were added"):
        learner.finish()


def test_a_single_prototype_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        learn([curved(0, 50)])
        assert not caplog.records
        found = learn([torch.zeros(50, 32)])
    assert found.hierarchy == (1,) and found.counts.tolist() == [50]
    assert torch.isfinite(found.vectors).all() and "one prototype" in caplog.text


@pytest.mark.parametrize("most", [0, -1, 4097])
def test_max_prototypes_out_of_range(most: int) -> None:
    with pytest.raises(TrainingError, match=f"max_prototypes is {most}; expected 1 to 4096"):
        PrototypeLearner(32, max_prototypes=most)


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (torch.zeros(5, 31), r"shape \[5, 31\]; expected \[patches, 32\]"),
        (torch.zeros(1, 5, 32), r"shape \[1, 5, 32\]"),
        (torch.ones(5, 32), "length 5.65685; expected 1"),
        (torch.full((5, 32), torch.nan), "length nan; expected 1"),
        (torch.full((5, 32), torch.inf), "length inf; expected 1"),
    ],
)
def test_wrong_patches(patches: Tensor, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        PrototypeLearner(32).add(patches)


MEMORY = """
import torch
from pathlib import Path
from edgead.training.finch import finch

def peak_mib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

torch.set_num_threads(1)
points = torch.randn(50_000, 32, generator=torch.Generator().manual_seed(0))
points = torch.nn.functional.normalize(points)
finch(points[:2000])  # libraries that load late
before = peak_mib()
finch(points)
print(peak_mib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's /proc entry")
def test_memory_of_50000_points() -> None:
    """32 MiB were measured (108 with 128 channels); a matrix [N, N] of float32 takes 9537 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100


@pytest.mark.gpu
def test_a_gpu_finds_the_same_prototypes() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, its driver and a CUDA build of PyTorch")
    found, expected = learn(images(), device="cuda"), learn(images())  # type: ignore[arg-type]
    assert found.hierarchy == expected.hierarchy
    assert torch.equal(found.counts.cpu(), expected.counts)
    torch.testing.assert_close(found.vectors.cpu(), expected.vectors, rtol=0, atol=1e-6)
