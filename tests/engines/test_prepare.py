"""The engine of a bundle: taken, built, verified, kept. Never one that does not fit, never none."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgead.bundle import Bundle
from edgead.cli import main
from edgead.engines import cache, prepare
from edgead.engines.prepare import Box, accept, choose_flavour, keep, prepare_engine
from edgead.errors import EngineError
from edgead.flavour import Flavour
from edgead.runtime.cuda import GpuInfo
from tests.fake_tensorrt import make

REPLAY = {
    "images": 4,
    "score_deviation": 0.001,
    "relative_score_deviation": math.inf,
    "flips": (),
    "threshold": 0.4,  # as the tiny bundle has it
    "calibration": (2.0, 1.0, -0.05),
}


@pytest.fixture
def classic() -> Flavour:
    """A stand-in: the libraries of classic TensorRT are not to be had without a GPU's installation."""
    return Flavour("tensorrt", make("tensorrt", None, version="10.3.0"), "10.3.0")


@pytest.fixture
def orin() -> GpuInfo:
    return GpuInfo("Orin", (8, 7), "12.6", 16 << 30, is_integrated=True)


def test_built_accepted_and_taken(
    tiny_opened: Bundle, rtx: Flavour, gpu: GpuInfo, engines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare_engine(tiny_opened, rtx, gpu)
    assert first.is_new and not first.verified and first.path is None and len(first.plan) > 1000
    assert first.key.target == "sm86" and first.key.batches == (1,)
    assert (first.key.gpu, first.key.driver) == (None, None)
    assert not engines.exists()  # nothing is kept before it is accepted
    path = accept(first, REPLAY)
    assert path and path.read_bytes() == first.plan and path.parent == engines

    second = prepare_engine(tiny_opened, rtx, gpu)
    assert not second.is_new and second.verified and second.path == path
    assert second.plan == first.plan and second.reason == "from the cache"
    (entry,) = cache.entries(engines)
    verified = entry.sidecar.verified
    assert verified and (verified.gpu, verified.driver) == (gpu.name, gpu.driver)
    assert verified.replay == {
        **REPLAY,
        "relative_score_deviation": "inf",
        "flips": [],
        "calibration": [2.0, 1.0, -0.05],
    }
    assert caplog.text == ""


def test_an_engine_that_was_not_accepted_is_not_kept(
    tiny_opened: Bundle, rtx: Flavour, gpu: GpuInfo, engines: Path
) -> None:
    accepted = prepare_engine(tiny_opened, rtx, gpu)
    accept(accepted, REPLAY)
    refused = prepare_engine(tiny_opened, rtx, gpu, batches=(2,))
    assert refused.is_new and refused.key.batches == (2,)
    again = prepare_engine(tiny_opened, rtx, gpu)
    assert again.plan == accepted.plan and again.verified


def test_built_ahead_of_time_and_verified_on_first_use(
    tiny_opened: Bundle, rtx: Flavour, gpu: GpuInfo, engines: Path
) -> None:
    built = prepare_engine(tiny_opened, rtx, None, target="sm86", batches=(1, 4))
    keep(built)
    loaded = prepare_engine(tiny_opened, rtx, gpu)
    assert not loaded.is_new and not loaded.verified and loaded.plan == built.plan
    assert loaded.key.batches == (1, 4)  # nobody asked for others
    accept(loaded, REPLAY)
    assert prepare_engine(tiny_opened, rtx, gpu).verified
    # Kernels are made by the driver of the box: another one has to prove itself again.
    other = dataclasses.replace(gpu, driver="13.0")
    assert not prepare_engine(tiny_opened, rtx, other).verified
    assert not prepare_engine(tiny_opened, rtx, None, target="sm86").verified
    assert len(cache.entries(engines)) == 1


def test_another_threshold_or_calibration_has_to_be_proven_anew(
    tiny: Any, tiny_opened: Bundle, rtx: Flavour, gpu: GpuInfo, engines: Path, tmp_path: Path
) -> None:
    accept(prepare_engine(tiny_opened, rtx, gpu), REPLAY)
    threshold = dataclasses.replace(tiny.manifest.threshold, value=0.5)
    calibration = dataclasses.replace(tiny.manifest.calibration, values=(2.0, 1.0, -0.04))
    for change, figures in (
        ({"threshold": threshold}, {"threshold": 0.5}),
        ({"calibration": calibration}, {"calibration": (2.0, 1.0, -0.04)}),
    ):
        other = Bundle.open(tiny.write(tmp_path / "other.edgead", **change))
        found = prepare_engine(other, rtx, gpu)
        assert not found.is_new and not found.verified
        accept(found, {**REPLAY, **figures})
        assert prepare_engine(other, rtx, gpu).verified
        assert not prepare_engine(tiny_opened, rtx, gpu).verified
    # What edgead wrote before these figures were kept.
    accept(prepare_engine(tiny_opened, rtx, gpu), {"images": 4})
    assert not prepare_engine(tiny_opened, rtx, gpu).verified


def test_an_engine_copied_from_another_machine(
    tiny_opened: Bundle, rtx: Flavour, gpu: GpuInfo, engines: Path, tmp_path: Path
) -> None:
    built = prepare_engine(tiny_opened, rtx, None, target="sm86", folder=tmp_path / "there")
    path = keep(built, out=tmp_path / "out")
    assert path.name == f"blob-{built.key.graph_sha256[:8]}-tensorrt-rtx-sm86.engine"
    assert not (tmp_path / "there").exists()
    shutil.copytree(tmp_path / "out", engines)
    found = prepare_engine(tiny_opened, rtx, gpu)
    assert found.plan == built.plan and not found.is_new
    accept(found, REPLAY)
    assert prepare_engine(tiny_opened, rtx, gpu).verified


def test_a_copied_engine_beats_the_box_s_own_that_fits_no_more(
    tiny: Any, rtx: Flavour, gpu: GpuInfo, engines: Path, tmp_path: Path
) -> None:
    """Also under another name: of a bundle whose class of parts is called otherwise there."""
    bundle, there = (
        Bundle.open(tiny.write(tmp_path / f"{name}.edgead", name=name)) for name in ("here", "there")
    )
    old = dataclasses.replace(rtx, version="1.0.1")
    accept(prepare_engine(bundle, old, gpu), REPLAY)
    built = prepare_engine(there, rtx, None, target="sm86", batches=(1, 4), folder=tmp_path / "there")
    keep(built, out=engines)
    found = prepare_engine(bundle, rtx, gpu)
    assert not found.is_new and found.plan == built.plan and found.key.batches == (1, 4)
    # Under its own name it takes the place; what is replaced later leaves nothing behind.
    built = prepare_engine(bundle, rtx, None, target="sm86", batches=(1, 2), folder=tmp_path / "there")
    keep(built, out=engines)
    assert prepare_engine(bundle, rtx, gpu).key.batches == (1, 2)
    assert len(cache.entries(engines)) == 2
    accept(prepare_engine(bundle, rtx, gpu, batches=(8,)), REPLAY)
    assert {path.name for path in engines.glob("here-*.json")} == {
        f"{cache.stem('here', built.key)}.json"
    }
    cache.prune(engines, lambda key: "")
    assert len(list(engines.glob("here-*.engine"))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flavour": {"version": "10.13.3.9"}}, "TensorRT 10.3.0, now 10.13.3.9"),
        ({"gpu": {"name": "Orin Nano"}}, "GPU Orin, now Orin Nano"),
        ({"gpu": {"driver": "12.8"}}, "driver 12.6, now 12.8"),
        ({"platform": "linux-aarch64-l4t36.5.0"}, "platform p, now linux-aarch64-l4t36.5.0"),
        ({"recipe": 99}, "edgead's recipe 1, now 99"),
        ({"options": {"batches": (1, 8)}}, "batches 1,4, now 1,8"),
        ({"options": {"workspace_mib": 512}}, "workspace MiB 256, now 512"),
    ],
)
def test_any_other_key_means_a_new_engine(
    change: dict[str, Any],
    reason: str,
    tiny_opened: Bundle,
    classic: Flavour,
    orin: GpuInfo,
    engines: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(prepare, "this_platform", lambda name: "p")
    old = prepare_engine(tiny_opened, classic, orin, batches=(1, 4), workspace_mib=256)
    accept(old, REPLAY)
    assert prepare_engine(tiny_opened, classic, orin).path and caplog.text == ""

    flavour = dataclasses.replace(classic, **change.get("flavour", {}))
    gpu = dataclasses.replace(orin, **change.get("gpu", {}))
    if "platform" in change:
        monkeypatch.setattr(prepare, "this_platform", lambda name: change["platform"])
    if "recipe" in change:
        real = prepare.EngineKey
        monkeypatch.setattr(prepare, "EngineKey", lambda **k: real(**k, recipe=change["recipe"]))
    options = change.get("options", {})
    new = prepare_engine(tiny_opened, flavour, gpu, **options)
    assert new.is_new and new.reason == f"the one in the cache is for {reason}"
    (line,) = caplog.messages
    assert line.startswith("building the tensorrt engine of") and line.endswith(reason)
    # What nobody asked for stays as it was built before.
    assert new.key.batches == options.get("batches", (1, 4))
    assert new.key.workspace_mib == options.get("workspace_mib", 256)

    (entry,) = cache.entries(engines)
    assert entry.sidecar.sha256 == old.sidecar.sha256  # the old engine is in force until then
    accept(new, REPLAY)
    (entry,) = cache.entries(engines)
    assert entry.sidecar.key == new.key and entry.read_plan() == new.plan
    assert len(list(engines.glob("*.engine"))) == 1


def test_another_graph_is_another_engine(
    tiny_opened: Bundle,
    make_tiny_model: Callable[..., bytes],
    tiny: Any,
    rtx: Flavour,
    gpu: GpuInfo,
    engines: Path,
    tmp_path: Path,
) -> None:
    accept(prepare_engine(tiny_opened, rtx, gpu), REPLAY)
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = onnx.load_from_string(tiny_opened.model_bytes())
    model.doc_string = "the same name, other bytes"
    other = Bundle.open(tiny.write(tmp_path / "b.edgead", model=model.SerializeToString()))
    new = prepare_engine(other, rtx, gpu)
    assert new.is_new and new.reason == "there is none yet"
    accept(new, REPLAY)
    assert len(cache.entries(engines)) == 2
    # The threshold is no part of the graph: another one needs no other engine.
    same = Bundle.open(
        tiny.write(
            tmp_path / "c.edgead", threshold=dataclasses.replace(tiny.manifest.threshold, value=0.3)
        )
    )
    assert not prepare_engine(same, rtx, gpu).is_new


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("flip", "is damaged: its SHA-256 is not the one in its sidecar"),
        ("truncate", "is damaged: it has 10 bytes"),
        ("empty", "is damaged: it has 0 bytes"),
        ("delete", "is missing"),
        ("folder", "cannot be read"),
        ("sidecar", "json is damaged, its content does not match its checksum"),
        ("sidecar text", "json is damaged, it is no JSON text"),
    ],
)
def test_damaged_files_are_set_aside_and_built_again(
    damage: str,
    reason: str,
    tiny_opened: Bundle,
    classic: Flavour,
    orin: GpuInfo,
    engines: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = accept(prepare_engine(tiny_opened, classic, orin), REPLAY)
    assert path
    sidecar = next(engines.glob("*.json"))
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 16]) + content[-4:])
    elif damage in ("truncate", "empty"):
        path.write_bytes(content[: 10 if damage == "truncate" else 0])
    elif damage in ("delete", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        text = sidecar.read_bytes()
        changed = text.replace(b'"sm87"', b'"sm86"') if damage == "sidecar" else text[:40]
        sidecar.write_bytes(changed)
    damaged = {p.name: p.read_bytes() for p in engines.glob("*.*") if p.is_file()}

    prepared = prepare_engine(tiny_opened, classic, orin)
    assert prepared.is_new and reason in prepared.reason
    assert caplog.messages == [
        f"building the tensorrt engine of {tiny_opened.path} for sm87: {prepared.reason}"
    ]
    aside = [p for p in engines.iterdir() if ".corrupt-" in p.name]
    assert len(aside) == (0 if damage in ("delete", "folder") else 1)
    for p in aside:  # nothing is lost
        assert p.read_bytes() == damaged[p.name.split(".corrupt-")[0]]
    if damage == "folder":
        path.rmdir()
    accept(prepared, REPLAY)
    assert prepare_engine(tiny_opened, classic, orin).verified


def test_no_damaged_byte_reaches_tensorrt(
    tiny_opened: Bundle, classic: Flavour, orin: GpuInfo, engines: Path
) -> None:
    path = accept(prepare_engine(tiny_opened, classic, orin), REPLAY)
    assert path
    path.write_bytes(b"evil" + path.read_bytes()[4:])
    assert b"evil" not in prepare_engine(tiny_opened, classic, orin).plan


def test_an_engine_that_tensorrt_refuses_is_replaced(
    tiny_opened: Bundle, classic: Flavour, orin: GpuInfo, engines: Path
) -> None:
    """Its bytes and its key are right: only the caller can know."""
    old = prepare_engine(tiny_opened, classic, orin, batches=(1, 2))
    accept(old, REPLAY)
    new = prepare_engine(tiny_opened, classic, orin, rebuild="TensorRT does not load it")
    assert new.is_new and new.reason == "TensorRT does not load it" and new.key == old.key
    assert not list(engines.glob("*.corrupt-*"))  # the old one may have lacked nothing but memory
    accept(new, REPLAY)
    (aside,) = engines.glob("*.corrupt-*")
    assert aside.read_bytes() == old.plan
    found = prepare_engine(tiny_opened, classic, orin)
    assert not found.is_new and found.plan == new.plan


def test_classic_tensorrt_builds_for_the_gpu_at_hand(
    tiny_opened: Bundle, classic: Flavour, orin: GpuInfo, engines: Path
) -> None:
    built = prepare_engine(tiny_opened, classic, orin, target="sm87")
    assert (built.key.gpu, built.key.driver, built.key.target) == ("Orin", "12.6", "sm87")
    with pytest.raises(EngineError, match=r"only for the GPU at hand \(Orin, sm87\), asked for is sm86"):
        prepare_engine(tiny_opened, classic, orin, target="sm86")
    with pytest.raises(EngineError, match="there is none here.*--backend tensorrt-rtx --target sm86"):
        prepare_engine(tiny_opened, classic, None, target="sm86")


def test_rtx_needs_a_target_or_a_gpu_that_it_knows(
    tiny_opened: Bundle, rtx: Flavour, orin: GpuInfo, engines: Path
) -> None:
    with pytest.raises(EngineError, match="name one with --target, of sm75, sm80, sm86"):
        prepare_engine(tiny_opened, rtx, None)
    with pytest.raises(EngineError, match="does not build for sm87.*use classic TensorRT"):
        prepare_engine(tiny_opened, rtx, orin)
    assert prepare_engine(tiny_opened, rtx, orin, target="sm89").key.target == "sm89"


def test_which_library(
    rtx: Flavour, orin: GpuInfo, classic: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_flavour("auto", None).name == "tensorrt-rtx"
    assert choose_flavour("tensorrt-rtx", orin).name == "tensorrt-rtx"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", classic.module)
        assert choose_flavour("auto", orin).name == "tensorrt"
        assert choose_flavour("auto", None).name == "tensorrt-rtx"
    # A module of None is one that Python refuses to import.
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert choose_flavour("auto", orin).name == "tensorrt-rtx"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"(?s)tensorrt is not installed.*tensorrt-rtx is not inst"):
        choose_flavour("auto", orin)


def test_what_fits_a_box(
    tiny_opened: Bundle, classic: Flavour, orin: GpuInfo, rtx: Flavour, gpu: GpuInfo, engines: Path
) -> None:
    mine = prepare_engine(tiny_opened, classic, orin).key
    versions = {"tensorrt": "10.3.0", "tensorrt-rtx": rtx.version}
    box = Box(orin, "", versions)
    assert box.why_not(mine) == box.why_stale(mine) == ""
    other = dataclasses.replace(mine, driver="12.4", recipe=0)
    expected = "driver 12.4, now 12.6; edgead's recipe 0, now 1"
    assert box.why_not(other) == box.why_stale(other) == expected
    newer = Box(orin, "", {**versions, "tensorrt": "10.13.3.9"})
    assert newer.why_stale(mine) == "TensorRT 10.3.0, now 10.13.3.9"
    bare = Box(None, "no driver", {})
    assert (bare.why_not(mine), bare.why_stale(mine)) == ("tensorrt is not installed", "")
    # An engine for another GPU of the same machine park is of use there, so it is not stale.
    portable = prepare_engine(tiny_opened, rtx, gpu).key
    assert (box.why_not(portable), box.why_stale(portable)) == ("the GPU is sm87", "")
    assert Box(gpu, "", versions).why_not(portable) == ""
    assert Box(None, "no driver", versions).why_not(portable) == "there is no GPU"
    assert set(Box.here().versions) <= {"tensorrt", "tensorrt-rtx"}


LOAD = """
import json, logging, sys
from pathlib import Path
bundle, folder, fsize = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("edgead").addHandler(handler)
import resource, signal
from edgead.bundle import Bundle
from edgead.engines.prepare import accept, prepare_engine
from edgead.flavour import open_flavour
from edgead.runtime.cuda import GpuInfo
gpu = GpuInfo("NVIDIA RTX A2000", (8, 6), "12.8", 6 << 30, False)
opened, flavour = Bundle.open(bundle), open_flavour("tensorrt-rtx")
if fsize:  # as a quota: writing more fails with EFBIG
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
prepared = prepare_engine(opened, flavour, gpu, folder=folder, batches=(1,))
path = accept(prepared, {"images": 4})
from edgead.cli import main
import io, os
os.environ["EDGEAD_CACHE"] = str(folder)
sys.stdout, sys.stderr, out = io.StringIO(), io.StringIO(), sys.stdout
status = main(["build", bundle, "--backend", "tensorrt-rtx", "--target", "sm89"])
files = sorted(p.name for p in folder.iterdir() if p.name != ".lock") if folder.is_dir() else []
result = {"new": prepared.is_new, "plan": len(prepared.plan), "path": str(path), "warnings": warnings,
          "status": status, "error": sys.stderr.getvalue(), "files": files}
print(json.dumps(result), file=out)
"""


def load(bundle: Path, folder: Path, *, mount: str = "", limit_bytes: int = 0) -> dict[str, Any]:
    """Loads (as `open_backend` does) and builds, in a process with file systems of its own."""
    command = [sys.executable, "-c", LOAD, str(bundle), str(folder), str(limit_bytes)]
    if mount:
        shell = f'{mount} && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", shell, str(folder), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def can_mount(folder: Path) -> bool:
    """Whether a process may have mounts of its own here, which go with it."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("kind", ["full disk", "quota", "read-only", "a file in its place"])
def test_a_folder_that_cannot_be_written_costs_a_warning(
    kind: str, tiny_bundle: Path, tiny_opened: Bundle, rtx: Flavour, tmp_path: Path
) -> None:
    """The engine is used from memory; `edgead build`, which has no other purpose, fails."""
    folder, options = tmp_path / "engines", {}
    folder.mkdir()
    size = len(prepare_engine(tiny_opened, rtx, None, target="sm86", folder=folder).plan)
    if kind in ("full disk", "read-only"):
        if not can_mount(folder):
            pytest.skip("this user may not mount a file system in a process of its own (unshare -rm)")
        room = size // 2
        mount = f'mount -t tmpfs -o size={room} tmpfs "$0"'
        if kind == "read-only":
            mount += ' && mount -o remount,ro "$0"'
        options = {"mount": mount}
    elif kind == "quota":
        options = {"limit_bytes": size // 2}
    else:
        folder.rmdir()
        folder.write_text("in the way")
    found = load(tiny_bundle, folder, **options)  # type: ignore[arg-type]
    reasons = {
        "full disk": "No space left on device",
        "quota": "File too large",
        "read-only": "Read-only file system",
        "a file in its place": "File exists",
    }
    assert found["new"] and found["plan"] > 1000 and found["path"] == "None"
    warning = found["warnings"][0]
    assert f"cannot be written to {folder} ({reasons[kind]})" in warning
    assert "used from memory" in warning and "EDGEAD_CACHE" in warning
    assert found["status"] == 1 and reasons[kind] in found["error"] and "--out" in found["error"]
    assert found["files"] == []  # no half of anything


def test_a_valid_engine_is_taken_from_a_read_only_folder(
    tiny_bundle: Path, tiny_opened: Bundle, rtx: Flavour, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    built = prepare_engine(tiny_opened, rtx, None, target="sm86", folder=folder)
    keep(built)
    if not can_mount(folder):
        pytest.skip("this user may not mount a file system in a process of its own (unshare -rm)")
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'
    found = load(tiny_bundle, folder, mount=mount)
    assert not found["new"] and found["plan"] == len(built.plan)
    assert "cannot be written" in found["warnings"][0]
    assert "will have to answer the golden samples again" in found["warnings"][0]
    assert len(found["files"]) == 2


CONCURRENT = """
import hashlib, json, sys
from pathlib import Path
from edgead.bundle import Bundle
from edgead.engines.prepare import accept, keep, prepare_engine
from edgead.flavour import open_flavour
from edgead.runtime.cuda import GpuInfo
gpu = GpuInfo("NVIDIA RTX A2000", (8, 6), "12.8", 6 << 30, False)
bundle, flavour = Bundle.open(sys.argv[1]), open_flavour("tensorrt-rtx")
print("ready", flush=True)
sys.stdin.readline()
prepared = prepare_engine(bundle, flavour, gpu, folder=Path(sys.argv[2]), batches=(1, 4))
path = accept(prepared, {"threshold": 0.4, "calibration": (2.0, 1.0, -0.05)})
print(json.dumps({"new": prepared.is_new, "plan": len(prepared.plan), "path": str(path)}))
"""


def test_processes_that_build_at_once_agree_on_one_engine(
    tiny_bundle: Path, tiny_opened: Bundle, rtx: Flavour, gpu: GpuInfo, tmp_path: Path
) -> None:
    folder = tmp_path / "engines"
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", CONCURRENT, str(tiny_bundle), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for builder in builders:
        assert builder.stdout and builder.stdout.readline() == "ready\n"
    for builder in builders:
        assert builder.stdin
        builder.stdin.write("go\n")
        builder.stdin.flush()
    results = []
    for builder in builders:
        out, errors = builder.communicate(timeout=120)
        assert builder.returncode == 0, errors
        results.append(json.loads(out))
    assert sum(result["new"] for result in results) >= 1
    assert all(result["plan"] > 1000 for result in results)
    found = prepare_engine(tiny_opened, rtx, gpu, folder=folder)
    assert found.verified and found.key.batches == (1, 4)
    assert {result["path"] for result in results} == {str(found.path)}
    assert len([path for path in folder.iterdir() if path.name != ".lock"]) == 2


def test_build_fails_as_a_whole_on_the_command_line(
    tiny_bundle: Path, engines: Path, rtx: Flavour, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny_bundle), "--backend", "tensorrt-rtx", "--target", "sm90"]) == 1
    assert "does not build for sm90" in capsys.readouterr().err and not engines.exists()
