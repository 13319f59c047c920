"""Opening a TensorRT library, its log, and what its messages mean."""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgead.errors import BackendError, EngineError
from edgead.flavour import MAX_LINE_CHARS, MAX_LINES, Flavour, explain, failure, open_flavour


@pytest.fixture
def rtx() -> Flavour:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    return open_flavour("tensorrt-rtx")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Function that puts a module `tensorrt` with this source before any other."""

    def write(source: str) -> None:
        (tmp_path / "tensorrt").mkdir()
        (tmp_path / "tensorrt" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    before = sys.modules.pop("tensorrt", None)
    yield write
    sys.modules.pop("tensorrt", None)
    if before is not None:
        sys.modules["tensorrt"] = before


def test_opens_the_real_library(rtx: Flavour) -> None:
    assert rtx.name == "tensorrt-rtx" and rtx.is_rtx
    assert rtx.module.__name__ == "tensorrt_rtx" and rtx.version == rtx.module.__version__
    assert rtx.version_tuple >= (1, 0) and all(isinstance(part, int) for part in rtx.version_tuple)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("10.3.0", (10, 3, 0)), ("10.13.3.9", (10, 13, 3, 9)), ("10.0.0b6", (10, 0, 0))],
)
def test_opens_a_classic_library(
    install: Callable[[str], None], version: str, expected: tuple[int, ...]
) -> None:
    install(f"__version__ = {version!r}\nclass Builder: ...")
    flavour = open_flavour("tensorrt")
    assert flavour.version_tuple == expected and not flavour.is_rtx


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("__version__ = '8.6.1'\nclass Builder: ...", "8.6.1 is too old, expected 10.0 or newer"),
        ("__version__ = '9.3.0.post12.dev1'\nclass Builder: ...", "is too old"),
        ("__version__ = '10.2.0'\nclass Builder: ...", "known as a faulty version"),
        ("", "is not TensorRT"),
        ("__version__ = 'unknown'\nclass Builder: ...", "is not TensorRT"),
        ("import tensorrt_bindings_that_nobody_has", "No module named 'tensorrt_bindings_that"),
        ("raise FileNotFoundError('Could not find: nvinfer_10.dll')", "Could not find: nvinfer_10.dll"),
        ("raise RuntimeError('failed to load plugins')", "cannot be imported: failed to load plugins"),
    ],
)
def test_refuses_what_cannot_work(install: Callable[[str], None], source: str, message: str) -> None:
    install(source)
    with pytest.raises(EngineError, match=message):
        open_flavour("tensorrt")


def test_libraries_that_are_missing(install: Callable[[str], None]) -> None:
    install("raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file')")
    with pytest.raises(EngineError) as caught:
        open_flavour("tensorrt")
    text = str(caught.value)
    assert "libnvinfer.so.10: cannot open shared object file" in text
    assert "cause: the Python bindings of TensorRT are there, its libraries are not" in text
    assert "JetPack" in text and "edgead[tensorrt-rtx]" in text


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt-rtx"):
        module = name.replace("-", "_")
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(sys, "path_importer_cache", {})
        with pytest.raises(EngineError, match=rf"{name} is not installed.*edgead\[tensorrt-rtx\]"):
            open_flavour(name)
    with pytest.raises(EngineError, match="unknown; choose tensorrt or tensorrt-rtx"):
        open_flavour("tensorrt_rtx")


def test_the_log_keeps_warnings_and_errors(rtx: Flavour, caplog: pytest.LogCaptureFixture) -> None:
    log, severity = rtx.new_log(), rtx.module.ILogger
    with caplog.at_level(logging.DEBUG, "edgead.flavour"):
        for level in ("VERBOSE", "INFO", "WARNING", "ERROR", "ERROR", "INTERNAL_ERROR"):
            log.log(getattr(severity, level), f"said as {level}")
    assert log.lines == [
        "warning: said as WARNING", "error: said as ERROR", "error: said as INTERNAL_ERROR"
    ]  # fmt: skip
    assert "said as INFO" in caplog.text and "said as VERBOSE" not in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
    for number in range(3 * MAX_LINES):
        log.log(severity.ERROR, f"{number}" + "x" * 2 * MAX_LINE_CHARS)
    assert len(log.lines) == MAX_LINES and log.lines[-1].startswith(f"error: {3 * MAX_LINES - 1}x")
    assert all(len(line) <= MAX_LINE_CHARS + len("warning: ") for line in log.lines)


def test_tensorrt_gets_one_log_for_ever(rtx: Flavour) -> None:
    """It takes one per process, and warns about a second one, which it does not use for everything."""
    first, other = rtx.new_log(), open_flavour("tensorrt-rtx").new_log()
    assert first is other
    builders = [rtx.module.Builder(first), rtx.module.Builder(other)]
    assert first.lines == [], builders
    # A real message arrives: this index is out of range.
    builders[1].create_builder_config().set_compute_capability(rtx.module.ComputeCapability.SM86, 7)
    assert any("index" in line for line in first.lines)
    assert rtx.new_log().lines == []


def test_the_log_can_be_made_by_many_threads(rtx: Flavour) -> None:
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(rtx.new_log())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len({id(log) for log in found}) == 1


class Said:
    """A log as `failure` sees it."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)


def test_a_failure_keeps_the_text_and_adds_cause_and_remedy() -> None:
    log = Said("warning: odd", "error: [x.cpp::1] The engine has an incompatible serialization version")
    error = failure("loading bottle.engine failed", log)
    assert isinstance(error, BackendError)
    assert str(error).splitlines() == [
        "loading bottle.engine failed; TensorRT says:",
        "  warning: odd",
        "  error: [x.cpp::1] The engine has an incompatible serialization version",
        "cause: the engine was made by another TensorRT, or something stands in the file before the "
        "plan",
        "remedy: rebuild it: edgead build <bundle>. An engine of Ultralytics has metadata in front: "
        "strip them",
    ]
    assert log.lines == []
    assert str(failure("the same", log)) == "the same; TensorRT gives no reason"
    assert str(failure("odd", Said("error: never seen"))) == "odd; TensorRT says:\n  error: never seen"


@pytest.mark.parametrize(
    ("message", "cause", "remedy"),
    [
        # The table of messages in the specification, then what TensorRT-RTX 1.7 said in tests of it.
        ("The engine has an incompatible serialization version", "another TensorRT", "edgead build"),
        ("Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not "
         "match", "another TensorRT", "edgead build"),
        ("Compute capability is invalid or not supported", "no such target", "classic TensorRT"),
        ("Error Code 1: Cuda Runtime (cudaError 35: x)", "no NVIDIA driver", "onnxruntime"),
        ("CUDA driver version is insufficient for CUDA runtime version", "no NVIDIA driver", "update"),
        ("Could not find any implementation for node {ForeignNode[x]}", "missing memory", "--workspace"),
        ("Killed", "lack of memory", "batch 1"),
        ("process died with exit code 137", "lack of memory", "swap"),
        ("cuMemAlloc failed: out of memory", "memory of the GPU", "--workspace"),
        ("Error Code 2: OutOfMemory (Requested size was 17163532 bytes.)", "memory", "--workspace"),
        ("operation not permitted when stream is capturing", "captured", "no other thread"),
        ("ImportError: libnvinfer.so.10: cannot open shared object", "libraries are not", "JetPack"),
        ("ImportError: libnvonnxparser.so.11: cannot open", "libraries are not", "[tensorrt-rtx]"),
        ("error: metadata-generation-failed for tensorrt-cu13-libs", "stub", "edgead[tensorrt-rtx]"),
        ("RuntimeError: Failed to dlopen libcuda.so.1", "no NVIDIA driver", "--gpus all"),
        ("ImportError: libcuda.so.1: cannot open shared object file", "no NVIDIA driver", "container"),
        ("fatal error: cuda.h: No such file or directory", "no CUDA headers", "CUDA_ROOT"),
        ("type object 'tensorrt.BuilderFlag' has no attribute 'FP16'", "by flag", "--precision fp16"),
        ("AttributeError: BuilderFlag INT8", "by flag", "--precision fp16"),
        ("first input has type UInt8 but must have type Float", "uint8 image", "cast the image"),
        ("Found unsupported input type of UINT8", "uint8 image", "cast the image"),
        ("Antialiasing is not supported currently.", "antialias=1", "on the host"),
        ("ITopKLayer best: K exceeds the maximum value allowed (3840)", "TopK", "pool"),
        ("Non-zero zero point is not supported", "asymmetric", "symmetrically"),
        ("ElementWiseOperation SUM must have same input types. But they are of types Float and Half",
         "two precisions", "Cast"),
        ("creator && \"Plugin not found, are the plugin name, version, and namespace correct?\"",
         "an operator", "custom operators"),
        ("NonZero plugin creator version 1 was not found in plugin registry.", "an operator", "NonZero"),
        ("node 1 u (Unique): false", "an operator", "Unique"),
        ("Cannot compile operation 'node_matmul' for Turing (SM75): FP32 GEMM is not supported.",
         "on Turing", "--precision fp16"),
        ("the map has 12 values NaN", "overflow", "--precision fp32"),
        ("score inf", "overflow", "--precision fp32"),
        ("Failed to parse the ONNX model.", "whole ONNX file", "export the bundle again"),
    ],
)  # fmt: skip
def test_known_messages(message: str, cause: str, remedy: str) -> None:
    found = explain(message)
    assert found is not None
    assert cause in found[0] and remedy in found[1]
    text = str(failure("building failed", Said(f"error: {message}")))
    assert message in text and f"cause: {found[0]}" in text and f"remedy: {found[1]}" in text


def test_the_missing_driver_is_not_blamed_for_another_fault() -> None:
    """TensorRT-RTX adds cudaError 35 to every error on a machine without a driver."""
    text = "K exceeds the maximum value allowed (3840)\nerror: Cuda Runtime (cudaError 35: CUDA driver)"
    assert "TopK" in (explain(text) or ("",))[0]


@pytest.mark.parametrize("message", ["", "all is well", "information about it", "cudaError 350"])
def test_unknown_messages(message: str) -> None:
    assert explain(message) is None
