"""The executor: order, bounds, leases, callbacks, heartbeats and the end.

Over a fake device that computes in a thread of its own, and over the real back ends of a CPU.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgead
from edgead import BackendError, BundleError, BusyError, DataError, Executor, Result
from edgead.manifest import RESIZE_IN_GRAPH, InputSpec
from edgead.runtime.backend import expected_specs
from edgead.runtime.host_slot import HostSlot
from tests.fake_backend import (
    NOT_FINITE,
    PATIENCE_S,
    FakeDevice,
    exercise,
    number_of,
    numbered,
    wait_until,
)

CPU_BACKENDS = ("onnxruntime", "openvino")


def scores(futures: list[Future[Result]]) -> list[float]:
    return [future.result(PATIENCE_S).score for future in futures]


@pytest.fixture
def executor(device: FakeDevice) -> Iterator[Executor]:
    """Over `device`, with three slots, blocking."""
    with device.executor() as opened:
        yield opened
        device.gate.set()


# --- verdicts


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_it_gives_what_a_detector_gives(backend: str, tiny: Any, tiny_bundle: Path) -> None:
    if backend != "onnxruntime":
        pytest.importorskip(backend, reason=f"{backend} is not installed")
    frame = tiny.frames(1, spots=True)[0]
    frames = [frame, frame[:50], frame[..., 0], frame[..., :1], frame[::-1], np.asfortranarray(frame)]
    with (
        edgead.load(tiny_bundle, backend=backend, threads=1) as detector,
        Executor.load(tiny_bundle, backend=backend, threads=1) as executor,
    ):
        assert (executor.backend, executor.precision) == (detector.backend, detector.precision)
        assert executor.manifest == detector.manifest
        for color in ("rgb", "bgr"):
            futures = [executor.submit(frame, color=color) for frame in frames]
            for frame, future in zip(frames, futures, strict=True):
                expected, result = detector(frame, color=color), future.result(PATIENCE_S)
                assert result.score == expected.score
                assert result.is_anomalous == expected.is_anomalous
                np.testing.assert_array_equal(result.anomaly_map, expected.anomaly_map)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_many_threads_over_a_real_back_end(backend: str, tiny: Any, tiny_bundle: Path) -> None:
    if backend != "onnxruntime":
        pytest.importorskip(backend, reason=f"{backend} is not installed")
    frames = np.concatenate([tiny.frames(8, spots=True), tiny.frames(8, spots=False)])
    with Executor.load(tiny_bundle, backend=backend, threads=1) as executor:
        expected = [executor.submit(frame).result(PATIENCE_S).score for frame in frames]
        exercise(executor, frame=lambda n: frames[n % 16], score=lambda n: expected[n % 16], count=1000)
    assert len({*expected}) > 8  # mistaken frames would show


def test_the_verdict_on_a_frame_of_a_lease(tiny: Any, tiny_bundle: Path) -> None:
    frame = tiny.frames(1, spots=True)[0]
    with Executor.load(tiny_bundle, backend="onnxruntime", threads=1) as executor:
        expected = executor.submit(frame).result(PATIENCE_S)
        with (lease := executor.slot()) as buffer:
            assert buffer.shape == (64, 64, 3) and buffer.dtype == np.uint8
            assert buffer.flags.c_contiguous and buffer.flags.writeable
            np.copyto(buffer, frame)
        assert lease.future.result(PATIENCE_S).score == expected.score


def test_a_graph_that_resizes_accepts_one_size(tiny: Any, tmp_path: Path) -> None:
    size = InputSpec(height=64, width=64, resize=RESIZE_IN_GRAPH)
    path = tiny.write(tmp_path / "b.edgead", input=size)
    with Executor.load(path, backend="onnxruntime", threads=1) as executor:
        executor.submit(np.zeros((64, 64, 3), np.uint8)).result(PATIENCE_S)
        with pytest.raises(DataError, match=r"480x640 px .* for frames of 64x64 px"):
            executor.submit(np.zeros((480, 640, 3), np.uint8))


def test_results_come_in_the_order_of_submission(device: FakeDevice) -> None:
    """The fake device finishes in any order, even the last frame first."""
    done: list[float] = []
    with device.executor(slots=8) as executor:
        for first in range(0, 80, 8):
            device.pause()
            for number in range(first, first + 8):
                future = executor.submit(numbered(number))
                future.add_done_callback(lambda future: done.append(future.result().score))
            device.gate.set()
            future.result(PATIENCE_S)
    assert done == device.launched == list(range(80))


def test_a_frame_may_be_changed_at_once(device: FakeDevice, executor: Executor) -> None:
    frame = numbered(5)
    device.pause()
    future = executor.submit(frame)
    frame[:] = 0
    device.gate.set()
    assert future.result(PATIENCE_S).score == 5


def test_a_result_outlives_later_frames_and_the_executor(executor: Executor) -> None:
    result = executor.submit(numbered(5)).result(PATIENCE_S)
    for number in range(6, 16):
        executor.submit(numbered(number)).result(PATIENCE_S)
    executor.close()
    assert (result.anomaly_map == 5).all()


def test_the_time_is_from_submission_to_result(device: FakeDevice, executor: Executor) -> None:
    device.pause()
    futures = [executor.submit(numbered(number)) for number in range(2)]
    time.sleep(0.05)
    device.gate.set()
    assert all(future.result(PATIENCE_S).elapsed_ms >= 50 for future in futures)


def test_the_threshold_is_live(device: FakeDevice, executor: Executor) -> None:
    assert executor.threshold == 100
    device.pause()
    before = executor.submit(numbered(50))
    executor.threshold = 50
    after = executor.submit(numbered(50))
    device.gate.set()
    verdicts = [(f.result(PATIENCE_S).threshold, f.result().is_anomalous) for f in (before, after)]
    assert verdicts == [(100, False), (50, True)]
    with pytest.raises(DataError, match="finite"):
        executor.threshold = float("nan")


def test_numbers_that_are_not_finite_give_no_verdict(executor: Executor) -> None:
    futures = [executor.submit(numbered(number)) for number in (1, NOT_FINITE, 2)]
    assert futures[0].result(PATIENCE_S).score == 1 and futures[2].result(PATIENCE_S).score == 2
    with pytest.raises(BackendError, match=r"fake \(fp32\) gave score nan .* there is no verdict"):
        futures[1].result(PATIENCE_S)
    stats = executor.stats
    assert (stats.completed, stats.failed, stats.recoveries) == (2, 1, 0)


def test_a_future_cannot_be_cancelled(device: FakeDevice, executor: Executor) -> None:
    device.pause()
    future = executor.submit(numbered(3))
    assert not future.cancel()
    device.gate.set()
    assert future.result(PATIENCE_S).score == 3


# --- bounds


def test_a_full_executor_waits(device: FakeDevice, executor: Executor) -> None:
    device.pause()
    futures = [executor.submit(numbered(number)) for number in range(3)]
    with pytest.raises(BusyError, match="all 3 slots are taken"):
        executor.submit(numbered(9), timeout_s=0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(executor.submit, numbered(3))
        stats = executor.stats
        assert (stats.capacity, stats.in_flight, stats.submitted, stats.rejected) == (3, 3, 3, 1)
        assert not waiting.done()
        device.gate.set()
        futures.append(waiting.result(PATIENCE_S))
    assert scores(futures) == [0, 1, 2, 3]
    assert device.calls["slot"] == 3


def test_a_full_executor_rejects(device: FakeDevice) -> None:
    with device.executor(slots=2, full="reject") as executor:
        device.pause()
        futures = [executor.submit(numbered(number)) for number in range(2)]
        for _ in range(3):
            with pytest.raises(BusyError, match="all 2 slots are taken"):
                executor.submit(numbered(9), timeout_s=PATIENCE_S)
            with pytest.raises(BusyError), executor.slot():
                pass
        assert executor.stats.rejected == 6
        device.gate.set()
        assert scores(futures) == [0, 1]
        assert executor.submit(numbered(2)).result(PATIENCE_S).score == 2


def test_who_waits_first_is_served_first(device: FakeDevice) -> None:
    with device.executor(slots=1) as executor, ThreadPoolExecutor(6) as pool:
        device.pause()
        executor.submit(numbered(0))
        waiting = []
        for number in range(1, 7):
            waiting.append(pool.submit(executor.submit, numbered(number)))
            wait_until(lambda: len(executor._worker._seats._turns) == len(waiting))
        device.gate.set()
        assert scores([future.result(PATIENCE_S) for future in waiting]) == [1, 2, 3, 4, 5, 6]
    assert device.launched == [0, 1, 2, 3, 4, 5, 6]


def test_a_free_slot_belongs_to_who_waits(device: FakeDevice) -> None:
    """Not to the callback that runs right after it was freed."""
    refused: list[bool] = []

    def jump_the_queue(future: Future[Result]) -> None:
        try:
            executor.submit(numbered(99))
        except BusyError:
            refused.append(True)

    with device.executor(slots=1) as executor, ThreadPoolExecutor(1) as pool:
        for number in range(20):
            device.pause()
            first = executor.submit(numbered(number))
            first.add_done_callback(jump_the_queue)
            waiting = pool.submit(executor.submit, numbered(50 + number))
            wait_until(lambda: len(executor._worker._seats._turns) == 1)
            device.gate.set()
            assert scores([first, waiting.result(PATIENCE_S)]) == [number, 50 + number]
    assert refused == [True] * 20


def test_two_slots_that_get_free_at_once_wake_two(device: FakeDevice) -> None:
    with device.executor(slots=2) as executor, ThreadPoolExecutor(2) as pool:
        seats = [executor._take_seat(0), executor._take_seat(0)]
        waiting = [pool.submit(executor.submit, numbered(number)) for number in (1, 2)]
        wait_until(lambda: len(executor._worker._seats._turns) == 2)
        with executor._worker._lock:
            for seat in seats:
                executor._worker._seats.vacate(seat)
        assert {*scores([future.result(PATIENCE_S) for future in waiting])} == {1, 2}


@pytest.mark.parametrize(
    "frame", [np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8), np.uint8), None]
)
def test_what_is_not_a_frame_takes_no_slot(frame: Any, executor: Executor) -> None:
    for _ in range(4):  # more often than there are slots
        with pytest.raises(DataError):
            executor.submit(frame, timeout_s=0)
    with pytest.raises(DataError, match="color"):
        executor.submit(numbered(1), color="hsv")
    assert executor.submit(numbered(1)).result(PATIENCE_S).score == 1
    assert executor.stats.submitted == 1


def test_leases_are_slots(device: FakeDevice, executor: Executor) -> None:
    idle = [executor.slot() for _ in range(5)]  # takes nothing before its block begins
    with idle[0] as first, idle[1] as second, idle[2] as third:
        assert not any(np.shares_memory(*pair) for pair in [(first, second), (second, third)])
        with pytest.raises(BusyError):
            executor.submit(numbered(9), timeout_s=0)
        with pytest.raises(BusyError), executor.slot(timeout_s=0):
            pass
        for number, buffer in enumerate((first, second, third)):
            np.copyto(buffer, numbered(number))
    assert scores([lease.future for lease in idle[:3]]) == [0, 1, 2]
    assert device.launched == [2, 1, 0]  # in the order in which the blocks ended
    with pytest.raises(BackendError, match="one frame"), idle[0]:
        pass


def test_a_block_that_fails_submits_nothing(executor: Executor) -> None:
    for _ in range(4):  # more often than there are slots
        lease = executor.slot(timeout_s=0)
        with pytest.raises(TimeoutError, match="no trigger"), lease:
            raise TimeoutError("no trigger")
        with pytest.raises(BackendError, match="submitted no frame"):
            lease.future  # noqa: B018
    assert executor.stats.submitted == 0


# --- callbacks


def test_a_callback_may_submit(executor: Executor) -> None:
    """A chain that keeps itself going: with all others idle a callback always finds a slot."""
    seen: list[float] = []
    finished = threading.Event()

    def again(future: Future[Result]) -> None:
        seen.append(future.result().score)
        if len(seen) == 50:
            finished.set()
        else:
            executor.submit(numbered(len(seen))).add_done_callback(again)

    executor.submit(numbered(0)).add_done_callback(again)
    assert finished.wait(PATIENCE_S) and seen == list(range(50))


def test_a_callback_never_waits_for_a_slot(device: FakeDevice, executor: Executor) -> None:
    outcomes: list[object] = []
    device.pause()

    def flood(future: Future[Result]) -> None:
        for _ in range(2):
            try:
                outcomes.append(executor.submit(numbered(7)))
            except BusyError as error:
                outcomes.append(error)

    first = executor.submit(numbered(0))
    first.add_done_callback(flood)
    others = [executor.submit(numbered(number)) for number in (1, 2)]
    device.gate.set()
    assert scores([first, *others]) == [0, 1, 2]
    wait_until(lambda: len(outcomes) == 2)
    accepted, refused = outcomes
    assert isinstance(accepted, Future) and accepted.result(PATIENCE_S).score == 7
    assert isinstance(refused, BusyError)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_fails_harms_nobody(
    error: type[BaseException], device: FakeDevice, executor: Executor, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(future: Future[Result]) -> None:
        raise error("in the callback")

    device.pause()
    future = executor.submit(numbered(1))
    future.add_done_callback(fail)
    device.gate.set()
    assert future.result(PATIENCE_S).score == 1
    assert executor.submit(numbered(2)).result(PATIENCE_S).score == 2
    assert "in the callback" in caplog.text


def test_a_callback_may_close(device: FakeDevice) -> None:
    executor = device.executor()
    device.pause()
    first, second = executor.submit(numbered(1)), executor.submit(numbered(2))
    first.add_done_callback(lambda future: executor.close())
    device.gate.set()
    assert scores([first, second]) == [1, 2]
    executor.close()
    with pytest.raises(BackendError, match="this executor is closed"):
        executor.submit(numbered(3))


# --- the end


def test_close_finishes_what_was_accepted(device: FakeDevice) -> None:
    executor = device.executor()
    device.pause()
    futures = [executor.submit(numbered(number)) for number in range(3)]
    threading.Timer(0.02, device.gate.set).start()
    executor.close()
    assert all(future.done() for future in futures) and scores(futures) == [0, 1, 2]
    executor.close()
    executor.close(wait=False)
    for call in (lambda: executor.submit(numbered(1)), lambda: executor.slot().__enter__()):
        with pytest.raises(BackendError, match="this executor is closed"):
            call()


def test_close_without_waiting_ends_after_what_has_begun(device: FakeDevice) -> None:
    executor = device.executor()
    device.pause()
    futures = [executor.submit(numbered(number)) for number in range(3)]
    wait_until(lambda: device.awaited == 1)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(executor.close, wait=False)
        wait_until(lambda: executor._worker._is_abandoned)
        device.gate.set()
        closing.result(PATIENCE_S)
    assert futures[0].result(PATIENCE_S).score == 0
    for future in futures[1:]:
        with pytest.raises(BackendError, match="closed before this frame was inspected"):
            future.result(PATIENCE_S)
    stats = executor.stats
    assert (stats.submitted, stats.completed, stats.failed, stats.in_flight) == (3, 1, 2, 0)


def test_close_ends_the_wait_for_a_slot(device: FakeDevice) -> None:
    executor = device.executor(slots=1)
    device.pause()
    executor.submit(numbered(0))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(executor.submit, numbered(1)) for _ in range(4)]
        wait_until(lambda: len(executor._worker._seats._turns) == 4)
        closing = threading.Thread(target=executor.close)
        closing.start()
        for future in waiting:
            with pytest.raises(BackendError, match="this executor is closed"):
                future.result(PATIENCE_S)
    device.gate.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()


def test_close_does_not_wait_for_a_lease(device: FakeDevice) -> None:
    executor = device.executor()
    lease = executor.slot()
    with pytest.raises(BackendError, match="this executor is closed"), lease as buffer:
        executor.close()
        buffer[:] = 1  # still memory
    with pytest.raises(BackendError, match="submitted no frame"):
        lease.future  # noqa: B018
    assert executor.stats.submitted == 0


def test_closing_while_others_submit(new_device: Callable[..., FakeDevice]) -> None:
    for seed in range(20):
        executor = new_device(seed=seed).executor(keep_warm_ms=0.01)
        accepted: list[Future[Result]] = []

        def work(executor: Executor = executor, accepted: list[Future[Result]] = accepted) -> str:
            while True:
                try:
                    accepted.append(executor.submit(numbered(1)))
                except BackendError as error:
                    return str(error)

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(work) for _ in range(4)]
            wait_until(lambda accepted=accepted: len(accepted) > 5)  # type: ignore[misc]
            executor.close()
            assert all("closed" in worker.result(PATIENCE_S) for worker in workers)
        assert {*scores(accepted)} == {1} and executor.stats.completed == len(accepted)


EXIT = """
import sys, numpy, edgead
executor = edgead.Executor.load(sys.argv[1], backend=sys.argv[2], keep_warm_ms=1)
for _ in range(3):
    executor.submit(numpy.zeros((64, 64, 3), numpy.uint8)).add_done_callback(lambda _: print("done"))
"""


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_program_may_end_without_closing(backend: str, tiny_bundle: Path) -> None:
    """A thread inside of a library while the interpreter ends takes the process down."""
    if backend != "onnxruntime":
        pytest.importorskip(backend, reason=f"{backend} is not installed")
    command = [sys.executable, "-c", EXIT, str(tiny_bundle), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["done"] * 3, "")


HANGING = """
import time
from edgead.runtime import worker
from tests.fake_backend import FakeDevice, numbered
device = FakeDevice()
executor = device.executor()
device.pause()
executor.submit(numbered(1))
worker.EXIT_S = 0.5
print(time.monotonic(), flush=True)
"""


def test_a_device_that_hangs_does_not_keep_the_program() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HANGING]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    took_s = time.monotonic() - float(done.stdout)
    assert (done.returncode, done.stderr) == (0, "") and 0.4 < took_s < 20


# --- opening


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots is 0, expected an integer >= 1"),
        ({"slots": True}, "slots is True"),
        ({"slots": 2.0}, "slots is 2.0"),
        ({"full": "drop"}, "full is 'drop', expected one of block, reject"),
        ({"keep_warm_ms": 0}, "keep_warm_ms is 0"),
        ({"keep_warm_ms": float("nan")}, "keep_warm_ms is nan"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, device: FakeDevice) -> None:
    with pytest.raises(BackendError) as caught:
        device.executor(**options)
    assert message in str(caught.value)


def test_slots_that_cannot_be_opened(new_device: Callable[..., FakeDevice]) -> None:
    with pytest.raises(BackendError, match="slot 2 failed"):
        new_device(faults={("slot", 2)}).executor()


def test_load_names_what_is_wrong(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="none.edgead"):
        Executor.load(tmp_path / "none.edgead")
    with pytest.raises(BackendError, match="unknown"):
        Executor.load(tiny_bundle, backend="cpu")


# --- heartbeats


def test_heartbeats_come_while_idle_and_yield(device: FakeDevice) -> None:
    with device.executor(keep_warm_ms=1) as executor:
        assert (executor.stats.capacity, device.calls["slot"]) == (3, 4)
        wait_until(lambda: executor.stats.heartbeats >= 3)
        with (lease := executor.slot()) as buffer:  # a camera that waits for its trigger
            now = executor.stats.heartbeats
            wait_until(lambda: executor.stats.heartbeats >= now + 3)
            np.copyto(buffer, numbered(1))
        assert lease.future.result(PATIENCE_S).score == 1
        device.pause()
        wait_until(lambda: len(device.is_open[0].in_flight) == 1)  # a heartbeat has begun
        device.launched.clear()
        futures = [executor.submit(numbered(number)) for number in (2, 3, 4)]
        assert device.launched == [2, 3, 4]  # at once, each in a slot of its own
        time.sleep(0.02)
        assert device.launched == [2, 3, 4]  # none comes in between
        device.gate.set()
        assert scores(futures) == [2, 3, 4]
    stats = executor.stats
    assert (stats.submitted, stats.completed, stats.failed) == (4, 4, 0)


def test_no_heartbeat_unless_asked_for(device: FakeDevice, executor: Executor) -> None:
    executor.submit(numbered(1)).result(PATIENCE_S)
    time.sleep(0.02)
    assert executor.stats.heartbeats == 0 and device.launched == [1]


class OneByOne:
    """A back end that computes when asked to, as those of a CPU do; `infer` waits for `gate`."""

    name, precision = "one by one", "fp32"
    max_batch: int | None = None

    def __init__(self, device: FakeDevice) -> None:
        self.inputs, self.outputs = expected_specs(device.manifest)
        self.begun: list[int] = []
        self.gate = threading.Semaphore(0)

    def infer(self, inputs: Any) -> dict[str, np.ndarray]:
        number = number_of(inputs["image"][0])
        self.begun.append(number)
        assert self.gate.acquire(timeout=PATIENCE_S)
        return {"score": np.full(1, number, np.float32), "anomaly_map": np.ones((1, 2, 3), np.float32)}

    def open_slot(self, batch: int = 1) -> HostSlot:
        return HostSlot(self, batch, np.ones(1, np.float32), lambda call: None)

    def close(self) -> None:
        pass


def test_on_a_cpu_a_frame_waits_for_one_heartbeat_at_most(device: FakeDevice) -> None:
    backend = OneByOne(device)
    heartbeat = number_of(np.zeros((8, 8, 3), np.uint8))
    with Executor(device.manifest, backend, reopen=lambda: backend, keep_warm_ms=1) as executor:
        wait_until(lambda: backend.begun == [heartbeat])
        futures = [executor.submit(numbered(number)) for number in (1, 2)]
        time.sleep(0.02)
        assert backend.begun == [heartbeat]  # one inference at a time
        backend.gate.release(3)
        assert scores(futures) == [1, 2]
        assert backend.begun[:3] == [heartbeat, 1, 2]
        backend.gate.release(1000)
    assert executor.stats.heartbeats >= 1
