"""Real builds with TensorRT for RTX, which needs no GPU for them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgead.bundle import Bundle
from edgead.cli import main
from edgead.engine import Sidecar
from edgead.engines.build import BuildOptions, build_engine, targets
from edgead.engines.cache import Entry, entries
from edgead.errors import EngineError
from edgead.flavour import Flavour
from tests.fake_tensorrt import Config, make

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the engines have up to 90 MiB each."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("size", "precision", "has_frame"),
    [
        ("s", "fp32", False),
        ("s", "fp16", False),
        ("s", "fp16", True),
        ("m", "fp32", False),
        ("m", "fp16", False),
    ],
)
def test_efficientad_builds_for_every_rtx_gpu(
    size: str,
    precision: str,
    has_frame: bool,
    rtx: Flavour,
    efficientad: Callable[[str, str, bool], Path],
    engines: Path,
    ram: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the command line: three profiles for every target, and one."""
    path = efficientad(size, precision, has_frame)
    bundle = Bundle.open(path)
    for wanted, batches in ((TARGETS, (1, 4, 16)), (("sm86",), (1,))):
        status = main(
            ["build", str(path), "--backend", "tensorrt-rtx", "--target", ",".join(wanted),
             "--batch", ",".join(map(str, batches)), "--out", str(ram)]
        )  # fmt: skip
        captured = capsys.readouterr()
        assert status == 0, captured.err
        lines = captured.out.splitlines()
        assert len(lines) == len(wanted) and all("MiB, built in" in line for line in lines)
        found = {entry.sidecar.key.target: entry for entry in entries(ram)}
        assert sorted(found) == sorted(wanted)
        for entry in found.values():
            key, plan = entry.sidecar.key, entry.read_plan()
            assert len(plan) > 0.9 * len(bundle.model_bytes()) and key.batches == batches
            assert key.graph_sha256 == bundle.manifest.members["model.onnx"].sha256
            assert (key.flavour, key.version) == ("tensorrt-rtx", rtx.version)
            assert (key.gpu, key.driver, entry.sidecar.verified) == (None, None, None)
            entry.engine_path.unlink()
            entry.path.unlink()
    assert not engines.exists()


def test_a_second_build_is_from_the_cache(
    rtx: Flavour, tiny_bundle: Path, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(tiny_bundle), "--backend", "tensorrt-rtx", "--target", "sm86,sm89"]
    assert main(command) == 0
    first = capsys.readouterr().out.splitlines()
    files = {path: path.stat().st_mtime_ns for path in engines.glob("*.*")}
    assert main(command) == 0
    second = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in first] == [line.split(":")[0] for line in second]
    assert all("MiB, built in" in line for line in first)
    assert all("from the cache" in line for line in second)
    assert {path: path.stat().st_mtime_ns for path in engines.glob("*.*")} == files


@pytest.fixture
def model(tiny_opened: Bundle) -> bytes:
    return tiny_opened.model_bytes()


def test_the_targets_of_the_library(rtx: Flavour, model: bytes) -> None:
    assert set(TARGETS) <= set(targets(rtx)) and "current" not in targets(rtx)
    for target in ("sm87", "sm90", "sm100", "sm110", "current"):  # Jetson Orin, H100, B200, Jetson Thor
        with pytest.raises(EngineError) as caught:
            build_engine(model, rtx, target=target)
        text = str(caught.value)
        assert f"does not build for {target}, only for {', '.join(targets(rtx))}" in text
        assert "use classic TensorRT on this GPU" in text


def test_several_profiles_are_in_the_engine(rtx: Flavour, model: bytes) -> None:
    one = build_engine(model, rtx, target="sm86")
    three = build_engine(model, rtx, target="sm86", options=BuildOptions((16, 1, 4, 4)))
    assert len(three) > len(one) > 0
    assert BuildOptions((16, 1, 4, 4)).batches == (1, 4, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": ()}, "expected one or more"),
        ({"batches": (0, 4)}, "each at least 1"),
        ({"workspace_mib": 0}, "expected at least 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        BuildOptions(**options)


def graph(*nodes: tuple[str, list[str], list[str], dict[str, Any]]) -> bytes:
    """A graph from image uint8 [N, 64, 64, 3] to y float32, of these nodes."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    make, dtypes = onnx.helper.make_node, onnx.TensorProto
    made = [
        make(kind, inputs, outputs, name=f"my_{kind}", **options)
        for kind, inputs, outputs, options in nodes
    ]
    constants = {"k": [4000], "flat": [0, -1]}
    tensor = onnx.helper.make_tensor_value_info
    content = onnx.helper.make_graph(
        made,
        "refused",
        [tensor("image", dtypes.UINT8, ["N", 64, 64, 3])],
        [tensor("y", dtypes.FLOAT, None)],
        [onnx.helper.make_tensor(name, dtypes.INT64, [len(v)], v) for name, v in constants.items()],
    )
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(content, opset_imports=[opset], ir_version=10)
    found: bytes = model.SerializeToString()
    return found


CAST: tuple[str, list[str], list[str], dict[str, Any]] = ("Cast", ["image"], ["x"], {"to": 1})


@pytest.mark.parametrize(
    ("nodes", "said", "cause"),
    [
        ([CAST, ("NonZero", ["x"], ["y"], {})], "node 1 my_NonZero (NonZero): ", "an operator"),
        ([CAST, ("Unique", ["x"], ["y"], {})], "node 1 my_Unique (Unique): ", "an operator"),
        ([CAST, ("Sparkle", ["x"], ["y"], {"domain": "mine"})], "(Sparkle): ", "an operator"),
        (
            [
                CAST,
                ("Reshape", ["x", "flat"], ["z"], {}),
                ("TopK", ["z", "k"], ["y", "where"], {}),
            ],
            "K exceeds the maximum value allowed (3840)",
            "a TopK of more",
        ),
        (
            [("Transpose", ["image"], ["z"], {"perm": [0, 3, 1, 2]}), ("Cast", ["z"], ["y"], {"to": 1})],
            "first input has type UInt8 but must have type Float",
            "the uint8 image",
        ),
        (
            [CAST, ("Cast", ["image"], ["h"], {"to": 10}), ("Add", ["x", "h"], ["y"], {})],
            "must have same input types",
            "two precisions",
        ),
    ],
)
def test_a_graph_that_is_refused(
    nodes: list[tuple[str, list[str], list[str], dict[str, Any]]], said: str, cause: str, rtx: Flavour
) -> None:
    with pytest.raises(EngineError) as caught:
        build_engine(graph(*nodes), rtx, target="sm86")
    text = str(caught.value)
    assert "TensorRT says:" in text and said in text
    assert cause in text.split("cause: ")[1].split("remedy: ")[0]


def test_float32_products_for_turing_name_the_precision(rtx: Flavour) -> None:
    """As a vision transformer has them."""
    product = graph(
        CAST,
        ("Transpose", ["x"], ["z"], {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["x", "z"], ["y"], {}),
    )
    with pytest.raises(EngineError, match="remedy: export it again with --precision fp16"):
        build_engine(product, rtx, target="sm75")
    assert build_engine(product, rtx, target="sm86")


def test_every_complaint_of_the_parser_is_told(
    rtx: Flavour,
    make_bundle: Callable[[bytes, str], Path],
    engines: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the command line, as the user sees it."""
    model = graph(CAST, ("Unique", ["x"], ["z"], {}), ("Sparkle", ["z"], ["y"], {"domain": "mine"}))
    bundle = make_bundle(model, "refused")
    assert main(["build", str(bundle), "--backend", "tensorrt-rtx", "--target", "sm86"]) == 1
    error = capsys.readouterr().err
    assert f"edgead build: error: tensorrt-rtx {rtx.version} does not take the graph" in error
    assert "my_Unique (Unique)" in error and "my_Sparkle (Sparkle)" in error
    assert "cause: " in error and "remedy: " in error and "Traceback" not in error
    assert not engines.exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_file_that_is_no_graph(damage: str, rtx: Flavour, model: bytes) -> None:
    content = {"truncated": model[: len(model) // 2], "empty": b"", "text": b"no graph"}[damage]
    with pytest.raises(EngineError, match="export the bundle again"):
        build_engine(content, rtx, target="sm86")


def test_a_fixed_batch(rtx: Flavour, make_tiny_model: Callable[..., bytes]) -> None:
    model = make_tiny_model(batch=4)
    assert build_engine(model, rtx, target="sm86", options=BuildOptions((4,)))
    with pytest.raises(EngineError, match="batches of 4 only, asked for is 1: build with --batch 4"):
        build_engine(model, rtx, target="sm86")


def test_too_little_workspace_and_too_large_a_batch(rtx: Flavour, model: bytes) -> None:
    with pytest.raises(EngineError, match="tensor volume exceeds"):
        build_engine(model, rtx, target="sm86", options=BuildOptions((1 << 40,)))
    assert build_engine(model, rtx, target="sm86", options=BuildOptions(workspace_mib=64))


def test_progress_reaches_the_caller_and_can_end_the_build(rtx: Flavour, model: bytes) -> None:
    seen: list[tuple[str, int, int]] = []
    build_engine(model, rtx, target="sm86", progress=lambda *step: seen.append(step))
    assert seen[0] == ("parse", 0, 1) and len({phase for phase, _, _ in seen}) > 3
    assert all(0 <= done <= total for _, done, total in seen)

    class Stopped(Exception):
        pass

    for error in (Stopped, KeyboardInterrupt):

        def stop(phase: str, done: int, total: int, error: type[BaseException] = error) -> None:
            if phase != "parse":
                raise error

        with pytest.raises(error):
            build_engine(model, rtx, target="sm86", progress=stop)
    assert build_engine(model, rtx, target="sm86")


def test_no_timing_cache_with_rtx(
    rtx: Flavour, model: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "times"
    assert build_engine(model, rtx, target="sm86", options=BuildOptions(timing_cache=file))
    assert f"timing cache {file} is not used: tensorrt-rtx has none" in caplog.text
    assert not file.exists()


@pytest.fixture
def classic() -> Flavour:
    """A stand-in: the libraries of classic TensorRT are not to be had without a GPU's installation."""
    return Flavour("tensorrt", make("tensorrt", None), "10.13.3.9")


def test_the_timing_cache_of_classic_tensorrt(
    classic: Flavour, model: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "times"
    options = BuildOptions(timing_cache=file)
    build_engine(model, classic, target="sm87", options=options)
    assert file.read_bytes() == b"timings" and caplog.text == ""
    build_engine(model, classic, target="sm87", options=options)  # reads it
    assert list(tmp_path.iterdir()) == [file]

    absent = BuildOptions(timing_cache=tmp_path / "absent" / "times")
    assert build_engine(model, classic, target="sm87", options=absent)
    assert "not written (No such file or directory)" in caplog.text  # and no failure of the build
    with pytest.raises(EngineError, match="cannot be read"):
        build_engine(model, classic, target="sm87", options=BuildOptions(timing_cache=tmp_path))


def test_a_timing_cache_of_another_gpu_is_begun_anew(
    classic: Flavour,
    model: bytes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "times"
    file.write_bytes(b"of another GPU")
    given: list[bytes] = []
    create = Config.create_timing_cache
    refuse = iter([False, True])
    monkeypatch.setattr(
        Config, "create_timing_cache", lambda self, b: (given.append(b), create(self, b))[1]
    )
    monkeypatch.setattr(Config, "set_timing_cache", lambda self, cache, ignore: next(refuse))
    build_engine(model, classic, target="sm87", options=BuildOptions(timing_cache=file))
    assert given == [b"of another GPU", b""] and "begun anew" in caplog.text
    assert file.read_bytes() == b"timings"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("create_network", "the builder gives no network"),
        ("create_builder_config", "the builder gives no configuration"),
        ("create_optimization_profile", "the builder gives no profile"),
        ("build_serialized_network", "building the engine for sm87 failed"),
    ],
)
def test_none_from_tensorrt_is_an_error(
    what: str, message: str, classic: Flavour, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classic.module.Builder, what, lambda *_: None)
    with pytest.raises(EngineError, match=f"{message}; TensorRT gives no reason"):
        build_engine(model, classic, target="sm87")


def test_what_tensorrt_says_while_building_is_kept(classic: Flavour, model: bytes) -> None:
    classic.module.build_error = "Could not find any implementation for node {ForeignNode[a...b]}."
    with pytest.raises(EngineError) as caught:
        build_engine(model, classic, target="sm87")
    assert "error: Could not find any implementation for node {ForeignNode[a...b]}." in str(caught.value)
    assert "remedy: set another workspace limit" in str(caught.value)


def test_the_engine_is_a_plain_file(
    rtx: Flavour, tiny_bundle: Path, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """trtexec and Triton take it: nothing stands before what TensorRT gave."""
    assert main(["build", str(tiny_bundle), "--backend", "tensorrt-rtx", "--target", "sm86"]) == 0
    (entry,) = entries(engines)
    mine = build_engine(Bundle.open(tiny_bundle).model_bytes(), rtx, target="sm86")
    assert entry.engine_path.read_bytes()[:8] == mine[:8]
    assert isinstance(entry, Entry) and isinstance(entry.sidecar, Sidecar)
