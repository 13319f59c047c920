"""From images that wait to their models, the earliest deadline first, and from there to the desk."""

from __future__ import annotations

import functools
import logging
import threading
import time
from concurrent.futures import Future

from edgead.errors import BackendError
from edgead.line.bundles import Bundles
from edgead.line.camera import Job
from edgead.line.desk import Desk
from edgead.line.verdicts import Verdict
from edgead.line.waiting import Waiting
from edgead.result import Result

logger = logging.getLogger(__name__)


class Dispatcher:
    """Images that wait, and those that models work on. Callers hold the line's lock, but for `dispatch`.

    Attributes:
        waiting: Images on their way to a model.
        flying: Those that a model works on.
        work: Notified when there is room for another one on the device.
        room: Notified when one of those that wait has gone.
    """

    def __init__(self, lock: threading.Lock, desk: Desk, bundles: Bundles, *, in_flight: int) -> None:
        self.waiting: Waiting[Job] = Waiting(())
        self.flying: list[Job] = []
        self.work, self.room = threading.Condition(lock), threading.Condition(lock)
        self._lock, self._desk, self._bundles, self._limit = lock, desk, bundles, in_flight
        self._is_closed = False

    @property
    def can_dispatch(self) -> bool:
        """Whether an image waits, and the device has room for it."""
        return len(self.waiting) > 0 and len(self.flying) < self._limit

    def put(self, job: Job) -> None:
        """Queues an image as its camera wants it: it, or older ones, may be given up."""
        camera, queue = job.camera, job.camera.config.queue
        if self.waiting.count(camera.name) >= queue and camera.config.grab == "inspect-all":
            camera.counts["overflows"] += 1
            reason = f"{queue} images were waiting already: the line is slower than its triggers"
            if not camera.overflows:
                logger.error("camera %s, from part %d on: %s", camera.name, job.part.part_id, reason)
            camera.overflows = True
            self._desk.decide(camera, job.part, Verdict.NOT_INSPECTED, reason)
            return
        if camera.overflows and not self.waiting.count(camera.name):
            camera.overflows = False
            logger.warning("camera %s: its queue is empty again", camera.name)
        while camera.config.grab == "live" and (older := self.waiting.drop_oldest(camera.name)):
            camera.counts["superseded"] += 1
            self._desk.decide(
                camera, older.part, Verdict.NOT_INSPECTED, "a newer image came before its turn"
            )
        self.waiting.put(camera.name, job)

    def dispatch(self) -> bool:
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
            job.start_ns, job.sender = time.monotonic_ns(), threading.current_thread()
            self.flying.append(job)
            self.room.notify_all()
        try:
            future = inspector.submit(job.shot, job.region)
        except Exception as error:
            self._answer(job, error)
            if isinstance(error, BackendError):  # the executor is closed for good
                self._bundles.renew(inspector, str(error))
        else:
            job.sender = None
            future.add_done_callback(functools.partial(self._answer_future, job))
        return True

    def give_up(self, before_ns: int) -> list[Job]:
        """Says ERROR of those that a model has worked on since before that moment; returns them."""
        hanging = [job for job in self.flying if job.start_ns < before_ns]
        for job in hanging:
            job.is_gone = True
            self.flying.remove(job)
            self._desk.decide(job.camera, job.part, Verdict.ERROR, "the model hangs")
        self.work.notify()
        return hanging

    def close(self) -> None:
        """What models say from now on is not heard."""
        self._is_closed = True
        self.waiting.clear()
        self.work.notify_all()
        self.room.notify_all()

    def _next_job(self) -> Job | None:
        if len(self.flying) >= self._limit:
            return None
        while (job := self.waiting.take(time.monotonic_ns(), self._needs_ns)) is not None:
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
                self.flying.remove(job)
                self.work.notify()
                if isinstance(answer, Result):
                    inspector.note_time(now_ns - job.start_ns)
                    job.part.anomaly_map = answer.anomaly_map
                decision = job.decision(answer, now_ns)
                if job.is_fit is None:
                    job.answer = decision
                elif job.is_fit:
                    self._desk.answer(job.camera, job.part, decision)
        inspector.leave()  # in any case: it is closed when the last one has left
