"""`edgead run` and `edgead simulate` as people and services start them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgead.cli import main
from tests.conftest import Tiny

LINE = """\
[line]
journal = "state"
backend = "onnxruntime"

[[camera]]
name = "top"
deadline_ms = 5000
source = { kind = "folder", path = "frames", SOURCE }

[[camera.recipe]]
bundle = "tiny.edgead"

[[sink]]
kind = "jsonl"
path = "results.jsonl"
"""


@pytest.fixture(autouse=True)
def here_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in this process must not end it."""
    monkeypatch.setattr("edgead.line.run.end", lambda status: status)


@pytest.fixture
def folder(tmp_path: Path, tiny_bundle: Path) -> Path:
    """tiny.edgead, and frames/ with 4 good images in a/ and 4 with a spot in b/."""
    shutil.copy(tiny_bundle, tmp_path / "tiny.edgead")
    for name, spots in (("a", False), ("b", True)):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for index, frame in enumerate(Tiny.frames(4, spots=spots, seed=5)):
            cv2.imwrite(str(tmp_path / "frames" / name / f"{index}.png"), frame[..., ::-1])
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recipe(folder: Path, source: str = "repeat = 1", more: str = "") -> Path:
    path = folder / "line.toml"
    path.write_text(LINE.replace("SOURCE", source) + more)
    return path


@pytest.mark.parametrize("rate", [[], ["--rate", "200"]])
def test_replay_of_a_folder(folder: Path, rate: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    results = folder / "results.jsonl"
    late = folder / "results.late.jsonl"
    for earlier in (results, late):
        earlier.write_text("of an earlier run\n")
    command = ["run", str(folder / "tiny.edgead"), "--source", str(folder / "frames"), *rate]
    assert main([*command, "--sink", str(results), "--deadline-ms", "20000"]) == 0
    assert not late.exists()
    records = lines(results)
    names = [Path(record["source"]).relative_to(folder / "frames").as_posix() for record in records]
    assert names == [f"{name}/{index}.png" for name in "ab" for index in range(4)]
    assert [record["verdict"] for record in records] == ["OK"] * 4 + ["NG"] * 4
    needed = {"part_id", "camera", "verdict", "score", "threshold", "reason", "source", "latency_ms"}
    assert needed <= records[0].keys() and records[0]["latency_ms"].keys() == {"wait", "infer", "total"}
    out = capsys.readouterr().out
    assert out.startswith("8 parts: 4 OK, 4 NG; trigger to verdict p50 ") and str(results) in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny.edgead"], "name a folder of images or a video: --source PATH"),
        (["tiny.edgead", "--source", "gone"], "--source gone: there is no such folder or file"),
        (["tiny.edgead", "--source", ".", "--check"], "--check and --unit go with a recipe file"),
        (["tiny.edgead", "--source", ".", "--sink", "frames"], "--sink frames: is a folder"),
        (["tiny.edgead", "--source", "empty"], "no images in this folder"),
        (["tiny.edgead", "--source", ".", "--rate", "-1"], "rate_hz"),
        (["gone.edgead", "--source", "frames"], "gone.edgead"),
        (["gone.toml"], "gone.toml: No such file"),
        (["line.toml", "--rate", "3"], "--rate goes with a bundle; write it in line.toml instead"),
    ],
)
def test_wrong_use_is_one_clear_line(
    folder: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    recipe(folder)
    assert main(["run", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("edgead run: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(("bundle", "sink"), [("tiny.edgead", "notes.csv"), ("bad.edgead", "r.jsonl")])
def test_earlier_results_stay_if_the_replay_cannot_start(folder: Path, bundle: str, sink: str) -> None:
    (folder / "bad.edgead").write_bytes((folder / "tiny.edgead").read_bytes()[:1000])
    (folder / sink).write_text("of an earlier run\n")
    command = ["run", str(folder / bundle), "--source", str(folder / "frames")]
    assert main([*command, "--sink", str(folder / sink)]) == 1
    assert (folder / sink).read_text() == "of an earlier run\n"


def test_check_opens_everything_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(folder)
    assert main(["run", str(path), "--check"]) == 0
    assert capsys.readouterr().out == f"{path}: good. Cameras: top (folder). Sinks: jsonl.\n"
    results = folder / "results.jsonl"
    assert not results.exists() or not results.read_text()
    assert main(["run", str(path)]) == 0  # nothing is left locked
    assert len(lines(results)) == 8


def test_what_cannot_be_opened_is_said_with_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = recipe(folder, more=f'\n[[sink]]\nkind = "status"\nport = {port}\n')
        assert main(["run", str(path), "--check"]) == 1
    error = capsys.readouterr().err
    assert f"{path}:17: " in error and str(port) in error
    recipe(folder).write_text(LINE.replace('"frames"', '"frames/a/0.png"').replace(", SOURCE", ""))
    assert main(["run", str(path), "--check"]) == 1
    assert f"{path}:8: " in capsys.readouterr().err


def test_unit_for_systemd(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(folder)
    assert main(["run", str(path), "--unit"]) == 0
    unit = capsys.readouterr().out
    assert "Type=notify" in unit and f" run {path}\n" in unit and "WatchdogSec=5" in unit
    assert "\nTimeoutStartSec=infinity\n" in unit  # engines may have to be built
    assert "\nStartLimitIntervalSec=0\n\n[Service]\n" in unit  # in [Unit]: a camera may be there late


def started(folder: Path, path: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edgead", "run", str(path)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(path: Path, count: int) -> None:
    end_s = time.monotonic() + 30
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end_s, "waited for 30 s"
        time.sleep(0.02)


def test_a_service_says_what_systemd_wants_to_hear_and_ends_on_sigterm(folder: Path) -> None:
    path = recipe(folder, "rate_hz = 50, repeat = 0")
    address = folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(30)
        process = started(folder, path, NOTIFY_SOCKET=str(address), WATCHDOG_USEC="400000")
        heard = [manager.recv(100).decode() for _ in range(3)]
        assert heard == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
        wait_for_lines(folder / "results.jsonl", 5)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    records = lines(folder / "results.jsonl")
    ids = [record["part_id"] for record in records]
    assert ids == list(range(1, len(ids) + 1))
    assert out.startswith(f"{len(ids)} parts: ")


def test_a_thread_that_is_still_in_a_library_does_not_abort_the_process(folder: Path) -> None:
    """As one that decodes, or loads a bundle: OpenCV's code in C++ cannot be ended with its thread."""
    program = (
        "import sys, threading, cv2, numpy as np\n"
        "from edgead.cli import main\n"
        "image = np.zeros((700, 700, 3), np.uint8)\n"
        "def blur():\n"
        "    while True: cv2.GaussianBlur(image, (0, 0), 3)\n"
        "threading.Thread(target=blur, daemon=True).start()\n"
        "sys.exit(main(['run', *sys.argv[1:]]))\n"
    )
    path = recipe(folder)
    for arguments, said in (([str(path), "--check"], "good."), ([str(path)], "8 parts: 4 OK, 4 NG; ")):
        command = [sys.executable, "-c", program, *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, "") and said in ended.stdout


def test_the_end_writes_out_what_was_printed_and_keeps_the_status() -> None:
    program = "from edgead.line.run import end\nprint('8 parts')\nend(1)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "8 parts\n")


def test_sighup_takes_over_a_bundle_that_was_replaced(folder: Path, tiny: Tiny) -> None:
    path = recipe(folder, "rate_hz = 50, repeat = 0")
    process = started(folder, path)
    try:
        wait_for_lines(folder / "results.jsonl", 3)
        new = tiny.write(folder / "new.edgead", name="renewed")
        new.replace(folder / "tiny.edgead")
        process.send_signal(signal.SIGHUP)
        end_s = time.monotonic() + 30
        while b'"renewed"' not in (folder / "results.jsonl").read_bytes():
            assert time.monotonic() < end_s, "waited for 30 s"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "took over" in errors
    records = lines(folder / "results.jsonl")
    assert {record["verdict"] for record in records} <= {"OK", "NG"}


def test_simulation_with_kills_gives_each_part_one_verdict(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two cameras; lost, doubled, dark images; failing models and sinks; kills of the process."""
    path = recipe(folder, "rate_hz = 80, repeat = 0")
    second = path.read_text().split("[[camera]]")[1].split("[[sink]]")[0].replace('"top"', '"side"')
    path.write_text(path.read_text() + "\n[[camera]]" + second.replace("5000", "30"))
    faults = folder / "faults.toml"
    faults.write_text(
        '[[fault]]\nkind = "lost"\nname = "top"\nshare = 0.1\n'
        '[[fault]]\nkind = "duplicate"\nname = "side"\nshare = 0.1\n'
        '[[fault]]\nkind = "dark"\nname = "side"\nshare = 0.1\n'
        '[[fault]]\nkind = "jitter"\nms = 5\n'
        '[[fault]]\nkind = "burst"\nfor_s = 1\n'
        '[[fault]]\nkind = "model-error"\nshare = 0.05\n'
        '[[fault]]\nkind = "slow-sink"\nname = "jsonl"\nshare = 0.1\nms = 20\n'
        '[[fault]]\nkind = "dead-sink"\nname = "jsonl"\nat_s = 1\nfor_s = 1\n'
        '[[fault]]\nkind = "kill"\nat_s = 4\nfor_s = 4\n'
    )
    out = folder / "out"
    command = ["simulate", str(path), "--faults", str(faults), "--out", str(out)]
    assert main([*command, "--stand-in", "3", "--for", "10"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["missing"] == report["doubled"] == [] and report["kills"] >= 2
    assert report["parts"] == sum(report["verdicts"].values()) > 20  # it may start slowly
    assert report["verdicts"]["NOT_INSPECTED"] > 0 and report["verdicts"]["OK"] > 0
    text = capsys.readouterr().out
    assert "the image was lost (simulated)" in text and f"{report['kills']} kills" in text
    sinks = lines(folder / "results.jsonl")  # the recipe's own sink, which was dead, slow, and killed
    ids = [record["part_id"] for record in sinks]
    assert sorted(ids) == list(range(1, report["parts"] + 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[fault]]\nkind = "rain"', ":2: fault 1.kind is 'rain'"),
        ('[[fault]]\nkind = "lost"\nname = "left"', ":3: lost of 'left': known are top"),
        ('[[fault]]\nkind = "lost"\nshare = 2', ":3: fault 1: share is 2, expected"),
        ('[[fault]]\nkind = "kill"\nat_s = 1', "say for how many seconds with --for"),
        ("fault = 3", "expected seed = NUMBER"),
        ("sed = 3", ":1: no key 'sed' is known here"),
    ],
)
def test_faults_that_cannot_be(
    folder: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "faults.toml").write_text(text)
    command = ["simulate", str(recipe(folder)), "--faults", str(folder / "faults.toml")]
    assert main([*command, "--out", str(folder / "out")]) == 1
    assert words in capsys.readouterr().err


def test_images_of_other_kinds_are_ignored_and_broken_ones_are_parts(folder: Path) -> None:
    (folder / "frames" / "notes.txt").write_text("hello")
    (folder / "frames" / "a" / "5.png").write_bytes(b"no image")
    cv2.imwrite(str(folder / "frames" / "grey.png"), np.full((80, 70), 99, np.uint8))
    command = ["run", str(folder / "tiny.edgead"), "--source", str(folder / "frames")]
    assert main([*command, "--sink", str(folder / "out.jsonl"), "--deadline-ms", "20000"]) == 0
    records = lines(folder / "out.jsonl")
    assert len(records) == 10
    (broken,) = (record for record in records if record["source"].endswith("5.png"))
    assert broken["verdict"] == "NOT_INSPECTED" and broken["score"] is None
