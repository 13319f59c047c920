"""The CPU benchmark runs whole and reports what it claims; no figure is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from edgead.benchmarks import cpu
from edgead.bundle import Bundle


def test_cpu_benchmark(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained_run: Path,
    trained_bundle: Path,
) -> None:
    out = tmp_path / "cpu.json"
    peer = tmp_path / "peer.py"
    peer.write_text('print(\'{"name": "a peer", "p50": 12.5}\')')
    arguments = ["cpu", "--bundle", trained_bundle, "--run", trained_run, "--rounds", 1, "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--peer", f"{sys.executable} {peer}"])
    monkeypatch.setattr(cpu, "start_up", lambda bundle, runs: START_UP(bundle, runs=1))
    cpu.main()
    results = json.loads(out.read_text())
    names = set(results["timings_ms"])
    assert {
        "naive eager torch fp32",
        "graph, onnxruntime fp32",
        "det(frame 900x900), onnxruntime fp32",
    } <= names
    assert all(0 < timing["p50"] <= timing["max"] for timing in results["timings_ms"].values())
    assert results["start_up"]["onnxruntime"]["import_and_load_s"] > 0
    assert "| a peer | 12.5 |" in capsys.readouterr().out


START_UP = cpu.start_up


def test_the_naive_form_of_a_reduced_target_space(tmp_path: Path) -> None:
    """As `edgead train` makes it by itself; its score is that of the reference."""
    model = cpu.random_bundle(tmp_path / "x.edgead", targets=32)
    golden = Bundle.open(tmp_path / "x.edgead").golden()
    image = torch.tensor(golden.images).permute(0, 3, 1, 2)
    assert cpu.naive(model)(image) == pytest.approx(float(golden.scores[0]), rel=1e-3)


@pytest.mark.parametrize("option", ["--bundle", "--run"])
def test_a_bundle_needs_its_run(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu", option, "x"])
    with pytest.raises(SystemExit):
        cpu.main()
    assert "--bundle and --run go together" in capsys.readouterr().err
