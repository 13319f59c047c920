"""MobileNetV2: its padding convention, its taps, and its accuracy with the real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgead.image import list_images, read_image, resize
from edgead.models.files import load_mobilenet
from edgead.models.mobilenet import MobileNetV2, _SameConv

TAPS = {
    "blocks.2": (24, 4),
    "blocks.5": (32, 8),
    "blocks.5.depthwise": (192, 8),
    "blocks.6.expand": (192, 8),
    "blocks.12": (96, 16),
    "blocks.12.depthwise": (576, 16),
    "blocks.13.expand": (576, 16),
}


@torch.inference_mode()
def test_taps_have_the_documented_channels_and_strides() -> None:
    network = MobileNetV2().eval()
    found = network.taps(torch.zeros(1, 3, 64, 64), tuple(TAPS))
    assert {name: (value.shape[1], 64 // value.shape[2]) for name, value in found.items()} == TAPS


def test_unknown_tap_is_named() -> None:
    with pytest.raises(ValueError, match="no tap blocks.17"):
        MobileNetV2().taps(torch.zeros(1, 3, 32, 32), ("blocks.17",))


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
@torch.inference_mode()
def test_same_padding_puts_the_odd_pixel_at_the_end(side: int, stride: int) -> None:
    """By definition: output i sees inputs starting at i * stride - total // 2."""
    conv = _SameConv(1, 1, 3, stride, bias=False)
    conv.weight.copy_(torch.arange(9.0).view(1, 1, 3, 3))
    x = torch.rand(1, 1, side, side)
    out = -(-side // stride)
    before = max((out - 1) * stride + 3 - side, 0) // 2
    wide = torch.zeros(side + 8, side + 8)
    wide[4 : 4 + side, 4 : 4 + side] = x[0, 0]
    expected = torch.empty(out, out)
    for i in range(out):
        for j in range(out):
            top, left = 4 + i * stride - before, 4 + j * stride - before
            expected[i, j] = (wide[top : top + 3, left : left + 3] * conv.weight[0, 0]).sum()
    torch.testing.assert_close(conv(x)[0, 0], expected)


@torch.inference_mode()
def test_top_1_on_real_images(shared: Path) -> None:
    """Sorted by name, an image's position is its class.

    All 1,000: 889 right (measured once, with Pillow's resize). A wrong padding or channel order costs
    far more than the tolerance.
    """
    network, info = load_mobilenet(shared / "weights" / "mobilenet_v2_imagenet.safetensors")
    assert info.sha256 == "3a46bafdf2676eb45efe2554807dea26c5e0e095483fc8cfb917b31c290a7be1"
    images = list_images(shared / "data" / "imagenet_1000")
    right = 0
    for target in range(0, 1000, 10):
        image = read_image(images[target])
        scale = 256 / min(image.shape[:2])
        image = resize(image, round(image.shape[0] * scale), round(image.shape[1] * scale))
        top, left = (image.shape[0] - 224) // 2, (image.shape[1] - 224) // 2
        crop = np.ascontiguousarray(image[top : top + 224, left : left + 224])
        x = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
        right += int(network(x).argmax()) == target + 1
    assert 82 <= right <= 86  # 84 of these 100
