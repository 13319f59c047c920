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
from pathlib import Path
from typing import Any

from edgead.errors import LineError
from edgead.line.bundles import Bundles
from edgead.line.camera import Camera, Job
from edgead.line.desk import Desk
from edgead.line.dispatch import Dispatcher
from edgead.line.grab import grab
from edgead.line.interfaces import Shot, Source
from edgead.line.ledger import Part
from edgead.line.outlet import Outlet
from edgead.line.verdicts import Verdict
from edgead.line.waiting import Waiting

logger = logging.getLogger(__name__)

PULSE_S = 0.25  # the longest that a thread of the line sleeps without a sign of life
LOOK_S = 0.02
CLOSE_S = 1.0  # that a source may take to close


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
        self._stall_ns = round(stall_s * 1e9)
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._dispatcher = Dispatcher(self._lock, desk, bundles, in_flight=in_flight)
        self._clock = threading.Condition(self._lock)  # who waits for deadlines
        self._next_alarm_ns = math.inf
        self._cameras: dict[str, Camera] = {}
        self._bundles = bundles
        self._loops: dict[str, Callable[[], None]] = {}  # what the threads do, by name
        self._threads: dict[str, threading.Thread] = {}
        self._stopping = threading.Event()
        self._is_started = self._is_closed = False

    # --- putting it together

    def add(self, cameras: list[Camera]) -> None:
        """Gives it its cameras. Sinks that take this line as their `Controls` can be opened then."""
        self._cameras = {camera.name: camera for camera in cameras}
        self._dispatcher.waiting = Waiting(tuple(self._cameras))

    def start(self, outlets: dict[str, Outlet]) -> None:
        """Starts the threads. What a crash left open becomes ERROR, and sinks get what they lack."""
        self._desk.begin(outlets)
        self._loops = {"dispatch": self._dispatch, "deadlines": self._watch_deadlines}
        for name, camera in self._cameras.items():
            self._loops[f"camera {name}"] = functools.partial(self._grab, camera)
        self._threads = {name: self._thread(name) for name in self._loops}
        for thread in self._threads.values():
            thread.start()
        with self._lock:
            self._is_started = True

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names, in the order of the recipe file."""
        return tuple(self._cameras)

    @property
    def lost_device(self) -> str:
        """Why parts get ERROR until this process has ended and another one has begun; else empty."""
        return self._bundles.lost_device

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
        closing = [
            threading.Thread(target=self._close, args=(camera,), daemon=True)
            for camera in self._cameras.values()
        ]
        for thread in closing:
            thread.start()
        end_s = time.monotonic() + CLOSE_S
        self._wait_until(self._is_idle, grace_s)
        for thread in closing:
            thread.join(max(end_s - time.monotonic(), 0))
        with self._lock:
            for camera in self._cameras.values():
                camera.ledger.abandon("the line was stopped before its answer", time.monotonic_ns())
                self._desk.release(camera)
            self._is_closed = True
            self._dispatcher.close()
            self._clock.notify_all()
        self._bundles.close()
        for name in ("dispatch", "deadlines"):
            if name in self._threads:
                self._threads[name].join(grace_s)
        return self._desk.close(grace_s / 2)

    @property
    def failures(self) -> list[str]:
        """Why sources ended that should not have."""
        with self._lock:
            return [camera.failure for camera in self._cameras.values() if camera.failure]

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
            if not self._is_started:  # the port of a PLC opens before the other sinks do
                raise LineError("the line is starting")
            if self._stopping.is_set():
                raise LineError("the line is stopping")
            now_ns = time.monotonic_ns()
            part = self._open(chosen, now_ns, tag)
            if chosen.awaiting.is_unsure(now_ns):
                reason = "the camera was not triggered: it is not clear which images are under way"
                self._desk.decide(chosen, part, Verdict.NOT_INSPECTED, reason)
                return part.part_id
            chosen.awaiting.add(part)
        try:
            chosen.source.fire()
        except LineError as error:
            with self._lock:
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
            before, chosen.recipe = chosen.recipe, index
        if index != before:
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
                name: camera.state(self._bundles, self._dispatcher.waiting.count(name))
                for name, camera in self._cameras.items()
            }
            is_running = self._is_started and not self._stopping.is_set()
            is_ready = is_running and self._bundles.are_ready
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

        A threshold that was set by hand was meant for the scores of the old one: it is dropped.

        Raises:
            EdgeADError: It cannot be loaded, or does not verify: the old one stays.
        """
        inspector = self._bundles.load(path, new)
        with self._lock:  # no part may meet the new scores with a threshold for the old
            self._bundles.put(path, inspector)
            dropped = [
                (camera.name, index, camera.drop_threshold(index))
                for camera in self._cameras.values()
                for index, recipe in enumerate(camera.config.recipes)
                if recipe.bundle == path
            ]
        for name, index, value in dropped:
            self.statistics.new_bundle(name, index)
            if value is not None:
                logger.warning(
                    "camera %s: the threshold %g that was set by hand does not hold any more: %s is new",
                    name,
                    value,
                    path,
                )

    # --- images come in

    def _grab(self, camera: Camera) -> None:
        grab(
            camera,
            functools.partial(self._take, camera),
            put=functools.partial(self._put_source, camera),
            stopping=self._stopping,
            is_given_up=self._is_given_up,
        )

    def _put_source(self, camera: Camera, source: Source) -> None:
        with self._lock:
            camera.source = source
            self._desk.give_up_awaited(camera, "the camera was lost before its image came")

    def _take(self, camera: Camera, shot: Shot) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            if camera.config.trigger == "plc":
                awaited = self._desk.match(camera, shot)
                if awaited is None:
                    return
                part = awaited
            else:
                part = self._open(camera, shot.trigger_ns, None)
        part.origin, part.frame_id = shot.origin, shot.frame_id
        part.exposure_ns = None if shot.image is None else shot.exposure_ns
        try:
            region = camera.region(shot, part.recipe, decode=self._desk.wants_pictures)
        except LineError as error:
            with self._lock:
                self._desk.decide(camera, part, Verdict.NOT_INSPECTED, str(error))
            return
        part.region = region
        job = Job(camera, part, shot, region)
        with self._lock:
            self._dispatcher.put(job)
        self._dispatcher.dispatch()  # an idle device gets it without waiting for another thread
        if self._is_given_up():
            return
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
                and self._dispatcher.waiting.count(camera.name) >= camera.config.queue
                and not self._stopping.is_set()
            ):
                self._dispatcher.room.wait(PULSE_S)

    def _open(self, camera: Camera, trigger_ns: int, tag: int | None) -> Part:
        bundle = self._bundles.name(camera.inspection.bundle)
        part = self._desk.open(camera, trigger_ns, tag, bundle)
        if part.deadline_ns < self._next_alarm_ns:
            self._clock.notify()
        return part

    # --- images are inspected

    def _dispatch(self) -> None:
        while not (self._is_closed or self._is_given_up()):
            self.beats[0] += 1
            if not self._dispatcher.dispatch():
                with self._lock:
                    if not self._dispatcher.can_dispatch:
                        self._dispatcher.work.wait(PULSE_S)

    # --- deadlines and faults

    def _watch_deadlines(self) -> None:
        while not self._is_closed:
            self.beats[1] += 1
            with self._lock:
                now_ns = time.monotonic_ns()
                for camera in self._cameras.values():
                    self._desk.give_up_overdue(camera, now_ns)
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
        has_ended = all(camera.has_ended for camera in self._cameras.values())
        return self._is_idle() and (self._stopping.is_set() or has_ended)

    def _is_idle(self) -> bool:
        is_open = any(len(camera.ledger) for camera in self._cameras.values())
        return not (is_open or self._dispatcher.flying)

    def check(self) -> None:
        """Starts anew what hangs; the watchdog calls it about once a second."""
        now_ns = time.monotonic_ns()
        with self._lock:
            hanging = self._dispatcher.give_up(now_ns - self._stall_ns)
            for name, thread in self._threads.items():
                if any(job.sender is thread for job in hanging):  # it hangs too: another one goes on
                    self._threads[name] = self._thread(name)
                    self._threads[name].start()
        for inspector in {job.inspector for job in hanging}:
            assert inspector is not None
            self._bundles.renew(inspector, f"no answer for {self._stall_ns / 1e9:g} s")
        for outlet in self._desk.outlets.values():
            if outlet.is_stalled(self._stall_ns / 1e9):
                outlet.restart()

    def _close(self, camera: Camera) -> None:
        try:
            camera.source.close()
        except Exception:
            logger.exception("camera %s: close", camera.name)

    def _thread(self, name: str) -> threading.Thread:
        return threading.Thread(target=self._loops[name], name=f"edgead {name}", daemon=True)

    def _is_given_up(self) -> bool:
        """Whether another thread does the work of this one, which hung."""
        return threading.current_thread() not in self._threads.values()

    def _camera(self, name: str) -> Camera:
        if name not in self._cameras:
            raise LineError(f"there is no camera {name!r}: {', '.join(self._cameras)}")
        return self._cameras[name]
