"""FBFT: blur, distances and score against plain forms, merged against plain, and runs of all kinds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgead.errors import TrainingError, WeightsError
from edgead.models import vit
from edgead.models.fbft import (
    BOXES,
    CONV_RATE,
    FBFT,
    TAPS,
    FbftConfig,
    Trainer,
    blur_matrix,
    both_axes,
    distance,
    mlp,
    top_values,
    transfer_loss,
)
from edgead.models.files import save_safetensors
from edgead.models.mobilenet import MobileNetV2
from edgead.models.pdn import PDN
from edgead.models.resnet import ResNet
from edgead.models.taps import Backbone
from edgead.training.data import open_dataset
from edgead.training.run import read_run
from edgead.training.session import Session
from edgead.training.train import train

CPU = torch.device("cpu")
SIDE = {"mobilenet_v2": 64, "pdn-s": 64, "resnet18": 64, "vit-tiny": 56}


def drawn(network: nn.Module, seed: int = 3) -> nn.Module:
    """Seeded weights with which the features of every layer are of order 1."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in network.named_parameters():
            if parameter.ndim >= 2 and "token" not in name and "pos" not in name:
                nn.init.kaiming_normal_(parameter)
            else:
                parameter.normal_(0.5, 0.2)
    return network.eval()


@pytest.fixture
def tiny_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT of three blocks as another size, with FBFT on its last two."""
    monkeypatch.setitem(vit.CONFIGS, "tiny", vit.ViTConfig(32, 2, 3, 5))
    monkeypatch.setattr(vit, "TAPS", (1, 2))


@pytest.fixture
def weight_file(tiny_vit: None, tmp_path: Path) -> Callable[[str], Path]:
    """Function that writes a random backbone of a kind."""
    networks: dict[str, Callable[[], nn.Module]] = {
        "mobilenet_v2": MobileNetV2,
        "pdn-s": lambda: PDN("s"),
        "pdn-m": lambda: PDN("m"),
        "resnet18": lambda: ResNet((2, 2, 2, 2), bottleneck=False),
        "vit-tiny": lambda: vit.ViT(vit.CONFIGS["tiny"]),
    }

    def write(kind: str) -> Path:
        path = tmp_path / f"{kind}.safetensors"
        save_safetensors(path, drawn(networks[kind]()).state_dict(), {})
        return path

    return write


@pytest.fixture
def model_of(weight_file: Callable[[str], Path], tmp_path: Path) -> Callable[[str], FBFT]:
    def make(kind: str) -> FBFT:
        config = FbftConfig(image_px=SIDE[kind])
        model: FBFT = Trainer(config, {"backbone": weight_file(kind)}, tmp_path).model
        return model.eval().requires_grad_(False)

    return make


def noise(side: int, count: int = 2, seed: int = 0) -> Tensor:
    """RGB uint8 [count, 3, side, side], the left third of one colour."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    images[..., : side // 3] = images[..., :1, :1]
    return torch.from_numpy(images)


# Students and losses ---------------------------------------------------------------------------------


def test_the_students_are_those_of_the_publication() -> None:
    """Parameters as counted for the published code: 1 771 776 for each at ViT-B, 887 040 both at S."""
    assert sum(p.numel() for p in mlp(768, 768).parameters()) == 1_771_776
    assert 2 * sum(p.numel() for p in mlp(384, 384).parameters()) == 887_040
    assert [layer.out_channels for layer in mlp(32, 96)[::2]] == [64, 64, 96]


def test_convolutions_of_one_cell_begin_as_linear_layers_and_compute_the_same() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        convolutions = mlp(6, 10)
        torch.manual_seed(1)
        linear = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 10))
    for a, b in zip(convolutions.parameters(), linear.parameters(), strict=True):
        assert torch.equal(a.flatten(), b.flatten())
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 6, 3, 4)).astype(np.float32))
    expected = linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(convolutions(x), expected)


def test_gelu_is_the_exact_one() -> None:
    """x Phi(x) at 1; the tanh form differs in the fourth digit."""
    (gelu,) = {type(layer): layer for layer in mlp(2, 2)[1::2]}.values()
    assert float(gelu(torch.tensor(1.0))) == pytest.approx(0.5 * (1 + math.erf(0.5**0.5)), abs=1e-6)


def test_loss_of_a_case_done_by_hand() -> None:
    """Cells with cosines 1, 1/sqrt(2), 0 and, for features of 0, 0: their mean over the whole batch."""
    features = torch.tensor([[3.0, 0], [1, 1], [0, 2], [0, 0]]).T.reshape(1, 2, 2, 2)
    predicted = torch.tensor([[1.0, 0], [5, 0], [1, 0], [1, 0]]).T.reshape(1, 2, 2, 2)
    expected = 1 - (1 + 0.5**0.5) / 4
    assert float(transfer_loss(predicted, features)) == pytest.approx(expected, rel=1e-6)
    assert float(transfer_loss(features, features)) == pytest.approx(0.25)


# Map -------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_distance_is_that_of_directions(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = (torch.from_numpy(rng.normal(size=(1, 7, 2, 3)).astype(np.float32)) for _ in range(2))
    found = distance(size * a, b)
    cosine = F.cosine_similarity(a.double(), b.double())
    torch.testing.assert_close(found[:, 0].double(), (2 - 2 * cosine).sqrt(), atol=1e-6, rtol=1e-6)
    assert 0 <= float(found.min()) and float(found.max()) <= 2 + 1e-6
    assert float(distance(a, -a).min()) == pytest.approx(2, abs=1e-6)


def test_distance_keeps_its_digits_near_zero() -> None:
    """Directions 1e-4 apart; sqrt(2 - 2 cos) in float32 has no digit left there."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(1, 64, 8, 8)).astype(np.float32)
    b = (a + 1e-4 * rng.normal(size=a.shape)).astype(np.float32)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    unit = [v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y)]
    expected = (unit[0] - unit[1]).norm(dim=1, keepdim=True)
    torch.testing.assert_close(distance(x, y).double(), expected, rtol=2e-3, atol=0)
    cancelled = (2 - 2 * F.cosine_similarity(x, y)).clamp_min(0).sqrt()[:, None].double()
    assert float((cancelled / expected - 1).abs().max()) > 0.1


def test_features_of_nothing_give_no_nan() -> None:
    nothing, ones = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    assert torch.equal(distance(nothing, nothing), torch.zeros(1, 1, 2, 2))
    torch.testing.assert_close(distance(nothing, ones), torch.ones(1, 1, 2, 2))


def literal_blur(enlarged: Tensor) -> Tensor:
    """Eight convolutions with box kernels and zero padding, of [H, W]."""
    for side in (5, 5, 5, 5, 5, 7, 7, 7):
        kernel = torch.full((1, 1, side, side), 1 / side**2, dtype=torch.float64)
        enlarged = F.conv2d(enlarged[None, None], kernel, padding=side // 2)[0, 0]
    return enlarged


@pytest.mark.parametrize(
    ("cells", "px"),
    [((37, 37), (130, 130)), ((5, 7), (40, 53)), ((74, 30), (300, 97)), ((4, 4), (9, 6))],
)
def test_the_matrices_are_enlarging_and_eight_convolutions(
    cells: tuple[int, int], px: tuple[int, int]
) -> None:
    x = torch.from_numpy(np.random.default_rng(0).random(cells))
    enlarged = F.interpolate(x[None, None], size=px, mode="bilinear", align_corners=False)[0, 0]
    expected, ones = literal_blur(enlarged), literal_blur(torch.ones(px, dtype=torch.float64))
    for border, value in (("zero", expected), ("renormalise", expected / ones)):
        rows, columns = (blur_matrix(n, side, border) for n, side in zip(cells, px, strict=True))
        torch.testing.assert_close(rows @ x @ columns.T, value, rtol=0, atol=1e-14)


def test_the_blur_has_variance_22_and_support_39() -> None:
    """As measured of the published chain: 5 * 2 + 3 * 4 px^2."""
    assert BOXES == (5,) * 5 + (7,) * 3
    spread = blur_matrix(101, 101, "zero")[:, 50]
    offset = torch.arange(-50, 51).double()
    assert float(spread.sum()) == pytest.approx(1, abs=1e-12)
    assert float((spread * offset).sum()) == pytest.approx(0, abs=1e-12)
    assert float((spread * offset**2).sum()) == pytest.approx(22, abs=1e-10)
    assert int((spread > 1e-15).sum()) == 39


def test_borders() -> None:
    """A constant 300 px map falls to 0.28^2 in the corner of the published blur, and stays as it is."""
    darkened = blur_matrix(74, 300, "zero").sum(1)
    assert float(darkened[0]) == pytest.approx(0.28, abs=0.01)
    assert float(darkened[150]) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(blur_matrix(74, 300, "renormalise").sum(1), torch.ones(300).double())


def test_both_axes_are_multiplied() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((2, 3, 4, 4)).astype(np.float32))
    matrix = torch.from_numpy(rng.random((9, 4)).astype(np.float32))
    torch.testing.assert_close(both_axes(x, matrix[:, :, None, None]), matrix @ x @ matrix.T)


def test_the_map_is_the_product_of_both_distances(model_of: Callable[[str], FBFT]) -> None:
    """Written out: bilinear, unit vectors in float64, the literal chain divided by its ones-map."""
    model = model_of("mobilenet_v2")
    images = noise(64, 1)
    earlier, later = model.backbone(images)
    assert earlier.shape == (1, 32, 8, 8) and later.shape == (1, 96, 4, 4)
    later = F.interpolate(later, size=(8, 8), mode="bilinear", align_corners=False)

    def wrong(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        predicted = net(x).double()
        unit = predicted / predicted.norm(dim=1, keepdim=True) - y.double() / y.double().norm(
            dim=1, keepdim=True
        )
        return unit.norm(dim=1)

    product = wrong(model.transfer.backward_net, later, earlier) * wrong(
        model.transfer.forward_net, earlier, later
    )
    enlarged = F.interpolate(product[None], size=(64, 64), mode="bilinear", align_corners=False)[0, 0]
    ones = literal_blur(torch.ones(64, 64, dtype=torch.float64))
    (raw,) = model(images)
    assert raw.shape == (1, 64, 64) and raw.dtype == torch.float32
    torch.testing.assert_close(raw[0].double(), literal_blur(enlarged) / ones, rtol=1e-5, atol=1e-6)


def test_perfect_students_find_nothing() -> None:
    model = FBFT(Backbone("mobilenet_v2", ("blocks.5", "blocks.5")), image_px=64)
    drawn(model.backbone)
    model.requires_grad_(False)
    assert float(model(noise(64))[0].max()) > 0.1
    model.transfer.forward_net = nn.Identity()  # one direction is enough: the map is a product
    assert torch.equal(model(noise(64))[0], torch.zeros(2, 64, 64))


# Score -----------------------------------------------------------------------------------------------


@given(st.integers(1, 1959), st.integers(1, 1959))
def test_number_of_values_in_the_score(height: int, width: int) -> None:
    assert top_values(height, width) == max(1, int(height * width / 1000))


def test_score_is_the_mean_of_the_largest_values(model_of: Callable[[str], FBFT]) -> None:
    model = model_of("mobilenet_v2")
    maps = torch.from_numpy(np.random.default_rng(0).permutation(3 * 64 * 64)).float().reshape(3, 64, 64)
    expected = [float(np.sort(m.ravel())[-4:].mean()) for m in maps.numpy()]  # 4096 values, 0.1 %
    assert model.score(maps).tolist() == pytest.approx(expected)
    assert model.score(-2.0 - 0 * maps[:, :5, :5]).tolist() == [-2, -2, -2]  # at least one value


def test_a_map_that_is_too_large_for_the_parser_is_refused() -> None:
    assert top_values(1959, 1959) == 3837
    with pytest.raises(TrainingError, match="its 3841 largest values, and TensorRT finds at most 3840"):
        top_values(1960, 1960)
    with pytest.raises(TrainingError, match="inspect at 1959 px or less"):
        FBFT(Backbone("mobilenet_v2", TAPS["mobilenet_v2"]), image_px=2048)


# Model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIDE)
def test_the_merged_form_is_the_same_function(kind: str, model_of: Callable[[str], FBFT]) -> None:
    model = model_of(kind)
    before = copy.deepcopy(model.state_dict())
    images = noise(SIDE[kind])
    (expected,) = model(images)
    assert float(expected.max() - expected.min()) > 0.05  # a constant map would prove nothing
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
        (found,) = model.merged(dtype)(images.float())
        assert found.dtype == torch.float32 and found.shape == (2, *model.map_cells)
        assert float((found - expected).abs().max()) < tolerance * float(expected.max())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_float16_ends_before_the_distances(model_of: Callable[[str], FBFT]) -> None:
    merged = model_of("mobilenet_v2").merged(torch.float16)
    transfer = merged.transfer
    assert {p.dtype for p in transfer.parameters()} == {torch.float16}
    assert transfer.finer.dtype == torch.float16 and transfer.blur.dtype == torch.float32


@pytest.mark.parametrize("kind", SIDE)
def test_the_architecture_and_the_weights_are_all_there_is(
    kind: str, model_of: Callable[[str], FBFT]
) -> None:
    """Also of a ViT whose position embedding is resampled from the weights: 5x5 of the file to 4x4."""
    model = model_of(kind)
    architecture = model.architecture()
    assert architecture["kind"] == kind and architecture["image_px"] == SIDE[kind]
    twin = Trainer.build(**architecture)
    twin.load_state_dict(model.state_dict(), strict=True)
    images = noise(SIDE[kind])
    assert torch.equal(twin.eval()(images)[0], model(images)[0])


# Training --------------------------------------------------------------------------------------------


class Recorded:
    """Images [5, 64, 64, 3] that note which of them were asked for."""

    def __init__(self, side: int = 64) -> None:
        self.pixels = noise(side, 5).permute(0, 2, 3, 1).contiguous().numpy()
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        self.asked.append(index)
        return self.pixels[index]


def fitted(
    run: Path, config: FbftConfig, backbone: Path, images: Any, resume: bool = False
) -> tuple[Trainer, Session, list[dict[str, float]]]:
    losses: list[dict[str, float]] = []
    run.mkdir(exist_ok=True)
    trainer = Trainer(config, {"backbone": backbone}, run)
    session = Session(
        run, config, images=images, device=CPU, settings={}, resume=resume,
        progress=lambda fraction, step, found: losses.append(dict(found)),
    )  # fmt: skip
    trainer.fit(session)
    return trainer, session, losses


def test_fifty_epochs_of_whole_images_in_batches_of_four(
    tmp_path: Path, weight_file: Callable[[str], Path]
) -> None:
    images = Recorded(32)
    config = FbftConfig(image_px=32, teacher_cache_mib=0)
    trainer, session, losses = fitted(tmp_path, config, weight_file("mobilenet_v2"), images)
    assert session.step == 50 * 2 == len(losses)
    assert trainer.record["fit"] == {"learning_rate": CONV_RATE, "epochs": 50}
    epochs = [tuple(images.asked[1:][i : i + 5]) for i in range(0, 250, 5)]  # the first fills the cache
    assert len(images.asked) == 251 and all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(epochs)) > 10
    first, last = (sum(losses[i].values()) for i in (0, -1))
    assert last < 0.8 * first


def test_minutes_end_the_training(tmp_path: Path, weight_file: Callable[[str], Path]) -> None:
    config = FbftConfig(image_px=32, minutes=0.01)
    _, session, losses = fitted(tmp_path, config, weight_file("mobilenet_v2"), Recorded(32))
    assert session.step == len(losses) >= 1 and session.fraction_done() >= 1


def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, weight_file: Callable[[str], Path]
) -> None:
    backbone, images = weight_file("mobilenet_v2"), Recorded()
    config = FbftConfig(steps=7, image_px=64, checkpoint_s=0.0)
    whole, _, losses = fitted(tmp_path / "whole", config, backbone, images)
    fitted(tmp_path / "parts", replace(config, steps=3), backbone, images)
    resumed, session, rest = fitted(tmp_path / "parts", config, backbone, images, resume=True)
    assert session.step == 7 and rest == losses[3:]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_features_that_are_not_kept_are_computed_again(
    tmp_path: Path, weight_file: Callable[[str], Path]
) -> None:
    """Room for none, and for three images of 7 KiB: the same numbers as with all of them."""
    backbone, losses = weight_file("pdn-s"), []
    for cache_mib in (0, 1, 64):
        config = FbftConfig(steps=3, image_px=64, teacher_cache_mib=cache_mib)
        images = Recorded()
        losses.append(fitted(tmp_path, config, backbone, images)[2])
        assert len(images.asked) == {0: 1 + 9, 1: 4 + 3, 64: 5}[cache_mib]
    assert losses[0] == losses[1] == losses[2]


def test_only_the_students_learn(tmp_path: Path, weight_file: Callable[[str], Path]) -> None:
    backbone, config = weight_file("resnet18"), FbftConfig(steps=2, image_px=64)
    before = Trainer(config, {"backbone": backbone}, tmp_path).model.state_dict()
    trainer, _, _ = fitted(tmp_path, config, backbone, Recorded())
    changed = {key for key, x in trainer.model.state_dict().items() if not torch.equal(x, before[key])}
    assert changed == {key for key in before if key.startswith("transfer.")}


@pytest.mark.filterwarnings("ignore")  # the exporter warns about its own internals
def test_a_run_on_the_shipped_kind_of_backbone_becomes_a_bundle(
    tmp_path: Path, demo_images: Path, random_teacher: Path
) -> None:
    """Train, calibrate, export through the parity gate, and give a batch of three to the graph."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from edgead.bundle import Bundle
    from edgead.export.pack import export_run

    run, path = tmp_path / "run", tmp_path / "tray.edgead"
    record = train(open_dataset(demo_images), run, FbftConfig(steps=2), backbone=random_teacher)
    assert record["architecture"] == {
        "kind": "pdn-s", "taps": ["trunk", "last"], "image_px": 256, "blur_border": "renormalise"
    }  # fmt: skip
    assert record["weights"]["backbone"]["file"] == random_teacher.name
    parity = export_run(run, path)
    assert parity.score_deviation < 1e-4 and not parity.flips
    bundle = Bundle.open(path)
    assert bundle.manifest.outputs["anomaly_map"].shape == ("N", 256, 256)
    golden = bundle.golden()
    calibration = np.array(bundle.manifest.calibration.values, np.float32)
    session = onnxruntime.InferenceSession(bundle.model_bytes(), providers=["CPUExecutionProvider"])
    images = golden.images[[0, -1, 0]]
    scores, maps = session.run(None, {"image": images, "calibration": calibration})
    for score, anomaly_map in zip(scores, maps, strict=True):
        assert score == pytest.approx(np.sort(anomaly_map.ravel())[-65:].mean(), rel=1e-5)
    np.testing.assert_allclose(scores, golden.scores[[0, -1, 0]], rtol=1e-4)


def test_a_run_on_a_vision_transformer(
    tmp_path: Path, demo_images: Path, weight_file: Callable[[str], Path]
) -> None:
    run, config = tmp_path / "run", FbftConfig(steps=2, image_px=56)
    record = train(open_dataset(demo_images), run, config, backbone=weight_file("vit-tiny"))
    assert record["architecture"]["taps"] == [1, 2] and record["fit"]["learning_rate"] == 1e-4
    assert record["weights"]["backbone"]["layout"] == "dinov2_vittiny14_reg (official keys)"
    images = noise(56)
    model = read_run(run).model
    (raw,) = model(images)
    assert raw.shape == (2, 56, 56) and torch.isfinite(raw).all()
    assert float((model.merged(torch.float32)(images.float())[0] - raw).abs().max()) < 1e-5


# Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "image_px", "message"),
    [
        ("vit-tiny", 500, "patches of 14 px; take 490 or 504"),
        ("vit-tiny", 1960, "its 3841 largest values"),
        ("mobilenet_v2", 250, "250 px side do not fit the strides of mobilenet_v2; take 240 or 256"),
        ("pdn-s", -3, "take 32$"),
        ("pdn-s", 0, "take 32$"),
    ],
)
def test_sides_that_do_not_fit(
    tmp_path: Path, weight_file: Callable[[str], Path], kind: str, image_px: int, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        Trainer(FbftConfig(image_px=image_px), {"backbone": weight_file(kind)}, tmp_path)


def test_backbones_that_do_not_fit(tmp_path: Path, weight_file: Callable[[str], Path]) -> None:
    with pytest.raises(WeightsError, match="holds pdn-m, which this method has no use for"):
        Trainer(FbftConfig(), {"backbone": weight_file("pdn-m")}, tmp_path)
    path = tmp_path / "other.safetensors"
    save_safetensors(path, {"pos_embed": torch.zeros(1, 5, 3)}, {})
    with pytest.raises(WeightsError, match="is no DINOv2 vision transformer"):
        Trainer(FbftConfig(), {"backbone": path}, tmp_path)
    with pytest.raises(WeightsError, match="no such weight file"):
        Trainer(FbftConfig(), {"backbone": tmp_path / "absent.pth"}, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"minutes": 0.0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}],
)
def test_settings_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match="at least one step|a number above 0"):
        FbftConfig(**options)  # type: ignore[arg-type]
    backbone = Backbone("mobilenet_v2", TAPS["mobilenet_v2"])
    with pytest.raises(ValueError, match="blur border 'reflect': expected"):
        FBFT(backbone, image_px=64, blur_border="reflect")  # type: ignore[arg-type]
