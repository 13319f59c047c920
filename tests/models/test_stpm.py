"""STPM: distances and product by hand, exact folds, the float32 tail, training, resuming, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgead.errors import TrainingError, WeightsError
from edgead.image import read_image, resize, resize_matrix
from edgead.models import stpm
from edgead.models.files import save_safetensors
from edgead.models.mobilenet import MobileNetV2
from edgead.models.resnet import ResNet
from edgead.models.stpm import (
    BATCHES,
    STPM,
    TAPS,
    ConvNorm,
    StpmConfig,
    Trainer,
    better,
    directions,
    level_distances,
    split,
)
from edgead.models.taps import Backbone
from edgead.training.data import open_dataset
from edgead.training.images import read_images
from edgead.training.run import read_run
from edgead.training.session import Session
from edgead.training.train import train

KINDS = ("resnet18", "mobilenet_v2", "pdn-s")
CPU = torch.device("cpu")


def make_teacher(kind: str) -> Backbone:
    """Seeded weights that keep the features of order 1."""
    backbone = Backbone(kind, TAPS[kind])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for conv in backbone.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight)
                assert conv.bias is not None
                conv.bias.normal_(0, 0.1)
    return backbone


def make_model(kind: str, noise: float) -> STPM:
    """A student that is its teacher but for relative noise on the weights of its convolutions.

    Its batch norms have random statistics and gains, which its biases undo.
    """
    model = STPM(make_teacher(kind)).eval().requires_grad_(False)
    teacher = model.teacher.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for name, part in model.student.network.named_modules():
            if isinstance(part, ConvNorm):
                conv, norm = part
                norm.running_mean.normal_(0, 1)
                norm.running_var.uniform_(0.3, 3)
                norm.weight.normal_(1, 0.3)
                gain = norm.weight / (norm.running_var + norm.eps).sqrt()
                source = teacher.get_submodule(name)
                conv.weight.copy_(source.weight / gain.view(-1, 1, 1, 1))
                norm.bias.copy_(source.bias + gain * norm.running_mean)
        for conv in model.student.modules():
            if isinstance(conv, nn.Conv2d):
                conv.weight.mul_(1 + noise * torch.randn_like(conv.weight))
    return model


@pytest.fixture(scope="module")
def mobilenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone that is quick enough to train with: MobileNetV2 with seeded random weights."""
    network = MobileNetV2()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("backbone") / "mobilenet.safetensors"
    save_safetensors(path, network.state_dict(), {})
    return path


@pytest.fixture(scope="module")
def images(demo_images: Path) -> Tensor:
    """Two good demo images, uint8 [2, 3, 256, 256]."""
    paths = sorted((demo_images / "train" / "good").iterdir())[:2]
    pixels = np.stack([resize(read_image(path), 256, 256) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def crops(images: Tensor) -> Tensor:
    """Their middle 128 px: half the side is a quarter of the time."""
    return images[..., 64:192, 64:192]


# Distances and product


def test_distances_and_product_by_hand() -> None:
    """t = (3, 4), s = (4, 3): directions (.6, .8) and (.8, .6), 0.08 apart; orthogonal ones are 2 apart.

    A vector of length 0 stays one, 1 apart from any direction. Their product is 0.16 everywhere.
    """

    def level(first: float, second: float, side: int) -> Tensor:
        return torch.tensor([first, second]).view(1, 2, 1, 1).expand(1, 2, side, side)

    teacher = [level(3, 4, 64), level(5, 0, 32), level(0, 0, 16)]
    student = [level(4, 3, 64), level(0, 0.1, 32), level(2, 1, 16)]
    distances = level_distances(teacher, student)
    assert [tuple(d.shape) for d in distances] == [(1, 64, 64), (1, 32, 32), (1, 16, 16)]
    for d, expected in zip(distances, (0.08, 2.0, 1.0), strict=True):
        torch.testing.assert_close(d, torch.full_like(d, expected))
    product = STPM(Backbone("mobilenet_v2", TAPS["mobilenet_v2"])).product(distances)
    torch.testing.assert_close(product, torch.full((1, 64, 64), 0.16))


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([1e-4, 1.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_a_distance_is_2_minus_2_cosines(seed: int, channels: int, scale: float) -> None:
    """Within 1e-6, whatever the lengths; after a ReLU at most 2, never more than 4, and symmetric."""
    generator = torch.Generator().manual_seed(seed)
    t, s = torch.randn(2, 1, channels, 3, 3, generator=generator).unbind()
    (d,) = level_distances([t], [scale * s])
    cosine = torch.nn.functional.cosine_similarity(t.double(), s.double(), dim=1)
    assert float((d - (2 - 2 * cosine)).abs().max()) < 1e-6
    assert 0 <= float(d.min()) and float(d.max()) <= 4 + 1e-6
    assert torch.equal(d, level_distances([scale * s], [t])[0])
    assert float(level_distances([t.relu()], [s.relu()])[0].max()) <= 2 + 1e-6


def test_product_of_the_enlarged_maps() -> None:
    """Not the enlarged product; enlarged by R d R^T with the matrices that images are resized with."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.rand(2, side, side, generator=generator) for side in (64, 32, 16)]
    expected = torch.ones(2, 64, 64, dtype=torch.float64)
    for level in levels:
        matrix = torch.from_numpy(resize_matrix(level.shape[1], 64)).double()
        expected *= matrix @ level.double() @ matrix.T
    product = STPM(Backbone("mobilenet_v2", TAPS["mobilenet_v2"])).product(levels)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-7)


# The student


def test_a_student_of_resnet18_is_the_published_one() -> None:
    """2,782,784 parameters; normal with std sqrt(2 / (9 C)); no batch norm of a block starts at 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = STPM(Backbone("resnet18", TAPS["resnet18"])).student
    assert sum(parameter.numel() for parameter in student.parameters()) == 2_782_784
    levels = student(torch.zeros(2, 3, 256, 256))
    assert [tuple(level.shape[1:]) for level in levels] == [(64, 64, 64), (128, 32, 32), (256, 16, 16)]
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 15 and all((norm.weight == 1).all() for norm in norms)
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}
    weight = student.network.layer3[1].conv2[0].weight
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(("kind", "norms"), [("mobilenet_v2", 39), ("resnet18", 15), ("pdn-s", 4)])
def test_a_norm_follows_every_convolution(kind: str, norms: int) -> None:
    """And it is trained, in train mode, while the teacher stays as it is."""
    model = STPM(Backbone(kind, TAPS[kind])).train()
    kinds = [type(module) for module in model.student.modules()]
    convs = sum(issubclass(found, nn.Conv2d) for found in kinds)
    assert kinds.count(nn.BatchNorm2d) == convs == norms
    assert all(p.requires_grad for p in model.student.parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert all(module.training for module in model.student.modules())
    assert not any(module.training for module in model.teacher.modules())
    assert not any(module.training for module in model.eval().modules())


# Plain and merged form


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_folds_are_exact(kind: str, crops: Tensor) -> None:
    """Batch norms with random statistics; maps within 1e-4 of their largest value in FP32."""
    model = make_model(kind, noise=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (plain,) = model(crops)
    folded = model.merged(torch.float32)
    (merged,) = folded(crops.float())
    assert float(plain.max()) > 1e-4 and float(plain.max()) > 2 * float(plain.min()) > 0
    assert float((merged - plain).abs().max()) < 1e-4 * float(plain.max())
    assert not [
        part for part in model.merged(torch.float32).modules() if isinstance(part, nn.BatchNorm2d)
    ]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@torch.inference_mode()
def test_equal_networks_give_nothing(crops: Tensor) -> None:
    model = make_model("mobilenet_v2", noise=0)
    features = model.teacher(crops)
    assert (model.product(level_distances(features, features)) == 0).all()
    (rounded,) = model(crops)  # weights divided by gains, and multiplied
    assert float(rounded.max()) < 1e-30


@torch.inference_mode()
def test_the_order_of_a_batch_changes_nothing(images: Tensor) -> None:
    model = make_model("mobilenet_v2", noise=0.1)
    (maps,), (swapped,) = model(images), model(images.flip(0))
    assert float((maps - swapped.flip(0)).abs().max()) < 1e-5 * float(maps.max())
    assert not torch.equal(maps[0], maps[1])


@pytest.mark.parametrize(("kind", "noise"), [("resnet18", 0.02), ("mobilenet_v2", 0.01)])
@torch.inference_mode()
def test_half_precision_where_all_distances_are_small(kind: str, noise: float, images: Tensor) -> None:
    """Relative error of the maximum below 2 %: the gate that the specification suggests.

    The same distances multiplied in FP16, whose smallest number is 6e-8, give 0 in many cells. Not much
    further down, at products of 1e-8, the rounding of FP16 convolutions makes 4 % of a map (measured).
    """
    model = make_model(kind, noise)
    x = images[:1]
    distances = level_distances(model.teacher(x), model.student(x))
    assert all(0 < float(level.max()) < 0.05 for level in distances)
    (plain,) = model(x)
    merged = model.merged(torch.float16)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float16}
    (half,) = merged(x.float())
    assert half.dtype == torch.float32
    assert abs(float(half.max() / plain.max()) - 1) < 0.02
    underflown = model.product([level.half().float() for level in distances]).half()
    assert (plain > 0).all() and float((underflown == 0).float().mean()) > 0.3


# Training


class Stop(Exception):
    pass


def fit(
    data: Path, run: Path, backbone: Path, *, resume: bool = False, progress: Any = None, **settings: Any
) -> dict[str, Any]:
    config = StpmConfig(checkpoint_s=0.0, **settings)
    dataset = open_dataset(data, seed=config.seed)
    return train(dataset, run, config, device="cpu", resume=resume, progress=progress, backbone=backbone)


def stop_at(last: int) -> Callable[[float, int, object], None]:
    def stop(fraction: float, step: int, losses: object) -> None:
        if step == last:
            raise Stop

    return stop


@pytest.fixture(scope="module")
def run(demo_images: Path, mobilenet_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of two batches and half a third one, on 4 images; a fifth picks the epoch."""
    folder = tmp_path_factory.mktemp("run") / "tray"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BATCHES, "mobilenet_v2", 2)
        fit(demo_images, folder, mobilenet_file, steps=5)
    return folder


def test_run_says_what_it_is(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["method"] == "stpm" and record["architecture"] == {"kind": "mobilenet_v2"}
    assert record["weights"]["backbone"]["file"] == "mobilenet.safetensors"
    assert record["training"]["steps"] == 5
    assert record["fit"]["epochs"] == 2.5 and record["fit"]["chosen_step"] in (2, 4, 5)
    assert record["fit"]["images"] == {"learned": 4, "validation": 1}
    table = (run / "losses.csv").read_text().splitlines()
    assert table[0] == "step,seconds,blocks.2,blocks.5,blocks.12"
    assert all(0 < float(value) < 4 for value in table[1].split(",")[2:])


def test_the_student_that_is_kept_is_the_one_that_was_chosen(run: Path, demo_images: Path) -> None:
    """Its mean over the held-out image, again: within 2 %, for training may run in bf16."""
    finished = read_run(run)
    paths = [demo_images / name for name in finished.record["data"]["train"]]
    pixels = read_images(paths)[split(5, finished.record["config"]["seed"])[1]]
    with torch.inference_mode():
        (maps,) = finished.model(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    mean = finished.record["fit"]["validation_map_mean"]
    assert float(maps.double().mean()) == pytest.approx(mean, rel=0.02)


def test_a_resumed_run_equals_an_uninterrupted_one(
    run: Path, demo_images: Path, mobilenet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: stopped within the second epoch, when a student was chosen already."""
    monkeypatch.setitem(BATCHES, "mobilenet_v2", 2)
    folder, steps = tmp_path / "run", []
    with pytest.raises(Stop):
        fit(demo_images, folder, mobilenet_file, steps=5, progress=stop_at(4))
    with pytest.raises(TrainingError, match="other settings.*learning_rate: 0.4 then, 0.1 now"):
        fit(demo_images, folder, mobilenet_file, steps=5, learning_rate=0.1, resume=True)
    fit(
        demo_images, folder, mobilenet_file, steps=5, resume=True,
        progress=lambda fraction, step, losses: steps.append(step),
    )  # fmt: skip
    assert steps == [4, 5]
    whole, resumed = read_run(run), read_run(folder)
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert whole.record["fit"] == resumed.record["fit"]


def test_100_epochs_unless_told_otherwise(
    demo_images: Path, mobilenet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 3 in place of 100: 3 epochs of 3 + 1 images. The losses fall."""
    monkeypatch.setitem(BATCHES, "mobilenet_v2", 3)
    monkeypatch.setattr("edgead.models.stpm.EPOCHS", 3)
    seen: list[float] = []
    record = fit(
        demo_images, tmp_path / "run", mobilenet_file,
        progress=lambda fraction, step, losses: seen.append(sum(losses.values())),
    )  # fmt: skip
    assert record["training"]["steps"] == len(seen) == 6 and record["fit"]["epochs"] == 3
    assert record["config"]["steps"] is None
    assert seen[0] > 1.2 * seen[-1]


def test_minutes_end_the_training(demo_images: Path, mobilenet_file: Path, tmp_path: Path) -> None:
    """However few: a student is chosen even if no epoch was finished."""
    record = fit(demo_images, tmp_path / "run", mobilenet_file, minutes=1e-9)
    assert record["training"]["steps"] <= 1 and record["fit"]["validation_map_mean"] > 0


def session(images: Tensor, folder: Path) -> Session:
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    return Session(folder, StpmConfig(steps=1), images=pixels, device=CPU, settings={})  # type: ignore[arg-type]


def test_features_from_the_cache_are_those_computed_anew(images: Tensor, tmp_path: Path) -> None:
    """0.3 MiB each: in 0, 1 of 2 and all; and they are the teacher's directions within FP16."""
    teacher, here = make_teacher("mobilenet_v2"), session(images, tmp_path)
    many, one, none = (directions(teacher, here, mib) for mib in (8, 0, 0))
    one._kept = many._kept[:1]
    assert (len(many._kept), len(none._kept)) == (2, 0)
    expected_levels = [nn.functional.normalize(level, dim=1) for level in teacher(images.flip(0))]
    for a, b, c, expected in zip(many([1, 0]), one([1, 0]), none([1, 0]), expected_levels, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b) and torch.equal(a, c)
        assert float((a - expected).abs().max()) < 0.02  # bf16 where the processor has it


def test_the_lowest_validation_maps_win(images: Tensor, tmp_path: Path) -> None:
    here = session(images, tmp_path)
    good, worse = make_model("mobilenet_v2", noise=0.02), make_model("mobilenet_v2", noise=0.1)
    targets, held_out = directions(good.teacher, here, 8), np.array([0, 1])
    first = better({}, worse, targets, held_out, here)
    here.step = 7
    second = better(first, good, targets, held_out, here)
    assert second["mean"] < first["mean"] and (first["step"], second["step"]) == (0, 7)
    assert better(second, worse, targets, held_out, here) is second
    assert torch.equal(second["student"]["network.stem.0.weight"], good.student.network.stem[0].weight)
    broken = make_model("mobilenet_v2", noise=0.02)
    broken.student.network.stem[0].weight.fill_(float("nan"))
    assert better(second, broken, targets, held_out, here) is second


@given(st.integers(2, 500), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_split(count: int, seed: int) -> None:
    learned, held_out = split(count, seed)
    assert sorted([*learned, *held_out]) == list(range(count))
    assert len(held_out) == -(-count // 5) and len(learned) >= 1
    assert np.array_equal(learned, split(count, seed)[0])


def test_no_tile_of_an_image_that_picks_the_epoch_is_learned(
    demo_images: Path, mobilenet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither itself nor its neighbours, which overlap it, nor the whole image."""
    seen: dict[str, set[int]] = {"learned": set(), "held out": set()}
    real_better, real_batch = stpm.better, Session.batch

    def note(*arguments: Any) -> Any:
        session = arguments[4]
        seen["held out"] |= {int(index) // session.images.per_image for index in arguments[3]}
        monkeypatch.setattr(Session, "batch", real_batch)
        found = real_better(*arguments)
        monkeypatch.setattr(Session, "batch", batch)
        return found

    def batch(self: Session, chosen: Any) -> Tensor:
        if len(chosen) > 1:  # one by one the teacher looks at all of them
            seen["learned"] |= {int(index) // self.images.per_image for index in chosen}
        return real_batch(self, chosen)

    monkeypatch.setattr(stpm, "better", note)
    monkeypatch.setattr(Session, "batch", batch)
    config = StpmConfig(steps=6)
    record = train(
        open_dataset(demo_images), tmp_path / "run", config,
        tile=256, overlap=128, device="cpu", backbone=mobilenet_file,
    )  # fmt: skip
    assert record["fit"]["images"] == {"learned": 4, "validation": 1}
    assert len(seen["learned"]) == 4 and len(seen["held out"]) == 1
    assert not seen["learned"] & seen["held out"]


def test_split_of_mvtec_bottle() -> None:
    """167 and 42 of 209, as the official implementation has it; and another seed, another split."""
    assert [len(part) for part in split(209, 0)] == [167, 42]
    assert not np.array_equal(split(209, 0)[1], split(209, 1)[1])


def test_export_and_engines(run: Path, tmp_path: Path) -> None:
    """Through the parity gate; and engines for two generations of GPUs."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from edgead.bundle import Bundle
    from edgead.export.pack import export_run

    path = tmp_path / "tray.edgead"
    parity = export_run(run, path)
    assert parity.images == 10 and not parity.flips
    bundle = Bundle.open(path)
    assert bundle.manifest.method == "stpm" and bundle.manifest.model["kind"] == "mobilenet_v2"
    assert bundle.manifest.calibration.names == ("product_scale", "offset")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from edgead.engines.build import build_engine
    from edgead.flavour import open_flavour

    for target in ("sm75", "sm86"):
        assert len(build_engine(bundle.model_bytes(), open_flavour("tensorrt-rtx"), target=target)) > 1e6


# Bad input


def test_without_a_file_it_runs_on_the_shipped_pdn(tmp_path: Path) -> None:
    """And the process is not seeded."""
    before = torch.initial_seed()
    trainer = Trainer(StpmConfig(), {}, tmp_path)
    assert torch.initial_seed() == before
    assert trainer.model.architecture() == {"kind": "pdn-s"}
    again, other = (Trainer(StpmConfig(seed=seed), {}, tmp_path) for seed in (42, 43))
    weight = trainer.model.student.network.conv1[0].weight
    assert torch.equal(weight, again.model.student.network.conv1[0].weight)
    assert not torch.equal(weight, other.model.student.network.conv1[0].weight)


def test_files_that_are_no_use(demo_images: Path, mobilenet_file: Path, tmp_path: Path) -> None:
    dataset = open_dataset(demo_images)
    with pytest.raises(TrainingError, match="--teacher: --method stpm starts from no such file"):
        train(dataset, tmp_path / "a", StpmConfig(), teacher=mobilenet_file)
    deeper = ResNet((3, 4, 6, 3), bottleneck=False, classes=0)
    save_safetensors(tmp_path / "resnet34.safetensors", deeper.state_dict(), {})
    with pytest.raises(WeightsError, match="holds resnet .* it takes resnet18, .*, mobilenet_v2, pdn-s"):
        train(dataset, tmp_path / "b", StpmConfig(), backbone=tmp_path / "resnet34.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"minutes": 0.0}, "at least one step"),
        ({"minutes": -1.0}, "at least one step"),
        ({"learning_rate": 0.0}, "a number above 0"),
        ({"learning_rate": float("nan")}, "a number above 0"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        StpmConfig(**options)  # type: ignore[arg-type]


def test_one_training_image_is_too_few() -> None:
    with pytest.raises(TrainingError, match="one in five training images back .* there is only 1"):
        split(1, 0)
