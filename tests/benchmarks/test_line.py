from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from edgead.benchmarks.line import main


def test_latency_of_a_stand_in(tiny_bundle: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(4):
        picture = np.random.default_rng(index).integers(60, 180, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(frames / f"{index}.png"), picture)
    command = ["latency", "--bundle", str(tiny_bundle), "--images", str(frames), "--stand-in"]
    command += ["--model-ms", "2", "--seconds", "0.1", "--deadline-ms", "20000"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "line_latency.json").read_text())
    assert results["machine"] and results["model_ms"] >= 2
    assert [(run["cameras"], run["load"]) for run in results["runs"]] == [
        (cameras, load) for cameras in (1, 2, 4) for load in (0.5, 0.8, 0.95, 1.5)
    ]
    for run in results["runs"]:
        assert sum(run[name] for name in ("OK", "NG", "LATE", "ERROR", "NOT_INSPECTED")) == run["parts"]
        assert run["total_ms"]["50"] >= run["infer_ms"]["50"] >= 2
    assert "| 4 | 150% |" in (tmp_path / "line_latency.md").read_text()


def test_promise_and_kills(tmp_path: Path) -> None:
    """Small; the committed results are of a million triggers and of a hundred kills."""
    assert main(["promise", "--parts", "400", "--rate", "300", "--out", str(tmp_path)]) == 0
    promise = json.loads((tmp_path / "line_promise.json").read_text())
    assert promise["parts"] == promise["in_the_sink"] == sum(promise["verdicts"].values()) == 416
    assert main(["kills", "--count", "5", "--out", str(tmp_path)]) == 0
    kills = json.loads((tmp_path / "line_kills.json").read_text())
    assert kills["kills"] >= 2 and kills["missing"] == kills["doubled"] == []
