"""One contract for all methods: what `edgead train` makes goes through every command after it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgead.cli import main
from edgead.detector import load
from edgead.engines.cache import entries
from edgead.flavour import Flavour
from edgead.image import list_images, read_image
from edgead.methods import METHODS

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
SMALL = [name for name in METHODS if name != "efficientad-m"]  # M differs from S in its PDNs alone


@pytest.mark.parametrize("method", SMALL)
def test_from_training_to_engines(
    method: str,
    tmp_path: Path,
    demo_images: Path,
    natural_images: Path,
    rtx: Flavour,
    engines: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, bundle, records = tmp_path / "run", tmp_path / "part.edgead", tmp_path / "results.json"
    options = [] if method == "protoad" else ["--steps", "5"]
    if method.startswith("efficientad"):
        options += ["--penalty", str(natural_images)]
    train = ["train", str(demo_images), "--method", method, "--out", str(run), *options]
    assert main(train) == 0, capsys.readouterr().err
    assert main(["export", str(run), "--out", str(bundle)]) == 0, capsys.readouterr().err
    assert main(["verify", str(bundle), "--backend", "onnxruntime"]) == 0
    evaluate = ["evaluate", str(bundle), str(demo_images), "--backend", "onnxruntime"]
    assert main([*evaluate, "--json", str(records)]) == 0
    figures = json.loads(records.read_text(encoding="utf-8"))
    assert figures["method"] == method and 0 <= figures["image_auroc"] <= 1
    assert figures["model"]["gflop_per_image"] > 1 and "pdn_small" in str(figures["model"])

    paths = list_images(demo_images / "test")[:3]
    with load(bundle, backend="onnxruntime") as detector:
        frames = [read_image(path) for path in paths]
        one_by_one = [detector(frame) for frame in frames]
        together = detector.predict_batch(frames)
        height, width = detector.manifest.map_shape
    for single, batched in zip(one_by_one, together, strict=True):
        assert single.anomaly_map.shape == (height, width) and np.ptp(single.anomaly_map) > 0
        assert batched.score == pytest.approx(single.score, rel=1e-4, abs=1e-4)

    capsys.readouterr()
    build = ["build", str(bundle), "--backend", "tensorrt-rtx", "--out", str(tmp_path)]
    assert main([*build, "--target", ",".join(RTX_TARGETS)]) == 0, capsys.readouterr().err
    assert sorted(entry.sidecar.key.target for entry in entries(tmp_path)) == sorted(RTX_TARGETS)
    assert not engines.exists()
