"""The benchmark of training steps. Peers are not installed here: one is written that has their form."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgead.benchmarks import train_memory, train_step
from edgead.benchmarks.train_step_peer import WARM_UP, name_of
from edgead.errors import DataError

PEER = """
import argparse, sys, time
from tqdm import tqdm
from common import get_pdn_small

def teacher_normalization(teacher, loader):
    raise AssertionError("takes minutes")

def main():
    parser = argparse.ArgumentParser()
    for option in ("dataset", "subdataset", "output_dir", "weights"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--imagenet_train_path", required=True)
    parser.add_argument("--mvtec_ad_path", required=True)
    config = parser.parse_args()
    assert (teacher_normalization(None, None)[0] == 0).all()
    bar = tqdm(range(70_000))
    for step, _ in zip(bar, range(70_000)):
        time.sleep(0.02 if step else 0.5)
        bar.set_description("loss")
"""
COMMON = """
import torch
def get_pdn_small(channels):
    return torch.nn.Conv2d(3, channels, 1)
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    folder = tmp_path / "EfficientAD"
    folder.mkdir()
    (folder / "efficientad.py").write_text(PEER)
    (folder / "common.py").write_text(COMMON)
    return folder


def test_all_loops_and_a_peer_take_turns(peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    monkeypatch.setattr(train_step, "WARM_UP", 1)
    seconds, versions = train_step.measure(1, torch.device("cpu"), (peer,), steps=1)
    assert set(seconds) == {*train_step.LOOPS, "nelson1425"} and set(versions) == {"nelson1425"}
    assert all(len(values) == 1 and min(values) > 0 for values in seconds.values())
    assert 0.02 <= min(seconds["nelson1425"])
    assert max(seconds["nelson1425"]) < 0.5, f"the first {WARM_UP} steps do not count"


def test_a_folder_that_holds_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="expected a folder with efficientad.py"):
        name_of(tmp_path)
    (tmp_path / "anomalib").mkdir()
    assert name_of(tmp_path) == "anomalib"


def test_memory_of_a_small_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train_memory", "--images", "3", "--steps", "1"])
    train_memory.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["images"] == 3 and 200 < record["host_peak_mib"] < 10_000


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    """As train_step starts it, which has allocated more."""
    measured = "from edgead.benchmarks.train_memory import _host_peak_mib as p; print(p())"
    parent = (
        "import subprocess, sys\n"
        "held = b'x' * (2 << 30)\n"
        f"subprocess.run([sys.executable, '-c', {measured!r}], check=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True, timeout=120
    )
    assert 50 < int(ended.stdout) < 1500


def test_a_peer_that_fails_loses_nothing_else(
    peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (peer / "efficientad.py").write_text("raise RuntimeError('no such GPU')")
    monkeypatch.setattr(train_step, "WARM_UP", 1)
    ours = train_step.loops(torch.device("cpu"))["edgead_muon"]
    monkeypatch.setattr(train_step, "loops", lambda device: {"edgead_muon": ours})
    monkeypatch.setattr(train_step, "measure", functools.partial(train_step.measure, steps=1))
    out = tmp_path / "steps.json"
    arguments = [
        "train_step",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--peer",
        str(peer),
        "--out",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert train_step.main() == 1
    assert set(json.loads(out.read_text())["median_s"]) == {"edgead_muon"}
    assert "no such GPU" in capfd.readouterr().err
