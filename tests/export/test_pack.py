"""From a run to a bundle that the runtime takes: contents, variants, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgead
from edgead.errors import ExportError, TrainingError
from edgead.export.pack import export_run
from edgead.image import read_image


def test_manifest_says_what_was_trained_and_proven(trained_run: Path, trained_bundle: Path) -> None:
    manifest = edgead.Bundle.open(trained_bundle).manifest
    record = json.loads((trained_run / "run.json").read_text())
    assert (manifest.method, manifest.name, manifest.precision) == ("efficientad-s", "tray", "fp32")
    assert manifest.threshold.value == record["threshold"]["value"]
    assert list(manifest.calibration.values) == record["calibration"]["values"]
    assert manifest.parity["images"] == 10 and manifest.parity["flips"] == []
    assert manifest.model["parameters"] == 8_057_856 - 384  # one bias less: two convolutions are one
    assert manifest.model["gflop_per_image"] == pytest.approx(75.9, abs=0.1)
    assert manifest.provenance["data"]["fingerprint"] == record["data"]["fingerprint"]
    assert manifest.provenance["data"]["images"] == {"train": 5, "validation": 1, "test": 9}
    assert str(trained_run.parents[1]) not in manifest.to_json()  # no path of the machine it was made on


def test_detector_gives_the_golden_scores(trained_bundle: Path) -> None:
    golden = edgead.Bundle.open(trained_bundle).golden()
    with edgead.load(trained_bundle, backend="onnxruntime") as detector:
        for image, score, cells in zip(golden.images, golden.scores, golden.maps, strict=True):
            result = detector(image)
            assert result.score == pytest.approx(float(score), rel=1e-4)
            np.testing.assert_allclose(result.anomaly_map, cells, atol=1e-4 * float(np.ptp(golden.maps)))


def test_frame_variant_gives_the_scores_of_the_host_resize(
    trained_run: Path, trained_bundle: Path, demo_images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "frame.edgead"
    export_run(trained_run, path, frame=(640, 640))
    frames = [read_image(file) for file in sorted((demo_images / "test").rglob("*.jpg"))[:3]]
    with (
        edgead.load(trained_bundle, backend="onnxruntime") as host,
        edgead.load(path, backend="onnxruntime") as inside,
    ):
        for frame in frames:
            assert inside(frame).score == pytest.approx(host(frame).score, rel=2e-3)
        with pytest.raises(edgead.DataError, match="640"):
            inside(frames[0][:300])


def test_fp16_passes_its_own_gate_and_halves_the_file(
    trained_run: Path, trained_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "half.edgead"
    parity = export_run(trained_run, path, precision="fp16", name="other name")
    assert parity.precision == "fp16" and parity.score_deviation < 1e-2
    assert edgead.Bundle.open(path).manifest.name == "other name"
    half, whole = (len(edgead.Bundle.open(p).model_bytes()) for p in (path, trained_bundle))
    assert half < 0.52 * whole


def test_export_is_repeatable(trained_run: Path, trained_bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.edgead"
    export_run(trained_run, again)
    a, b = edgead.Bundle.open(trained_bundle), edgead.Bundle.open(again)
    assert a.manifest.members == b.manifest.members  # the same checksums, the graph's among them


def test_refusals_leave_no_file(trained_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.edgead"
    with pytest.raises(ExportError, match="'int8' is unknown; choose one of fp32, fp16"):
        export_run(trained_run, out, precision="int8")
    with pytest.raises(ExportError, match="frame 100x640: it has to lie between 256x256"):
        export_run(trained_run, out, frame=(100, 640))
    with pytest.raises(TrainingError, match="is no training run"):
        export_run(tmp_path, out)
    moved = tmp_path / "run"
    shutil.copytree(trained_run, moved)
    record = json.loads((moved / "run.json").read_text())
    record["data"]["root"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(record))
    with pytest.raises(ExportError, match="10 of the run's 10 images are gone"):
        export_run(moved, out)
    assert not out.exists()


def test_test_images_that_are_gone_or_damaged_are_left_out(
    trained_run: Path, demo_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training does not read them: one of them must not make the run useless."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(trained_run, run)
    shutil.copytree(demo_images, data)
    record = json.loads((run / "run.json").read_text())
    record["data"]["root"] = str(data)
    (run / "run.json").write_text(json.dumps(record))
    (data / record["data"]["test"][3]).unlink()
    damaged = data / record["data"]["test"][4]
    damaged.write_bytes(damaged.read_bytes()[:3000])
    assert export_run(run, tmp_path / "x.edgead").images == 8
    assert "2 of the run's 10 images are gone or damaged, the first: " in caplog.text
    assert "goes without" in caplog.text
    (data / record["data"]["validation"][0]).unlink()
    with pytest.raises(ExportError, match="3 of the run's 10 images are gone"):
        export_run(run, tmp_path / "y.edgead")
