"""A run with --border reflect from training to the verdict of the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgead import cli, cli_training
from edgead.bundle import Bundle
from edgead.detector import load
from edgead.export.graph import MergedGraph
from edgead.export.pack import export_run
from edgead.image import read_image, resize
from edgead.models.efficientad import BORDERS, EfficientAD, anomaly_map
from edgead.models.pdn import PDN
from edgead.training.data import open_dataset
from edgead.training.efficientad import TrainConfig, build_model
from edgead.training.run import read_run
from edgead.training.train import train


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    demo_images: Path,
    natural_images: Path,
    random_teacher: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("reflect") / "run"
    config = TrainConfig(steps=2, border="reflect")
    train(
        open_dataset(demo_images, seed=config.seed), folder, config,
        teacher=random_teacher, penalty=natural_images,
    )  # fmt: skip
    return folder


def test_run_is_read_back_with_its_border_and_calibrated_on_all_cells(run: Path) -> None:
    finished = read_run(run)
    assert finished.record["config"]["border"] == finished.model.border == "reflect"
    root = Path(finished.record["data"]["root"])
    images = [resize(read_image(root / p), 256, 256) for p in finished.record["data"]["validation"]]
    with torch.inference_mode():
        local, logical = finished.model(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert local.shape == logical.shape == (len(images), 64, 64)
    for maps, name in ((local, "student"), (logical, "autoencoder")):
        low, high = np.quantile(maps.double().numpy(), [0.9, 0.995])
        quantiles = finished.record["calibration"]["quantiles"][name]
        assert quantiles == pytest.approx({"low": low, "high": high}, rel=1e-4)
    joined = anomaly_map(local, logical, torch.tensor(finished.record["calibration"]["values"]))
    expected = joined.amax(dim=(1, 2)).tolist()
    assert finished.record["calibration"]["scores"] == pytest.approx(expected, rel=1e-3)


def test_bundle_passes_the_gate_says_its_border_and_fills_it(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "reflect.edgead"
    parity = export_run(run, path)
    assert not parity.flips and parity.map_deviation < 1e-4
    bundle = Bundle.open(path)
    assert bundle.manifest.model["border"] == "reflect"
    assert bundle.manifest.provenance["training"]["config"]["border"] == "reflect"
    assert bundle.manifest.map_shape == (64, 64)
    nodes = onnx.load_from_string(bundle.model_bytes()).graph.node
    pads = [node for node in nodes if node.op_type == "Pad"]
    modes = [onnx.helper.get_node_attr_value(node, "mode") for node in pads]
    assert modes == [b"reflect"]  # and no padding of the map
    golden = bundle.golden()
    assert all((golden.maps[:, row] != 0).all() for row in (0, -1))
    with load(path, backend="onnxruntime", threads=1) as detector:
        result = detector(golden.images[0])
    np.testing.assert_allclose(result.anomaly_map, golden.maps[0], atol=1e-3 * np.ptp(golden.maps))


def test_published_bundle_says_so(trained_bundle: Path, trained_run: Path) -> None:
    assert Bundle.open(trained_bundle).manifest.model["border"] == "published"
    assert json.loads((trained_run / "run.json").read_text())["config"]["border"] == "published"


@torch.inference_mode()
@pytest.mark.parametrize("size", ["s", "m"])
def test_folds_stay_exact(size: str) -> None:
    """Reflection copies pixels, so what is folded into the first convolution folds as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        teacher = PDN(size)  # type: ignore[arg-type]
        for parameter in teacher.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
        model: EfficientAD = build_model(teacher, seed=1, border="reflect").eval()
        model.mean.normal_(0, 0.5)
        model.std.uniform_(0.5, 2)
        image = torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8)
    calibration = torch.tensor([0.7, 1.3, -0.05])
    expected = anomaly_map(*model(image.permute(0, 3, 1, 2)), calibration)
    score, maps = MergedGraph(model)(image, calibration)
    spread = float(np.ptp(expected.numpy()))
    assert spread > 0.3  # a constant map would prove nothing
    assert float((maps - expected).abs().max()) < 1e-5 * spread
    assert float(score[0]) == pytest.approx(float(expected.max()), abs=1e-5 * spread)


def test_command_line_offers_the_borders_that_there_are() -> None:
    arguments = cli.build_parser().parse_args(["train", "d", "--out", "r", "--border", "reflect"])
    assert arguments.border == "reflect" and cli_training.BORDERS == BORDERS
