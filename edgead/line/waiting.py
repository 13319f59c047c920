"""Which image is inspected next: the earliest deadline first, and no camera starves.

No threads in here: callers hold a lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Dated(Protocol):
    """What waits: something that has to be done at a certain time."""

    @property
    def deadline_ns(self) -> int: ...


T = TypeVar("T", bound=Dated)


class Waiting(Generic[T]):
    """Images that wait, one queue per camera, each in the order of its triggers.

    The earliest deadline goes first. By itself that rule fails where there is more to do than can be
    done: all time goes to images that are too late when they are ready, or to the one camera whose
    deadlines are shortest. So images that cannot be ready in time are thrown away, and the camera that
    lost most of them since one of its own was taken goes before all others.
    """

    def __init__(self, cameras: tuple[str, ...]) -> None:
        self._queues: dict[str, deque[T]] = {camera: deque() for camera in cameras}
        self._lost = dict.fromkeys(cameras, 0)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def count(self, camera: str) -> int:
        """Images of this camera that wait."""
        return len(self._queues[camera])

    def put(self, camera: str, item: T) -> None:
        self._queues[camera].append(item)

    def take(self, now_ns: int, needs_ns: Callable[[T], int] = lambda item: 0) -> T | None:
        """The next one that can be ready in time, if it needs `needs_ns`.

        If none can, the one with the latest deadline: what it needs may have been thought wrong.
        """
        last: tuple[str, T] | None = None
        for camera, queue in self._queues.items():
            while queue and queue[0].deadline_ns - needs_ns(queue[0]) <= now_ns:
                item = queue.popleft()
                self._lost[camera] += 1
                is_last = last is None or item.deadline_ns >= last[1].deadline_ns
                if is_last and item.deadline_ns > now_ns:
                    last = camera, item
        ready = [camera for camera, queue in self._queues.items() if queue]
        if ready:
            camera = min(ready, key=lambda name: (-self._lost[name], self._queues[name][0].deadline_ns))
            last = camera, self._queues[camera].popleft()
        if last is None:
            return None
        self._lost[last[0]] = 0
        return last[1]

    def drop_oldest(self, camera: str) -> T | None:
        """Takes out what has waited longest."""
        queue = self._queues[camera]
        return queue.popleft() if queue else None

    def clear(self) -> None:
        """Takes out all."""
        for queue in self._queues.values():
            queue.clear()
