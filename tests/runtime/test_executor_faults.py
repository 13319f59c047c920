"""The executor when its back end fails, and in the long run: nothing lost, twice or left over."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead import BackendError, BusyError, Executor, Result
from edgead.errors import CudaError
from tests.fake_backend import PATIENCE_S, TORN, FakeDevice, exercise, numbered, wait_until

Make = Callable[..., FakeDevice]


def lost(message: str) -> CudaError:
    return CudaError(message, "CUDA_ERROR_ILLEGAL_ADDRESS")


def scores(futures: list[Future[Result]]) -> list[float]:
    return [future.result(PATIENCE_S).score for future in futures]


def errors(futures: list[Future[Result]]) -> list[str]:
    found = [future.exception(PATIENCE_S) for future in futures]
    assert all(type(error) is BackendError for error in found)
    return [str(error) for error in found]


def submit_in_flight(executor: Executor, device: FakeDevice, numbers: range) -> list[Future[Result]]:
    """Submits as many frames as there are slots, so that all are on their way at once."""
    device.pause()
    futures = [executor.submit(numbered(number)) for number in numbers]
    device.gate.set()
    return futures


# --- recovery


@pytest.mark.parametrize("is_sticky", [False, True])
@pytest.mark.parametrize("error", [lost, RuntimeError, MemoryError])
@pytest.mark.parametrize("nth", [4, 5, 6])
@pytest.mark.parametrize("call", ["launch", "wait"])
def test_after_a_fault_everything_runs_again(
    call: str,
    nth: int,
    error: Callable[[str], Exception],
    is_sticky: bool,
    new_device: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = new_device(faults={(call, nth)}, error=error, is_sticky=is_sticky)
    done: list[float] = []
    with device.executor() as executor:
        first = executor._worker.backend
        for start in range(0, 12, 3):
            futures = submit_in_flight(executor, device, range(start, start + 3))
            for future in futures:
                future.add_done_callback(lambda future: done.append(future.result().score))
            assert scores(futures) == list(range(start, start + 3))
        stats = executor.stats
        assert first.is_closed and device.is_open == [executor._worker.backend]  # type: ignore[attr-defined]
    assert done == list(range(12))
    assert (stats.submitted, stats.completed, stats.failed, stats.recoveries) == (12, 12, 0, 1)
    assert (device.calls["open"], device.calls["slot"]) == (2, 6)
    assert caplog.text.count("it is opened again") == 1
    if not is_sticky:  # else what was in flight before fails first
        assert f"back end fake failed ({call} {nth} failed): it is opened again" in caplog.text


def test_a_lease_outlives_the_back_end(new_device: Make) -> None:
    """A camera writes into memory of a back end that fails meanwhile."""
    device = new_device(faults={("wait", 1)})
    with device.executor() as executor:
        with (lease := executor.slot()) as buffer:
            np.copyto(buffer[:4], numbered(7)[:4])
            assert executor.submit(numbered(1)).result(PATIENCE_S).score == 1
            assert executor.stats.recoveries == 1
            np.copyto(buffer[4:], numbered(7)[4:])
        assert lease.future.result(PATIENCE_S).score == 7
        assert scores(submit_in_flight(executor, device, range(3))) == [0, 1, 2]


def test_a_lease_that_submits_nothing_outlives_the_back_end(new_device: Make) -> None:
    device = new_device(faults={("wait", 1)})
    with device.executor(slots=2) as executor:
        with pytest.raises(TimeoutError), executor.slot() as buffer:
            assert executor.submit(numbered(1)).result(PATIENCE_S).score == 1
            buffer[:] = 77
            raise TimeoutError
        assert scores(submit_in_flight(executor, device, range(2))) == [0, 1]


def test_frames_are_accepted_while_the_back_end_is_opened_again(new_device: Make) -> None:
    device = new_device(faults={("wait", 1)})
    with device.executor() as executor:
        device.reopening.clear()
        futures = [executor.submit(numbered(number)) for number in range(3)]
        wait_until(lambda: device.calls["close"] == 1)
        assert executor.stats.in_flight == 3
        with pytest.raises(BusyError):
            executor.submit(numbered(3), timeout_s=0)
        device.reopening.set()
        assert scores(futures) == [0, 1, 2]
    assert device.launched[-3:] == [0, 1, 2]


def test_a_back_end_may_fail_often_if_it_gives_results_in_between(new_device: Make) -> None:
    device = new_device(faults={("wait", 2), ("wait", 4), ("wait", 6)}, is_sticky=True)
    with device.executor() as executor:
        assert scores(submit_in_flight(executor, device, range(3))) == [0, 1, 2]
        assert scores(submit_in_flight(executor, device, range(3))) == [0, 1, 2]
        assert executor.stats.recoveries == 3


GIVEN_UP = "back end fake was opened again and failed before its first result"


@pytest.mark.parametrize(
    ("faults", "results", "message"),
    [
        ({("wait", 1), ("wait", 2)}, [], f"{GIVEN_UP} (wait 2 failed)"),
        ({("wait", 2), ("wait", 3)}, [0], f"{GIVEN_UP} (wait 3 failed)"),
        ({("launch", 1), ("launch", 2)}, [], f"{GIVEN_UP} (launch 2 failed)"),
        ({("wait", 3), ("launch", 4)}, [0, 1], f"{GIVEN_UP} (launch 4 failed)"),
        (
            {("wait", 2), ("open", 2)},
            [0],
            "back end fake failed (wait 2 failed) and cannot be opened again (open 2 failed)",
        ),
        (
            {("launch", 3), ("slot", 5)},
            [0, 1],
            "back end fake failed (launch 3 failed) and cannot be opened again (slot 5 failed)",
        ),
    ],
)
def test_what_cannot_be_recovered_is_said(
    faults: set[tuple[str, int]], results: list[int], message: str, new_device: Make
) -> None:
    device = new_device(faults=faults)
    executor = device.executor()
    done: list[int] = []
    device.pause()
    with ThreadPoolExecutor(2) as pool:
        futures = [executor.submit(numbered(number)) for number in range(3)]
        for number, future in enumerate(futures):
            future.add_done_callback(lambda future, number=number: done.append(number))
        device.gate.set()
        text = f"{message}: the executor is closed. Load the bundle again"
        assert scores(futures[: len(results)]) == results
        assert errors(futures[len(results) :]) == [text] * (3 - len(results))
        assert futures[-1].exception().__cause__ is not None  # type: ignore[union-attr]
        for call in (lambda: executor.submit(numbered(1)), lambda: executor.slot().__enter__()):
            with pytest.raises(BackendError) as caught:
                call()
            assert str(caught.value) == text
        pool.submit(executor.close).result(PATIENCE_S)
    stats = executor.stats
    assert (stats.submitted, stats.completed, stats.in_flight) == (3, len(results), 0)
    assert stats.failed == 3 - len(results)
    wait_until(lambda: done == [0, 1, 2])


def test_who_waits_for_a_slot_learns_of_the_end(new_device: Make) -> None:
    device = new_device(faults={("wait", 1), ("open", 2)})
    with device.executor(slots=1) as executor, ThreadPoolExecutor(3) as pool:
        device.pause()
        future = executor.submit(numbered(0))
        waiting = [pool.submit(executor.submit, numbered(1)) for _ in range(3)]
        wait_until(lambda: len(executor._worker._seats._turns) == 3)
        device.gate.set()
        assert all("cannot be opened again" in text for text in errors([future, *waiting]))  # type: ignore[list-item]


def test_an_error_of_closing_is_logged(new_device: Make, caplog: pytest.LogCaptureFixture) -> None:
    device = new_device(faults={("wait", 1), ("close", 1), ("close", 2)})
    with device.executor() as executor:
        assert executor.submit(numbered(1)).result(PATIENCE_S).score == 1
    assert caplog.text.count("closing the back end: close") == 2


def test_closing_while_the_back_end_is_opened_again(new_device: Make) -> None:
    for wait in (True, False):
        device = new_device(faults={("wait", 1)})
        executor = device.executor()
        device.reopening.clear()
        futures = [executor.submit(numbered(number)) for number in range(3)]
        wait_until(lambda device=device: device.calls["close"] == 1)  # type: ignore[misc]
        with ThreadPoolExecutor(1) as pool:
            closing = pool.submit(executor.close, wait=wait)
            wait_until(lambda executor=executor: executor._worker._is_closing)  # type: ignore[misc]
            device.reopening.set()
            closing.result(PATIENCE_S)
        if wait:
            assert scores(futures) == [0, 1, 2]
        else:
            assert all("closed before this frame was inspected" in text for text in errors(futures))


def test_a_fault_after_closing_without_waiting_opens_nothing(new_device: Make) -> None:
    device = new_device(faults={("wait", 1)})
    executor = device.executor()
    device.pause()
    futures = [executor.submit(numbered(number)) for number in range(3)]
    wait_until(lambda: device.awaited == 1)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(executor.close, wait=False)
        wait_until(lambda: executor._worker._is_abandoned)
        device.gate.set()
        closing.result(PATIENCE_S)
    assert all("closed before this frame was inspected" in text for text in errors(futures))
    assert device.calls["open"] == 1


def test_a_heartbeat_that_fails_opens_the_back_end_again(new_device: Make) -> None:
    for call in ("launch", "wait"):
        device = new_device(faults={(call, 2)}, is_sticky=True)
        with device.executor(keep_warm_ms=0.1) as executor:
            wait_until(lambda executor=executor: executor.stats.heartbeats >= 5)  # type: ignore[misc]
            assert executor.stats.recoveries == 1
            assert scores(submit_in_flight(executor, device, range(3))) == [0, 1, 2]


def test_heartbeats_that_cannot_recover_close(new_device: Make) -> None:
    device = new_device(faults={("wait", 1), ("wait", 2)})
    device.pause()
    with device.executor(keep_warm_ms=0.1, slots=1) as executor, ThreadPoolExecutor(1) as pool:
        with pytest.raises(BackendError, match=GIVEN_UP), executor.slot():
            waiting = pool.submit(executor.submit, numbered(1))
            wait_until(lambda: len(executor._worker._seats._turns) == 1)
            device.gate.set()
            with pytest.raises(BackendError, match=GIVEN_UP):
                waiting.result(PATIENCE_S)
        with pytest.raises(BackendError, match=GIVEN_UP):
            executor.submit(numbered(1))


def test_an_interrupted_launch_is_launched_again(new_device: Make) -> None:
    """Ctrl-C in `submit`: nobody has that future, but the executor must go on."""
    device = new_device(faults={("launch", 2)}, error=KeyboardInterrupt)
    with device.executor() as executor:
        assert executor.submit(numbered(1)).result(PATIENCE_S).score == 1
        with pytest.raises(KeyboardInterrupt):
            executor.submit(numbered(2))
        assert executor.submit(numbered(3)).result(PATIENCE_S).score == 3
        assert scores(submit_in_flight(executor, device, range(3))) == [0, 1, 2]
    assert executor.stats.completed == 6


def test_nobody_waits_for_an_executor_whose_thread_has_died(new_device: Make) -> None:
    device = new_device(faults={("wait", 2)}, error=SystemExit)
    executor = device.executor()
    futures = submit_in_flight(executor, device, range(3))
    assert scores(futures[:1]) == [0]
    assert all("the executor itself failed (wait 2 failed)" in text for text in errors(futures[1:]))
    with pytest.raises(BackendError, match="the executor itself failed"):
        executor.submit(numbered(3))
    executor.close()


def test_a_loaded_executor_opens_the_same_back_end_again(tiny: Any, tmp_path: Path) -> None:
    """From memory: the file is gone. Closing the back end behind its back stands for a fault."""
    path = tiny.write(tmp_path / "b.edgead")
    frame = tiny.frames(1, spots=True)[0]
    with Executor.load(path, threads=1) as executor:
        name, expected = executor.backend, executor.submit(frame).result(PATIENCE_S).score
        path.unlink()
        executor._worker.backend.close()
        assert executor.submit(frame).result(PATIENCE_S).score == expected
        assert executor.backend == name and executor.stats.recoveries == 1


# --- for a long time


@pytest.mark.parametrize("full", ["block", "reject"])
def test_ten_thousand_frames_with_faults(full: str, new_device: Make) -> None:
    device = new_device(hazard=0.003, is_sticky=True, error=lost)
    with device.executor(full=full, keep_warm_ms=0.5) as executor:
        exercise(executor, frame=numbered, score=float, count=10_000 if full == "block" else 1_000)
        assert executor.stats.recoveries > 3
    assert device.calls["open"] == 1 + executor.stats.recoveries
    assert {*device.launched} - {TORN} == set(range(executor.stats.submitted))  # TORN: heartbeats


def test_memory_stays_flat(device: FakeDevice) -> None:
    with device.executor() as executor:

        def traced_bytes(count: int) -> int:
            exercise(executor, frame=numbered, score=float, count=count, threads=2)
            device.launched.clear()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = traced_bytes(200)
            assert traced_bytes(3000) - before < 30_000  # ten bytes a frame
        finally:
            tracemalloc.stop()


def test_five_hundred_executors(tiny: Any, new_device: Make, tiny_bundle: Path) -> None:
    frame = tiny.frames(1, spots=False)[0]
    tracemalloc.start()
    try:
        for count in range(500):
            device = FakeDevice()
            with device.executor(keep_warm_ms=0.2) as executor:
                futures = [executor.submit(numbered(number)) for number in range(3)]
            assert scores(futures) == [0, 1, 2] and device.misuse == [] and device.is_open == []
            if count == 50:
                gc.collect()
                before = tracemalloc.get_traced_memory()[0]
        gc.collect()
        # Mostly 1 kB; other threads of this process may be at work. Executors that stay take far more.
        assert tracemalloc.get_traced_memory()[0] - before < 200_000
    finally:
        tracemalloc.stop()
    for _ in range(50):
        with Executor.load(tiny_bundle, backend="onnxruntime", threads=1) as executor:
            executor.submit(frame)
    assert "edgead-executor" not in [thread.name for thread in threading.enumerate()]
