"""The fake driver finds the mistakes that it is there to find."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgead.errors import CudaError
from edgead.runtime.cuda import Device
from edgead.runtime.cuda.host import host_pages
from tests.fake_cuda import FakeCuda

LEAKS: dict[str, Callable[[Device], Any]] = {
    "stream": lambda device: device.create_stream(),
    "event": lambda device: device.create_event(),
    "memory": lambda device: device.alloc(10),
    "host memory": lambda device: device.alloc_host(10),
    "graph": lambda device: graph_of_nothing(device),
    "device": lambda device: None,
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_leak_fails_the_test(what: str, fake_box: Any) -> None:
    device = fake_box.open()
    LEAKS[what](device)
    with pytest.raises(AssertionError, match="not freed"):
        fake_box.fake.finish()  # ends everything


def graph_of_nothing(device: Any) -> int:
    stream = device.create_stream()
    device.begin_capture(stream)
    graph = device.end_capture(stream)
    device.destroy_stream(stream)
    return graph


def test_an_overrun_is_found(fake_cuda: FakeCuda) -> None:
    address = allocate(fake_cuda, 100)
    fake_cuda.device_array(address, 100)[:] = 1
    ctypes.c_uint8.from_address(address + 100).value = 1
    free(fake_cuda, address)
    assert fake_cuda.count("overruns") == 1
    with pytest.raises(AssertionError, match="1 writes beyond the end"):
        fake_cuda.finish()


def test_freeing_what_is_in_flight_is_a_fault(fake_box: Any) -> None:
    device = fake_box.open()
    stream, host, memory = device.create_stream(), device.alloc_host(10), device.alloc(10)
    with fake_box.fake.held():
        device.copy_to_device(memory, host.address, 10, stream)
        device.free(memory)
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        device.synchronize_stream(stream)
    device.reset()


def test_a_copy_beyond_the_memory_is_refused(fake_box: Any) -> None:
    device = fake_box.open()
    stream, host, memory = device.create_stream(), device.alloc_host(100), device.alloc(100)
    for offset, nbytes in ((0, 101), (1, 100), (-1, 10), (100, 1)):
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            device.copy_to_device(memory + offset, host.address, nbytes, stream)
    assert fake_box.fake.count("misuses") == 4
    device.reset()


def test_copies_of_pageable_memory_are_counted(fake_box: Any) -> None:
    device = fake_box.open()
    stream, memory, pages = device.create_stream(), device.alloc(10), host_pages(10)
    pages[:10] = 3
    device.copy_to_device(memory, pages.ctypes.data, 10, stream)
    pages[:10] = 4  # the driver has taken a copy
    device.copy_to_host(pages.ctypes.data, memory, 10, stream)
    device.synchronize_stream(stream)
    assert (pages[:10] == 3).all() and fake_box.fake.pageable_copies == 2
    device.reset()


def test_a_kernel_that_fails(fake_box: Any) -> None:
    device, fake = fake_box.open(), fake_box.fake
    stream = device.create_stream()
    assert fake.launch(stream, lambda: 719) == 0
    with pytest.raises(CudaError, match="LAUNCH_FAILED"):
        device.synchronize_stream(stream)
    assert fake.launch(stream, lambda: None) == 719
    device.reset()


def test_a_kernel_that_raises_fails_the_test(fake_box: Any) -> None:
    device, fake = fake_box.open(), fake_box.fake
    stream = device.create_stream()
    fake.launch(stream, lambda: 1 // 0)
    with pytest.raises(CudaError, match="LAUNCH_FAILED"):
        device.synchronize_stream(stream)
    device.reset()
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        fake.finish()
    fake.raised.clear()


def test_a_wait_that_holds_the_gil_gives_up(fake_cuda: FakeCuda) -> None:
    """Proof that `test_a_wait_gives_up_the_gil` can fail: here the wait keeps Python's lock."""
    library = ctypes.PyDLL(fake_cuda.library._name)
    context, stream = make_context(fake_cuda), ctypes.c_void_p()
    assert fake_cuda.library.cuStreamCreate(ctypes.byref(stream), 1) == 0
    fake_cuda.patience_ms = 200
    ran: list[int] = []
    fake_cuda.library.fake_cuda_hold(1)
    assert fake_cuda.launch(stream.value or 0, lambda: ran.append(1)) == 0
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(60)  # so that the stream's thread cannot get the lock between these two
    try:
        library.fake_cuda_hold(0)
        assert library.cuStreamSynchronize(stream) == 909  # CUDA_ERROR_TIMEOUT
    finally:
        sys.setswitchinterval(interval_s)
    fake_cuda.patience_ms = 20_000
    assert fake_cuda.library.cuStreamSynchronize(stream) == 0 and ran == [1]
    fake_cuda.library.cuStreamDestroy_v2(stream)
    leave_context(fake_cuda, context)


def test_unforked_work_of_a_capture(fake_box: Any) -> None:
    """Another stream joins a capture through an event, and must be waited for before the end."""
    device = fake_box.open()
    first, second, event, back = (
        device.create_stream(), device.create_stream(), device.create_event(), device.create_event(),
    )  # fmt: skip
    order: list[int] = []
    for is_joined in (False, True):
        device.begin_capture(first)
        device.record_event(event, first)
        device.wait_event(second, event)
        fake_box.launch(second, lambda: order.append(2))
        if not is_joined:
            with pytest.raises(CudaError, match="UNJOINED"):
                device.end_capture(first)
            continue
        device.record_event(back, second)
        device.wait_event(first, back)
        fake_box.launch(first, lambda: order.append(1))
        graph = device.end_capture(first)
        device.launch_graph(graph, first)
        device.synchronize_stream(first)
        device.destroy_graph(graph)
    assert order == [2, 1]
    device.reset()


def test_capture_ends_in_its_own_thread(fake_box: Any, run_in_thread: Any) -> None:
    device = fake_box.open()
    stream = device.create_stream()
    device.begin_capture(stream)

    def end() -> None:
        device.make_current()
        device.end_capture(stream)

    with pytest.raises(CudaError, match="WRONG_THREAD"):
        run_in_thread(end)
    device.destroy_graph(device.end_capture(stream))
    device.reset()


def test_another_thread_may_allocate_during_a_capture(fake_box: Any, run_in_thread: Any) -> None:
    """Captures are thread local."""
    device = fake_box.open()
    stream = device.create_stream()
    device.begin_capture(stream)

    def allocate_elsewhere() -> None:
        device.make_current()
        device.free(device.alloc(10))

    run_in_thread(allocate_elsewhere)
    with pytest.raises(CudaError, match="CAPTURE_UNSUPPORTED"):
        device.alloc(10)
    device.abort_capture(stream)
    device.free(device.alloc(10))
    device.reset()


def test_outside_of_the_fixture_there_is_no_gpu(fake_cuda: FakeCuda) -> None:
    fake_cuda.finish()
    assert fake_cuda.library.cuInit(0) == 100
    fake_cuda.start()
    assert fake_cuda.library.cuInit(0) == 0


def test_torch_is_not_disturbed(fake_cuda: FakeCuda) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert not torch.cuda.is_available()
    layer = torch.nn.Conv2d(3, 4, 3)
    assert np.isfinite(layer(torch.ones(1, 3, 8, 8)).detach().numpy()).all()


def make_context(fake: FakeCuda) -> int:
    context = ctypes.c_void_p()
    assert fake.library.cuInit(0) == 0
    assert fake.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert fake.library.cuCtxSetCurrent(context) == 0
    return context.value or 0


def leave_context(fake: FakeCuda, context: int) -> None:
    assert fake.library.cuCtxSetCurrent(None) == 0
    assert fake.library.cuDevicePrimaryCtxRelease_v2(0) == 0


def allocate(fake: FakeCuda, nbytes: int) -> int:
    make_context(fake)
    address = ctypes.c_void_p()
    assert fake.library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(nbytes)) == 0
    return address.value or 0


def free(fake: FakeCuda, address: int) -> None:
    assert fake.library.cuMemFree_v2(ctypes.c_void_p(address)) == 0
    leave_context(fake, 0)
