from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgead.bundle import Bundle, set_threshold
from edgead.calibration import choose_threshold
from edgead.cli import main
from edgead.detector import load
from edgead.errors import BundleError, DataError, TrainingError
from edgead.image import list_images, read_image
from edgead.recalibrate import HISTORY, recalibrate, undo


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Twenty noisy grey pictures, as a darker lamp gives them."""
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(20):
        rng = np.random.default_rng(index)
        picture = rng.integers(40, 90, (48, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index:02}.png"), picture)
    return folder


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Path:
    return Path(shutil.copy(tiny_bundle, tmp_path / "part.edgead"))


def test_scale_and_threshold_are_those_of_the_definition(bundle: Path, good: Path) -> None:
    """Recomputed here: the 0.9 quantile of good pixels is 0, the 0.995 quantile 0.1, per raw map."""
    result = recalibrate(bundle, list_images(good), backend="onnxruntime", false_reject=0.1)
    frames = [read_image(path) for path in list_images(good)]
    manifest = Bundle.open(bundle).manifest
    with load(bundle, backend="onnxruntime") as detector:
        answers = [detector(frame) for frame in frames]
        total = np.zeros_like(np.stack([answer.anomaly_map for answer in answers]))
        for index in range(2):
            detector._judge.calibration = np.eye(3, dtype=np.float32)[index]
            raw = np.stack([detector(frame).anomaly_map for frame in frames])
            low, high = np.quantile(raw.astype(np.float64), [0.9, 0.995])
            total += 0.05 * (raw - low) / (high - low)
    np.testing.assert_allclose([a.anomaly_map for a in answers], total, rtol=1e-4, atol=1e-5)
    scores = np.array([answer.score for answer in answers])
    expected = choose_threshold(scores, false_reject=0.1)
    assert manifest.threshold.value == pytest.approx(expected.value, rel=1e-5) == result.after
    assert (scores >= manifest.threshold.value).sum() == 2  # a tenth of twenty
    assert manifest.threshold.basis.startswith("recalibrated: order statistic")
    assert manifest.threshold.good_images == result.images == 20


def test_the_graph_stays_and_golden_samples_answer_anew(bundle: Path, good: Path) -> None:
    before = Bundle.open(bundle)
    recalibrate(bundle, list_images(good), backend="onnxruntime")
    after = Bundle.open(bundle)
    assert after.model_bytes() == before.model_bytes()  # so an engine of it stays valid
    assert not np.array_equal(after.golden().scores, before.golden().scores)
    assert np.array_equal(after.golden().images, before.golden().images)
    assert main(["verify", str(bundle), "--backend", "onnxruntime"]) == 0


def test_an_odd_image_is_named(bundle: Path, good: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in list_images(good):
        cv2.imwrite(str(path), read_image(path) // 8)
    cv2.imwrite(str(good / "odd.png"), np.full((48, 40, 3), 255, np.uint8))
    recalibrate(bundle, list_images(good), backend="onnxruntime")
    assert "odd.png: the anomaly map of this good image" in caplog.text
    assert len(caplog.records) == 1


def test_undo_brings_back_what_was_before_step_by_step(bundle: Path, good: Path) -> None:
    states = [Bundle.open(bundle).manifest]
    for rate in (0.2, 0.05):
        recalibrate(bundle, list_images(good), backend="onnxruntime", false_reject=rate)
        states.append(Bundle.open(bundle).manifest)
    assert len(states[-1].provenance[HISTORY]) == 2
    for expected in (states[1], states[0]):
        undo(bundle)
        manifest = Bundle.open(bundle).manifest
        assert manifest.calibration == expected.calibration
        assert manifest.threshold == expected.threshold
        assert main(["verify", str(bundle), "--backend", "onnxruntime"]) == 0
    with pytest.raises(BundleError, match="was never recalibrated"):
        undo(bundle)


def test_what_happened_meanwhile_is_not_undone(bundle: Path, good: Path) -> None:
    """The passes take minutes: another command may give the bundle a threshold, or an export a graph."""

    def changed(done: int, total: int) -> None:
        if done == 3:
            set_threshold(bundle, 0.123)

    with pytest.raises(BundleError, match="another command changed it meanwhile; run this one again"):
        recalibrate(bundle, list_images(good), backend="onnxruntime", progress=changed)
    manifest = Bundle.open(bundle).manifest
    assert manifest.threshold.value == 0.123 and HISTORY not in manifest.provenance
    other = bundle.with_name("other.edgead")  # takes nothing away
    recalibrate(bundle, list_images(good), out=other, backend="onnxruntime", progress=changed)
    assert HISTORY in Bundle.open(other).manifest.provenance


def test_fields_of_a_newer_minor_stay(
    good: Path, tmp_path: Path, rewrite_manifest: Callable[..., Path]
) -> None:
    def newer(data: dict[str, Any]) -> None:
        data |= {"format": [1, 1], "lens": "f8"}
        for part in (data["input"], data["threshold"], data["members"]["model.onnx"]):
            part["more"] = 7

    path = rewrite_manifest(tmp_path / "part.edgead", newer)
    recalibrate(path, list_images(good), backend="onnxruntime")
    undo(path)
    with zipfile.ZipFile(path) as file:
        data = json.loads(file.read("manifest.json"))
    assert (data["format"], data["lens"], data["input"]["more"]) == ([1, 1], "f8", 7)
    assert data["threshold"]["more"] == data["members"]["model.onnx"]["more"] == 7
    assert Bundle.open(path).manifest.format == (1, 1)


def test_command(bundle: Path, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bundle.read_bytes()
    out = tmp_path / "new.edgead"
    command = ["recalibrate", str(bundle), "--backend", "onnxruntime"]
    assert main([*command, "--good", str(good), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "calibrated on 20 good images" in printed and "support a false-reject rate" in printed
    assert bundle.read_bytes() == content and Bundle.open(out).manifest.threshold.good_images == 20
    recalibrated, old = out.read_bytes(), tmp_path / "old.edgead"
    assert main(["recalibrate", str(out), "--undo", "--out", str(old)]) == 0
    assert out.read_bytes() == recalibrated
    assert str(old) in capsys.readouterr().out
    assert Bundle.open(old).manifest.threshold == Bundle.open(bundle).manifest.threshold
    assert main(["recalibrate", str(out), "--undo"]) == 0
    assert Bundle.open(out).manifest.threshold == Bundle.open(bundle).manifest.threshold


def test_inspect_says_which_calibration_the_gate_of_the_export_saw(
    good: Path,
    tmp_path: Path,
    rewrite_manifest: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    parity = {"images": 9, "score_deviation": 1e-7, "flips": []}
    path = rewrite_manifest(tmp_path / "part.edgead", lambda data: data.update(parity=parity))
    assert main(["inspect", str(path)]) == 0
    assert "  at export: 9 images" in capsys.readouterr().out
    recalibrate(path, list_images(good), backend="onnxruntime")
    assert main(["inspect", str(path)]) == 0
    assert "  at export, before it was recalibrated: 9 images" in capsys.readouterr().out


@pytest.mark.parametrize("rate", [0.0, -0.5, 0.5])
def test_a_rate_out_of_range_is_told_of_before_the_images_are_read(
    bundle: Path, good: Path, rate: float
) -> None:
    (good / "00.png").write_bytes(b"not a picture")
    with pytest.raises(TrainingError, match=f"--false-reject {rate} is out of range"):
        recalibrate(bundle, list_images(good), backend="onnxruntime", false_reject=rate)


@pytest.mark.parametrize("damage", ["nothing there", "no image"])
def test_bad_input_leaves_the_bundle_alone(bundle: Path, good: Path, damage: str) -> None:
    content = bundle.read_bytes()
    paths = []
    if damage == "no image":
        (good / "05.png").write_bytes(b"not a picture")
        paths = list_images(good)
    with pytest.raises(DataError, match="needs images of good parts" if not paths else "05.png"):
        recalibrate(bundle, paths, backend="onnxruntime")
    assert bundle.read_bytes() == content
