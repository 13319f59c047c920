"""What only a real GPU can show: a kernel that faults, and the way back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgead.runtime.cuda import LAYERS
from tests.runtime.cuda.conftest import reason_against_gpu, skip_without

# In a process of its own: the fault makes the primary context, which torch shares, unusable.
CODE = '''
import ctypes, sys
from edgead.errors import CudaError
from edgead.runtime.cuda import open_device

PTX = b""".version 6.4
.target sm_75
.address_size 64
.visible .entry fault() { .reg .b64 %rd<2>; mov.u64 %rd1, 16; st.global.u64 [%rd1], %rd1; ret; }
"""
driver = ctypes.CDLL("libcuda.so.1")
device = open_device(layer=sys.argv[1])
device.make_current()
stream, buffer = device.create_stream(), device.alloc_host(1000)
buffer.array[:] = 5
module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cuModuleLoadData(ctypes.byref(module), PTX) == 0
assert driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"fault") == 0
one = [ctypes.c_uint(1)] * 6
assert driver.cuLaunchKernel(kernel, *one, 0, ctypes.c_void_p(stream), None, None) == 0
codes = []
for call in (lambda: device.synchronize_stream(stream), device.synchronize, lambda: device.alloc(10)):
    try:
        call()
    except CudaError as error:
        assert error.is_sticky, error
        codes.append(error.code)
print("fault", *codes)
device.reset()
assert (buffer.array == 5).all()
again = open_device(layer=sys.argv[1])
again.make_current()
stream, address = again.create_stream(), again.alloc(1000)
buffer, target = again.alloc_host(1000), again.alloc_host(1000)
buffer.array[:] = 6
again.copy_to_device(address, buffer.address, 1000, stream)
again.copy_to_host(target.address, address, 1000, stream)
again.synchronize_stream(stream)
assert (target.array == 6).all()
again.free(address)
again.destroy_stream(stream)
again.close()
print("recovered")
'''


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS)
def test_a_reset_is_the_way_out_of_a_fault(layer: str) -> None:
    """If this fails on a driver, `Device.reset` is no remedy there: the process must be started anew."""
    skip_without(layer)
    reason = reason_against_gpu()
    if reason:
        pytest.skip(f"needs an NVIDIA GPU: {reason}")
    done = subprocess.run(
        [sys.executable, "-c", CODE, layer], capture_output=True, text=True, timeout=120, check=False
    )
    fault = "fault" + " CUDA_ERROR_ILLEGAL_ADDRESS" * 3
    assert done.stdout.splitlines() == [fault, "recovered"], done.stderr
