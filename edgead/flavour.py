"""Which TensorRT: the classic one or TensorRT for RTX, its log, and what its messages mean.

The two differ in their module, in how a target is named and in a few optional features, which are probed
with `hasattr`. What differs is decided at the place that needs it; this module only opens the library.
"""

from __future__ import annotations

import importlib
import logging
import re
import threading
from dataclasses import dataclass
from typing import Any

from edgead.errors import BackendError, EngineError

CLASSIC, RTX = "tensorrt", "tensorrt-rtx"
NAMES = (CLASSIC, RTX)
OLDEST = {CLASSIC: (10, 0), RTX: (1, 2)}  # RTX: its own CUDA graphs
MAX_LINES, MAX_LINE_CHARS = 50, 2000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flavour:
    """An opened TensorRT library.

    Attributes:
        name: A name of `NAMES`.
        module: `tensorrt` or `tensorrt_rtx`.
        version: As the module gives it, such as "10.3.0".
    """

    name: str
    module: Any
    version: str

    @property
    def version_tuple(self) -> tuple[int, ...]:
        """Such as (10, 3, 0)."""
        return _version_tuple(self.version)

    @property
    def is_rtx(self) -> bool:
        return self.name == RTX

    def new_log(self) -> Any:
        """Returns the logger to give to TensorRT, emptied.

        It is the same object each time: TensorRT takes one per process, and what it has to say goes to
        that one only. Its `lines` (list of str) are the warnings and errors since this call or the last
        `failure`, at most `MAX_LINES`, the newest last. Everything from INFO up also goes to `logging`
        at DEBUG. `interrupt` is what was raised meanwhile, such as KeyboardInterrupt: nothing may be
        raised through TensorRT's own frames, which would lose it.
        """
        base: Any = self.module.ILogger
        with _logs_lock:
            if base not in _logs:
                _logs[base] = _make_log(base)
        log = _logs[base]
        log.lines.clear()
        log.interrupt = None
        return log

    def new_runtime(self, log: Any) -> Any:
        """Returns what loads engines.

        Raises:
            BackendError: CUDA cannot be used here; no engine is to blame.
        """
        try:
            return self.module.Runtime(log)
        except (RuntimeError, TypeError) as error:  # the bindings' word for a null pointer
            raise BackendError(f"{failure(f'{self.name} cannot start ({error})', log)}") from error


_logs: dict[Any, Any] = {}
_logs_lock = threading.Lock()


def _make_log(base: Any) -> Any:
    class Log(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.lines: list[str] = []
            self.interrupt: BaseException | None = None

        def log(self, severity: Any, msg: str) -> None:  # called from TensorRT's own threads, too
            try:
                self._note(severity, msg)
            except BaseException as error:
                self.interrupt = error

        def _note(self, severity: Any, msg: str) -> None:
            if severity == base.VERBOSE:
                return
            logger.debug("%s: %s", severity, msg)
            if severity == base.INFO:
                return
            line = f"{'warning' if severity == base.WARNING else 'error'}: {msg[:MAX_LINE_CHARS]}"
            if self.lines[-1:] != [line]:
                self.lines.append(line)
                del self.lines[:-MAX_LINES]

    return Log()


def open_flavour(name: str) -> Flavour:
    """Imports a TensorRT library.

    Args:
        name: A name of `NAMES`.

    Raises:
        EngineError: Unknown name; not installed, without its libraries, too old or known to be faulty.
    """
    if name not in NAMES:
        raise EngineError(f"TensorRT flavour {name!r} is unknown; choose {' or '.join(NAMES)}")
    module_name = name.replace("-", "_")
    try:
        if name == CLASSIC:
            module = importlib.import_module("tensorrt")
        else:
            module = importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise _not_importable(module_name, error) from error
        raise EngineError(f"{name} is not installed. {_INSTALL[name]}") from None
    except Exception as error:  # RuntimeError, say: a plugin library cannot be loaded
        raise _not_importable(module_name, error) from error
    version = str(getattr(module, "__version__", ""))
    if not hasattr(module, "Builder") or not _version_tuple(version):
        raise EngineError(
            f"the module {module_name} ({getattr(module, '__file__', None) or 'a folder'}) is not "
            f"TensorRT: something else of that name hides it, or it is half installed. {_INSTALL[name]}"
        )
    _check_version(name, version)
    return Flavour(name, module, version)


def _check_version(name: str, version: str) -> None:
    found = _version_tuple(version)
    if found < OLDEST[name]:
        raise EngineError(
            f"{name} {version} is too old, expected {'.'.join(map(str, OLDEST[name]))} or newer. "
            f"{_INSTALL[name]}"
        )
    if name == CLASSIC and found[:3] == (10, 2, 0):
        raise EngineError("tensorrt 10.2.0 is known as a faulty version; install 10.3 or newer, or 10.1")


def _version_tuple(version: str) -> tuple[int, ...]:
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def _not_importable(module_name: str, error: Exception) -> EngineError:
    text = f"the module {module_name} cannot be imported: {error}"
    return EngineError(_with_explanation(text, str(error)))


def failure(what: str, log: Any) -> EngineError:
    """Returns the error for a call of TensorRT that failed, and empties the log.

    Args:
        what: What failed, such as "building the engine for sm87 failed".
        log: The logger of `Flavour.new_log`.

    Returns:
        An error with TensorRT's own lines and, where one is known, cause and remedy.
    """
    lines = list(log.lines)
    log.lines.clear()
    said = "\n".join(f"  {line}" for line in lines)
    text = f"{what}; TensorRT says:\n{said}" if lines else f"{what}; TensorRT gives no reason"
    return EngineError(_with_explanation(text, said))


def _with_explanation(text: str, said: str) -> str:
    known = explain(said)
    return f"{text}\ncause: {known[0]}\nremedy: {known[1]}" if known else text


def blames_device(text: str) -> bool:
    """Whether a message of TensorRT is about the memory or the state of the GPU, not about an engine."""
    return bool(re.search(r"out of memory|OutOfMemory|std::bad_alloc|Cuda Runtime \(", text))


def explain(text: str) -> tuple[str, str] | None:
    """Looks a message of TensorRT, CUDA or their installers up; returns (cause, remedy) or None."""
    for pattern, cause, remedy in _KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            return cause, remedy
    return None


_GET_CLASSIC = (
    "on a Jetson use JetPack's TensorRT (a virtual environment needs --system-site-packages); on a PC "
    'install it from NVIDIA\'s index, or take TensorRT for RTX: pip install "edgead[tensorrt-rtx]"'
)
_INSTALL = {
    CLASSIC: _GET_CLASSIC[0].upper() + _GET_CLASSIC[1:],
    RTX: 'pip install "edgead[tensorrt-rtx]"; on a Jetson or a data-centre GPU use classic TensorRT',
}
_MEMORY = (
    "set another workspace limit (edgead build --workspace: with too little nothing fits, too much "
    "exhausts the memory), close other GPU programs, build for batch 1, add swap on a Jetson"
)
_CAST_FIRST = "cast the image to float as the first step of the graph, then permute, slice or resize"

# Message (regular expression, any case), cause, remedy. The first that fits counts. The missing driver
# is last because TensorRT for RTX adds cudaError 35 to every error on a machine without one.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"incompatible serialization version|version tag|magic tag|serialization.*(assertion|header)",
        "the engine was made by another TensorRT, or something stands in the file before the plan",
        "rebuild it: edgead build <bundle>. An engine of Ultralytics has metadata in front: strip them",
    ),
    (
        r"compute capability is invalid or not supported",
        "TensorRT for RTX has no such target (it has none for 8.7, 9.0, 10.0 and 11.0)",
        "use classic TensorRT on this GPU: --backend tensorrt",
    ),
    (
        r"could not find any implementation",
        "no kernel was found; the reason is often missing memory rather than the operator",
        _MEMORY,
    ),
    (
        r"\bkilled\b|SIGKILL|exit (code|status) 137",
        "the system ended the process for lack of memory, which on a Jetson GPU and CPU share",
        _MEMORY,
    ),
    (
        r"out of memory|OutOfMemory|cuda ?error:? 2\b|std::bad_alloc",
        "the memory of the GPU (on a Jetson: of the whole board) is exhausted",
        _MEMORY,
    ),
    (
        r"operation not permitted when stream is capturing|StreamCaptureUnsupported",
        "something else called CUDA while a graph was being captured",
        "let no other thread allocate, free or synchronise meanwhile; edgead captures per thread, so it "
        "can be another library that uses this GPU in the same thread",
    ),
    (
        r"lib(nvinfer|nvonnxparser|nvinfer_plugin|tensorrt_rtx|tensorrt_onnxparser_rtx)[\w.]*\.so",
        "the Python bindings of TensorRT are there, its libraries are not",
        _GET_CLASSIC,
    ),
    (
        r"metadata-generation-failed",
        "the package on the public index is a stub that could not reach NVIDIA's own index",
        'configure NVIDIA\'s index for pip, or pip install "edgead[tensorrt-rtx]"',
    ),
    (
        r"libcuda\.so",
        "there is no NVIDIA driver, or the container was started without the GPU",
        "install the driver; start a container with --gpus all (Jetson: --runtime nvidia)",
    ),
    (
        r"cuda\.h: No such file",
        "building pycuda found no CUDA headers",
        "set CUDA_ROOT to the folder of the CUDA toolkit, or stay with cuda-bindings",
    ),
    (
        r"has no attribute '?(FP16|INT8|BF16|FP8|INT4)|BuilderFlag.*\b(FP16|INT8)\b",
        "code for TensorRT 10 that sets precisions by flag; TensorRT 11 has none",
        "the precision is in the ONNX graph: edgead export --precision fp16",
    ),
    (
        r"failed to parse the ONNX model",
        "the graph is not a whole ONNX file",
        "export the bundle again",
    ),
    (
        r"type UInt8 but must have type|unsupported input type of UINT8",
        "the graph does more with the uint8 image than cast it",
        f"{_CAST_FIRST}; graphs of `edgead export` do",
    ),
    (
        r"antialiasing is not supported",
        "the graph resizes with antialias=1",
        "resize on the host (edgead does), or export with --frame",
    ),
    (
        r"K exceeds the maximum value|K not within",
        "a TopK of more elements than TensorRT takes (3839)",
        "pool before it, or use a maximum instead",
    ),
    (
        r"non-zero zero point",
        "asymmetric quantisation",
        "quantise symmetrically, int8 with zero point 0",
    ),
    (
        r"must have same input types|must have the same type",
        "two precisions meet in one operation",
        "insert an explicit Cast before it",
    ),
    (
        r"FP32 GEMM is not supported",
        "TensorRT for RTX has no float32 matrix products on Turing (sm75)",
        "export it again with --precision fp16 (vision transformers have such products), or build for a "
        "newer GPU",
    ),
    (
        r"plugin not found|NonZero|\bUnique\b|no importer registered|unsupported operator",
        "the graph holds an operator that this TensorRT does not take",
        "keep sizes that depend on the data (NonZero, Unique) and custom operators out of the graph",
    ),
    (
        r"\bnan\b|\binf(inity)?\b|not finite",
        "values overflowed: half precision ends at 65504",
        "export with --precision fp32, and check with edgead verify",
    ),
    (
        r"cuda ?error:? 35\b|cudaErrorInsufficientDriver|cuda driver version is insufficient",
        "there is no NVIDIA driver, or it is too old for this CUDA",
        "install or update the driver; on a machine without a GPU use --backend onnxruntime, or build "
        "ahead of time for a named target: edgead build --backend tensorrt-rtx --target sm86",
    ),
)
