"""The engine room of the executor: one thread that awaits launched frames, in their order.

What makes the counts come out: `_jobs` holds the accepted frames that have no outcome yet, in the order
of their launches, and only this thread takes from its head. This thread alone handles a failure of the
back end: it opens it again and launches again exactly what is in `_jobs`.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from edgead.errors import BackendError, BusyError
from edgead.judge import Judge
from edgead.result import Result
from edgead.runtime.backend import Backend
from edgead.runtime.seats import Seat, Seats

EXIT_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stats:
    """Counts since the executor was opened; submitted = completed + failed + in_flight.

    Attributes:
        capacity: Number of slots.
        in_flight: Frames that were accepted and have no outcome yet.
        submitted: Frames that were accepted.
        completed: Frames with a result.
        failed: Frames whose future has an error.
        rejected: Frames that were not accepted because no slot was free (`BusyError`).
        recoveries: How often the back end failed and was opened again.
        heartbeats: Inferences that only kept the device warm.
    """

    capacity: int
    in_flight: int
    submitted: int
    completed: int
    failed: int
    rejected: int
    recoveries: int
    heartbeats: int


@dataclass(slots=True)
class Job:
    """A frame on its way; a heartbeat if it has no future."""

    seat: Seat
    future: Future[Result] | None
    start_s: float
    threshold: float
    is_launched: bool = False
    error: Exception | None = None  # of the launch


class Worker:
    """Runs what is in a seat through a back end. Any thread may call it. See `Executor`.

    Attributes:
        backend: The one in use.
    """

    def __init__(
        self,
        judge: Judge,
        backend: Backend,
        reopen: Callable[[], Backend],
        *,
        slots: int,
        keep_warm_s: float,
    ) -> None:
        """Opens the slots, one more for heartbeats unless `keep_warm_s` is infinite, and starts."""
        self.backend = backend
        self._judge, self._reopen = judge, reopen
        self._keep_warm_s = keep_warm_s
        try:
            all_slots = slots + (keep_warm_s < math.inf)
            self._all = [Seat(backend.open_slot()) for _ in range(all_slots)]
        except BaseException:
            self._close_backend()
            raise
        self._lock = threading.Lock()  # of all that follows; never held during a wait or a callback
        self._seats = Seats(self._lock, self._all[:slots])
        self._jobs: deque[Job] = deque()
        self._work = threading.Condition(self._lock)  # what this thread waits for
        self._is_closing = self._is_abandoned = False
        self._is_broken = False  # no launches until the back end was opened again
        self._is_fresh = False  # opened again, and no inference has succeeded so far
        self._failure: str | None = None
        self._idle_since_s = time.monotonic()
        self._submitted = self._completed = self._failed = self._rejected = 0
        self._recoveries = self._heartbeats = 0
        self._thread = threading.Thread(target=self._serve, name="edgead-executor", daemon=True)
        self._thread.start()
        _running.add(self)

    def stats(self) -> Stats:
        """The counts, all of one moment."""
        with self._lock:
            return Stats(
                capacity=self._seats.capacity,
                in_flight=len(self._jobs),
                submitted=self._submitted,
                completed=self._completed,
                failed=self._failed,
                rejected=self._rejected,
                recoveries=self._recoveries,
                heartbeats=self._heartbeats,
            )

    def close(self, *, wait: bool, limit_s: float | None = None) -> None:
        """See `Executor.close`; waits for its thread for `limit_s` at most."""
        with self._lock:
            self._is_closing = True
            self._is_abandoned |= not wait
            self._work.notify()
            self._seats.wake_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(limit_s)

    # --- in the threads of the callers

    def take_seat(self, wait_s: float) -> Seat:
        """Returns a free seat, to be given to `accept` or `vacate`.

        Raises:
            BusyError: There was none for `wait_s`. This thread never waits: it would for itself.
            BackendError: Closed.
        """
        if threading.current_thread() is self._thread:
            wait_s = 0
        with self._lock:
            seat = self._seats.take(wait_s, self._check_open)
            if seat is None:
                self._rejected += 1
                raise BusyError(
                    f"all {self._seats.capacity} slots are taken: send fewer frames, or load with more "
                    "slots"
                )
        return seat

    def vacate(self, seat: Seat) -> None:
        """Takes a seat back whose frame is not to be inspected."""
        with self._lock:
            self._seats.vacate(seat)

    def accept(self, seat: Seat, start_s: float) -> Future[Result]:
        """Launches what is in the seat; `start_s` is the `time.perf_counter()` of when the frame came.

        Raises:
            BackendError: Closed.
        """
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()
        job = Job(seat, future, start_s, self._judge.threshold)
        with self._lock:
            self._check_open()
            self._jobs.append(job)
            self._submitted += 1
            self._launch(job)
            self._work.notify()
        return future

    def _check_open(self) -> None:
        if self._failure is not None:
            raise BackendError(self._failure)
        if self._is_closing:
            raise BackendError("this executor is closed; load the bundle again")

    def _launch(self, job: Job) -> None:
        """Launches, under the lock; after a failure this is left to `_recover`."""
        if self._is_broken:
            return
        try:
            job.seat.launch()
            job.is_launched = True
        except Exception as error:
            job.error = error
            self._is_broken = True

    # --- in its own thread

    def _serve(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._conclude(job)
                del job  # while idle it would keep the last result alive
        except BaseException as error:  # a fault in here must not leave anybody waiting
            logger.exception("the executor's thread failed")
            self._give_up("the executor itself failed", error)
        finally:
            self._close_backend()

    def _next(self) -> Job | None:
        """Waits for a frame, or for the time of a heartbeat; None is the end."""
        with self._lock:
            while self._failure is None and not self._is_abandoned:
                if self._jobs:
                    return self._jobs[0]
                if self._is_closing:
                    return None
                left_s = self._idle_since_s + self._keep_warm_s - time.monotonic()
                if left_s <= 0:
                    heartbeat = Job(self._all[-1], None, 0.0, 0.0)
                    self._launch(heartbeat)
                    return heartbeat
                self._work.wait(None if left_s == math.inf else min(left_s, threading.TIMEOUT_MAX))
        self._fail_all("the executor was closed before this frame was inspected", None)
        return None

    def _conclude(self, job: Job) -> None:
        try:
            if not job.is_launched:
                raise job.error or BackendError("the launch was interrupted")
            scores, maps = job.seat.slot.wait()
            score, anomaly_map = float(scores[0]), maps[0].copy()
        except Exception as error:
            self._recover(error)
        else:
            self._finish(job, score, anomaly_map)

    def _finish(self, job: Job, score: float, anomaly_map: np.ndarray) -> None:
        """Gives the verdict. The slot is free before the future is fulfilled: a callback may submit."""
        result: Result | None = None
        failure: Exception | None = None
        if job.future is not None:
            try:
                result = self._judge.result(
                    score,
                    anomaly_map,
                    threshold=job.threshold,
                    start_s=job.start_s,
                    source=f"{self.backend.name} ({self.backend.precision})",
                )
            except Exception as error:
                failure = error
        with self._lock:
            self._is_fresh = False
            self._idle_since_s = time.monotonic()
            if job.future is None:
                self._heartbeats += 1
                return
            self._jobs.popleft()
            self._seats.vacate(job.seat)
            self._completed += failure is None
            self._failed += failure is not None
        _fulfil(job.future, result, failure)

    def _recover(self, error: Exception) -> None:
        """Opens the back end again and launches everything again that has no result."""
        with self._lock:
            self._is_broken = True
            if self._is_abandoned:
                return
        name = self.backend.name
        if self._is_fresh:
            self._give_up(f"back end {name} was opened again and failed before its first result", error)
            return
        logger.warning("back end %s failed (%s): it is opened again", name, error)
        self._close_backend()
        try:
            self.backend = self._reopen()
            slots = [self.backend.open_slot() for _ in self._all]
        except Exception as again:
            self._give_up(f"back end {name} failed ({error}) and cannot be opened again", again)
            return
        with self._lock:
            for seat, slot in zip(self._all, slots, strict=True):
                seat.take_slot(slot)
            self._is_broken, self._is_fresh = False, True
            self._recoveries += 1
            for job in self._jobs:
                job.is_launched, job.error = False, None
                self._launch(job)

    def _give_up(self, what: str, error: BaseException) -> None:
        """Closes for good; `_next` then ends the thread."""
        with self._lock:
            self._failure = f"{what} ({error}): the executor is closed. Load the bundle again"
            self._seats.wake_all()
        logger.error("%s", self._failure)
        self._fail_all(self._failure, error)

    def _fail_all(self, text: str, cause: BaseException | None) -> None:
        with self._lock:
            jobs = list(self._jobs)
            self._jobs.clear()
            self._failed += len(jobs)
            for job in jobs:
                self._seats.vacate(job.seat)
        for job in jobs:
            failure = BackendError(text)
            failure.__cause__ = cause
            if job.future is not None:
                _fulfil(job.future, None, failure)

    def _close_backend(self) -> None:
        try:
            self.backend.close()
        except Exception as error:
            logger.warning("closing the back end: %s", error)


_running: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is inside a back end while the interpreter ends takes the process down with it."""
    for worker in list(_running):
        worker.close(wait=True, limit_s=EXIT_S)  # but a device that hangs must not keep the process


def _fulfil(future: Future[Result], result: Result | None, failure: Exception | None) -> None:
    try:
        if failure is not None:
            future.set_exception(failure)
        elif result is not None:
            future.set_result(result)
    except BaseException:  # such as SystemExit in a callback; an Exception is logged by the future
        logger.exception("a future was fulfilled, but then its callbacks failed")
