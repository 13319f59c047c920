"""The merged graph against the plain definition of the networks: every fold is exact."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgead.errors import ExportError
from edgead.export.graph import MergedGraph
from edgead.export.to_onnx import OPSET, check, describe, to_onnx
from edgead.image import resize
from edgead.models.efficientad import EfficientAD, anomaly_map, anomaly_score
from edgead.models.pdn import PDN
from edgead.training.efficientad import build_model

CALIBRATION = torch.tensor([0.7, 1.3, -0.05])


def random_model(size: str) -> EfficientAD:
    """Seeded weights that give feature differences of order 1, and statistics that are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        teacher = PDN(size)
        for parameter in teacher.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
        model = build_model(teacher, seed=1).eval()
        model.mean.normal_(0, 0.5)
        model.std.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def small() -> EfficientAD:
    return random_model("s")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def reference(model: EfficientAD, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    maps = anomaly_map(*model(images.permute(0, 3, 1, 2)), CALIBRATION)
    return anomaly_score(maps), maps


@pytest.mark.parametrize("size", ["s", "m"])
@torch.inference_mode()
def test_folds_are_exact(size: str, images: torch.Tensor) -> None:
    model = random_model(size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    score, maps = MergedGraph(model)(images, CALIBRATION)
    expected_score, expected_maps = reference(model, images)
    spread = float(expected_maps.max() - expected_maps.min())
    assert spread > 0.5  # a constant map would prove nothing
    assert float((maps - expected_maps).abs().max()) < 1e-5 * spread
    assert float((score - expected_score).abs().max()) < 1e-5 * spread
    # export changes nothing
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@torch.inference_mode()
def test_half_precision_stays_near_and_keeps_the_tail_in_float32(
    small: EfficientAD, images: torch.Tensor
) -> None:
    graph = MergedGraph(small, dtype=torch.float16)
    score, maps = graph(images, CALIBRATION)
    _, expected = reference(small, images)
    assert score.dtype == maps.dtype == torch.float32
    assert float((maps - expected).abs().max()) < 5e-3 * float(expected.max())


@pytest.mark.parametrize(("height", "width"), [(300, 420), (256, 256), (515, 301)])
def test_resize_in_the_graph_equals_the_host_within_one_level(
    small: EfficientAD, height: int, width: int
) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    graph = MergedGraph(small, frame=(height, width))
    resized = torch.round(graph.resize(torch.from_numpy(frame[None]).float()))[0].numpy()
    difference = np.abs(resized - resize(frame, 256, 256).astype(np.float32))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3  # 1/255; only ties round differently


@pytest.fixture(scope="module")
def content(small: EfficientAD) -> bytes:
    return to_onnx(MergedGraph(small))


def test_onnx_file_is_what_every_back_end_takes(content: bytes) -> None:
    model = onnx.load_from_string(content)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    assert inputs["image"].elem_type == onnx.TensorProto.UINT8
    assert [d.dim_param or d.dim_value for d in inputs["image"].shape.dim] == ["batch", 256, 256, 3]
    assert [d.dim_value for d in inputs["calibration"].shape.dim] == [3]
    outputs = {value.name: value.type.tensor_type for value in model.graph.output}
    assert [d.dim_param or d.dim_value for d in outputs["anomaly_map"].shape.dim] == ["batch", 64, 64]
    assert outputs["score"].elem_type == outputs["anomaly_map"].elem_type == onnx.TensorProto.FLOAT
    assert not {node.op_type for node in model.graph.node} & {"Dropout", "BatchNormalization", "TopK"}
    # image -> Cast -> Transpose: TensorRT takes no other order
    first = next(node for node in model.graph.node if "image" in node.input)
    assert first.op_type == "Cast"
    assert describe(content)["opset"] == OPSET


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_runtime_reproduces_torch_for_every_batch(
    content: bytes, small: EfficientAD, images: torch.Tensor, batch: int
) -> None:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    many = images.repeat(3, 1, 1, 1)[:batch]
    score, maps = session.run(None, {"image": many.numpy(), "calibration": CALIBRATION.numpy()})
    expected_score, expected_maps = reference(small, many)
    np.testing.assert_allclose(maps, expected_maps.numpy(), atol=1e-4)
    np.testing.assert_allclose(score, expected_score.numpy(), atol=1e-4)


def test_the_older_exporter_gives_the_same_numbers(
    small: EfficientAD, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch 2.4 has; used here with the installed torch."""
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    content = to_onnx(MergedGraph(small))
    monkeypatch.undo()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert [output.shape for output in session.get_outputs()] == [["batch"], ["batch", 64, 64]]
    _, maps = session.run(None, {"image": images.numpy(), "calibration": CALIBRATION.numpy()})
    np.testing.assert_allclose(maps, reference(small, images)[1].numpy(), atol=1e-4)


def test_calibration_is_an_input_that_acts(content: bytes, images: torch.Tensor) -> None:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    feed = {"image": images[:1].numpy()}
    parts = [
        session.run(["anomaly_map"], {**feed, "calibration": np.array(c, np.float32)})[0]
        for c in ([1, 0, 0], [0, 1, 0], [2, 3, 0.5])
    ]
    inner = (slice(None), slice(4, -4), slice(4, -4))
    expected = (2 * parts[0] + 3 * parts[1] + 0.5)[inner]
    np.testing.assert_allclose(parts[2][inner], expected, rtol=1e-4, atol=1e-5)
    assert (parts[2][:, :4] == 0).all()


def test_fp16_weights_are_fp16_in_the_file(small: EfficientAD, content: bytes) -> None:
    half = to_onnx(MergedGraph(small, dtype=torch.float16))
    assert len(half) < 0.52 * len(content)
    convolutions = [node for node in onnx.load_from_string(half).graph.node if node.op_type == "Conv"]
    weights = {tensor.name: tensor.data_type for tensor in onnx.load_from_string(half).graph.initializer}
    assert {weights[node.input[1]] for node in convolutions} == {onnx.TensorProto.FLOAT16}


def _model(
    nodes: list[onnx.NodeProto], *, opset: int = OPSET, dtype: int = onnx.TensorProto.FLOAT
) -> onnx.ModelProto:
    tensor = onnx.helper.make_tensor_value_info
    inputs = [tensor("image", onnx.TensorProto.UINT8, [1, 2, 2, 3])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [tensor("y", dtype, list("abcd"))])
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_check_refuses_what_tensorrt_would() -> None:
    make, proto = onnx.helper.make_node, onnx.TensorProto
    cast = make("Cast", ["image"], ["x"], to=proto.FLOAT)
    transpose = make("Transpose", ["image"], ["t"], perm=[0, 3, 1, 2])
    cases = [
        ([transpose, make("Cast", ["t"], ["y"], to=proto.FLOAT)], {}, "Transpose"),
        ([make("Cast", ["image"], ["y"], to=proto.DOUBLE)], {"dtype": proto.DOUBLE}, "double precision"),
        ([cast, make("Relu", ["x"], ["y"])], {"opset": 17}, "opset"),
        ([cast, make("Dropout", ["x"], ["y"])], {}, "Dropout"),
    ]
    for nodes, options, message in cases:
        with pytest.raises(ExportError, match=message):
            check(_model(nodes, **options))  # type: ignore[arg-type]
    check(_model([cast, make("Relu", ["x"], ["y"])]))
