"""What the doctor asks in a child process (see `edgead.doctor.probe`): everything that loads a library.

Each function returns plain JSON values and may fail in any way.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgead.doctor.probe import MARK
from edgead.errors import BackendError, EdgeADError

# Numbers of CUdevice_attribute in cuda.h.
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18


def machine() -> dict[str, Any]:
    """`edgead.machine.describe`, which also calls nvidia-smi."""
    from edgead.machine import describe

    return describe()


def driver() -> dict[str, Any]:
    """The CUDA driver by itself, without any package.

    Returns:
        library (is there one), code and code_name of cuInit or cuDeviceGetCount, version such as "12.6",
        gpus [{name, compute_capability, memory_mib, is_integrated}].
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        missing = "No such file" in str(error)
        return {"library": False, "gpus": []} if missing else {"error": str(error)}
    facts: dict[str, Any] = {"library": True, "gpus": [], "code": int(cuda.cuInit(0))}
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0:
        facts["version"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if facts["code"] == 0:
        facts["code"] = int(cuda.cuDeviceGetCount(ctypes.byref(count)))
    name = ctypes.c_char_p()
    if cuda.cuGetErrorName(facts["code"], ctypes.byref(name)) == 0 and name.value:
        facts["code_name"] = name.value.decode()
    facts["gpus"] = [_gpu(cuda, ordinal) for ordinal in range(count.value)]
    return facts


def _gpu(cuda: ctypes.CDLL, ordinal: int) -> dict[str, Any]:
    device, value, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    attributes = []
    for attribute in (_MAJOR, _MINOR, _INTEGRATED):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        attributes.append(value.value)
    return {
        "name": name.value.decode(errors="replace"),
        "compute_capability": attributes[:2],
        "memory_mib": size.value // 2**20,
        "is_integrated": bool(attributes[2]),
    }


def states(count: str, root: str) -> dict[str, Any]:
    """`edgead.gpu_state.read` of the first GPUs."""
    from edgead.gpu_state import read

    return {"gpus": [read(ordinal, root=Path(root)) for ordinal in range(int(count))]}


def cuda_layer(layer: str) -> dict[str, Any]:
    """Opens GPU 0 as the runtime does."""
    from edgead.runtime.cuda import open_device

    device = open_device(0, layer=layer)
    try:
        device.make_current()
        free, total = device.memory_info()
        return {"info": asdict(device.info), "free_mib": free // 2**20, "total_mib": total // 2**20}
    finally:
        device.close()


def flavour(name: str) -> dict[str, Any]:
    """Loads a TensorRT."""
    from edgead.flavour import open_flavour

    return {"version": open_flavour(name).version}


def library(module: str) -> dict[str, Any]:
    """Imports a library."""
    return {"version": str(getattr(importlib.import_module(module), "__version__", ""))}


def auto() -> dict[str, Any]:
    """What `backend="auto"` tries on this machine."""
    from edgead.runtime import explain_auto

    return {"candidates": explain_auto()}


def bundle(path: str) -> dict[str, Any]:
    """Checks a bundle and says what it is."""
    from edgead.bundle import Bundle

    manifest = Bundle.open(Path(path)).manifest
    return {"name": manifest.name, "method": manifest.method, "precision": manifest.precision}


def engine(path: str, name: str) -> dict[str, Any]:
    """Whether the cache has an engine of a TensorRT flavour for a bundle and this box; changes nothing.

    Returns:
        missing: why not, empty if it has one.
    """
    from edgead.bundle import MODEL, Bundle
    from edgead.engines import cache
    from edgead.engines.build import check_target
    from edgead.engines.prepare import Box
    from edgead.flavour import open_flavour

    graph = Bundle.open(Path(path)).manifest.members[MODEL].sha256
    box = Box.here()
    if box.gpu is None:
        raise BackendError(box.why_no_gpu)
    wanted = (graph, name, box.gpu.sm)
    found = [entry.sidecar for entry in cache.entries(cache.default_folder())]
    found = [one for one in found if (one.key.graph_sha256, one.key.flavour, one.key.target) == wanted]
    if not found:
        check_target(open_flavour(name), box.gpu.sm)
        return {"missing": "there is no engine for this box yet"}
    newest_first = sorted(found, key=lambda sidecar: sidecar.utc, reverse=True)
    stale = [box.why_stale(sidecar.key) for sidecar in newest_first]
    return {"missing": f"the engine in the cache fits no more ({stale[0]})" if all(stale) else ""}


def backend(path: str, name: str) -> dict[str, Any]:
    """Opens a back end with a bundle and replays its golden samples."""
    from edgead.bundle import Bundle
    from edgead.runtime import open_backend, replay

    opened_bundle = Bundle.open(Path(path))
    opened = open_backend(opened_bundle, name)
    try:
        result = replay(opened, opened_bundle)
        return {
            "precision": opened.precision,
            "ok": result.ok,
            "images": result.images,
            "flips": len(result.flips),
        }
    finally:
        opened.close()


QUESTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        machine,
        driver,
        states,
        cuda_layer,
        flavour,
        library,
        auto,
        bundle,
        engine,
        backend,
    )
}


def main(question: str, arguments: Sequence[str]) -> None:
    """Answers one question on standard output and ends the process."""
    try:
        facts = QUESTIONS[question](*arguments)
    except EdgeADError as error:
        facts = {"error": str(error)}
    except Exception as error:  # whatever a library raises is the answer
        facts = {"error": f"{type(error).__name__}: {error}"}
    print(f"\n{MARK}{json.dumps(facts)}", flush=True)
    sys.stderr.flush()
    os._exit(0)  # without the exit handlers of the libraries, which may crash as well
