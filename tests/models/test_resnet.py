"""ResNets: names and shapes of torchvision's files, numbers of torchvision's networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgead.errors import WeightsError
from edgead.models.files import load_backbone, save_safetensors, sha256
from edgead.models.mobilenet import MobileNetV2
from edgead.models.resnet import ResNet

# Tensors and parameters of torchvision's files; of those of resnet18, wide_resnet50_2 and
# wide_resnet101_2 as published with them (tensors: with num_batches_tracked), of resnet50 25,557,032.
NETWORKS = {
    "resnet18": ((2, 2, 2, 2), False, 64, 122, 11_689_512),
    "resnet50": ((3, 4, 6, 3), True, 64, 320, 25_557_032),
    "wide_resnet50_2": ((3, 4, 6, 3), True, 128, 320, 68_883_240),
    "wide_resnet101_2": ((3, 4, 23, 3), True, 128, 626, 126_886_696),
}
# Written down from torchvision's layout: a bottleneck has its stride in conv2.
SHAPES = {
    "resnet18": {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.1.conv2.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer3.0.downsample.1.num_batches_tracked": (),
        "fc.weight": (1000, 512),
    },
    "resnet50": {
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer2.3.conv3.weight": (512, 128, 1, 1),
        "layer3.5.bn2.bias": (256,),
        "fc.bias": (1000,),
    },
    "wide_resnet50_2": {
        "layer1.0.conv1.weight": (128, 64, 1, 1),
        "layer2.0.conv2.weight": (256, 256, 3, 3),
        "layer4.2.conv3.weight": (2048, 1024, 1, 1),
    },
    "wide_resnet101_2": {
        "layer3.22.conv2.weight": (512, 512, 3, 3),
        "layer3.22.conv3.weight": (1024, 512, 1, 1),
        "fc.weight": (1000, 2048),
    },
}
FEATURES = {"resnet18": (128, 256), "resnet50": (512, 1024)}  # channels of layer2 and layer3


def make(name: str, classes: int = 1000) -> ResNet:
    blocks, bottleneck, width, _, _ = NETWORKS[name]
    return ResNet(blocks, bottleneck=bottleneck, width=width, classes=classes)


@pytest.fixture(scope="module")
def resnet18() -> ResNet:
    """Seeded weights; batch norms with other statistics and gains than a new network's."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        network = make("resnet18").eval()
        for name, value in network.state_dict().items():
            if "running_mean" in name or (".bn" in name and "bias" in name):
                value.normal_(0, 0.1)
            elif "running_var" in name or (".bn" in name and "weight" in name):
                value.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize("name", list(NETWORKS))
def test_names_and_shapes_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        network = make(name)
    state = network.state_dict()
    assert network.name == name
    assert len(state) == NETWORKS[name][3]
    assert sum(p.numel() for p in network.parameters()) == NETWORKS[name][4]
    assert {key: tuple(state[key].shape) for key in SHAPES[name]} == SHAPES[name]
    told = ResNet.of_state_dict(state)
    assert told is not None and told.name == name
    assert {k: v.shape for k, v in told.state_dict().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_numbers_are_torchvisions(name: str) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    theirs = getattr(models, name)(weights=None).eval()
    ours = make(name).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))


def literal_basic_block(state: dict[str, Tensor], key: str, x: Tensor, stride: int) -> Tensor:
    """A basic block as He et al. draw it, in FP64."""

    def norm(y: Tensor, name: str) -> Tensor:
        mean, var, gain, bias = (
            state[f"{key}.{name}.{part}"].double().view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * gain + bias

    def conv(y: Tensor, name: str, step: int, pad: int) -> Tensor:
        weight = state[f"{key}.{name}.weight"].double()
        return torch.nn.functional.conv2d(y, weight, stride=step, padding=pad)

    y = norm(conv(x, "conv1", stride, 1), "bn1").relu()
    y = norm(conv(y, "conv2", 1, 1), "bn2")
    if f"{key}.downsample.0.weight" in state:
        x = norm(conv(x, "downsample.0", stride, 0), "downsample.1")
    return (x + y).relu()


@torch.inference_mode()
def test_a_block_is_what_the_paper_draws(resnet18: ResNet) -> None:
    state = resnet18.state_dict()
    found = resnet18.taps(torch.rand(1, 3, 64, 64), ("layer1", "layer2.0", "layer2"))
    a = literal_basic_block(state, "layer2.0", found["layer1"].double(), 2)
    b = literal_basic_block(state, "layer2.1", a, 1)
    torch.testing.assert_close(found["layer2.0"].double(), a, atol=1e-4, rtol=1e-4)  # FP32 against FP64
    torch.testing.assert_close(found["layer2"].double(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(FEATURES))
@torch.inference_mode()
def test_taps_have_the_channels_and_strides_of_the_paper(name: str) -> None:
    network = make(name, classes=0).eval()
    found = network.taps(torch.zeros(1, 3, 64, 64), ("layer2", "layer3"))
    assert {k: (v.shape[1], 64 // v.shape[2]) for k, v in found.items()} == {
        "layer2": (FEATURES[name][0], 8),
        "layer3": (FEATURES[name][1], 16),
    }
    with pytest.raises(ValueError, match="no tap layer5"):
        network.taps(torch.zeros(1, 3, 64, 64), ("layer5",))


@torch.inference_mode()
def test_folded_batch_norms_change_nothing(resnet18: ResNet) -> None:
    folded = make("resnet18").eval()
    folded.load_state_dict(resnet18.state_dict())
    folded.fold()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(folded(x), resnet18(x), atol=1e-4, rtol=1e-4)


def test_files_are_recognised_by_their_keys(tmp_path: Path, resnet18: ResNet) -> None:
    state = resnet18.state_dict()
    truncated = {k: v for k, v in state.items() if not k.startswith(("fc.", "layer4."))}
    no_counters = {k: v for k, v in state.items() if "num_batches" not in k}
    for name, content in {"a.pth": state, "b.safetensors": truncated, "c.pth": no_counters}.items():
        path = tmp_path / name
        if path.suffix == ".pth":
            torch.save({"state_dict": {f"module.{k}": v for k, v in content.items()}}, path)
        else:
            save_safetensors(path, content, {})
        network, info = load_backbone(path)
        assert isinstance(network, ResNet) and not network.training
        assert info.layout == ("resnet18" if name != "b.safetensors" else network.name)
        x = torch.rand(1, 3, 32, 32)
        with torch.inference_mode():
            found, expected = (n.taps(x, ("layer3",))["layer3"] for n in (network, resnet18))
        assert torch.equal(found, expected), name
    path = tmp_path / "mobilenet.safetensors"
    save_safetensors(path, MobileNetV2().state_dict(), {})
    assert isinstance(load_backbone(path)[0], MobileNetV2)


def test_wrong_files_are_refused(tmp_path: Path, resnet18: ResNet, random_teacher: Path) -> None:
    with pytest.raises(WeightsError, match="no backbone that can be told by its keys"):
        load_backbone(random_teacher)
    state = resnet18.state_dict()
    del state["layer2.1.conv1.weight"]
    state["layer3.0.bn1.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(WeightsError, match=r"missing layer2\.1\.conv1\.weight.*layer3\.0\.bn1\.weight"):
        load_backbone(tmp_path / "damaged.pth")


def test_a_name_with_another_hash_is_warned_about(
    tmp_path: Path, resnet18: ResNet, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "plain.pth"
    torch.save(resnet18.state_dict(), path)
    right = tmp_path / f"resnet18-{sha256(path)[:8]}.pth"
    path.rename(right)
    load_backbone(right)
    assert not caplog.text
    wrong = right.rename(tmp_path / "resnet18-f37072fd.pth")
    load_backbone(wrong)
    assert "SHA-256" in caplog.text
