"""The benchmark of training steps. Peers are not installed here: one is written that has their form."""

from __future__ import annotations

import json
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
    seconds, versions = train_step.measure(1, torch.device("cpu"), (peer,), steps=2)
    assert set(seconds) == {*train_step.LOOPS, "nelson1425"} and set(versions) == {"nelson1425"}
    assert all(len(values) == 2 and min(values) > 0 for values in seconds.values())
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
