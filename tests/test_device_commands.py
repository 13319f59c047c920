"""`edgead build` and `edgead engines`, as a user calls them, with a GPU (a stand-in) and without."""

from __future__ import annotations

import gc
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgead.bundle import Bundle
from edgead.cli import build_parser, main
from edgead.device_commands import progress_line, table
from edgead.engines.cache import entries
from edgead.engines.prepare import detect_gpu
from tests import fake_tensorrt

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "engines"
    monkeypatch.setenv("EDGEAD_CACHE", str(folder))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], engines: Path) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def bare(run: Run) -> Run:
    """`run` on a machine without a GPU, with the real TensorRT for RTX."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    if detect_gpu()[0] is not None:
        pytest.skip("there is a GPU: this is about machines without")
    return run


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def trt(
    request: pytest.FixtureRequest, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A stand-in for TensorRT whose engines run on the fake driver, on a GPU sm86."""
    module = fake_tensorrt.make(request.param, fake_cuda.library)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    if request.param == "tensorrt-rtx":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    fake_cuda.set_device(name="Fake GPU", major=8, minor=6)
    yield module
    module.engines.clear()
    gc.collect()


def name_of(trt: Any) -> str:
    return str(trt.__name__.replace("_", "-"))


def test_build_without_a_gpu(bare: Run, tiny_bundle: Path, tmp_path: Path, engines: Path) -> None:
    status, out, err = bare("build", tiny_bundle)
    assert (status, out) == (1, "") and "there is no GPU here (" in err
    assert "name the target, such as --backend tensorrt-rtx --target sm86" in err
    status, out, err = bare("build", tiny_bundle, "--target", "sm86,sm120", "--batch", "4,1")
    assert status == 0
    lines = out.splitlines()
    assert all(f"-{sm}-" in line for line, sm in zip(lines, ("sm86", "sm120"), strict=True))
    assert all("MiB, built in" in line and "to be verified when its box" in line for line in lines)
    assert err.splitlines() == ["building: tensorrt-rtx sm86", "building: tensorrt-rtx sm120"]
    assert [entry.sidecar.key.batches for entry in entries(engines)] == [(1, 4), (1, 4)]

    status, out, err = bare("build", tiny_bundle, "--target", "sm86", "--out", tmp_path / "out")
    assert status == 0 and "from the cache, was built in" in out and err == ""
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    name = f"blob-{_graph(tiny_bundle)[:8]}-tensorrt-rtx-sm86"
    assert names == [f"{name}.engine", f"{name}.json"]
    (copied,) = entries(tmp_path / "out")
    assert copied.read_plan() == next(e for e in entries(engines) if "sm86" in e.path.name).read_plan()


def _graph(bundle: Path) -> str:
    return Bundle.open(bundle).manifest.members["model.onnx"].sha256


def test_two_exports_of_one_name_do_not_overwrite_each_other(
    bare: Run, tiny: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    import onnx

    graph = onnx.load_from_string(tiny.model)
    graph.doc_string = "the same run in another precision, say"
    other = tiny.write(tmp_path / "other.edgead", model=graph.SerializeToString())
    out = tmp_path / "out"
    for bundle in (tiny_bundle, other):
        assert bare("build", bundle, "--target", "sm86", "--out", out)[0] == 0
    found = {entry.sidecar.key.graph_sha256 for entry in entries(out)}
    assert found == {_graph(tiny_bundle), _graph(other)} and len(list(out.glob("*.engine"))) == 2


def test_all_targets_are_looked_at_before_the_first_build(
    bare: Run, tiny_bundle: Path, engines: Path
) -> None:
    status, out, err = bare("build", tiny_bundle, "--target", "sm86,sm87")
    assert (status, out) == (1, "") and "sm87" in err
    assert not engines.exists()


def test_a_cache_that_is_no_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for named in ("file", "file/engines"):
        monkeypatch.setenv("EDGEAD_CACHE", str(tmp_path / named))
        for verb in ("list", "prune"):
            status, out, err = run("engines", verb)
            assert (status, out) == (1, "") and f"{tmp_path / named}: Not a directory" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm8x"], "write current, or compute capabilities such as sm86"),
        (["--target", ""], "write current"),
        (["--batch", "1,x"], "write batch sizes such as 1 or 1,4,16"),
        (["--batch", "0"], "write batch sizes"),
        (["--batch", ""], "write batch sizes"),
        (["--backend", "onnxruntime"], "invalid choice"),
        (["--workspace", "much"], "invalid int"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tiny_bundle: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", str(tiny_bundle), *arguments])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_options_reach_the_builder(bare: Run, tiny_bundle: Path, tmp_path: Path, engines: Path) -> None:
    status, _, err = bare(
        "build", tiny_bundle, "--target", "sm86", "--workspace", 64,
        "--timing-cache", tmp_path / "times", "--backend", "tensorrt-rtx",
    )  # fmt: skip
    assert status == 0 and entries(engines)[0].sidecar.key.workspace_mib == 64
    status, _, err = bare("build", tiny_bundle, "--target", "sm86", "--workspace", 0)
    assert status == 1 and "workspace of 0 MiB: expected at least 1" in err
    status, _, err = bare("build", tiny_bundle, "--target", "sm86", "--backend", "tensorrt")
    if importlib.util.find_spec("tensorrt") is None:
        assert status == 1 and "tensorrt is not installed. On a Jetson" in err


def test_build_on_a_gpu_proves_the_engine(run: Run, trt: Any, tiny_bundle: Path, engines: Path) -> None:
    status, out, err = run("build", tiny_bundle, "--batch", "1,2")
    assert status == 0, err
    assert f"{name_of(trt)}-sm86-" in out and "verified on the golden samples" in out
    (entry,) = entries(engines)
    verified = entry.sidecar.verified
    assert verified and verified.gpu == "Fake GPU" and verified.replay["images"] == 4
    assert (trt.builds, trt.engines[-1].runs >= 4) == (1, True)
    status, out, _ = run("build", tiny_bundle, "--target", "current,sm86")
    assert status == 0 and trt.builds == 1 and out.count("from the cache") == 2


def test_build_on_a_gpu_refuses_an_engine_with_other_verdicts(
    run: Run, trt: Any, tiny_bundle: Path, engines: Path
) -> None:
    trt.bias = 1.0
    status, out, err = run("build", tiny_bundle)
    assert (status, out) == (1, "") and "the engine is refused" in err and "2 of 4 verdicts" in err
    assert not engines.exists()


def test_build_on_a_gpu_for_another_one(run: Run, trt: Any, tiny_bundle: Path, engines: Path) -> None:
    status, out, err = run("build", tiny_bundle, "--target", "sm89")
    if name_of(trt) == "tensorrt":
        assert status == 1 and "only for the GPU at hand (Fake GPU, sm86), asked for is sm89" in err
    else:
        assert status == 0 and "to be verified when its box loads it first" in out


def test_list(run: Run, trt: Any, tiny_bundle: Path, engines: Path, fake_cuda: Any) -> None:
    status, out, _ = run("engines", "list")
    assert (status, out) == (0, f"{engines}: 0 engines\n")
    run("build", tiny_bundle, "--batch", "1,4")
    status, out, _ = run("engines", "list")
    first, header, row = out.splitlines()
    assert status == 0 and first == f"{engines}: 1 engine"
    assert header.split() == (
        "bundle graph library target GPU batches size verified age usable-here".split()
    )
    is_classic = name_of(trt) == "tensorrt"
    columns = row.split("  ")
    cells = [cell.strip() for cell in columns if cell.strip()]
    assert cells[0] == "blob" and cells[2:6] == [
        f"{name_of(trt)} {trt.__version__}", "sm86", "Fake GPU" if is_classic else "any", "1,4"
    ]  # fmt: skip
    assert cells[7] == "yes" and cells[9] == "yes"
    fake_cuda.set_device(name="Another GPU", major=8, minor=9)
    row = run("engines", "list")[1].splitlines()[2]
    assert row.endswith("GPU Fake GPU, now Another GPU" if is_classic else "the GPU is sm89")
    next(engines.glob("*.engine")).unlink()
    assert " missing " in run("engines", "list")[1]


def test_prune(run: Run, trt: Any, tiny_bundle: Path, engines: Path, fake_cuda: Any) -> None:
    run("build", tiny_bundle)
    (engines / "blob-00000000-tensorrt-sm86-00000000.engine").write_bytes(b"left by a crash")
    status, out, _ = run("engines", "prune", "--dry-run")
    assert status == 0 and out.splitlines() == [
        "blob-00000000-tensorrt-sm86-00000000.engine: no sidecar names it",
        f"{engines}: 1 file would be deleted",
    ]
    assert run("engines", "prune")[1].endswith(": 1 file deleted\n") and len(entries(engines)) == 1
    fake_cuda.set_device(name="Another GPU", major=8, minor=6)
    out = run("engines", "prune")[1]
    if name_of(trt) == "tensorrt":
        assert "GPU Fake GPU, now Another GPU" in out and entries(engines) == []
    else:
        assert len(entries(engines)) == 1
        assert run("engines", "prune", "--all")[1].count("all are to go") == 2
    assert list(engines.glob("[!.]*")) == []


def test_report_on_a_gpu(run: Run, trt: Any, tiny_bundle: Path) -> None:
    run("build", tiny_bundle)
    status, out, err = run("engines", "report", tiny_bundle)
    assert status == 0, err
    assert "verified at" in out and "4 golden samples, scores differ by up to" in out
    assert "1 layers, 1.0 MiB of device memory per context:" in out and "everything  fake" in out


def test_report_without_a_gpu(bare: Run, tiny_bundle: Path) -> None:
    status, out, _ = bare("engines", "report", tiny_bundle)
    assert status == 0 and "no engine of tensorrt-rtx for" in out
    bare("build", tiny_bundle, "--target", "sm86", "--batch", "1,4")
    status, out, _ = bare("engines", "report", tiny_bundle)
    assert status == 0 and "batches 1,4" in out and "not verified yet" in out
    assert "the kernels of an engine cannot be shown: " in out
    assert "layers of the graph as tensorrt-rtx" in out
    assert any(line.split()[1:3] == ["CONVOLUTION", "FLOAT"] for line in out.splitlines())
    assert "outputs: " in out and " FLOAT" in out


def test_every_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("build", "engines", "engines list", "engines prune", "engines report"):
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args([*words.split(), "-h"])
        assert caught.value.code == 0 and "usage: edgead" in capsys.readouterr().out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_line("tensorrt sm87") as progress:
            for step in range(1000):
                progress("Timing tactics", step, 1000)
        text = stream.getvalue()
        if isinstance(stream, Terminal):
            assert text.startswith("\rbuilding: tensorrt sm87, Timing tactics 0/1000")
            assert text.endswith("\r\033[K") and "\n" not in text  # nothing of it stays
            assert text.count("building") < 100
        else:
            assert text == "building: tensorrt sm87\n"
        with progress_line("from the cache"):
            pass
        assert stream.getvalue() == text


def test_a_table() -> None:
    assert table(["a", "bb"], [["xxx", "y"], ["", "zz"]]) == ["a    bb", "xxx  y", "     zz"]
