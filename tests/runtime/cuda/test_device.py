"""The contract of `Device`, over both layers and over the fake driver or a GPU."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.errors import BackendError, CudaError
from edgead.runtime.cuda import Device, HostBuffer


class Bench:
    """Two host buffers, device memory and a stream, with known bytes in the first buffer."""

    def __init__(self, device: Device, nbytes: int = 10_000, *, mapped: bool = False) -> None:
        self.device, self.nbytes = device, nbytes
        self.source: HostBuffer = device.alloc_host(nbytes, mapped=mapped)
        self.target: HostBuffer = device.alloc_host(nbytes, mapped=mapped)
        self.memory = device.alloc(nbytes)
        self.stream = device.create_stream()
        self.source.array[:] = np.random.default_rng(0).integers(0, 256, nbytes)

    def enqueue(self) -> None:
        """There and back again."""
        self.device.copy_to_device(self.memory, self.source.address, self.nbytes, self.stream)
        self.device.copy_to_host(self.target.address, self.memory, self.nbytes, self.stream)

    def free(self) -> None:
        self.device.synchronize_stream(self.stream)
        self.device.free(self.memory)
        self.device.free_host(self.source)
        self.device.free_host(self.target)
        self.device.destroy_stream(self.stream)


def check_copies(bench: Bench) -> None:
    bench.target.array[:] = 0
    bench.enqueue()
    bench.device.synchronize_stream(bench.stream)
    np.testing.assert_array_equal(bench.target.array, bench.source.array)


def check_graph(bench: Bench) -> None:
    bench.target.array[:] = 0
    bench.device.begin_capture(bench.stream)
    bench.enqueue()
    graph = bench.device.end_capture(bench.stream)
    bench.device.launch_graph(graph, bench.stream)
    bench.device.synchronize_stream(bench.stream)
    np.testing.assert_array_equal(bench.target.array, bench.source.array)
    bench.device.destroy_graph(graph)


@pytest.fixture
def bench(device: Device) -> Iterator[Bench]:
    made = Bench(device)
    yield made
    made.free()


@contextmanager
def waiting(device: Device, box: Any) -> Iterator[tuple[int, threading.Event]]:
    """A stream whose work waits until the event is set; the threads of a real driver wait there, too."""
    stream, go = device.create_stream(), threading.Event()
    box.launch(stream, lambda: go.wait(20))
    try:
        yield stream, go
    finally:
        go.set()
        device.synchronize_stream(stream)
        device.destroy_stream(stream)


def test_info(device: Device, box: Any) -> None:
    info = device.info
    assert device.layer == box.layer
    assert info.name and info.memory_bytes > 0
    assert info.sm == f"sm{info.compute_capability[0]}{info.compute_capability[1]}"
    major, minor = map(int, info.driver.split("."))
    assert major >= 11 and minor >= 0
    free, total = device.memory_info()
    assert 0 < free <= total <= info.memory_bytes


def test_host_buffers(device: Device) -> None:
    for nbytes in (1, 100, mmap.PAGESIZE, 5 * mmap.PAGESIZE + 1):
        buffer = device.alloc_host(nbytes)
        assert buffer.array.shape == (nbytes,) and buffer.array.dtype == np.uint8
        assert buffer.address == buffer.array.ctypes.data and buffer.address % mmap.PAGESIZE == 0
        assert buffer.device_address == 0 and not buffer.array.any()
        buffer.array[:] = 7
        device.free_host(buffer)
        assert (buffer.array == 7).all()
        buffer.array[:] = 8  # the memory is ours


def test_mapped_host_memory_is_seen_by_the_device(device: Device) -> None:
    bench = Bench(device, mapped=True)
    assert bench.source.device_address and bench.target.device_address
    # From mapped memory through the device's address, to host memory: no copy was made before.
    device.copy_to_host(bench.target.address, bench.source.device_address, bench.nbytes, bench.stream)
    device.synchronize_stream(bench.stream)
    np.testing.assert_array_equal(bench.target.array, bench.source.array)
    bench.free()


def test_copies_there_and_back(bench: Bench) -> None:
    check_copies(bench)


def test_copies_of_parts(bench: Bench, device: Device) -> None:
    device.copy_to_device(bench.memory + 100, bench.source.address + 10, 50, bench.stream)
    device.copy_to_host(bench.target.address + 1000, bench.memory + 120, 30, bench.stream)
    device.synchronize_stream(bench.stream)
    np.testing.assert_array_equal(bench.target.array[1000:1030], bench.source.array[30:60])
    assert not bench.target.array[:1000].any() and not bench.target.array[1030:].any()


def test_a_stream_keeps_the_order_and_does_not_wait_for_another(
    bench: Bench, device: Device, box: Any
) -> None:
    done: list[int] = []
    with waiting(device, box) as (stream, go):
        for number in range(5):
            box.launch(stream, lambda number=number: done.append(number))
        check_copies(bench)  # on its own stream
        assert device.stream_is_idle(bench.stream) and not device.stream_is_idle(stream)
        assert done == []
        go.set()
        device.synchronize_stream(stream)
        assert done == [0, 1, 2, 3, 4] and device.stream_is_idle(stream)


def test_an_event_makes_another_stream_wait(device: Device, box: Any) -> None:
    done: list[str] = []
    event, other = device.create_event(), device.create_stream()
    with waiting(device, box) as (stream, go):
        box.launch(stream, lambda: done.append("first"))
        device.record_event(event, stream)
        device.wait_event(other, event)
        box.launch(other, lambda: done.append("second"))
        assert not device.stream_is_idle(other)
        go.set()
        device.synchronize_stream(other)
    assert done == ["first", "second"]
    device.destroy_stream(other)
    device.destroy_event(event)


def test_events_tell_the_time(bench: Bench, device: Device, box: Any) -> None:
    start, end = device.create_event(timing=True), device.create_event(timing=True)
    device.record_event(start, bench.stream)
    box.launch(bench.stream, lambda: time.sleep(0.02))
    device.record_event(end, bench.stream)
    device.synchronize_event(end)
    assert 19 < device.elapsed_ms(start, end) < 5000
    quiet = device.create_event()
    device.record_event(quiet, bench.stream)
    device.synchronize_event(quiet)
    with pytest.raises(CudaError) as caught:
        device.elapsed_ms(start, quiet)
    assert caught.value.code == "CUDA_ERROR_INVALID_HANDLE"
    for event in (start, end, quiet):
        device.destroy_event(event)


def test_a_graph_repeats_what_was_captured(bench: Bench, device: Device, box: Any) -> None:
    calls: list[int] = []
    device.begin_capture(bench.stream)
    bench.enqueue()
    box.launch(bench.stream, lambda: calls.append(int(bench.target.array[0])))
    graph = device.end_capture(bench.stream)
    device.synchronize_stream(bench.stream)
    assert not bench.target.array.any() and not calls  # captured, not run
    for value in (3, 200, 5):
        bench.source.array[:] = value
        device.launch_graph(graph, bench.stream)
        device.synchronize_stream(bench.stream)
        assert (bench.target.array == value).all()
    assert calls == [3, 200, 5]
    device.destroy_graph(graph)


@pytest.mark.parametrize("end", ["end", "abort"])
def test_a_forbidden_call_spoils_a_capture_and_the_stream_recovers(
    end: str, bench: Bench, device: Device
) -> None:
    device.begin_capture(bench.stream)
    bench.enqueue()
    with pytest.raises(CudaError, match="captur") as caught:
        device.synchronize_stream(bench.stream)
    assert caught.value.code == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    if end == "end":
        with pytest.raises(CudaError, match="enqueue") as caught:
            device.end_capture(bench.stream)
        assert caught.value.code == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    else:
        device.abort_capture(bench.stream)
    device.abort_capture(bench.stream)  # without a capture: nothing
    check_copies(bench)


def test_an_aborted_capture_leaves_nothing(bench: Bench, device: Device) -> None:
    device.begin_capture(bench.stream)
    bench.enqueue()
    device.abort_capture(bench.stream)
    device.synchronize_stream(bench.stream)
    assert not bench.target.array.any()
    check_graph(bench)


WAITS: list[Callable[[Device, int, int], None]] = [
    lambda device, stream, event: device.synchronize_stream(stream),
    lambda device, stream, event: device.synchronize_event(event),
    lambda device, stream, event: device.synchronize(),
]


@pytest.mark.parametrize("wait", WAITS, ids=["stream", "event", "device"])
@pytest.mark.parametrize("timing", [False, True], ids=["blocking", "timing"])
def test_a_wait_gives_up_the_gil(timing: bool, wait: Any, device: Device, box: Any) -> None:
    """The work needs Python's lock: a wait that kept it would never end (the fake's gives up)."""
    stream, event = device.create_stream(), device.create_event(timing=timing)
    ran: list[str] = []
    for _ in range(20):
        box.launch(stream, lambda: ran.append(threading.current_thread().name))
    device.record_event(event, stream)
    wait(device, stream, event)
    assert len(ran) == 20 and threading.current_thread().name not in ran
    device.destroy_event(event)
    device.destroy_stream(stream)


def test_any_thread_may_come(device: Device, box: Any, run_in_thread: Any) -> None:
    """Made in one thread, used in a second, destroyed in a third; they end before the device."""

    def make() -> Bench:
        device.make_current()
        device.make_current()
        return Bench(device)

    def use(bench: Bench) -> None:
        device.make_current()
        event = device.create_event()
        check_graph(bench)
        device.record_event(event, bench.stream)
        device.synchronize_event(event)
        device.destroy_event(event)

    def free(bench: Bench) -> None:
        device.make_current()
        bench.free()

    benches = [run_in_thread(make) for _ in range(3)]
    threads = [threading.Thread(target=use, args=(bench,)) for bench in benches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for bench in benches:
        np.testing.assert_array_equal(bench.target.array, bench.source.array)
        run_in_thread(lambda bench=bench: free(bench))


CALLS: list[Callable[[Bench], Any]] = [
    lambda bench: bench.device.alloc(10),
    lambda bench: bench.device.free(bench.memory),
    lambda bench: bench.device.alloc_host(10),
    lambda bench: bench.device.create_stream(),
    lambda bench: bench.device.create_event(),
    lambda bench: bench.device.synchronize(),
    lambda bench: bench.device.memory_info(),
]


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_a_thread_that_did_not_make_it_current(call: Any, bench: Bench, run_in_thread: Any) -> None:
    with pytest.raises(CudaError, match=r"make_current\(\) in each thread") as caught:
        run_in_thread(lambda: call(bench))
    assert caught.value.code == "CUDA_ERROR_INVALID_CONTEXT" and not caught.value.is_sticky


@pytest.mark.parametrize(
    "call",
    [
        lambda bench: bench.device.alloc(0),
        lambda bench: bench.device.copy_to_device(0, bench.source.address, 10, bench.stream),
        lambda bench: bench.device.copy_to_host(bench.target.address, 0, 10, bench.stream),
    ],
)
def test_wrong_arguments(call: Any, bench: Bench) -> None:
    with pytest.raises(CudaError, match="mistake in the calling code") as caught:
        call(bench)
    assert caught.value.code in ("CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_INVALID_HANDLE")
    check_copies(bench)


def test_too_much_host_memory(device: Device) -> None:
    for nbytes in (0, -5, 1 << 60):
        with pytest.raises(BackendError, match=f"{nbytes} bytes"):
            device.alloc_host(nbytes)


def test_close(box: Any, run_in_thread: Any) -> None:
    device = box.open()
    buffer = device.alloc_host(5000)  # left over on purpose
    buffer.array[:] = 9
    run_in_thread(device.close)
    device.close()
    device.reset()  # nothing to reset any more
    with pytest.raises(BackendError, match="closed or reset; open it again"):
        device.make_current()
    assert (buffer.array == 9).all()
    buffer.array[:] = 10
    again = box.open()
    Bench(again).free()
    again.close()


def test_two_devices_share_one_context(box: Any) -> None:
    first, second = box.open(), box.open()
    bench = Bench(first)
    second.close()
    first.make_current()
    check_copies(bench)
    bench.free()
    first.close()


@pytest.mark.parametrize("cycles", [500])
def test_opening_and_closing_leaves_nothing(cycles: int, box: Any) -> None:
    """Flat: a leak of one of the buffers (256 KiB each) would make 100 MB."""

    def cycle() -> None:
        device = box.open()
        bench = Bench(device, 1 << 18)
        bench.source.array[:] = bench.target.array[:] = 1
        check_graph(bench)
        bench.free()
        device.close()

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE

    if box.fake is None:
        cycles = 50  # a real context takes its time
    for _ in range(cycles // 10):
        cycle()
    before = resident_bytes()
    for _ in range(cycles - cycles // 10):
        cycle()
    assert resident_bytes() - before < 16 << 20
    assert box.fake is None or box.fake.leaks() == {}
