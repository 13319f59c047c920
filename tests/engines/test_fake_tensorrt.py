"""The stand-in for TensorRT that other tests use has no method that the real one has not."""

from __future__ import annotations

import enum
import inspect
from typing import Any

import pytest

from tests import fake_tensorrt
from tests.real_bindings import RTX, Api, fits

CLASSES = {
    "Profile": "IOptimizationProfile",
    "Config": "IBuilderConfig",
    "Network": "INetworkDefinition",
    "Tensor": "ITensor",
    "TimingCache": "ITimingCache",
    "HostMemory": "IHostMemory",
    "Context": "IExecutionContext",
    "Inspector": "EngineInspector",
    "Engine": "ICudaEngine",
    "RtxEngine": "ICudaEngine",
    "RuntimeConfig": "IRuntimeConfig",
}
RTX_ONLY = {"ComputeCapability", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy"}
# One class stands in for all versions: the first is of TensorRT for RTX, the second of TensorRT 10.
SHARED = {"Config.set_compute_capability", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"}
OWN = {"engines", "builds", "bias", "build_error"}  # for tests, see `make`


def faults(kind: type, api: dict[str, list[str]]) -> list[str]:
    """What of a class of the stand-in is not in a class of TensorRT, or takes other arguments."""
    found = []
    for name, member in vars(kind).items():
        is_claim = isinstance(member, property | enum.Enum) or inspect.isfunction(member)
        if name.startswith("_") or not is_claim or f"{kind.__name__}.{name}" in SHARED:
            continue
        if name not in api:
            found.append(f"{kind.__name__}.{name}")
        elif inspect.isfunction(member) and api[name]:
            count = len(inspect.signature(member).parameters) - 1
            if not any(fits(signature, count, ()) for signature in api[name]):
                found.append(f"{kind.__name__}.{name}: {count} arguments, not {api[name]}")
    return found


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_it_has_nothing_that_the_real_one_has_not(flavour: str, apis: dict[str, Api]) -> None:
    module: Any = fake_tensorrt.make(flavour, None)
    versions = [RTX] if flavour == "tensorrt-rtx" else [name for name in apis if name != RTX]
    for version in versions:
        api = apis[version]
        for name, thing in vars(module).items():
            if isinstance(thing, type):
                assert name in api, (version, name)
                assert faults(thing, api[name]) == [], version
            else:
                assert name.startswith("__") or name in OWN
        for name, real in CLASSES.items():
            if real in api and not (name in ("RtxEngine", "RuntimeConfig") and version != RTX):
                assert faults(getattr(fake_tensorrt, name), api[real]) == [], version
    assert (set(vars(module)) & RTX_ONLY) == (RTX_ONLY if flavour == "tensorrt-rtx" else set())


def test_a_wrong_method_is_found(apis: dict[str, Api]) -> None:
    class Wrong:
        def set_tensor_address(self, name: str) -> None: ...
        def set_address(self, name: str, address: int) -> None: ...
        def set_input_shape(self, name: str, shape: Any) -> None: ...

    found = faults(Wrong, apis[RTX]["IExecutionContext"])
    assert [text.split(":")[0] for text in found] == ["Wrong.set_tensor_address", "Wrong.set_address"]
