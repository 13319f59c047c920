"""What the CUDA layer makes of every fault, over the fake driver."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgead.errors import BackendError, CudaError
from edgead.runtime.cuda import Device
from edgead.runtime.cuda.errors import cuda_error

OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED, NO_DEVICE, LOST = 2, 700, 719, 100, 46
SHAKEN = 1 << 16


class Parts:
    """One of everything, to call with."""

    def __init__(self, device: Device) -> None:
        self.stream = device.create_stream()
        self.event, self.start = device.create_event(), device.create_event(timing=True)
        self.host, self.memory = device.alloc_host(SHAKEN), device.alloc(SHAKEN)
        device.record_event(self.start, self.stream)
        device.begin_capture(self.stream)
        device.copy_to_device(self.memory, self.host.address, SHAKEN, self.stream)
        self.graph = device.end_capture(self.stream)
        device.synchronize_stream(self.stream)

    def free(self, device: Device) -> None:
        device.destroy_graph(self.graph)
        device.free(self.memory)
        device.free_host(self.host)
        device.destroy_event(self.event)
        device.destroy_event(self.start)
        device.destroy_stream(self.stream)


CALLS: dict[str, Callable[[Device, Parts], Any]] = {
    "cuCtxSetCurrent": lambda d, p: d.make_current(),
    "cuCtxSynchronize": lambda d, p: d.synchronize(),
    "cuMemGetInfo": lambda d, p: d.memory_info(),
    "cuStreamCreate": lambda d, p: d.create_stream(),
    "cuStreamSynchronize": lambda d, p: d.synchronize_stream(p.stream),
    "cuStreamQuery": lambda d, p: d.stream_is_idle(p.stream),
    "cuEventCreate": lambda d, p: d.create_event(),
    "cuEventRecord": lambda d, p: d.record_event(p.event, p.stream),
    "cuEventSynchronize": lambda d, p: d.synchronize_event(p.event),
    "cuStreamWaitEvent": lambda d, p: d.wait_event(p.stream, p.event),
    "cuEventElapsedTime": lambda d, p: d.elapsed_ms(p.start, p.start),
    "cuMemAlloc": lambda d, p: d.alloc(100),
    "cuMemHostRegister": lambda d, p: d.alloc_host(100),
    "cuMemHostGetDevicePointer": lambda d, p: d.alloc_host(100, mapped=True),
    "cuMemcpyHtoDAsync": lambda d, p: d.copy_to_device(p.memory, p.host.address, 10, p.stream),
    "cuMemcpyDtoHAsync": lambda d, p: d.copy_to_host(p.host.address, p.memory, 10, p.stream),
    "cuStreamBeginCapture": lambda d, p: d.begin_capture(p.stream),
    "cuStreamEndCapture": lambda d, p: d.end_capture(p.stream),
    "cuGraphInstantiate": lambda d, p: captured(d, p.stream),
    "cuGraphLaunch": lambda d, p: d.launch_graph(p.graph, p.stream),
    "cuGraphExecDestroy": lambda d, p: d.destroy_graph(p.graph),
    "cuMemHostUnregister": lambda d, p: d.free_host(p.host),
}
# pycuda does not raise them, but tells stderr.
CLEAN_UPS: dict[str, Callable[[Device, Parts], Any]] = {
    "cuStreamDestroy": lambda d, p: d.destroy_stream(p.stream),
    "cuEventDestroy": lambda d, p: d.destroy_event(p.event),
    "cuMemFree": lambda d, p: d.free(p.memory),
}


def captured(device: Device, stream: int) -> int:
    device.begin_capture(stream)
    return device.end_capture(stream)


@pytest.mark.parametrize("name", [*CALLS, *CLEAN_UPS])
def test_every_call_is_checked(name: str, fake_box: Any, capfd: Any) -> None:
    device = fake_box.open()
    parts = Parts(device)
    fake_box.fake.fail(name, 1, 801)
    if name in CLEAN_UPS and fake_box.layer == "pycuda":
        CLEAN_UPS[name](device, parts)
        assert f"{name} failed: operation not supported" in capfd.readouterr().err
        device.close()
        return
    with pytest.raises(CudaError) as caught:
        (CALLS | CLEAN_UPS)[name](device, parts)
    assert caught.value.code == "CUDA_ERROR_NOT_SUPPORTED" and not caught.value.is_sticky
    said = rf"{name}\w* failed with CUDA_ERROR_NOT_SUPPORTED \(801: operation not supported\): "
    assert re.match(said, str(caught.value))
    parts.free(device)  # nothing was lost by the failure
    device.close()


@pytest.mark.parametrize(
    ("code", "name", "advice", "is_sticky"),
    [
        (2, "OUT_OF_MEMORY", "Close other programs on this GPU", False),
        (46, "DEVICE_UNAVAILABLE", "nvidia-smi", True),
        (214, "ECC_UNCORRECTABLE", "dmesg", True),
        (700, "ILLEGAL_ADDRESS", "reset the device and open it again", True),
        (702, "LAUNCH_TIMEOUT", "reset the device", True),
        (719, "LAUNCH_FAILED", "reset the device", True),
        (999, "UNKNOWN", "reset the device", True),
        (709, "CONTEXT_IS_DESTROYED", "Open the device again", True),
        (4, "DEINITIALIZED", "before the interpreter ends", False),
        (900, "STREAM_CAPTURE_UNSUPPORTED", "without a graph first", False),
        (400, "INVALID_HANDLE", "mistake in the calling code", False),
    ],
)
def test_what_a_code_means(code: int, name: str, advice: str, is_sticky: bool, fake_box: Any) -> None:
    device = fake_box.open()
    fake_box.fake.fail("cuMemAlloc", 1, code, times=2)
    with pytest.raises(CudaError) as caught:
        device.alloc(100)
    assert (caught.value.code, caught.value.is_sticky) == (f"CUDA_ERROR_{name}", is_sticky)
    assert f"({code}: " in str(caught.value) and advice in str(caught.value)
    device.close()


def test_names_are_those_of_the_driver() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    for code in range(1, 1000):
        if "CUDA_ERROR_" in (ours := cuda_error("cuInit", code).code) and not ours[-1].isdigit():
            assert ours == driver.CUresult(code).name


@pytest.mark.parametrize("code", [220, 226, 721])
def test_these_end_the_context_too(code: int) -> None:
    """As cuda.h of CUDA 13.0 says of them: errors of NVLink, contained ones, tensor memory."""
    assert cuda_error("cuStreamSynchronize", code).is_sticky


def test_a_code_that_nobody_knows_passes_through(fake_box: Any) -> None:
    device = fake_box.open()
    fake_box.fake.fail("cuMemGetInfo", 1, 12345)
    with pytest.raises(CudaError, match="cuMemGetInfo failed") as caught:
        device.memory_info()
    if fake_box.layer == "pycuda":
        assert "pycuda does not tell" in str(caught.value)
    else:
        assert caught.value.code == "CUDA_ERROR_12345"
    device.close()


def test_memory_runs_out_and_comes_back(fake_box: Any) -> None:
    fake_box.fake.set_device(memory_bytes=1 << 20)
    device = fake_box.open()
    blocks = [device.alloc(1 << 18) for _ in range(4)]
    with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
        device.alloc(1)
    assert device.memory_info() == (0, 1 << 20)
    for block in blocks:
        device.free(block)
    device.free(device.alloc(1 << 20))
    device.close()


def test_double_free_is_an_error(fake_box: Any) -> None:
    device = fake_box.open()
    parts = Parts(device)
    parts.free(device)
    for free, handle in (
        (device.free, parts.memory),
        (device.destroy_stream, parts.stream),
        (device.destroy_event, parts.event),
        (device.destroy_graph, parts.graph),
        (device.free_host, parts.host),
    ):
        with pytest.raises(CudaError):
            free(handle)
    device.close()


FATAL = {
    "a call": lambda fake: fake.fail("cuGraphLaunch", 1, ILLEGAL_ADDRESS, sticky=True),
    "work on a stream": lambda fake: fake.fail("work", 1, ILLEGAL_ADDRESS),
}


@pytest.mark.parametrize("fault", FATAL)
def test_after_a_fatal_error_everything_fails_until_a_reset(fault: str, fake_box: Any) -> None:
    device = fake_box.open()
    parts = Parts(device)
    parts.host.array[:] = 5
    FATAL[fault](fake_box.fake)
    with pytest.raises(CudaError, match="reset the device and open it again") as caught:
        device.launch_graph(parts.graph, parts.stream)
        device.synchronize_stream(parts.stream)
    assert caught.value.code == "CUDA_ERROR_ILLEGAL_ADDRESS" and caught.value.is_sticky
    for name, call in CALLS.items():
        if name not in ("cuCtxSetCurrent", "cuGraphInstantiate"):
            with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
                call(device, parts)
    device.reset()
    device.close()
    with pytest.raises(BackendError, match="closed or reset"):
        device.make_current()
    assert fake_box.fake.leaks() == {}
    assert (parts.host.array == 5).all()
    parts.host.array[:] = 6  # still ours

    again = fake_box.open()
    renewed = Parts(again)
    again.launch_graph(renewed.graph, renewed.stream)
    again.synchronize_stream(renewed.stream)
    renewed.free(again)
    again.close()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_the_end_comes_from_another_thread(how: str, fake_box: Any, run_in_thread: Any) -> None:
    """After a fatal error, and not from the thread that opened the device."""
    for _ in range(20):  # more often than a thread's stack of contexts is deep
        device = run_in_thread(fake_box.open)
        device.make_current()
        Parts(device)
        fake_box.fake.fail("work", 1, LAUNCH_FAILED)
        stream = device.create_stream()
        fake_box.launch(stream, lambda: None)
        with pytest.raises(CudaError, match="LAUNCH_FAILED"):
            device.synchronize_stream(stream)
        getattr(device, how)()
        assert fake_box.fake.leaks() == {}


def test_a_reset_with_work_in_flight(fake_box: Any) -> None:
    device = fake_box.open()
    parts = Parts(device)
    ran: list[int] = []
    with fake_box.fake.held():
        for number in range(5):
            fake_box.launch(parts.stream, lambda number=number: ran.append(number))
            device.launch_graph(parts.graph, parts.stream)
        device.reset()
    assert fake_box.fake.leaks() == {} and ran == []
    parts.host.array[:] = 1


def test_a_reset_by_somebody_else(fake_box: Any) -> None:
    mine, other = fake_box.open(), fake_box.open()
    stream = mine.create_stream()
    other.reset()
    with pytest.raises(CudaError) as caught:
        mine.make_current()
        mine.synchronize_stream(stream)
    assert caught.value.code in ("CUDA_ERROR_INVALID_CONTEXT", "CUDA_ERROR_CONTEXT_IS_DESTROYED")
    mine.close()


def test_devices_that_share_a_gpu_reset_it_once_for_one_fault(fake_box: Any) -> None:
    """The second reset would take the context that the first one has opened anew meanwhile."""
    for _ in range(3):  # the next fault is another one
        first, second = fake_box.open(), fake_box.open()
        fake_box.fake.fail("work", 1, LAUNCH_FAILED)
        first.make_current()
        stream = first.create_stream()
        fake_box.launch(stream, lambda: None)
        with pytest.raises(CudaError, match="LAUNCH_FAILED"):
            first.synchronize_stream(stream)
        first.reset()
        again = fake_box.open()
        parts = Parts(again)
        with pytest.raises(CudaError, match="CONTEXT_IS_DESTROYED") as caught:
            second.make_current()
        assert caught.value.is_sticky
        second.reset()
        again.make_current()
        again.launch_graph(parts.graph, parts.stream)
        again.synchronize_stream(parts.stream)
        parts.free(again)
        again.close()
        assert fake_box.fake.leaks() == {}


def test_a_reset_that_fails_is_left_to_the_next_device(fake_box: Any) -> None:
    first, second = fake_box.open(), fake_box.open()
    name = "cuDevicePrimaryCtxReset"
    fake_box.fake.fail(name, 1, ILLEGAL_ADDRESS)
    with pytest.raises(CudaError, match=name):
        first.reset()
    second.make_current()
    second.create_stream()
    second.reset()
    assert fake_box.fake.leaks() == {}


def test_a_lost_gpu(fake_box: Any) -> None:
    """Nothing works, not even the reset; the frames are still there."""
    device = fake_box.open()
    parts = Parts(device)
    parts.host.array[:] = np.arange(SHAKEN) % 251
    fake_box.fake.fail("*", 1, LOST, times=-1)
    fake_box.fake.may_leak = True
    wait = lambda: device.synchronize_stream(parts.stream)  # noqa: E731
    for call in (device.make_current, device.synchronize, wait):
        with pytest.raises(CudaError, match="in use by another process, lost, or not ready"):
            call()
    with pytest.raises(CudaError, match="DEVICE_UNAVAILABLE"):
        device.reset()
    with pytest.raises(BackendError, match="closed or reset"):
        device.make_current()
    with pytest.raises(CudaError, match="DEVICE_UNAVAILABLE"):
        fake_box.open()
    np.testing.assert_array_equal(parts.host.array, np.arange(SHAKEN) % 251)
    parts.host.array[:] = 0


def test_a_failed_allocation_of_a_mapped_buffer_leaves_nothing(fake_box: Any) -> None:
    device = fake_box.open()
    for nth in (1, 2):
        fake_box.fake.fail("cuMemHostGetDevicePointer", nth, OUT_OF_MEMORY)
        with pytest.raises(CudaError):
            for _ in range(nth):
                buffer = device.alloc_host(100, mapped=True)
        assert fake_box.fake.count("registrations") == nth - 1
    device.free_host(buffer)
    device.close()


def test_graph_calls_in_order(fake_box: Any) -> None:
    device = fake_box.open()
    parts = Parts(device)
    fake_box.fake.clear_log()
    graph = captured(device, parts.stream)
    device.launch_graph(graph, parts.stream)
    device.synchronize_stream(parts.stream)
    device.destroy_graph(graph)
    assert fake_box.fake.log() == [
        "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy",
        "cuGraphLaunch", "cuStreamSynchronize", "cuGraphExecDestroy",
    ]  # fmt: skip
    assert fake_box.fake.pageable_copies == fake_box.fake.count("default_stream_uses") == 0
    parts.free(device)
    device.close()
