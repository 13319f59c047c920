"""A running line: from triggers to verdicts, exactly one each, in time.

Threads: one per source takes images in; one gives them to the models, the earliest deadline first; one
waits for deadlines; each executor has one, in which results come back; each sink has one. All state is
under one lock, which nobody holds while waiting for anything.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from edgead.errors import BackendError, LineError
from edgead.line.bundles import Bundles
from edgead.line.camera import Camera, Job
from edgead.line.desk import Desk
from edgead.line.interfaces import Shot
from edgead.line.ledger import Part
from edgead.line.outlet import Outlet
from edgead.line.verdicts import Verdict
from edgead.line.waiting import Waiting
from edgead.result import Result

logger = logging.getLogger(__name__)

PULSE_S = 0.25  # the longest that a thread of the line sleeps without a sign of life
LOOK_S = 0.02
REOPEN_BACKOFF_S = (1.0, 30.0)


class Line:
    """Gives each trigger of its cameras one verdict. `edgead.line.assembly` makes one of a recipe file.

    It implements `edgead.line.interfaces.Controls`.

    Attributes:
        statistics: What the verdicts were.
        beats: Turns of the two threads that must never stand still, for the watchdog.
    """

    def __init__(
        self,
        name: str,
        desk: Desk,
        bundles: Bundles,
        *,
        in_flight: int = 1,
        stall_s: float = 10.0,
    ) -> None:
        self.name = name
        self.statistics = desk.statistics
        self.beats = [0, 0]
        self._desk = desk
        self._limit, self._stall_ns = in_flight, round(stall_s * 1e9)
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # the dispatcher waits for it
        self._room = threading.Condition(self._lock)  # sources that wait for room
        self._clock = threading.Condition(self._lock)  # who waits for deadlines
        self._next_alarm_ns = math.inf
        self._cameras: dict[str, Camera] = {}
        self._waiting: Waiting[Job] = Waiting(())
        self._flying: list[Job] = []
        self._bundles = bundles
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._is_closed = False

    # --- putting it together

    def add(self, cameras: list[Camera]) -> None:
        """Gives it its cameras. Sinks that take this line as their `Controls` can be opened then."""
        self._cameras = {camera.name: camera for camera in cameras}
        self._waiting = Waiting(tuple(self._cameras))

    def start(self, outlets: dict[str, Outlet]) -> None:
        """Starts the threads. What a crash left open becomes ERROR, and sinks get what they lack."""
        self._desk.begin(outlets)
        loops: dict[str, Callable[[], None]] = {
            "dispatch": self._dispatch,
            "deadlines": self._watch_deadlines,
        }
        for name, camera in self._cameras.items():
            loops[f"camera {name}"] = functools.partial(self._grab, camera)
        for name, loop in loops.items():
            thread = threading.Thread(target=loop, name=f"edgead {name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names, in the order of the recipe file."""
        return tuple(self._cameras)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until all sources have ended and all their parts have a verdict; False: not yet."""
        return self._wait_until(self._is_done, math.inf if timeout_s is None else timeout_s)

    def stop(self, grace_s: float = 1.0) -> dict[str, int]:
        """Ends: takes no more triggers, gives open parts `grace_s` for their answers, then says ERROR.

        Returns:
            How many records each sink could not write out; the journal has them.
        """
        with self._lock:
            if self._is_closed:
                return {}
            self._stopping.set()
        for camera in self._cameras.values():
            camera.source.close()
        self._wait_until(lambda: not any(len(c.ledger) for c in self._cameras.values()), grace_s)
        with self._lock:
            self._waiting.clear()
            for camera in self._cameras.values():
                camera.ledger.abandon("the line was stopped before its answer", time.monotonic_ns())
                self._desk.release(camera)
            self._is_closed = True
            for condition in (self._work, self._clock, self._room):
                condition.notify_all()
        self._bundles.close()
        for thread in self._threads[:2]:
            thread.join(grace_s)
        return self._desk.close(grace_s / 2)

    @property
    def failures(self) -> list[str]:
        """Why sources ended that should not have."""
        with self._lock:
            return [camera.failure for camera in self._cameras.values() if camera.failure]

    @property
    def has_hung(self) -> bool:
        """Whether a back end was left to its fate."""
        return self._bundles.has_hung

    # --- Controls

    def trigger(self, camera: str, tag: int | None = None) -> int:
        """See `Controls`."""
        chosen = self._camera(camera)
        if chosen.config.trigger != "plc":
            raise LineError(
                f"camera {camera}: its images are its triggers; to trigger it from outside write "
                'trigger = "plc" in the recipe file'
            )
        with self._lock:
            if self._stopping.is_set():
                raise LineError("the line is stopping")
            part = self._open(chosen, time.monotonic_ns(), tag)
            chosen.awaiting.append(part)
        try:
            chosen.source.fire()
        except LineError as error:
            with self._lock:
                if part in chosen.awaiting:
                    chosen.awaiting.remove(part)
                self._desk.decide(
                    chosen, part, Verdict.NOT_INSPECTED, f"the camera was not triggered: {error}"
                )
        return part.part_id

    def select_recipe(self, camera: str, index: int) -> None:
        """See `Controls`."""
        chosen = self._camera(camera)
        last = len(chosen.config.recipes) - 1
        if not 0 <= index <= last:
            raise LineError(f"camera {camera} has no recipe {index}: 0 to {last}")
        with self._lock:
            chosen.recipe = index
        logger.info("camera %s: recipe %d", camera, index)

    def set_threshold(self, camera: str, value: float) -> None:
        """See `Controls`."""
        chosen = self._camera(camera)
        if not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise LineError(f"camera {camera}: threshold {value!r}, expected a finite number")
        with self._lock:
            chosen.thresholds[chosen.recipe] = float(value)
        logger.info("camera %s: threshold %g", camera, value)

    def state(self) -> dict[str, Any]:
        """See `Controls`."""
        with self._lock:
            cameras = {
                name: camera.state(self._bundles, self._waiting.count(name))
                for name, camera in self._cameras.items()
            }
            is_ready = not self._stopping.is_set() and self._bundles.are_ready
        for name, camera in self._cameras.items():
            cameras[name]["source"].update(camera.source.counters())
        return {
            "name": self.name,
            "ready": is_ready,
            "uptime_s": time.monotonic() - self._started_s,
            "cameras": cameras,
            **self._desk.state(),
        }

    def swap(self, path: Path, new: Path) -> None:
        """Puts a new bundle in the place of one of the recipe file, without losing a part.

        Raises:
            EdgeADError: It cannot be loaded, or does not verify: the old one stays.
        """
        self._bundles.swap(path, new)

    # --- images come in

    def _grab(self, camera: Camera) -> None:
        """The thread of a source, which is opened again if it fails."""
        pause_s, longest_s = REOPEN_BACKOFF_S
        while not self._stopping.is_set():
            try:
                for shot in camera.source.shots():
                    self._take(camera, shot)
                    camera.failure, pause_s = None, REOPEN_BACKOFF_S[0]
                break
            except LineError as error:
                camera.failure = f"camera {camera.name}: {error}"
                logger.error("%s", camera.failure)
            except Exception as error:
                camera.failure = f"camera {camera.name}: {error!r}"
                logger.exception("camera %s", camera.name)
            if camera.reopen is None:
                break
            if self._stopping.wait(pause_s):
                break
            pause_s = min(2 * pause_s, longest_s)
            camera.source.close()
            try:
                camera.source = camera.reopen()
            except LineError as error:
                logger.error("camera %s: %s", camera.name, error)
        camera.has_ended = True

    def _take(self, camera: Camera, shot: Shot) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            if camera.config.trigger == "plc":
                part = camera.awaited_part(time.monotonic_ns())
                if part is None:
                    return
            else:
                part = self._open(camera, shot.trigger_ns, None)
        part.origin, part.frame_id, part.exposure_ns = shot.origin, shot.frame_id, shot.exposure_ns
        try:
            region = camera.region(shot, part.recipe, decode=self._desk.wants_pictures)
        except LineError as error:
            with self._lock:
                self._desk.decide(camera, part, Verdict.NOT_INSPECTED, str(error))
            return
        part.region = region
        job = Job(camera, part, shot, region)
        with self._lock:
            self._queue(job)
        self._dispatch_one()  # an idle device gets it without waiting for another thread
        # Beside the inference: what it finds is there sooner than the answer, mostly.
        image = shot.image if region is None else region
        assert image is not None
        inspector = self._bundles.get(camera.config.recipes[part.recipe].bundle)
        problem = camera.problem(image, part.recipe, inspector)
        with self._lock:
            job.is_fit = problem is None
            if problem is not None:
                self._desk.decide(camera, part, Verdict.NOT_INSPECTED, problem)
            elif job.answer is not None:
                self._desk.answer(camera, part, job.answer)
            while (
                camera.config.grab == "wait"
                and self._waiting.count(camera.name) >= camera.config.queue
                and not self._stopping.is_set()
            ):
                self._room.wait(PULSE_S)

    def _queue(self, job: Job) -> None:
        camera, queue = job.camera, job.camera.config.queue
        if self._waiting.count(camera.name) >= queue and camera.config.grab == "inspect-all":
            camera.counts["overflows"] += 1
            reason = f"{queue} images were waiting already: the line is slower than its triggers"
            if not camera.overflows:
                logger.error("camera %s, from part %d on: %s", camera.name, job.part.part_id, reason)
            camera.overflows = True
            self._desk.decide(camera, job.part, Verdict.NOT_INSPECTED, reason)
            return
        if camera.overflows and not self._waiting.count(camera.name):
            camera.overflows = False
            logger.warning("camera %s: its queue is empty again", camera.name)
        while camera.config.grab == "live" and (older := self._waiting.drop_oldest(camera.name)):
            camera.counts["superseded"] += 1
            self._desk.decide(
                camera, older.part, Verdict.NOT_INSPECTED, "a newer image came before its turn"
            )
        self._waiting.put(camera.name, job)

    def _open(self, camera: Camera, trigger_ns: int, tag: int | None) -> Part:
        bundle = self._bundles.name(camera.inspection.bundle)
        part = self._desk.open(camera, trigger_ns, tag, bundle)
        if part.deadline_ns < self._next_alarm_ns:
            self._clock.notify()
        return part

    # --- images are inspected

    def _dispatch(self) -> None:
        while not self._is_closed:
            self.beats[0] += 1
            if not self._dispatch_one():
                with self._lock:
                    if not self._may_dispatch():
                        self._work.wait(PULSE_S)

    def _may_dispatch(self) -> bool:
        return len(self._waiting) > 0 and len(self._flying) < self._limit

    def _dispatch_one(self) -> bool:
        """Gives the next image to its model, in whatever thread; False if there is none, or no room."""
        with self._lock:
            job = self._next_job()
            if job is None:
                return False
            recipe = job.part.recipe
            inspector = self._bundles.enter(job.camera.config.recipes[recipe].bundle)
            if inspector is None:
                reason = "its bundle is being loaded again"
                self._desk.decide(job.camera, job.part, Verdict.ERROR, reason)
                return True
            job.inspector = inspector
            job.threshold = job.camera.threshold(recipe, inspector)
            job.start_ns = time.monotonic_ns()
            self._flying.append(job)
            self._room.notify_all()
        try:
            future = inspector.submit(job.shot, job.region)
        except Exception as error:
            self._answer(job, error)
            if isinstance(error, BackendError):  # the executor is closed for good
                self._bundles.renew(inspector, str(error))
        else:
            future.add_done_callback(functools.partial(self._answer_future, job))
        return True

    def _next_job(self) -> Job | None:
        if len(self._flying) >= self._limit:
            return None
        while (job := self._waiting.take(time.monotonic_ns(), self._needs_ns)) is not None:
            if job.part.decision is None:
                return job
        return None

    def _needs_ns(self, job: Job) -> int:
        inspector = self._bundles.get(job.camera.config.recipes[job.part.recipe].bundle)
        return 0 if inspector is None else inspector.needs_ns

    def _answer_future(self, job: Job, future: Future[Result]) -> None:
        error = future.exception()
        self._answer(job, future.result() if error is None else error)

    def _answer(self, job: Job, answer: Result | BaseException) -> None:
        """In the executor's thread: what a model says becomes the verdict, if it is in time."""
        now_ns = time.monotonic_ns()
        inspector = job.inspector
        assert inspector is not None
        with self._lock:
            if not (job.is_gone or self._is_closed):
                self._flying.remove(job)
                self._work.notify()
                if isinstance(answer, Result):
                    inspector.note_time(now_ns - job.start_ns)
                    job.part.anomaly_map = answer.anomaly_map
                decision = job.decision(answer, now_ns)
                if job.is_fit is None:
                    job.answer = decision
                elif job.is_fit:
                    self._desk.answer(job.camera, job.part, decision)
        inspector.leave()  # in any case: it is closed when the last one has left

    # --- deadlines and faults

    def _watch_deadlines(self) -> None:
        while not self._is_closed:
            self.beats[1] += 1
            with self._lock:
                now_ns = time.monotonic_ns()
                for camera in self._cameras.values():
                    if camera.ledger.next_deadline_ns <= now_ns:
                        camera.ledger.expire(now_ns)
                        self._desk.release(camera)
                deadlines = (camera.ledger.next_deadline_ns for camera in self._cameras.values())
                self._next_alarm_ns = min(deadlines, default=math.inf)
                left_s = (self._next_alarm_ns - time.monotonic_ns()) / 1e9
                if left_s > 0:
                    self._clock.wait(min(left_s, PULSE_S))

    def _wait_until(self, is_so: Callable[[], bool], timeout_s: float) -> bool:
        """Looks now and then: a condition would wake this thread for each part."""
        end_s = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if is_so():
                    return True
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(left_s, LOOK_S))

    def _is_done(self) -> bool:
        cameras = self._cameras.values()
        is_idle = not self._flying and not any(len(camera.ledger) for camera in cameras)
        return is_idle and (self._stopping.is_set() or all(camera.has_ended for camera in cameras))

    def check(self) -> None:
        """Starts anew what hangs; the watchdog calls it about once a second."""
        now_ns = time.monotonic_ns()
        with self._lock:
            hanging = [job for job in self._flying if now_ns - job.start_ns > self._stall_ns]
            for job in hanging:
                job.is_gone = True
                self._flying.remove(job)
                self._desk.decide(job.camera, job.part, Verdict.ERROR, "the model hangs")
            self._work.notify()
        for inspector in {job.inspector for job in hanging}:
            assert inspector is not None
            self._bundles.has_hung = True
            self._bundles.renew(inspector, f"no answer for {self._stall_ns / 1e9:g} s")
        for outlet in self._desk.outlets.values():
            if outlet.is_stalled(self._stall_ns / 1e9):
                outlet.restart()

    def _camera(self, name: str) -> Camera:
        if name not in self._cameras:
            raise LineError(f"there is no camera {name!r}: {', '.join(self._cameras)}")
        return self._cameras[name]
