"""Evaluation: figures, lists and JSON on a small data set on disk, by a detector with known scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgead import metrics
from edgead.by_size import SizeConfig
from edgead.errors import BackendError, DataError
from edgead.evaluate import Evaluation, evaluate
from edgead.image import write_image
from edgead.manifest import Calibration, InputSpec, Manifest, OutputSpec, Threshold
from edgead.result import Result
from edgead.training.data import open_dataset

HEIGHT_PX, WIDTH_PX = 24, 32
# Brightest grey value of each test image; its score is that value / 255, the threshold is 100 / 255.
TEST_SET = {"good": (20, 40, 120), "scratch": (200, 60), "dent & chip": (220, 240)}


class BrightnessDetector:
    """Score = brightest value of the frame, map = brightest value of 8x8 blocks; both 0..1."""

    backend = "onnxruntime"
    precision = "fp32"

    def __init__(self) -> None:
        self.threshold = 100 / 255
        self.calls = 0
        self.manifest = Manifest(
            method="brightness",
            name="parts",
            precision="fp32",
            input=InputSpec(height=HEIGHT_PX, width=WIDTH_PX),
            outputs={"score": OutputSpec(shape=("N",)), "anomaly_map": OutputSpec(shape=("N", 3, 4))},
            calibration=Calibration(values=(1.0,), names=("scale",), meaning="none"),
            threshold=Threshold(value=100 / 255, basis="chosen for the test"),
            provenance={"seed": 3},
        )

    def __call__(self, frame: np.ndarray) -> Result:
        self.calls += 1
        if frame.shape != (HEIGHT_PX, WIDTH_PX, 3):
            raise DataError(f"frame has shape {frame.shape}")
        blocks = frame.max(axis=2).reshape(HEIGHT_PX // 8, 8, WIDTH_PX // 8, 8).max(axis=(1, 3))
        score = float(blocks.max() / 255)
        anomaly_map = (blocks / 255).astype(np.float32)
        return Result(score, score >= self.threshold, self.threshold, anomaly_map, 0.1)


def make_dataset(root: Path, *, masks: bool = True) -> Path:
    """MVTec layout: dark parts with one bright 8x8 square, which is the defect where there is one."""
    for index in range(12):
        save(root / "train" / "good" / f"{index:03}.png", np.full((HEIGHT_PX, WIDTH_PX, 3), 10))
    for defect, levels in TEST_SET.items():
        for index, level in enumerate(levels):
            picture = np.full((HEIGHT_PX, WIDTH_PX, 3), 10)
            picture[8:16, 16:24] = level
            save(root / "test" / defect / f"{index:03}.png", picture)
            if masks and defect != "good":
                save(root / "ground_truth" / defect / f"{index:03}_mask.png", (picture > 50) * 255)
    return root


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, picture.astype(np.uint8))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "parts")


def run(root: Path) -> Evaluation:
    return evaluate(BrightnessDetector(), open_dataset(root))


def test_figures_are_those_of_the_known_scores(parts: Path) -> None:
    evaluation = run(parts)
    assert (evaluation.images, evaluation.good_images, evaluation.defect_images) == (7, 3, 4)
    assert (evaluation.false_rejects, evaluation.missed_defects) == (1, 1)
    assert evaluation.false_reject_rate == pytest.approx(1 / 3)
    assert evaluation.missed_defect_rate == pytest.approx(1 / 4)
    # Of 12 pairs, one is in the wrong order: the scratch of 60 is below the good image of 120.
    assert evaluation.image_auroc == pytest.approx(11 / 12)
    assert evaluation.per_defect["scratch"] == {
        "images": 2,
        "image_auroc": pytest.approx(5 / 6),
        "missed_defects": 1,
        "missed_defect_rate": 0.5,
    }
    assert evaluation.per_defect["dent & chip"]["image_auroc"] == 1.0
    assert evaluation.f1_max == pytest.approx(8 / 9)  # at 60: four hits and one false reject
    assert evaluation.f1_max_threshold == pytest.approx(60 / 255)
    assert (evaluation.dataset, evaluation.method, evaluation.name) == ("parts", "brightness", "parts")
    assert (evaluation.threshold_basis, evaluation.provenance) == ("chosen for the test", {"seed": 3})
    assert not evaluation.errors
    assert not evaluation.notes


def test_rows_keep_the_order_of_the_data_set(parts: Path) -> None:
    dataset = open_dataset(parts)
    rows = evaluate(BrightnessDetector(), dataset).rows
    expected = [item.path.relative_to(parts).as_posix() for item in dataset.test]
    assert [row.path for row in rows] == expected
    wrong = {row.path for row in rows if not row.is_right}
    assert wrong == {"test/good/002.png", "test/scratch/001.png"}
    scores = {row.path: row.score for row in rows}
    assert scores["test/dent & chip/001.png"] == pytest.approx(240 / 255)


def test_pixel_figures_are_those_of_maps_enlarged_to_the_image(parts: Path) -> None:
    dataset, detector = open_dataset(parts), BrightnessDetector()
    evaluation = evaluate(detector, dataset)
    pixels = metrics.PixelScores()
    for item, anomaly_map in zip(dataset.test, evaluation.maps, strict=True):
        mask = np.zeros((HEIGHT_PX, WIDTH_PX), dtype=bool)
        mask[8:16, 16:24] = item.label == 1
        enlarged = Result(0.0, False, 1.0, anomaly_map, 0.0).map_at(HEIGHT_PX, WIDTH_PX)
        pixels.add(enlarged, mask)
    assert evaluation.regions == 4
    assert 0.5 < evaluation.pixel_auroc == pixels.auroc()
    assert (evaluation.au_pro_30, evaluation.au_pro_05) == (pixels.au_pro(0.3), pixels.au_pro(0.05))


def test_json_has_every_figure_and_no_maps(parts: Path) -> None:
    record = json.loads(run(parts).to_json())
    wanted = {
        *("dataset", "method", "backend", "precision", "images", "image_auroc", "pixel_auroc"),
        *("au_pro_30", "au_pro_05", "f1_max", "threshold", "false_reject_rate", "missed_defect_rate"),
        *("per_defect", "latency_ms", "machine", "rows", "errors", "notes", "by_size"),
    }
    assert wanted <= set(record)
    assert "maps" not in record
    assert set(record["rows"][0]) == {"path", "label", "defect", "score", "is_anomalous", "latency_ms"}
    assert len(record["rows"]) == 7


def test_large_maps_are_kept_as_the_highest_values_of_their_blocks(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgead.evaluate._KEPT_MAP_PX", 4)  # maps have 3 x 4 pixels: blocks of 2 x 2
    whole = run(parts)
    kept = evaluate(BrightnessDetector(), open_dataset(parts), sizes=SizeConfig())
    for large, small in zip(whole.maps, kept.maps, strict=True):
        assert large.shape == (3, 4) and small.shape == (2, 2)
        assert small[0, 1] == large[:2, 2:].max() and small[1, 0] == large[2, :2].max()
    assert kept.au_pro_30 == pytest.approx(whole.au_pro_30)
    assert kept.by_size is not None
    assert [one.path for one in kept.by_size.components if not one.is_found] == ["test/scratch/001.png"]


def test_one_warm_up_call_is_left_out_of_the_latency(parts: Path) -> None:
    detector = BrightnessDetector()
    evaluation = evaluate(detector, open_dataset(parts))
    latency = evaluation.latency_ms
    assert detector.calls == 8
    assert latency["calls"] == 7
    assert "warm-up" in latency["scope"]
    calls_ms = sorted(row.latency_ms for row in evaluation.rows)
    assert latency["p50"] == calls_ms[3]
    assert calls_ms[0] > 0
    assert latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"] == calls_ms[-1]


def test_progress_reports_every_image(parts: Path) -> None:
    seen: list[tuple[int, int]] = []
    dataset = open_dataset(parts)
    evaluate(BrightnessDetector(), dataset, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 7) for done in range(1, 8)]


def test_without_masks_pixel_figures_are_null(tmp_path: Path) -> None:
    evaluation = run(make_dataset(tmp_path / "parts", masks=False))
    record = json.loads(evaluation.to_json())
    assert [record[key] for key in ("pixel_auroc", "au_pro_30", "au_pro_05")] == [None] * 3
    assert record["regions"] == 0
    assert evaluation.image_auroc == pytest.approx(11 / 12)
    assert "4 of 4 defect images have no mask" in evaluation.notes[0]


def test_one_empty_mask_takes_the_pixel_figures_away(parts: Path) -> None:
    save(parts / "ground_truth" / "scratch" / "001_mask.png", np.zeros((HEIGHT_PX, WIDTH_PX, 3)))
    evaluation = run(parts)
    assert math.isnan(evaluation.pixel_auroc)
    assert math.isnan(evaluation.au_pro_30)
    assert "1 of 4 defect images" in evaluation.notes[0]


def test_an_unreadable_image_is_listed_and_the_rest_is_judged(parts: Path) -> None:
    (parts / "test" / "good" / "001.png").write_bytes(b"not a picture")
    evaluation = run(parts)
    assert [error["path"] for error in evaluation.errors] == ["test/good/001.png"]
    assert evaluation.errors[0]["message"].startswith("test/good/001.png: ")
    assert (evaluation.images, evaluation.good_images) == (6, 2)
    assert evaluation.false_reject_rate == 0.5
    assert "1 of 7 test images could not be used" in evaluation.notes[0]
    assert json.loads(evaluation.to_json())["errors"] == evaluation.errors


def test_an_unreadable_mask_costs_only_the_pixel_figures(parts: Path) -> None:
    (parts / "ground_truth" / "scratch" / "000_mask.png").write_bytes(b"not a picture")
    evaluation = run(parts)
    assert [error["path"] for error in evaluation.errors] == ["ground_truth/scratch/000_mask.png"]
    assert evaluation.images == 7
    assert math.isnan(evaluation.au_pro_30)


def test_without_good_images_what_needs_them_is_null_and_explained(parts: Path) -> None:
    for path in (parts / "test" / "good").iterdir():
        path.write_bytes(b"")
    record = json.loads(run(parts).to_json())
    assert record["image_auroc"] is None
    assert record["false_reject_rate"] is None
    assert record["per_defect"]["scratch"]["image_auroc"] is None
    assert record["missed_defect_rate"] == 0.25
    assert any(note.startswith("No good image") for note in record["notes"])


def test_no_usable_image_is_an_error_that_names_the_first_cause(parts: Path) -> None:
    for path in (parts / "test").rglob("*.png"):
        save(path, np.zeros((5, 7, 3)))
    with pytest.raises(DataError, match=r"none of its 7 test images.*first: test/.*frame has shape"):
        run(parts)


def test_a_failing_back_end_ends_the_evaluation(parts: Path) -> None:
    class Broken(BrightnessDetector):
        def __call__(self, frame: np.ndarray) -> Result:
            raise BackendError("device lost")

    with pytest.raises(BackendError, match="device lost"):
        evaluate(Broken(), open_dataset(parts))


def test_a_threshold_set_after_loading_is_used_and_said(parts: Path) -> None:
    detector = BrightnessDetector()
    detector.threshold = 50 / 255
    evaluation = evaluate(detector, open_dataset(parts))
    assert (evaluation.false_rejects, evaluation.missed_defects) == (1, 0)
    assert "set after loading" in evaluation.threshold_basis
