"""The border of the map: what the published form cannot see, and what --border reflect changes.

The detector here is made, not trained: the student gives zeros, the autoencoder too, and the teacher's
mean is that of a plain grey image, so that the map is exactly what a defect changes in the teacher's
features (random weights).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgead.models.efficientad import (
    BORDERS,
    REFLECTED_PX,
    Border,
    EfficientAD,
    anomaly_map,
    anomaly_score,
    extended,
    normalise,
)
from edgead.models.pdn import PDN
from edgead.training.efficientad import build_model

DEFECT_PX = 8
STUDENT_ONLY = torch.tensor([1.0, 0.0, 0.0])


@torch.inference_mode()
def detector(border: Border) -> EfficientAD:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        teacher = PDN("s")
        for parameter in teacher.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    model = build_model(teacher, seed=0, border=border).eval()
    for last in (model.student.last, model.autoencoder.last):
        last.weight.zero_()
        assert last.bias is not None
        last.bias.zero_()
    clean = normalise(torch.full((1, 3, 256, 256), 128, dtype=torch.uint8))
    model.mean.copy_(model.teacher(clean).mean(dim=(0, 2, 3)).view(-1, 1, 1))
    return model


@pytest.fixture(scope="module")
def detectors() -> dict[str, EfficientAD]:
    return {border: detector(border) for border in ("published", "reflect")}


@torch.inference_mode()
def seen(model: EfficientAD, top: int, *, left: int = 120) -> tuple[float, tuple[int, int]]:
    """Score of a bright square, which the edge may cut off, and the pixel of the highest cell."""
    image = torch.full((1, 3, 256, 256), 128, dtype=torch.uint8)
    image[:, :, top : top + DEFECT_PX, left : left + DEFECT_PX] = 255
    maps = anomaly_map(*model(image), STUDENT_ONLY)
    row, column = divmod(int(maps[0].argmax()), 64)
    return float(anomaly_score(maps)), (4 * row, 4 * column)


def test_published_form_loses_a_defect_that_moves_into_the_border(
    detectors: dict[str, EfficientAD],
) -> None:
    """As far as a cell is centred in it (16 px from the edge) it is seen in full, then less and less.

    Measured: 1.42, 1.42, 1.09, 0.59, 0.21 from the middle to the edge. The last 3 rows are in no cell.
    """
    scores = {top: seen(detectors["published"], top)[0] for top in (124, 16, 8, 4, 0, 250, 253)}
    assert scores[16] == pytest.approx(scores[124], rel=1e-4)
    assert scores[124] > scores[8] > scores[4] > scores[0] > scores[250] > 0
    assert scores[0] < 0.2 * scores[124]
    assert scores[253] < 1e-6 * scores[124]  # nothing but roundings


@pytest.mark.parametrize(("top", "left"), [(0, 120), (248, 120), (120, 248), (248, 0)])
def test_reflect_finds_a_defect_at_the_edge_and_where_it_is(
    detectors: dict[str, EfficientAD], top: int, left: int
) -> None:
    middle, _ = seen(detectors["reflect"], 124)
    score, at = seen(detectors["reflect"], top, left=left)
    assert score > middle  # with its reflection it is even larger
    assert all(abs(found - wanted) <= 8 for found, wanted in zip(at, (top, left), strict=True))
    missed, shown = seen(detectors["published"], top, left=left)
    assert missed < 0.2 * middle
    assert max(abs(shown[0] - top), abs(shown[1] - left)) >= 12  # and if at all, then elsewhere


@torch.inference_mode()
def test_inner_cells_are_the_published_ones(detectors: dict[str, EfficientAD]) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8, generator=generator)
    whole, inner = detectors["reflect"](image)[0], detectors["published"](image)[0]
    assert whole.shape == (1, 64, 64) and inner.shape == (1, 56, 56)
    torch.testing.assert_close(whole[:, 4:-4, 4:-4], inner)


def test_cell_i_is_the_patch_of_pixels_4i_minus_16_to_4i_plus_16() -> None:
    """By the gradient of a cell, in a PDN whose weights are positive: no activation is cut off."""
    network = PDN("s")
    for parameter in network.parameters():
        parameter.data.abs_()
    x = torch.rand(1, 3, 256, 256, requires_grad=True)
    features = network(extended(x, "reflect"))
    assert features.shape[-2:] == (64, 64)
    for row, column in ((10, 40), (59, 20)):
        (gradient,) = torch.autograd.grad(features[0, :, row, column].sum(), x, retain_graph=True)
        rows, columns = (gradient[0].abs().sum(dim=(0, axis)).nonzero().flatten() for axis in (2, 1))
        assert (int(rows[0]), int(rows[-1])) == (4 * row - 16, 4 * row + 16)
        assert (int(columns[0]), int(columns[-1])) == (4 * column - 16, 4 * column + 16)


def test_margin_is_just_as_large_as_64_cells_need() -> None:
    network = PDN("s", 1)
    left, right, top, bottom = REFLECTED_PX
    assert (left, right) == (top, bottom) == (16, 13)
    sizes = [network(torch.zeros(1, 3, 64 + 16 + px, 64 + 16 + px)).shape[-1] for px in range(12, 17)]
    assert sizes == [15, 16, 16, 16, 16]  # 12 px are too few, more than 13 give nothing


@torch.inference_mode()
@pytest.mark.parametrize("border", BORDERS)
def test_maps_have_64_cells_either_way(detectors: dict[str, EfficientAD], border: str) -> None:
    raw: Tensor = torch.full((2, detectors[border].cells, detectors[border].cells), 3.0)
    maps = anomaly_map(raw, raw, torch.tensor([1.0, 1.0, -7.0]))
    assert maps.shape == (2, 64, 64)
    # The published border of zeros lies above a map below the low quantile; without it there is none.
    assert anomaly_score(maps).tolist() == ([0, 0] if border == "published" else [-1, -1])


def test_unknown_border() -> None:
    with pytest.raises(ValueError, match="border 'mirror' is unknown; known: published, reflect"):
        EfficientAD(PDN("s"), border="mirror")  # type: ignore[arg-type]
