"""The thread that takes a camera's images in, and opens its source again when that fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from edgead.errors import LineError
from edgead.line.camera import Camera
from edgead.line.interfaces import Shot, Source

logger = logging.getLogger(__name__)

REOPEN_BACKOFF_S = (1.0, 30.0)


def grab(
    camera: Camera,
    take: Callable[[Shot], None],
    *,
    put: Callable[[Source], None],
    stopping: threading.Event,
    is_given_up: Callable[[], bool],
) -> None:
    """Runs until the source ends or the line stops.

    Args:
        take: Gets each shot; may hang.
        put: Puts a source that was opened anew in the place of the one that failed.
        is_given_up: Whether another thread has gone on with the shots, because `take` hung.
    """
    pause_s, longest_s = REOPEN_BACKOFF_S
    while not stopping.is_set():
        try:
            if camera.shots is None:
                camera.shots = camera.source.shots()
            for shot in camera.shots:
                take(shot)
                if is_given_up():
                    return
                camera.failure, pause_s = None, REOPEN_BACKOFF_S[0]
            break
        except Exception as error:
            if is_given_up():
                return
            camera.failure = f"camera {camera.name}: {_said(error)}"
            logger.error("%s", camera.failure, exc_info=not isinstance(error, LineError))
        camera.shots = None
        if camera.reopen is None:
            break
        camera.source.close()
        while not stopping.wait(pause_s):
            pause_s = min(2 * pause_s, longest_s)
            try:
                put(camera.reopen())
                break
            except Exception as error:
                logger.error("camera %s: cannot be opened again: %s", camera.name, _said(error))
    if stopping.is_set():
        camera.source.close()  # which may have been opened after the line had closed all of them
    camera.has_ended = True


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, LineError) else repr(error)
