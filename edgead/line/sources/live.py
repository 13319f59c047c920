"""Live cameras: a thread that takes frames as they come, and connects again when they stop."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from queue import SimpleQueue
from typing import Protocol

from edgead.errors import LineError
from edgead.line.interfaces import Shot

logger = logging.getLogger(__name__)

WAITING_IMAGES = 8  # more than these lose their image, so that memory stays bounded
WAITING_SHOTS = 10_000
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class Connection(Protocol):
    """To one camera, until it is lost. All but `fire` and `counters` are called in one thread."""

    def grab(self) -> Iterable[Shot]:
        """Waits a moment, a second at most where the library allows it, for the next shots.

        Raises:
            LineError: The connection is lost.
        """
        ...

    def fire(self) -> None:
        """Software trigger; returns at once. Raises LineError where there is none."""
        ...

    def counters(self) -> Mapping[str, int]:
        """Of this connection."""
        ...

    def close(self) -> None:
        """May take seconds if the camera does not answer."""
        ...


class Live:
    """A `Source` over connections to one camera. It takes frames from the start, and gives them away
    from the first step of `shots` on."""

    def __init__(self, camera: str, connect: Callable[[], Connection]) -> None:
        """
        Args:
            connect: Makes a connection, or raises LineError.

        Raises:
            LineError: There is no connection.
        """
        self._camera, self._connect = camera, connect
        self._lock = threading.Lock()
        self._connection: Connection | None = connect()
        self._counts = Counter(frames=0, lost_frames=0, overflows=0, reconnects=0)
        self._shots: SimpleQueue[Shot | Exception | None] = SimpleQueue()  # None: closed
        self._is_wanted = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera {camera}", daemon=True)
        self._thread.start()

    def shots(self) -> Iterator[Shot]:
        """See `Source`."""
        self._is_wanted = True
        while (shot := self._shots.get()) is not None and not self._closed.is_set():
            if isinstance(shot, Exception):
                raise LineError(f"camera {self._camera} failed: {shot!r}") from shot
            yield shot

    def fire(self) -> None:
        """See `Source`."""
        connection = self._connection
        if connection is None:
            raise LineError(f"camera {self._camera} is not connected: it cannot be triggered now")
        connection.fire()

    def counters(self) -> Mapping[str, int]:
        """See `Source`."""
        with self._lock:
            counts = Counter(self._counts)
            counts.update({} if self._connection is None else self._connection.counters())
        return dict(counts)

    def close(self) -> None:
        """See `Source`. A camera that does not answer is left alone after a second."""
        self._closed.set()
        self._shots.put(None)
        self._thread.join(1.0)

    def _run(self) -> None:
        connection = self._connection
        try:
            while connection is not None:
                try:
                    while not self._closed.is_set():
                        for shot in connection.grab():
                            self._give(shot)
                except LineError as error:
                    logger.warning("%s: connecting again", error)
                finally:
                    self._drop(connection)
                connection = self._connect_again()
        except Exception as error:
            logger.exception("camera %s", self._camera)
            self._shots.put(error)

    def _give(self, shot: Shot) -> None:
        if not self._is_wanted:
            return
        waiting = self._shots.qsize()
        if shot.image is not None and waiting >= WAITING_IMAGES:
            self._counts["overflows"] += 1
            shot = replace(shot, image=None, problem="the line did not take the image in time")
        self._counts["frames" if shot.image is not None else "lost_frames"] += 1
        if waiting < WAITING_SHOTS:
            self._shots.put(shot)
        if waiting == WAITING_SHOTS - 1:
            logger.error(
                "camera %s: the line takes no shots; from now on they are only counted", self._camera
            )

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            self._connection = None
            self._counts.update(connection.counters())
        connection.close()

    def _connect_again(self) -> Connection | None:
        """Tries until it works; None if the source is closed."""
        for pause_s in pauses_s():
            if self._closed.wait(pause_s):
                return None
            try:
                connection = self._connect()
            except LineError as error:
                logger.info("%s: trying again", error)
                continue
            logger.warning("camera %s: connected again", self._camera)
            self._counts["reconnects"] += 1
            self._connection = connection
            return connection
        raise AssertionError("the pauses never end")


def pauses_s() -> Iterator[float]:
    """Before each attempt to connect."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
