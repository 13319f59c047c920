"""Running a line from the command line or as a service, until it ends or is told to."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from edgead.errors import EdgeADError
from edgead.line.assembly import open_line
from edgead.line.line import Line
from edgead.line.recipe import CameraConfig, Inspection, Recipe, Settings, SinkConfig
from edgead.line.service import is_supervised, notify, watchdog_period_s
from edgead.line.sinks import sink_module
from edgead.line.sources import source_module

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter from another one. Python's own 5 ms would be felt in each
verdict."""

GRACE_S = 1.0  # for open parts when the line is told to stop; all in all it takes less than two
DEADLINE_MS = 1000.0


def replay_recipe(
    bundle: Path,
    source: Path,
    results: Path,
    journal: Path,
    *,
    rate_hz: float | None = None,
    deadline_ms: float = DEADLINE_MS,
    backend: str = "auto",
) -> Recipe:
    """The recipe of `edgead run X.edgead --source FOLDER`.

    Raises:
        LineError: A value that cannot be.
    """
    kind = "folder" if source.is_dir() else "video"
    module = source_module(kind)
    config = module.Config(path=source, rate_hz=rate_hz)
    camera = CameraConfig(
        name="replay",
        deadline_ms=deadline_ms,
        grab="inspect-all" if rate_hz else "wait",
        queue=CameraConfig.queue if rate_hz else 1,
        recipes=(Inspection(bundle=bundle),),
        kind=kind,
        source=config,
    )
    lines = sink_module("jsonl").Config(path=results)
    return Recipe(
        Settings(journal=journal, sync="never", backend=backend),
        (camera,),
        (SinkConfig("jsonl", "jsonl", lines),),
        {},
    )


def run(recipe: Recipe, *, opened: Callable[[Recipe], Line] = open_line) -> tuple[Line, int]:
    """Runs a line until its sources end, or SIGTERM or SIGINT. SIGHUP takes over bundles that changed.

    Under a service manager, which starts it anew, it also ends when its device can be used again by
    another process only. Without one it goes on, and its parts get ERROR.

    Returns:
        The line, stopped; and 0, or 1 if a camera failed, a sink could not be written out, or a device
        is lost.

    Raises:
        EdgeADError: It cannot start.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    line = opened(recipe)
    changes = Changes(recipe, line)
    period_s = watchdog_period_s()
    try:
        with _signals(signal.SIGTERM, signal.SIGINT) as told_to_stop, _signals(signal.SIGHUP) as hang_up:
            notify("READY=1")
            beats, next_beat_s = [-1, -1], 0.0
            while not told_to_stop and not line.wait(min(period_s / 4, 0.1)):
                if hang_up:
                    hang_up.clear()
                    changes.take_over()
                if time.monotonic() < next_beat_s:
                    continue
                next_beat_s = time.monotonic() + period_s
                line.check()
                if all(now > before for now, before in zip(line.beats, beats, strict=True)):
                    notify("WATCHDOG=1")
                beats = list(line.beats)
                if line.lost_device and is_supervised():
                    logger.error("this line ends, to be started anew: %s", line.lost_device)
                    break
            notify("STOPPING=1")
            failures = bool(line.failures or line.lost_device)
    finally:
        left = line.stop(GRACE_S)
    for name, count in left.items():
        if count:
            logger.error(
                "sink %s: %d records were not written: the next start gives them to it, unless it is a "
                "PLC, metrics or the status page",
                name,
                count,
            )
    return line, int(failures or any(left.values()))


def end(status: int) -> NoReturn:
    """Ends the process at once, when the line is stopped and all is written.

    A thread may still be in a library, such as one that loads or decodes: if it came back while the
    interpreter ends, the process would abort.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def _signals(*numbers: signal.Signals) -> Iterator[list[int]]:
    """A list that is filled when one of the signals comes; only in the main thread."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Changes:
    """Which bundle files were replaced since they were loaded."""

    def __init__(self, recipe: Recipe, line: Line) -> None:
        self._line = line
        paths = {inspection.bundle for camera in recipe.cameras for inspection in camera.recipes}
        self._known = {path: _stamp(path) for path in paths}

    def take_over(self) -> None:
        """Swaps them in, in a thread of its own: loading takes seconds."""
        threading.Thread(target=self._swap, name="edgead swap", daemon=True).start()

    def _swap(self) -> None:
        for path, known in self._known.items():
            try:
                if (now := _stamp(path)) != known:
                    self._line.swap(path, path)
                    self._known[path] = now
            except Exception as error:
                said = error if isinstance(error, (EdgeADError, OSError)) else repr(error)
                logger.error("%s: not taken over, the line goes on as it is: %s", path, said)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
