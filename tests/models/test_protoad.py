"""ProtoAD: scores by hand and by others' definitions, the split form, a run from images to bundle."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from edgead.bundle import Bundle
from edgead.errors import TrainingError, WeightsError
from edgead.export.graph import MergedGraph
from edgead.export.pack import export_run
from edgead.export.to_onnx import describe, to_onnx
from edgead.methods import configure
from edgead.models.files import read_state_dict, save_safetensors
from edgead.models.mobilenet import MobileNetV2
from edgead.models.pdn import PDN
from edgead.models.protoad import (
    TAPS,
    Nearest,
    ProtoAD,
    ProtoADConfig,
    Trainer,
    distances,
    patches,
    smoothing_matrix,
)
from edgead.models.resnet import ResNet
from edgead.models.taps import Backbone
from edgead.training import finch
from edgead.training.data import open_dataset
from edgead.training.run import read_run
from edgead.training.train import train

CHANNELS = (3, 5, 7)
SEEDS = st.integers(0, 2**32 - 1)


def random_levels(seed: int, *, scale: float = 1.0) -> list[Tensor]:
    """Feature maps of 8x8, 4x4 and 2x2 cells of two images."""
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(2, channels, side, side, generator=generator)
        for channels, side in zip(CHANNELS, (8, 4, 2), strict=True)
    ]


def random_prototypes(seed: int, count: int, channels: int = sum(CHANNELS)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, channels, generator=generator))


def joined_by_folding(fine: Tensor, coarse: Tensor) -> Tensor:
    """The embedding as papers on patch features do it: a block of fine cells gets its coarse cell."""
    (n, channels, side, _), step = fine.shape, fine.shape[2] // coarse.shape[2]
    blocks = F.unfold(fine, step, stride=step).view(n, channels, step * step, *coarse.shape[2:])
    below = coarse[:, :, None].expand(-1, -1, step * step, -1, -1)
    both = torch.cat([blocks, below], 1).flatten(1, 2).flatten(2)
    return F.fold(both, (side, side), step, stride=step)


@pytest.mark.parametrize("seed", [0, 1])
def test_patches_are_the_folded_embedding_of_length_one(seed: int) -> None:
    fine, middle, coarse = random_levels(seed)
    expected = joined_by_folding(joined_by_folding(fine, middle), coarse)
    torch.testing.assert_close(patches([fine, middle, coarse]), F.normalize(expected), rtol=0, atol=1e-6)


def test_distance_by_hand() -> None:
    """Two cells (3, 4) and (0, -2) below a coarse one of 0; cosines with (1, 0, 0) are 0.6 and 0, with
    (0, -1, 0) -0.8 and 1; a cell of zeros has the cosine 0 with everything."""
    fine = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0], [1.0, 0.0]]).T.view(1, 2, 2, 2)
    prototypes = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    expected = torch.tensor([[[0.4, 0.0], [1.0, 0.0]]])
    for found in (
        distances([fine, torch.zeros(1, 1, 1, 1)], prototypes),
        Nearest(prototypes, (2, 1), torch.float32)([fine, torch.zeros(1, 1, 1, 1)]),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@given(SEEDS, st.integers(1, 20), st.floats(0.01, 300))
@settings(deadline=None)
def test_split_form_is_the_joined_form(seed: int, count: int, scale: float) -> None:
    levels, prototypes = random_levels(seed, scale=scale), random_prototypes(seed, count)
    split = Nearest(prototypes, CHANNELS, torch.float32)(levels)
    torch.testing.assert_close(split, distances(levels, prototypes), rtol=0, atol=1e-6)


@given(SEEDS, st.integers(1, 20), st.floats(0.1, 10))
@settings(deadline=None)
def test_order_repetition_and_brightness_change_nothing(seed: int, count: int, factor: float) -> None:
    levels, prototypes = random_levels(seed), random_prototypes(seed, count)
    expected = distances(levels, prototypes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for same in (prototypes[order], torch.cat([prototypes, prototypes[:3]])):
        torch.testing.assert_close(distances(levels, same), expected, rtol=0, atol=1e-6)
    brighter = [factor * level for level in levels]
    torch.testing.assert_close(distances(brighter, prototypes), expected, rtol=0, atol=1e-6)


@given(SEEDS)
@settings(deadline=None)
def test_a_patch_that_is_a_prototype_is_normal(seed: int) -> None:
    levels = random_levels(seed)
    known = patches(levels).permute(0, 2, 3, 1).flatten(0, 2)
    found = distances(levels, known)
    assert float(found.min()) >= 0 and float(found.max()) < 1e-6


def test_squares_beyond_float16() -> None:
    """The squared length of these features, 3.9e6, is no float16; features and products are."""
    levels = random_levels(0, scale=500.0)
    prototypes = random_prototypes(0, 9)
    half = Nearest(prototypes, CHANNELS, torch.float16)([level.half() for level in levels])
    assert half.dtype == torch.float32
    # steps of the products are 2^-11 of them, and they are summed up over three levels
    torch.testing.assert_close(half, distances(levels, prototypes), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("cells", "px", "sigma_px"), [(64, 256, 4.0), (8, 16, 4.0), (5, 20, 1.5)])
def test_smoothing_is_enlarging_and_then_a_gaussian(cells: int, px: int, sigma_px: float) -> None:
    """The oracles are torch and scipy in float64; with 16 px the kernel is as wide as the mirror."""
    matrix = smoothing_matrix(cells, px, sigma_px)
    cell_map = torch.rand(cells, cells, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(cell_map[None, None], size=(px, px), mode="bilinear", align_corners=False)
    expected = gaussian_filter(large[0, 0].numpy(), sigma_px, mode="reflect", truncate=4.0)
    np.testing.assert_allclose((matrix @ cell_map @ matrix.T).numpy(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.sum(1), torch.ones(px, dtype=torch.float64))


def backbone(kind: str, seed: int = 5) -> Backbone:
    """Seeded random weights that keep features of order 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Backbone(kind, TAPS[kind])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.1)
    return network


def images(count: int = 1) -> Tensor:
    """uint8 [count, 256, 256, 3]: blobs, whose patches differ, in noise."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 60, (count, 256, 256, 3))
    blobs = 195 * rng.random((count, 8, 8, 3)).repeat(32, 1).repeat(32, 2)
    return torch.from_numpy((noise + blobs).astype(np.uint8))


@pytest.mark.parametrize("kind", ["wide_resnet50_2", "resnet18", "mobilenet_v2", "pdn-s"])
@torch.inference_mode()
def test_levels_nest_and_merged_is_plain(kind: str) -> None:
    network, x = backbone(kind), images()
    levels = network(x.permute(0, 3, 1, 2))
    assert [level.shape[2:] for level in levels] == [(64, 64), (32, 32), (16, 16)][: len(levels)]
    assert tuple(level.shape[1] for level in levels) == network.channels
    # those of patches of the image itself: distances from 0 to what random features differ by
    described = patches(levels)[0].flatten(1).T
    model = ProtoAD(network, described[:: len(described) // 11].clone())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (expected,) = model(x.permute(0, 3, 1, 2))
    assert expected.shape == (1, 256, 256) and float(expected.min()) >= 0
    spread = float(expected.max() - expected.min())
    calibration = torch.tensor([1.0, 0.0])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        score, maps = MergedGraph(model, dtype=dtype)(x, calibration)
        assert score.dtype == maps.dtype == torch.float32
        assert float((maps - expected).abs().max()) < tolerance * spread
        assert float(score[0]) == float(maps.max())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_published_embedding_has_1792_channels() -> None:
    assert sum(Backbone("wide_resnet50_2", TAPS["wide_resnet50_2"]).channels) == 1792


@pytest.fixture(scope="module")
def few_images(demo_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images to train on and one to calibrate with, so that clustering takes a second."""
    root = tmp_path_factory.mktemp("few") / "tray"
    shutil.copytree(demo_images, root)
    for path in sorted((root / "train" / "good").iterdir())[3:]:
        path.unlink()
    return root


@pytest.fixture(scope="module")
def finished(few_images: Path, random_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("protoad") / "run"
    train(open_dataset(few_images), run, ProtoADConfig(max_prototypes=300), backbone=random_teacher)
    return run


def test_run_says_what_was_clustered(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    assert record["method"] == "protoad" and record["training"]["steps"] == 2
    assert record["weights"]["backbone"]["layout"] == "conv1.."
    found = record["clustering"]
    count = found["prototypes"]
    assert count == max(size for size in found["hierarchy"] if size <= 300)
    assert record["architecture"] == {"kind": "pdn-s", "prototypes": count}
    members = found["patches_per_prototype"]
    assert 2 <= members["least"] <= members["median"] <= members["most"]
    assert members["least"] * count <= 2 * 64 * 64 <= members["most"] * count
    state, _ = read_state_dict(finished / "detector.safetensors")
    assert tuple(state["prototypes"].shape) == (count, 384) and "backbone.network.conv1.weight" in state
    torch.testing.assert_close(state["prototypes"].norm(dim=1), torch.ones(count))
    assert {path.name for path in finished.iterdir()} == {"run.json", "detector.safetensors"}


@torch.inference_mode()
def test_prototypes_are_of_the_training_images(finished: Path, few_images: Path) -> None:
    """Recomputed here, from all patches at once: they fit into one block."""
    from edgead.training.images import read_images

    run = read_run(finished)
    x = torch.from_numpy(read_images(list(open_dataset(few_images).train))).permute(0, 3, 1, 2)
    assert isinstance(run.model, ProtoAD)
    described = [patches(run.model.backbone(x[i : i + 1]))[0].flatten(1).T for i in range(2)]
    every = torch.cat(described).half()
    labels = next(labels for labels in finch.finch(every) if int(labels.max()) < 300)
    means, _ = finch.cluster_means(every, labels, torch.ones(len(every), dtype=torch.int64))
    cosines = (F.normalize(means) @ run.model.prototypes.T).amax(1)
    assert len(means) == len(run.model.prototypes) and float(cosines.min()) > 1 - 1e-5


def test_an_interrupted_run_starts_again_and_gives_the_same(
    finished: Path, few_images: Path, random_teacher: Path, tmp_path: Path
) -> None:
    dataset, config = open_dataset(few_images), ProtoADConfig(max_prototypes=300)
    seen: list[tuple[float, int]] = []

    def interrupt(fraction: float, step: int, losses: Mapping[str, float]) -> None:
        seen.append((fraction, step))
        if len(seen) == 1:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(dataset, run, config, backbone=random_teacher, progress=interrupt)
    train(dataset, run, config, backbone=random_teacher, progress=interrupt, resume=True)
    assert seen == [(0.5, 1), (0.5, 1), (1.0, 2)]
    state, expected = (read_state_dict(path / "detector.safetensors")[0] for path in (run, finished))
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_bundle_passes_the_gate_and_names_its_prototypes(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "tray.edgead"
    parity = export_run(finished, path)
    assert parity.images >= 8 and not parity.flips
    bundle = Bundle.open(path)
    model = bundle.manifest.model
    assert model["kind"] == "pdn-s" and model["backbone"]["sha256"]
    assert model["prototypes"] == len(read_run(finished).model.prototypes)
    assert bundle.manifest.outputs["anomaly_map"].shape == ("N", 256, 256)
    assert bundle.manifest.calibration.names == ("distance_scale", "offset")


def test_turing_and_ampere_take_1024_prototypes() -> None:
    """In FP16, whose tail is FP32; the graph in FP32 throughout differs in no operator."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from edgead.engines.build import build_engine
    from edgead.flavour import open_flavour

    model = ProtoAD(backbone("mobilenet_v2"), random_prototypes(0, 1024, 152))
    content = to_onnx(MergedGraph(model, dtype=torch.float16))
    nodes = describe(content)["nodes"]
    assert isinstance(nodes, dict) and nodes["Resize"] == 4 and not {"MatMul", "Gemm"} & set(nodes)
    for target in ("sm75", "sm86"):
        assert build_engine(content, open_flavour("tensorrt-rtx"), target=target)


@pytest.mark.parametrize("option", [{"steps": 20}, {"minutes": 1.0}, {"checkpoint_s": 1.0}])
def test_there_are_no_steps_to_choose(option: dict[str, float]) -> None:
    name = "--" + next(iter(option)).replace("_", "-")
    expected = f"^{name}: not an option of --method protoad, which has --max-prototypes"
    with pytest.raises(TrainingError, match=expected):
        configure("protoad", **option)


@pytest.mark.parametrize("most", [0, -3, 4097])
def test_more_prototypes_than_an_engine_takes(most: int) -> None:
    with pytest.raises(TrainingError, match=f"--max-prototypes {most}: a number from 1 to 4096"):
        configure("protoad", max_prototypes=most)


def test_backbones_without_taps_and_files_that_are_none(tmp_path: Path) -> None:
    config = ProtoADConfig()
    path = tmp_path / "resnet101.safetensors"
    network = ResNet((1, 1, 1, 1), bottleneck=False)
    save_safetensors(path, network.state_dict(), {})
    with pytest.raises(WeightsError, match=r"resnet101.* has no use for; it takes wide_resnet50_2, "):
        Trainer(config, {"backbone": path}, tmp_path)
    save_safetensors(path, {"prototypes": torch.zeros(4, 1792)}, {})
    with pytest.raises(WeightsError, match="no backbone that can be told by its keys"):
        Trainer(config, {"backbone": path}, tmp_path)
    state = MobileNetV2().state_dict()
    state.pop("blocks.3.project.weight")
    save_safetensors(path, state, {})
    with pytest.raises(WeightsError, match=r"missing blocks\.3\.project\.weight"):
        Trainer(config, {"backbone": path}, tmp_path)


def test_a_teacher_is_named_as_backbone(few_images: Path, random_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--teacher: .* no such file; it takes --backbone"):
        train(open_dataset(few_images), tmp_path / "run", ProtoADConfig(), teacher=random_teacher)
    shipped = Trainer(ProtoADConfig(), {}, tmp_path).record["weights"]["backbone"]
    assert shipped["file"] == "pdn_small.safetensors"


def test_one_image_that_shows_nothing(
    tmp_path: Path, random_teacher: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Far from the edges all patches are alike; the run ends, and a single prototype is warned of."""
    from edgead.image import write_image

    good = tmp_path / "flat" / "good"
    good.mkdir(parents=True)
    for index in range(2):
        write_image(good / f"{index}.png", np.full((300, 300, 3), 90, np.uint8))
    with caplog.at_level(logging.WARNING):
        dataset, config = open_dataset(tmp_path / "flat"), ProtoADConfig(max_prototypes=1)
        record = train(dataset, tmp_path / "run", config, backbone=random_teacher)
    assert record["clustering"]["prototypes"] == 1 and record["training"]["steps"] == 1
    assert "one prototype" in caplog.text
    assert np.isfinite(record["threshold"]["value"])


def test_pdn_m_is_a_variant_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_safetensors(path, PDN("m").state_dict(), {})
    trainer = Trainer(ProtoADConfig(), {"backbone": path}, tmp_path)
    assert trainer.model.architecture() == {"kind": "pdn-m", "prototypes": 0}
    built = Trainer.build(kind="pdn-m", prototypes=5)
    assert tuple(built.prototypes.shape) == (5, 384)
