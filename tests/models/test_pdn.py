"""PDN shapes, sizes and receptive field; expected values are those of the EfficientAD paper's tables."""

from __future__ import annotations

import pytest
import torch

from edgead.models.pdn import FEATURES, PDN

# parameters computed by hand from the layer tables: sum of out * in * k * k + out
TEACHER_PARAMETERS = {"s": 2_694_144, "m": 8_026_624}
STUDENT_PARAMETERS = {"s": 4_267_392, "m": 11_615_488}


@pytest.mark.parametrize("size", ["s", "m"])
def test_parameter_counts(size: str) -> None:
    for channels, expected in ((FEATURES, TEACHER_PARAMETERS), (2 * FEATURES, STUDENT_PARAMETERS)):
        assert sum(p.numel() for p in PDN(size, channels).parameters()) == expected[size]


@pytest.mark.parametrize("size", ["s", "m"])
@torch.inference_mode()
def test_output_sizes_with_and_without_padding(size: str) -> None:
    x = torch.zeros(1, 3, 256, 256)
    assert PDN(size)(x).shape == (1, FEATURES, 56, 56)
    assert PDN(size, padding=True)(x).shape == (1, FEATURES, 64, 64)


@torch.inference_mode()
def test_padded_and_unpadded_share_weights_and_agree_inside() -> None:
    plain, padded = PDN("s"), PDN("s", padding=True)
    padded.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 96, 96)
    inner = padded(x)[..., 4:-4, 4:-4]  # 16 px of border on each side see padding
    torch.testing.assert_close(inner, plain(x), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_padding_counts_in_the_pools_as_the_published_network_has_it() -> None:
    """Independent form: an nn.Sequential with the convolutions' own padding."""
    pdn = PDN("s", padding=True)
    reference = torch.nn.Sequential(
        torch.nn.Conv2d(3, 128, 4, padding=3), torch.nn.ReLU(), torch.nn.AvgPool2d(2, 2, padding=1),
        torch.nn.Conv2d(128, 256, 4, padding=3), torch.nn.ReLU(), torch.nn.AvgPool2d(2, 2, padding=1),
        torch.nn.Conv2d(256, 256, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(256, 384, 4),
    )  # fmt: skip
    for index, name in ((0, "conv1"), (3, "conv2"), (6, "conv3"), (8, "conv4")):
        reference[index].load_state_dict(getattr(pdn, name).state_dict())
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(pdn(x), reference(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", ["s", "m"])
def test_receptive_field_is_33_pixels_and_stride_4(size: str) -> None:
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    PDN(size)(x)[0, :, 2, 3].sum().backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    columns = x.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    assert (rows.min(), rows.max()) == (4 * 2, 4 * 2 + 32)
    assert (columns.min(), columns.max()) == (4 * 3, 4 * 3 + 32)


def test_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'l' is unknown; known sizes: s, m"):
        PDN("l")
