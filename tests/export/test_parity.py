"""The parity gate lets equal graphs pass and stops others; golden samples are the telling ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgead.bundle import Bundle
from edgead.errors import ExportError
from edgead.export.graph import MergedGraph
from edgead.export.parity import RESIZED, Flip, Parity, choose_golden, compare, taken
from edgead.export.to_onnx import to_onnx
from edgead.image import list_images, read_image, resize
from edgead.training.run import read_run
from tests.toy_method import Toy


@pytest.fixture(scope="module")
def arguments(trained_run: Path, trained_bundle: Path, demo_images: Path) -> dict[str, object]:
    run = read_run(trained_run)
    return {
        "model": run.model,
        "onnx_content": Bundle.open(trained_bundle).model_bytes(),
        "images": list_images(demo_images / "test")[:3],
        "precision": "fp32",
        "calibration": np.array(run.record["calibration"]["values"], np.float32),
        "threshold": run.record["threshold"]["value"],
    }


def test_exported_graph_agrees_within_1e_4_of_the_spread_without_flips(
    arguments: dict[str, object],
) -> None:
    parity, golden = compare(**arguments)  # type: ignore[arg-type]
    assert parity.images == 3 and not parity.flips and not parity.failures
    assert parity.score_deviation < 1e-4 and parity.map_deviation < 1e-4
    assert golden.images.dtype == np.uint8 and golden.images.shape[1:] == (256, 256, 3)
    np.testing.assert_allclose(golden.maps.max(axis=(1, 2)), golden.scores)


def _damaged(content: bytes, scale: float) -> bytes:
    """The same graph with the last convolution's bias scaled: a fold gone wrong."""
    model = onnx.load_from_string(content)
    conv = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    for tensor in model.graph.initializer:
        if tensor.name == conv.input[2]:
            values = onnx.numpy_helper.to_array(tensor) * np.float32(scale)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return model.SerializeToString()


def test_a_wrong_fold_is_stopped(arguments: dict[str, object]) -> None:
    content = _damaged(arguments["onnx_content"], 1.05)  # type: ignore[arg-type]
    message = "fails the parity gate on 3 images: the largest score deviation"
    with pytest.raises(ExportError, match=message):
        compare(**{**arguments, "onnx_content": content})  # type: ignore[arg-type]


def test_nan_is_stopped(arguments: dict[str, object]) -> None:
    content = _damaged(arguments["onnx_content"], float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="NaN or infinite scores"):
        compare(**{**arguments, "onnx_content": content})  # type: ignore[arg-type]


@pytest.fixture
def resized(demo_images: Path) -> dict[str, object]:
    """Without a graph: a model whose map shows every pixel."""
    return {
        "model": Toy(cell_px=1),
        "images": list_images(demo_images / "test")[:3],
        "precision": "fp32",
        "calibration": np.array([1, 0], np.float32),
        "threshold": 0.0,
    }


@pytest.mark.parametrize("frame", [(96, 128), (192, 256)])
def test_values_between_two_grey_levels_do_not_stop_a_graph_that_resizes(
    resized: dict[str, object], frame: tuple[int, int]
) -> None:
    """At these sizes many values are exactly x.5, and host and graph round some to different sides."""
    content = to_onnx(MergedGraph(resized["model"], frame=frame))  # type: ignore[arg-type]
    parity, golden = compare(**resized, onnx_content=content, frame=frame)  # type: ignore[arg-type]
    assert 0 < parity.resized < RESIZED
    assert parity.score_deviation < 1e-4 and parity.map_deviation < 1e-4
    assert golden.images.shape[1:] == (*frame, 3)


def test_a_verdict_that_only_the_rounding_of_the_resize_flips_is_told_and_stops_nothing(
    resized: dict[str, object],
) -> None:
    model, images = Toy(cell_px=64), resized["images"]  # the score is the mean of all pixels
    content, frame = to_onnx(MergedGraph(model, frame=(96, 128))), (96, 128)
    session = onnxruntime.InferenceSession(content)
    flipped = []
    for path in images:  # type: ignore[attr-defined]
        fitted = resize(read_image(path), *frame)
        host = torch.from_numpy(resize(fitted, 64, 64)[None]).permute(0, 3, 1, 2)
        of_host = float(model(host)[0].max())
        score = float(
            session.run(["score"], {"image": fitted[None], "calibration": np.array([1, 0], np.float32)})[
                0
            ][0]
        )
        threshold = max(of_host, score)
        changed = {**resized, "model": model, "threshold": threshold, "frame": frame}
        parity, _ = compare(**changed, onnx_content=content)  # type: ignore[arg-type]
        assert not parity.failures
        flipped += [flip for flip in parity.flips if flip.image == path.name]
    assert flipped and all(flip.by_resize for flip in flipped)


class _Shifted(torch.nn.Module):
    """A resize that adds to one column of pixels in `every`."""

    def __init__(self, resize: torch.nn.Module, levels: float, every: int) -> None:
        super().__init__()
        self.resize = resize
        self.register_buffer("shift", torch.zeros(64, 3))
        self.shift[::every] = levels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.resize(images) + self.shift


@pytest.mark.parametrize(
    ("levels", "every", "message"),
    [(0.9, 32, r"another grey level on [23]\.\d+% of"), (2.0, 64, "by more than one grey level")],
)
def test_a_resize_that_is_not_the_host_s_is_stopped(
    resized: dict[str, object], levels: float, every: int, message: str
) -> None:
    """0.9 of a level changes nine values of ten, in 2 of 64 columns."""
    graph = MergedGraph(resized["model"], frame=(96, 128))  # type: ignore[arg-type]
    graph.resize = _Shifted(graph.resize, levels, every)
    with pytest.raises(ExportError, match=message):
        compare(**resized, onnx_content=to_onnx(graph), frame=(96, 128))  # type: ignore[arg-type]


def test_large_frames_are_compared_on_fewer_images() -> None:
    assert taken(10, (256, 256)) == taken(10, (4096, 4096)) == list(range(10))
    assert len(taken(501, (256, 256))) == 500 and taken(501, (256, 256))[-1] == 500
    assert len(taken(104, (900, 900))) == 40 and len(taken(104, (2048, 2048))) == 20
    assert taken(39, (2048, 2048)) == list(range(0, 39, 2))


def test_no_images_is_an_error(arguments: dict[str, object]) -> None:
    with pytest.raises(ExportError, match="needs images"):
        compare(**{**arguments, "images": []})  # type: ignore[arg-type]


def test_flips_fail_always_in_fp32_and_beyond_the_margin_in_fp16() -> None:
    near, far = Flip("near.png", 0.995, 1.002), Flip("far.png", 0.5, 1.5)
    parity = Parity("fp32", 9, 2.0, 5e-5, 5e-5, 1e-4, 2e-4, (near,))
    assert ["near.png" in failure for failure in parity.failures] == [True]
    half = replace(parity, precision="fp16", tolerance=1e-2, margin=2e-2)
    assert half.failures == []
    assert ["far.png" in failure for failure in replace(half, flips=(near, far)).failures] == [True]
    assert len(replace(half, score_deviation=float("nan")).failures) == 1


def test_golden_samples_surround_the_threshold_outside_the_margin() -> None:
    scores = np.array([0.1, 0.4, 0.99, 1.01, 1.3, 5.0, 0.2])
    assert choose_golden(scores, 1.0, 0.05, bytes_per_image=1) == [4, 1, 5, 0]
    assert choose_golden(scores, 1.0, 0.05, bytes_per_image=40 << 20) == [4]
    # none outside: take these
    assert choose_golden(np.array([0.99, 1.01]), 1.0, 0.5, bytes_per_image=1) == [1, 0]
    assert choose_golden(np.array([0.1, 0.3]), 1.0, 0.1, bytes_per_image=1) == [1, 0]  # all good
