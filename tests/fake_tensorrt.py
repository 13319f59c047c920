"""A stand-in for TensorRT that runs on the fake CUDA driver: its engines compute, with ONNX Runtime.

`make(name)` gives a module with the names that edgead uses (a test compares them with the real
bindings). "Building" stores the ONNX file and the profiles in the plan. Running enqueues a host
function on the stream, which reads and writes "device" memory: so streams, copies, capture and replay,
addresses, shapes and profiles have to be right for a result to come out, and a wait that kept the GIL
would never end.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
import struct
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np

VERSIONS = {"tensorrt": "10.13.3.9", "tensorrt-rtx": "1.7.1.116"}
MAGIC = b"FAKEPLAN"
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_CALLBACKS: list[Any] = []


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: Severity, message: str) -> None:
        pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.IntEnum):
    LAYER_NAMES_ONLY = 0
    NONE = 1
    DETAILED = 2


class TensorIOMode(enum.IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(enum.IntEnum):
    FLOAT = 0
    UINT8 = 6


class LayerInformationFormat(enum.IntEnum):
    ONELINE = 0
    JSON = 1


class CudaGraphStrategy(enum.IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class ComputeCapability(enum.IntEnum):
    SM75 = 75
    SM80 = 80
    SM86 = 86
    SM89 = 89
    SM120 = 120
    SM121 = 121
    CURRENT = 1


class HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = tuple(min), tuple(opt), tuple(max)

    def get_shape(self, input: str) -> list[tuple[int, ...]]:
        return list(self.shapes[input])


class TimingCache:
    def serialize(self) -> HostMemory:
        return HostMemory(b"timings")


class Config:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.num_compute_capabilities = 0
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: Any = None
        self.builder_optimization_level = 3

    def clear_flag(self, flag: BuilderFlag) -> None:
        assert flag == BuilderFlag.TF32

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self.workspace_bytes = pool_size

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        return True

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache()

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        return True

    def get_timing_cache(self) -> TimingCache:
        return TimingCache()


class Tensor:
    def __init__(self, value: Any) -> None:
        self.name = value.name
        sides = value.type.tensor_type.shape.dim
        self.shape = tuple(side.dim_value or -1 for side in sides)
        self.dtype = DataType.UINT8 if value.type.tensor_type.elem_type == 2 else DataType.FLOAT


class Network:
    onnx: bytes = b""
    model: Any = None

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Tensor:
        return Tensor(self.model.graph.input[index])


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network = network

    def parse(self, model: bytes, path: str | None = None) -> bool:
        import onnx

        self.network.onnx, self.network.model = bytes(model), onnx.load_from_string(bytes(model))
        return True

    def get_error(self, index: int) -> Any:
        raise IndexError(index)


def _version_header(version: str, profiles: list[Profile]) -> bytes:
    header = json.dumps({"version": version, "profiles": [p.shapes for p in profiles]}).encode()
    return MAGIC + struct.pack("<I", len(header)) + header


class Cuda:
    """The two driver calls that a running engine makes, and its scratch memory."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def launch(self, stream: int, function: Any) -> int:
        launch = self.library.cuLaunchHostFunc
        launch.argtypes = [ctypes.c_void_p, HOST_FUNCTION, ctypes.c_void_p]
        return int(launch(ctypes.c_void_p(stream), function, None))


def _array(address: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)


class Context:
    def __init__(self, engine: Engine, config: Any = None) -> None:
        self.engine, self.config = engine, config
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        context = weakref.ref(self)
        self._callback = HOST_FUNCTION(lambda _: context() and context()._run())
        _CALLBACKS.append(self._callback)  # a stream may still call it after a fault
        engine.contexts += 1

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return profile_index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.profiles[self.profile][name]
        fits = all(low <= side <= high for low, side, high in zip(smallest, shape, largest, strict=True))
        self.shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory % 256 == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        code = self.engine.cuda.launch(stream_handle, self._callback)
        if code:
            self.engine.logger.log(Severity.ERROR, f"IExecutionContext::enqueueV3: Cuda failure {code}")
        return code == 0

    def _run(self) -> None:
        shape = self.shapes["image"]
        batch = shape[0]
        feeds = {
            "image": _array(self.addresses["image"], "uint8", shape),
            "calibration": _array(self.addresses["calibration"], "float32", (3,)),
        }
        score, anomaly_map = self.engine.session.run(["score", "anomaly_map"], feeds)
        _array(self.addresses["score"], "float32", (batch,))[:] = score + self.engine.bias
        _array(self.addresses["anomaly_map"], "float32", anomaly_map.shape)[:] = anomaly_map
        self.engine.runs += 1


class RuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    _allocation = ExecutionContextAllocationStrategy.STATIC
    _cache: object = None

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self._allocation = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        self._cache = cache
        return True


class Inspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return json.dumps({"Layers": [{"Name": "everything", "LayerType": "fake"}]})


class Engine:
    name = "fake"
    num_layers = 1
    device_memory_size_v2 = 1 << 20

    def __init__(self, plan: bytes, logger: ILogger, cuda: Cuda, bias: float) -> None:
        import onnxruntime

        length = struct.unpack_from("<I", plan, len(MAGIC))[0]
        start = len(MAGIC) + 4
        self.profiles = json.loads(plan[start : start + length])["profiles"]
        onnx = plan[start + length :]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self.logger, self.cuda, self.bias = logger, cuda, bias
        self.contexts = self.runs = 0

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    @property
    def num_io_tensors(self) -> int:
        return 4

    def get_tensor_name(self, index: int) -> str:
        return [node.name for node in (*self.session.get_inputs(), *self.session.get_outputs())][index]

    def _node(self, name: str) -> Any:
        nodes = (*self.session.get_inputs(), *self.session.get_outputs())
        return next(node for node in nodes if node.name == name)

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        is_input = name in [node.name for node in self.session.get_inputs()]
        return TensorIOMode.INPUT if is_input else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.UINT8 if "uint8" in self._node(name).type else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(side if isinstance(side, int) else -1 for side in self._node(name).shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.profiles[profile_index][name]]

    def create_execution_context(self, config: Any = None) -> Context:
        return Context(self, config)

    def create_engine_inspector(self) -> Inspector:
        return Inspector()


class RtxEngine(Engine):
    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()


def make(name: str, library: Any, *, version: str | None = None) -> Any:
    """Returns the module `tensorrt` or `tensorrt_rtx`, running on a loaded fake driver.

    For tests it has the attributes `engines` (all that were loaded), `builds` (how many were built),
    `bias` (added to every score: an engine that computes wrongly) and `build_error` (a text that
    building fails with).
    """
    module: Any = ModuleType(name.replace("-", "_"))
    module.__spec__ = ModuleSpec(module.__name__, None)  # importlib.util.find_spec looks for it
    is_rtx = name == "tensorrt-rtx"
    module.__version__ = version or VERSIONS[name]
    module.engines, module.builds, module.bias, module.build_error = [], 0, 0.0, ""
    cuda = Cuda(library)

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def create_network(self, flags: int = 0) -> Network:
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
            if module.build_error:
                self.logger.log(Severity.ERROR, module.build_error)
                return None
            module.builds += 1
            return HostMemory(_version_header(module.__version__, config.profiles) + network.onnx)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            plan = bytes(serialized_engine)
            if not plan.startswith(_version_header(module.__version__, [])[: len(MAGIC)]):
                self.logger.log(Severity.ERROR, "Error Code 1: magic tag does not match")
                return None
            length = struct.unpack_from("<I", plan, len(MAGIC))[0]
            header = json.loads(plan[len(MAGIC) + 4 : len(MAGIC) + 4 + length])
            if header["version"] != module.__version__:
                self.logger.log(Severity.ERROR, "The engine has an incompatible serialization version")
                return None
            kind = RtxEngine if is_rtx else Engine
            module.engines.append(kind(plan, self.logger, cuda, module.bias))
            return module.engines[-1]

    shared: list[Callable[..., Any] | type] = [
        ILogger, Logger, NetworkDefinitionCreationFlag, MemoryPoolType, ProfilingVerbosity, TensorIOMode,
        BuilderFlag, DataType, LayerInformationFormat, OnnxParser, Builder, Runtime,
        ExecutionContextAllocationStrategy,
    ]  # fmt: skip
    if is_rtx:
        shared += [CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy, ComputeCapability]
    for thing in shared:
        setattr(module, thing.__name__, thing)
    return module
