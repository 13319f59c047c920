"""Opening a GPU: which layer, which GPU, and what is said when there is none."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from edgead.errors import BackendError, CudaError
from edgead.runtime.cuda import LAYERS, open_device
from tests.fake_cuda import FakeCuda, has_driver


def run(code: str, environment: dict[str, str] | None = None) -> str:
    """Runs code in a fresh interpreter and returns what it prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OPEN = """
from edgead.errors import BackendError
from edgead.runtime.cuda import open_device
try:
    device = open_device(layer={layer!r})
    device.make_current()
    print(device.layer, device.info.name)
    device.close()
except BackendError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_without_a_driver(layer: str) -> None:
    pytest.importorskip(layer.split(".")[0], reason=f"{layer} is not installed")
    if has_driver():
        pytest.skip("this machine has a CUDA driver")
    said = run(OPEN.format(layer=layer))
    assert said.startswith("BackendError the CUDA driver (libcuda.so.1) cannot be loaded")
    for advice in ("Install or update the NVIDIA driver", "container", "onnxruntime"):
        assert advice in said


def test_in_a_process_of_its_own(fake_box: Any) -> None:
    said = run(OPEN.format(layer=fake_box.layer), fake_box.fake.environment())
    assert said == f"{fake_box.layer} Fake GPU 0\n"


def test_a_driver_without_a_gpu(fake_box: Any) -> None:
    fake_box.fake.devices = 0
    with pytest.raises(CudaError, match="CUDA_VISIBLE_DEVICES.*container.*onnxruntime") as caught:
        open_device(layer=fake_box.layer)
    assert caught.value.code == "CUDA_ERROR_NO_DEVICE"
    fake_box.fake.devices = 1
    open_device(layer=fake_box.layer).close()


@pytest.mark.parametrize(("code", "name"), [(34, "STUB_LIBRARY"), (803, "SYSTEM_DRIVER_MISMATCH")])
def test_a_driver_that_does_not_fit(code: int, name: str, fake_box: Any) -> None:
    fake_box.fake.fail("cuInit", 1, code)
    with pytest.raises(CudaError, match="Install or update the NVIDIA driver") as caught:
        open_device(layer=fake_box.layer)
    assert caught.value.code == f"CUDA_ERROR_{name}"


def test_which_gpu(fake_box: Any) -> None:
    fake_box.fake.devices = 2
    fake_box.fake.driver_version = 13020
    fake_box.fake.set_device(
        ordinal=1, name="Fake Thor", major=11, minor=0, integrated=True, memory_bytes=123 << 20
    )
    first, second = (open_device(ordinal, layer=fake_box.layer) for ordinal in (0, 1))
    assert (first.info.name, first.info.sm, first.info.is_integrated) == ("Fake GPU 0", "sm87", False)
    assert (second.info.name, second.info.sm, second.info.is_integrated) == ("Fake Thor", "sm110", True)
    assert second.info.memory_bytes == 123 << 20 and second.info.driver == "13.2"
    second.make_current()
    block = second.alloc(1 << 20)
    assert second.memory_info() == (122 << 20, 123 << 20)
    first.make_current()
    assert first.memory_info()[0] == first.info.memory_bytes
    second.make_current()
    second.free(block)
    first.close()
    second.close()
    for ordinal in (2, -1):
        with pytest.raises(CudaError, match="CUDA_VISIBLE_DEVICES") as caught:
            open_device(ordinal, layer=fake_box.layer)
        assert caught.value.code == "CUDA_ERROR_INVALID_DEVICE"


@pytest.mark.parametrize("fault", ["cuDeviceGet", "cuDeviceGetName", "cuDevicePrimaryCtxRetain"])
def test_a_failed_opening_leaves_nothing(fault: str, fake_box: Any) -> None:
    fake_box.fake.fail(fault, 1, 999)
    with pytest.raises(CudaError, match=f"{fault} failed"):
        open_device(layer=fake_box.layer)
    assert fake_box.fake.leaks() == {}


def test_the_environment_chooses_the_layer(fake_box: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEAD_CUDA", fake_box.layer)
    device = open_device()
    assert device.layer == fake_box.layer
    device.close()
    other = next(layer for layer in LAYERS if layer != fake_box.layer)
    monkeypatch.setenv("EDGEAD_CUDA", other)
    device = open_device(layer=fake_box.layer)  # the argument wins
    assert device.layer == fake_box.layer
    device.close()


def test_the_first_layer_is_the_default(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="cuda.bindings is not installed")
    monkeypatch.delenv("EDGEAD_CUDA", raising=False)
    device = open_device()
    assert device.layer == "cuda.bindings"
    device.close()


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_an_unknown_layer(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEAD_CUDA", "cupy" if how == "environment" else "pycuda")
    with pytest.raises(BackendError, match="'cupy' is unknown.*choose cuda.bindings or pycuda"):
        open_device(layer="cupy" if how == "argument" else None)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_is_not_installed(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda.bindings", "cuda.bindings.driver", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)  # its import raises ModuleNotFoundError
    extra = {"cuda.bindings": "tensorrt", "pycuda": "pycuda"}[layer]
    with pytest.raises(BackendError, match=rf'pip install "edgead\[{extra}\]"'):
        open_device(layer=layer)


def test_no_layer_is_installed() -> None:
    code = (
        "import importlib.util, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('cuda', 'pycuda'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    said = run(code + OPEN.format(layer=None))
    assert "no CUDA layer is installed" in said and "edgead[tensorrt]" in said


def test_bindings_that_hold_the_gil_are_named(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bindings = pytest.importorskip("cuda.bindings", reason="cuda.bindings is not installed")
    open_device(layer="cuda.bindings").close()
    assert not caplog.records
    monkeypatch.setattr(bindings, "__version__", "12.9.0")
    open_device(layer="cuda.bindings").close()
    assert "12.9.1" in caplog.text and "stops all Python threads" in caplog.text


def test_a_function_that_the_driver_lacks(fake_cuda: FakeCuda) -> None:
    """A call that the installed bindings know and the (fake) driver does not."""
    pytest.importorskip("cuda.bindings", reason="cuda.bindings is not installed")
    from edgead.runtime.cuda.bindings import BindingsDevice

    device = BindingsDevice(0)
    with pytest.raises(BackendError, match="driver lacks cuDeviceGetPCIBusId.*older than the installed"):
        device._call("cuDeviceGetPCIBusId", 100, 0)
    device.close()
