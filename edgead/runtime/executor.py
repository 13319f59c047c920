"""Keeps a back end busy: frames go in from any thread, verdicts come out in the order of the frames.

A frame is written straight into the buffer of a slot (`edgead.runtime.backend.Slot`), launched by the
thread that submits it and awaited by the executor's one thread (`edgead.runtime.worker`), which builds
the result, frees the slot and fulfils the future. So there are at most as many frames on their way as
there are slots.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.judge import Judge
from edgead.manifest import Manifest
from edgead.result import Result
from edgead.runtime import open_backend
from edgead.runtime.backend import Backend
from edgead.runtime.seats import Seat
from edgead.runtime.worker import Stats, Worker

SLOTS = 3  # one is filled, one computes, one is read
FULL = ("block", "reject")


class Executor:
    """Runs frames through a back end, several at once. Any thread may call it.

        with edgead.Executor.load("bottle.edgead") as executor:
            future = executor.submit(frame)              # a concurrent.futures.Future
            with (lease := executor.slot()) as buffer:   # or without a copy:
                camera.read_into(buffer)                 # uint8 [H, W, 3] RGB
            print(future.result().score, lease.future.result().score)

    Order. Futures are fulfilled one after the other in the order of submission, which is the order in
    which the calls of `submit` and the blocks of `slot` end. Their callbacks run in the executor's
    thread: keep them short. In a callback `submit` and `slot` never wait for a slot (`BusyError`), and a
    callback must not wait for another future.

    Nothing is lost. A future cannot be cancelled: what was accepted gets a result or an error. If the
    back end fails, it is closed and opened again, once, and all frames without a result run again, in
    their order. If it cannot be opened, or fails again before its first result, all futures get a
    `BackendError` and the executor is closed.

    On a CPU one inference runs at a time, on all cores; slots then only queue.

    Use it as a context manager or call `close` (otherwise the end of the program does); the executor
    owns its back end.

    Attributes:
        manifest: What the bundle says about the model; its threshold is the one at the time of loading.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        *,
        reopen: Callable[[], Backend],
        slots: int = SLOTS,
        full: str = "block",
        keep_warm_ms: float | None = None,
    ) -> None:
        """Opens the slots and starts the thread; `load` is the usual way.

        Args:
            manifest: Of the bundle whose graph the back end has loaded.
            backend: Closed by the executor, also when this fails.
            reopen: Loads the same graph again, after a failure.
            slots: The most frames on their way, at least 1.
            full: What a frame meets that finds no free slot: "block", it waits, in the order of arrival,
                or "reject", `BusyError`.
            keep_warm_ms: After this long without a frame an inference runs in a slot of its own, and
                again and again, so that clocks and caches are ready for the next frame. A frame waits at
                most for the one that has begun (on a CPU that is a whole inference). None: never.

        Raises:
            BackendError: A wrong argument, or the slots cannot be opened.
        """
        try:
            _check_arguments(slots, full, keep_warm_ms)
        except BackendError:
            backend.close()
            raise
        self.manifest = manifest
        self._judge = Judge(manifest)
        self._waits = full == "block"
        keep_warm_s = math.inf if keep_warm_ms is None else keep_warm_ms / 1e3
        self._worker = Worker(self._judge, backend, reopen, slots=slots, keep_warm_s=keep_warm_s)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        threads: int | None = None,
        slots: int = SLOTS,
        full: str = "block",
        keep_warm_ms: float | None = None,
    ) -> Executor:
        """Opens a bundle, verifies it and loads its graph.

        The bundle stays in memory, because a back end that fails is loaded again from it: the same one,
        also if "auto" chose it.

        Args:
            path: A `*.edgead` file.
            backend: "auto", or a name of `edgead.runtime.BACKENDS` (see `edgead.runtime.open_backend`).
            threads: Threads for one inference on a CPU; None leaves the number to the back end.
            slots: See the class, as `full` and `keep_warm_ms`.

        Raises:
            BundleError: The file is absent, damaged or of another format.
            BackendError: The back end is not installed or refuses the graph, or a wrong argument.
        """
        bundle = Bundle.open(path)
        opened = open_backend(bundle, backend, threads=threads)
        name = opened.name
        return cls(
            bundle.manifest,
            opened,
            reopen=lambda: open_backend(bundle, name, threads=threads),
            slots=slots,
            full=full,
            keep_warm_ms=keep_warm_ms,
        )

    @property
    def backend(self) -> str:
        """Name of the back end in use."""
        return self._worker.backend.name

    @property
    def precision(self) -> str:
        """Precision that the back end computes in: "fp32", "bf16" or "fp16"."""
        return self._worker.backend.precision

    @property
    def threshold(self) -> float:
        """Scores from here on are anomalous. Setting it acts on what is submitted next."""
        return self._judge.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._judge.threshold = value

    @property
    def stats(self) -> Stats:
        """The counts, all of one moment."""
        return self._worker.stats()

    def submit(
        self, frame: np.ndarray, *, color: str = "rgb", timeout_s: float | None = None
    ) -> Future[Result]:
        """Accepts a frame, which is copied: the array may be used again at once.

        Args:
            frame: uint8 [H, W, 3], or [H, W] or [H, W, 1] for grey, 0-255, of any size (resized on the
                host if need be, unless the graph resizes, which then accepts one size only). Need not be
                contiguous.
            color: Order of the channels, "rgb" or "bgr".
            timeout_s: The longest wait for a slot where the executor blocks; None is any.

        Returns:
            The future verdict; its `elapsed_ms` is from this call to the result. The future's error is a
            `BackendError`: the back end failed, gave a score that is not finite, or was closed.

        Raises:
            DataError: The frame is not such an image.
            BusyError: No slot is free.
            BackendError: The executor is closed.
        """
        start_s = time.perf_counter()
        seat = self._take_seat(timeout_s)
        try:
            self._judge.prepare(frame, color, into=seat.image)
        except BaseException:
            self._worker.vacate(seat)
            raise
        return self._worker.accept(seat, start_s)

    def slot(self, *, timeout_s: float | None = None) -> Lease:
        """Lends the buffer of a slot, to be written by the camera; see `Lease`.

        Args:
            timeout_s: As in `submit`; the wait is when the block is entered.
        """
        return Lease(self, timeout_s)

    def close(self, *, wait: bool = True) -> None:
        """Ends; may be repeated, from any thread. `submit` and waiting threads get a `BackendError`.

        What was accepted gets its result before this returns. The block of a lease that is still open
        ends with a `BackendError`. In a callback this only gives the order and returns at once.

        Args:
            wait: False does not compute what has not begun: those futures get a `BackendError`.
        """
        self._worker.close(wait=wait)

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take_seat(self, timeout_s: float | None) -> Seat:
        wait_s = math.inf if timeout_s is None else timeout_s
        return self._worker.take_seat(wait_s if self._waits else 0)


class Lease:
    """The buffer of a slot, lent to be written in place: the frame is submitted where the block ends.

        lease = executor.slot()
        with lease as buffer:            # waits for a slot, as `Executor.submit` does
            camera.read_into(buffer)
        result = lease.future.result()

    `buffer` is uint8 [H, W, 3] RGB, contiguous, of the size of the graph's input, with any content; in
    memory that the GPU copies from where there is one. Leave it alone after the block. A block that ends
    by an exception submits nothing. A lease is for one frame; `elapsed_ms` is from the end of the block.
    """

    def __init__(self, executor: Executor, timeout_s: float | None) -> None:
        self._executor = executor
        self._timeout_s = timeout_s
        self._seat: Seat | None = None
        self._future: Future[Result] | None = None

    @property
    def future(self) -> Future[Result]:
        """The future verdict, as from `Executor.submit`; BackendError before a frame was submitted."""
        if self._future is None:
            raise BackendError("this lease has submitted no frame: its block did not end regularly")
        return self._future

    def __enter__(self) -> np.ndarray:
        if self._seat is not None:
            raise BackendError("a lease is for one frame: call executor.slot() for each")
        self._seat = self._executor._take_seat(self._timeout_s)
        return self._seat.image

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._seat is not None
        if kind is None:
            self._future = self._executor._worker.accept(self._seat, time.perf_counter())
        else:
            self._executor._worker.vacate(self._seat)


def _check_arguments(slots: int, full: str, keep_warm_ms: float | None) -> None:
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise BackendError(f"slots is {slots!r}, expected an integer >= 1")
    if full not in FULL:
        raise BackendError(f"full is {full!r}, expected one of {', '.join(FULL)}")
    if keep_warm_ms is not None and not 0 < keep_warm_ms < math.inf:
        raise BackendError(f"keep_warm_ms is {keep_warm_ms!r}, expected a number of ms > 0 or None")
