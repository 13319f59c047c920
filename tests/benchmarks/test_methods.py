from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgead.benchmarks.methods import main, of_finch, of_protoad


def test_bundles_in_one_table(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [tmp_path / "first.edgead", tmp_path / "second.edgead"]
    for path in pair:
        shutil.copy(tiny_bundle, path)
    out = tmp_path / "methods.json"
    assert main([*map(str, pair), "--rounds", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["machine"] and set(results["rows"]) == {"first", "second"}
    for row in results["rows"].values():
        assert row["graph, onnxruntime fp32, ms"] > 0 and row["call, onnxruntime fp32, ms"] > 0
        assert row["peak RSS MiB"] > 30 and row["method"] == "tiny-blob"
    assert "| first | tiny-blob |" in capsys.readouterr().out


def test_the_two_forms_of_protoad_agree() -> None:
    """With random weights; cosines in FP32 are right to about 1e-6."""
    result = of_protoad("resnet18", threads=1, rounds=1)
    assert result["largest_difference"] < 1e-5
    assert set(result["timings_ms"]) == {"plain", "split"} and result["times_faster"] > 0


def test_finch_finds_the_groups() -> None:
    """Of 50 groups, far apart: one of the partitions has about these."""
    clusters = of_finch(rounds=1)["clusters"]
    assert any(48 <= count <= 52 for count in clusters) and sorted(clusters, reverse=True) == clusters


def test_wrong_use(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "name bundles, or --protoad" in capsys.readouterr().err
    shutil.copy(tiny_bundle, tmp_path / tiny_bundle.name)
    assert main([str(tiny_bundle), str(tmp_path / tiny_bundle.name)]) == 1
    assert "have the same file name" in capsys.readouterr().err
    assert main([str(tmp_path / "gone.edgead")]) == 1
    capsys.readouterr()
    assert main([str(tiny_bundle), "--rounds", "1", "--out", str(tiny_bundle / "x.json")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("edgead.benchmarks.methods: error: ") and message.count("\n") == 1
