"""Reduction at export: exact with all directions, gated with fewer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgead.bundle import Bundle
from edgead.cli import main
from edgead.errors import ExportError
from edgead.export import reduce, reduce_gate
from edgead.export.graph import MergedGraph
from edgead.export.pack import export_run
from edgead.export.parity import Flip
from edgead.export.reduce import Reduced, folding, sizes_for
from edgead.export.reduce_gate import Gate
from edgead.models.efficientad import EfficientAD, anomaly_map
from edgead.models.pdn import PDN
from edgead.training.efficientad import build_model

CALIBRATION = torch.tensor([0.7, 1.3, -0.05])


def orthonormal(channels: int, seed: int) -> torch.Tensor:
    matrix = np.random.default_rng(seed).normal(size=(channels, channels))
    return torch.from_numpy(np.linalg.qr(matrix)[0])


def random_model(size: str, targets: int = 384) -> EfficientAD:
    """Seeded weights that give feature differences of order 1, and statistics that are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        teacher = PDN(size)
        for parameter in teacher.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
        model = build_model(teacher, seed=1, targets=targets).eval()
        model.mean.normal_(0, 0.5)
        model.std.uniform_(0.5, 2)
        if model.rotation is not None:
            model.rotation.copy_(orthonormal(384, 9)[:, :targets] * 1.7)
    return model


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def maps_of(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    return anomaly_map(*model(image.permute(0, 3, 1, 2)), CALIBRATION)


@pytest.mark.parametrize(("channels", "k"), [(384, 384), (7, 7), (384, 64), (384, 33), (16, 2)])
def test_every_direction_keeps_its_energy(channels: int, k: int) -> None:
    """The mean over k of a vector along one direction is what the mean over C was, for all of them."""
    directions = orthonormal(channels, 1)
    matrix = folding(directions, k)
    assert matrix.shape == (channels, k) and matrix.dtype == torch.float64
    energies = (matrix.T @ directions).square().mean(0)
    np.testing.assert_allclose(energies, np.full(channels, 1 / channels), rtol=1e-12)
    if k == channels:  # a rotation: any vector keeps its norm
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(k), atol=1e-12)


def test_energy_is_kept_in_the_mean_where_cutting_loses_it() -> None:
    """Uncorrelated sources: cut to 8 of 32 directions 3/4 of the energy is gone, folded nothing."""
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(20_000, 32)))
    whole = float(rows.square().sum(1).mean()) / 32
    folded = float((rows @ folding(torch.eye(32), 8)).square().mean())
    assert folded == pytest.approx(whole, rel=0.02)  # 20,000 samples: 0.5 % of standard error
    assert float(rows[:, :8].square().sum(1).mean()) / 32 == pytest.approx(whole / 4, rel=0.02)


@pytest.mark.parametrize("size", ["s", "m"])
@torch.inference_mode()
def test_all_directions_give_the_maps_of_the_run(size: str, image: torch.Tensor) -> None:
    model = random_model(size)
    rotations = folding(orthonormal(384, 2), 384), folding(orthonormal(384, 3), 384)
    _, maps = MergedGraph(Reduced(model, rotations))(image, CALIBRATION)
    expected = maps_of(model, image)
    spread = float(expected.max() - expected.min())
    assert spread > 0.5  # a constant map would prove nothing
    assert float((maps - expected).abs().max()) < 1e-5 * spread  # the bound without rotations


@pytest.mark.parametrize(("targets", "k"), [(384, 48), (64, 16), (64, None)])
@torch.inference_mode()
def test_folded_graph_equals_the_plain_form(targets: int, k: int | None, image: torch.Tensor) -> None:
    model = random_model("s", targets)
    if k is None:
        plain = model
    else:
        rotations = folding(orthonormal(targets, 2), k), folding(orthonormal(targets, 3), k)
        plain = Reduced(model, rotations)
    graph = MergedGraph(plain)
    convolutions = graph.networks.local, graph.networks.autoencoder.last
    assert [convolution.out_channels for convolution in convolutions] == 2 * [k or targets]
    _, maps = graph(image, CALIBRATION)
    expected = maps_of(plain, image)
    spread = float(expected.max() - expected.min())
    assert spread > 0.5
    assert float((maps - expected).abs().max()) < 1e-5 * spread


@pytest.fixture(scope="module")
def reduced_bundle(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hardly trained run, with a gate that lets any size pass: what is written, not how good."""
    path = tmp_path_factory.mktemp("reduced") / "tray.edgead"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce, "PICTURES", 2)
        patch.setattr(reduce, "TRAINING_IMAGES", 2)
        patch.setattr(reduce, "SIZES", (16, 32))
        patch.setattr(reduce, "SHARES", (0.5,))
        patch.setattr(reduce_gate, "DEVIATION", 1e9)
        patch.setattr(reduce_gate, "MARGIN", 1e9)
        patch.setattr(reduce_gate, "AUROC_LOSS", 1.0)
        export_run(trained_run, path, reduce="auto")
    return path


def test_reduced_bundle_says_so_and_proves_its_graph(
    trained_run: Path, trained_bundle: Path, reduced_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, whole = Bundle.open(reduced_bundle), Bundle.open(trained_bundle)
    manifest = bundle.manifest
    assert manifest.parity["score_deviation"] < 1e-4 and manifest.parity["flips"] == []
    reduction = manifest.model["reduction"]
    assert (reduction["directions"], reduction["directions_of"], reduction["asked"]) == (16, 384, "auto")
    assert (reduction["inputs"], reduction["inputs_of"]) == (64, 128) and reduction["refused"] == {}
    assert reduction["gate"]["images"] == 10 and len(reduction["gate"]["auroc"]) == 2
    # 2 * 56^2 * (512 * 16 + 256 * 16 + 64 * 9) * 368 multiplications and additions fewer, and
    # 2 * 2 * (123^2 * 16 * 64 * 256 - 126^2 * 128 * 64)
    assert manifest.model["gflop_per_image"] == pytest.approx(75.9 - 29.7 - 15.3, abs=0.2)
    assert len(bundle.model_bytes()) < 0.6 * len(whole.model_bytes())
    # calibrated with its own maps, on the same validation images
    assert manifest.calibration.values != whole.manifest.calibration.values
    assert manifest.threshold.good_images == whole.manifest.threshold.good_images
    assert main(["inspect", str(reduced_bundle)]) == 0
    shown = capsys.readouterr().out
    assert "reduction" in shown and (
        "16 of 384 directions, conv-2 reads 64 of 128 channels (asked for: auto); 10 images" in shown
    )


def test_all_directions_change_no_verdict_number(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reduce, "PICTURES", 2)
    monkeypatch.setattr(reduce, "TRAINING_IMAGES", 2)
    path = tmp_path / "x.edgead"
    export_run(trained_run, path, reduce="384")
    manifest, record = Bundle.open(path).manifest, json.loads((trained_run / "run.json").read_text())
    gate = manifest.model["reduction"]["gate"]
    assert gate["score_deviation"] < 1e-4 and gate["flips"] == []
    assert gate["auroc"][0] == pytest.approx(gate["auroc"][1], abs=1e-6)
    assert gate["kept"]["local"] == pytest.approx([1, 1], abs=1e-4)
    assert manifest.threshold.value == pytest.approx(record["threshold"]["value"], rel=1e-4)
    assert list(manifest.calibration.values) == pytest.approx(record["calibration"]["values"], rel=1e-4)


def test_a_gate_that_fails(
    trained_run: Path, trained_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by number it is an error; auto exports all directions and says what it tried."""
    monkeypatch.setattr(reduce, "PICTURES", 2)
    monkeypatch.setattr(reduce, "TRAINING_IMAGES", 2)
    monkeypatch.setattr(reduce_gate, "DEVIATION", 1e-9)
    monkeypatch.setattr(reduce, "SIZES", (32,))
    monkeypatch.setattr(reduce, "SHARES", (0.5, 0.25))  # nothing passes with a half: no quarter
    path = tmp_path / "x.edgead"
    with pytest.raises(ExportError, match="--reduce 32 fails its gate on this run: a score moves by"):
        export_run(trained_run, path, reduce="32")
    assert not path.exists()
    export_run(trained_run, path, reduce="auto")
    bundle, whole = Bundle.open(path), Bundle.open(trained_bundle)
    assert bundle.model_bytes() == whole.model_bytes()
    assert bundle.manifest.calibration == whole.manifest.calibration
    reduction = bundle.manifest.model["reduction"]
    assert (reduction["directions"], reduction["inputs"]) == (384, 128) and "gate" not in reduction
    tried = (32, 64), (32, 128), (384, 64)
    assert set(reduction["refused"]) == {f"{k} directions, {n} inputs of conv-2" for k, n in tried}


def test_what_breaks_the_gate() -> None:
    near, far = Flip("near.png", 0.009, -0.002), Flip("far.png", -0.3, 0.001)
    gate = Gate(64, 128, 9, 1.0, 0.04, 0.01, (0.99, 0.9885), {}, {}, (near,))
    assert gate.failures == []
    assert ["far.png" in failure for failure in replace(gate, flips=(near, far)).failures] == [True]
    assert len(replace(gate, score_deviation=float("nan")).failures) == 1
    assert "falls from 0.9900 to 0.9870" in replace(gate, auroc=(0.99, 0.987)).failures[0]
    assert replace(gate, auroc=None).failures == []


def test_what_may_be_asked_for() -> None:
    model = random_model("s", 64)
    assert sizes_for("off", model) == () and sizes_for("33", model) == ((33, 128),)
    tried = [(k, n) for n in (128, 96, 64, 48, 32) for k in (16, 32, 48, 64)]
    tried.remove((64, 128))  # the whole run
    assert list(sizes_for("auto", model)) == tried
    for wrong in ("1", "65", "few", "-4", ""):
        with pytest.raises(ExportError, match=r"expected auto, off, or a number .* from 2 to 64"):
            sizes_for(wrong, model)
