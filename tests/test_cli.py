"""Every command as a user calls it, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgead import cli, runtime
from edgead.cli import main
from edgead.image import list_images, read_image


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_export_inspect_predict_evaluate(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    demo_images: Path,
    natural_images: Path,
    random_teacher: Path,
) -> None:
    folder, bundle = tmp_path / "run", tmp_path / "tray.edgead"
    status, out, _ = run(
        capsys, "train", demo_images, "--teacher", random_teacher, "--penalty", natural_images,
        "--out", folder, "--steps", 2, "--seed", 1, "--false-reject", 0.05,
    )  # fmt: skip
    assert status == 0 and "2 steps in" in out and "asked for was 5.00%" in out
    status, out, _ = run(capsys, "export", folder, "--out", bundle, "--name", "trays")
    assert status == 0 and "10 images" in out and "0 verdict flips" in out

    status, out, _ = run(capsys, "inspect", bundle)
    assert status == 0 and "trays, efficientad-s, fp32" in out and "19 Conv" in out and "checked" in out
    assert max(map(len, out.splitlines())) < 250 and "… (--json shows all)" in out
    status, out, _ = run(capsys, "inspect", bundle, "--json")
    assert json.loads(out)["threshold"]["target_false_reject_rate"] == 0.05

    status, out, _ = run(capsys, "verify", bundle, "--backend", "onnxruntime")
    assert status == 0 and "same verdicts as the reference" in out

    assert run(capsys, "set-threshold", bundle, 0.75)[0] == 0
    for ending in (
        "a threshold set by hand, 0.75: give it that again, if it still holds\n",
        "verdict flips\n",
    ):
        status, out, _ = run(capsys, "export", folder, "--out", bundle, "--name", "trays")
        assert status == 0 and out.endswith(ending)

    test_images = list_images(demo_images / "test")
    heatmaps = tmp_path / "heat"
    status, out, _ = run(
        capsys, "predict", bundle, demo_images / "test", "--json", "--heatmaps", heatmaps,
        "--backend", "onnxruntime",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [row["path"] for row in rows] == [str(path) for path in test_images]
    names = {"path", "score", "relative_score", "is_anomalous", "threshold", "elapsed_ms"}
    assert all(set(row) == names for row in rows)
    assert all(row["relative_score"] == row["score"] / row["threshold"] for row in rows)
    assert all(row["is_anomalous"] == (row["score"] >= row["threshold"]) for row in rows)
    pictures = list_images(heatmaps)
    assert len(pictures) == len(rows)
    assert read_image(pictures[0]).shape == read_image(test_images[0]).shape

    record, page = tmp_path / "e.json", tmp_path / "e.html"
    status, out, _ = run(
        capsys, "evaluate", bundle, demo_images, "--json", record, "--html", page,
        "--backend", "onnxruntime",
    )  # fmt: skip
    evaluation = json.loads(record.read_text())
    required = "method backend precision images image_auroc pixel_auroc au_pro_30 au_pro_05 threshold"
    required += " false_reject_rate missed_defect_rate per_defect latency_ms machine"
    assert status == 0 and set(required.split()) <= set(evaluation)
    assert {"p50", "p90", "p99", "max"} <= set(evaluation["latency_ms"])
    assert evaluation["images"] == 9 and evaluation["backend"] == "onnxruntime"
    assert "image AUROC" in out and "<html" in page.read_text()[:200].lower()

    status, out, _ = run(capsys, "set-threshold", bundle, 0.75)
    assert status == 0 and "-> 0.75" in out
    status, out, _ = run(capsys, "predict", bundle, test_images[0], "--json")
    assert json.loads(out)["threshold"] == 0.75


def test_predict_goes_on_after_a_bad_file_and_fails_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained_bundle: Path, demo_images: Path
) -> None:
    bad, good = tmp_path / "bad.png", list_images(demo_images)[0]
    bad.write_bytes(b"not a picture")
    status, out, err = run(capsys, "predict", trained_bundle, bad, good, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and "bad.png" in rows[0]["error"] and rows[1]["path"] == str(good)
    assert "1 of 2 images could not be inspected" in err
    status, out, _ = run(capsys, "predict", trained_bundle, bad, good)
    assert out.splitlines()[0].startswith("ERROR") and out.splitlines()[1][:2] in ("OK", "NG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing.edgead"], "nothing.edgead: cannot be read"),
        (["predict", "BUNDLE", "EMPTY"], "no images in this folder or below it"),
        (["evaluate", "BUNDLE", "EMPTY"], "EMPTY"),
        (["train", "EMPTY", "--out", "run"], "EMPTY"),
        (["export", "EMPTY", "--out", "x.edgead"], "is no training run"),
        (["set-threshold", "BUNDLE", "nan"], "threshold"),
        (
            ["distill", "EMPTY", "--backbone", "none.safetensors", "--out", "t.safetensors"],
            "holds 0 images",
        ),
        (["distill", "EMPTY", "--backbone", "b", "--out", "t", "--steps", "0"], "at least 1"),
        (["demo", "--only-data", "EMPTY/.."], "not an empty folder"),
        (["export", "EMPTY", "--out", "EMPTY"], "EMPTY is a folder; name a file"),
        (["evaluate", "BUNDLE", "EMPTY", "--json", "BUNDLE/x.json"], "its folder cannot be made"),
        (["evaluate", "BUNDLE", "EMPTY", "--html", "EMPTY"], "EMPTY is a folder; name a file"),
        (["recalibrate", "BUNDLE", "--undo", "--false-reject", "0.1"], "for a new calibration"),
        (["recalibrate", "BUNDLE", "--undo", "--out", "EMPTY"], "EMPTY is a folder; name a file"),
        (["train", "EMPTY", "--out", "run", "--minutes", "nan"], "more than 0 minutes"),
        (["train", "EMPTY", "--out", "run", "--learning-rate", "-1"], "a number above 0 is needed"),
    ],
)
def test_errors_are_one_line_and_say_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained_bundle: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    shutil.copy(trained_bundle, tmp_path / "BUNDLE")
    before = (tmp_path / "BUNDLE").read_bytes()
    status, _, err = run(capsys, *arguments)
    assert status == 1 and err.startswith(f"edgead {arguments[0]}: error: ") and message in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert (tmp_path / "BUNDLE").read_bytes() == before


def test_names_that_a_terminal_cannot_show(
    tmp_path: Path, trained_bundle: Path, demo_images: Path
) -> None:
    """The images after it get their verdicts."""
    first, *_ = list_images(demo_images)
    strange, usual = tmp_path / "gepr\u00fcft.jpg", tmp_path / "z.jpg"
    for path in (strange, usual):
        shutil.copy(first, path)
    command = [sys.executable, "-m", "edgead", "predict", trained_bundle, strange, usual]
    done = subprocess.run(
        [*map(str, command), "--backend", "onnxruntime"],
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "gepr\\xfcft.jpg" in lines[0] and lines[1].endswith("z.jpg")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="cannot be read"):
        main(["inspect", "nothing.edgead", "--debug"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["export", "run", "--out", "x", "--frame", "900"],
        ["predict"],
        ["train", "d", "--out", "r", "--seed", "-1"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: edgead" in capsys.readouterr().err


def test_missing_extra_is_named(tmp_path: Path) -> None:
    """In a process that cannot import torch, `edgead train` says what to install."""
    script = (
        "import sys; sys.modules['torch'] = None; from edgead.cli import main;"
        " sys.exit(main(['train', '.', '--out', 'r']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert 'needs torch, which is not installed: pip install "edgead[train]"' in done.stderr


def test_evaluate_needs_no_torch(tmp_path: Path, trained_bundle: Path, demo_images: Path) -> None:
    """A device has the core only."""
    script = (
        "import sys; sys.modules['torch'] = None; from edgead.cli import main; "
        "sys.exit(main(['evaluate', *sys.argv[1:], '--backend', 'onnxruntime', '--json', 'e.json']))"
    )
    command = [sys.executable, "-c", script, str(trained_bundle), str(demo_images)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "e.json").read_text())["images"] == 9


def test_a_closed_pipe_is_no_traceback(trained_bundle: Path, demo_images: Path) -> None:
    arguments = ["predict", str(trained_bundle), str(demo_images / "test"), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgead", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("{")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() != 0 and "Traceback" not in err


def test_the_back_ends_to_choose_from_are_all_there_are() -> None:
    """The command line does not import the runtime for them: --help stays quick."""
    assert cli.BACKENDS == runtime.BACKENDS
