"""Backbones: what they take, what each cell of a tap sees, and that the merged form is the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgead.errors import WeightsError
from edgead.models.efficientad import extended
from edgead.models.files import load_backbone, load_mobilenet, load_teacher, save_safetensors
from edgead.models.folding import normalise
from edgead.models.mobilenet import MobileNetV2
from edgead.models.pdn import PDN
from edgead.models.resnet import ResNet
from edgead.models.taps import PDN_TAPS, Backbone

STAGES = ("layer1", "layer2", "layer3")
TAPS = {
    "resnet18": STAGES,
    "wide_resnet50_2": ("layer2", "layer3"),
    "mobilenet_v2": ("blocks.2", "blocks.5", "blocks.12"),
    "pdn-s": PDN_TAPS,
    "pdn-m": PDN_TAPS,
}
# Channels and stride of each tap, from the tables of the papers
SHAPES = {
    "resnet18": [(64, 4), (128, 8), (256, 16)],
    "wide_resnet50_2": [(512, 8), (1024, 16)],
    "mobilenet_v2": [(24, 4), (32, 8), (96, 16)],
    "pdn-s": [(256, 4), (384, 4)],
    "pdn-m": [(384, 4), (384, 4)],
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [2, 3, 64, 64]: blocks of colour, so that convolutions answer with more than noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


def lively(network: nn.Module) -> nn.Module:
    """Seeded weights that keep the features of order 1, and batch norms that are not the identity."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
            elif isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A weight file for each of three kinds."""
    folder = tmp_path_factory.mktemp("weights")
    networks = {
        "mobilenet_v2": MobileNetV2(),
        "resnet18": ResNet((2, 2, 2, 2), bottleneck=False),
        "pdn-s": PDN("s"),
    }
    for kind, network in networks.items():
        save_safetensors(folder / f"{kind}.safetensors", lively(network).state_dict(), {})
    return {kind: folder / f"{kind}.safetensors" for kind in networks}


@pytest.mark.parametrize("kind", list(TAPS))
def test_channels_and_strides(kind: str) -> None:
    backbone = Backbone(kind, TAPS[kind])
    levels = backbone(torch.zeros(1, 3, 64, 64))
    assert [(level.shape[1], 64 // level.shape[2]) for level in levels] == SHAPES[kind]
    assert all(level.shape[2] == level.shape[3] for level in levels)
    assert backbone.channels == tuple(channels for channels, _ in SHAPES[kind])


def test_maps_of_a_pdn_reach_to_the_edges() -> None:
    """64x64 of 256 px, as the other backbones' first levels; without the reflection there are 56x56."""
    levels = Backbone("pdn-s", PDN_TAPS)(torch.zeros(1, 3, 256, 256))
    assert {tuple(level.shape[2:]) for level in levels} == {(64, 64)}


@torch.inference_mode()
def test_levels_are_those_of_the_file(files: dict[str, Path], images: Tensor) -> None:
    """Against the networks used by themselves, each with the normalisation of its own publication."""
    network, _ = load_mobilenet(files["mobilenet_v2"])
    mobile = network.taps(images.float() / 127.5 - 1, TAPS["mobilenet_v2"])
    resnet, _ = load_backbone(files["resnet18"])  # batch norms not folded
    stages = resnet.taps(normalise(images), STAGES)
    teacher, _ = load_teacher(files["pdn-s"])
    last = teacher(extended(normalise(images), "reflect"))
    expected = {
        "mobilenet_v2": list(mobile[tap] for tap in TAPS["mobilenet_v2"]),
        "resnet18": list(stages[tap] for tap in STAGES),
    }
    for kind, path in files.items():
        backbone, info = Backbone.load(path, TAPS)
        assert (backbone.kind, info.name) == (kind, path.name)
        levels = backbone(images)
        if kind == "pdn-s":
            torch.testing.assert_close(levels[1], last)
            continue
        for level, wanted in zip(levels, expected[kind], strict=True):
            torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("kind", "before", "after"), [("pdn-s", 8, 12), ("pdn-m", 16, 16)])
def test_pixels_that_a_pdn_cell_sees(kind: str, before: int, after: int) -> None:
    """Cell i of "last" sees pixels 4 i - 16 .. 4 i + 16.

    By the layers' sizes: the hidden cell of a PDN-S sees 21 of them, of which the published strides put
    the third of four at 4 i - 8 .. 4 i + 12. The last convolution of a PDN-M is 1x1: both see the same.
    """
    backbone = Backbone(kind, PDN_TAPS)
    lively(backbone)
    for tap, cell, near, far in [(0, (8, 9), before, after), (1, (7, 6), 16, 16)]:
        x = torch.full((1, 3, 64, 64), 128.0).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            noisy = x + 100 * torch.rand_like(x)
        (level,) = (found for i, found in enumerate(backbone(noisy)) if i == tap)
        level[0, :, cell[0], cell[1]].abs().sum().backward()
        assert x.grad is not None
        seen = x.grad[0].abs().sum(0) > 0
        for axis, index in enumerate(cell):
            touched = seen.any(dim=1 - axis).nonzero().flatten()
            assert (int(touched[0]), int(touched[-1])) == (4 * index - near, 4 * index + far)


@pytest.mark.parametrize("kind", ["mobilenet_v2", "resnet18", "pdn-s"])
@torch.inference_mode()
def test_merged_is_the_plain_backbone(kind: str, files: dict[str, Path], images: Tensor) -> None:
    """FP32 within rounding; FP16 within 1 % of the largest value, after some 20 roundings of 2^-11."""
    backbone, _ = Backbone.load(files[kind], TAPS)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    plain = backbone(images)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 1e-2)):
        merged = backbone.merged(dtype)
        weights = {parameter.dtype for parameter in merged.parameters()}
        levels = merged(images.float())
        assert weights == {dtype} and {level.dtype for level in levels} == {dtype}
        for level, wanted in zip(levels, plain, strict=True):
            assert float(wanted.std()) > 0.1
            assert float((level.float() - wanted).abs().max()) < tolerance * float(wanted.abs().max())
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_bytes_and_floats_are_the_same_image(files: dict[str, Path], images: Tensor) -> None:
    backbone, _ = Backbone.load(files["resnet18"], TAPS)
    for a, b in zip(backbone(images), backbone(images.float()), strict=True):
        assert torch.equal(a, b)


def test_a_backbone_is_frozen(files: dict[str, Path], images: Tensor) -> None:
    backbone, _ = Backbone.load(files["resnet18"], TAPS)
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(level.requires_grad for level in backbone(images))


@pytest.mark.parametrize(
    ("kind", "gone"),
    [("resnet18", ("layer4.", "fc.")), ("mobilenet_v2", ("blocks.13.", "head.", "classifier."))],
)
def test_nothing_beyond_the_deepest_tap_is_kept(
    kind: str, gone: tuple[str, ...], files: dict[str, Path]
) -> None:
    """And what is kept suffices: an unfilled backbone takes it whole."""
    backbone, _ = Backbone.load(files[kind], TAPS)
    state = backbone.state_dict()
    assert state and not [key for key in state if key.removeprefix("network.").startswith(gone)]
    assert not [key for key in state if "running_" in key]  # batch norms are folded
    empty = Backbone(kind, TAPS[kind])
    empty.load_state_dict(state, strict=True)
    x = torch.rand(1, 3, 32, 32) * 255
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), empty(x), strict=True))


def test_without_a_file_it_is_the_shipped_pdn() -> None:
    backbone, info = Backbone.load(None, TAPS)
    assert (backbone.kind, info.name) == ("pdn-s", "pdn_small.safetensors")


def test_files_that_are_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    only = {"resnet18": STAGES, "mobilenet_v2": TAPS["mobilenet_v2"]}
    with pytest.raises(WeightsError, match="holds pdn-s, which .* takes resnet18, mobilenet_v2"):
        Backbone.load(files["pdn-s"], only)
    with pytest.raises(WeightsError, match="no such weight file"):
        Backbone.load(tmp_path / "absent.safetensors", only)
    save_safetensors(tmp_path / "other.safetensors", {"conv1.weight": torch.zeros(8, 3, 3, 3)}, {})
    with pytest.raises(WeightsError, match="is no backbone that can be told by its keys"):
        Backbone.load(tmp_path / "other.safetensors", only)
    deeper = ResNet((3, 4, 6, 3), bottleneck=False, classes=0)  # 34 layers
    save_safetensors(tmp_path / "resnet34.safetensors", deeper.state_dict(), {})
    with pytest.raises(WeightsError, match=r"holds resnet \(3, 4, 6, 3\) of width 64, which"):
        Backbone.load(tmp_path / "resnet34.safetensors", only)


@pytest.mark.parametrize("kind", ["mobilenet_v2", "resnet18", "pdn-s"])
def test_incomplete_files_are_refused(kind: str, tmp_path: Path, files: dict[str, Path]) -> None:
    """Each without one tensor that the taps need, and, cut off in the middle, as bytes."""
    from safetensors.torch import load_file

    key = {"mobilenet_v2": "blocks.4.project.bias", "resnet18": "layer2.1.bn2.running_var"}
    missing = key.get(kind, "conv3.weight")
    state = load_file(files[kind])
    del state[missing]
    save_safetensors(tmp_path / "less.safetensors", state, {})
    with pytest.raises(WeightsError, match=f"missing {missing}"):
        Backbone.load(tmp_path / "less.safetensors", TAPS)
    content = files[kind].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        Backbone.load(tmp_path / "cut.safetensors", TAPS)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="backbone 'vgg16' is unknown"):
        Backbone("vgg16", ("features",))
