"""Between the line and one sink: a queue and a thread, so that no sink ever delays a verdict."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from edgead.errors import LineError
from edgead.line.interfaces import Picture, Sink
from edgead.line.mark import Mark
from edgead.line.verdicts import Record

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
SINK_CLOSE_S = 1.0
ATTEMPTS_AT_A_BUG = 3  # that a record gets which makes a sink raise what sinks do not raise


@dataclass(slots=True, eq=False)
class _Item:
    record: Record
    picture: Picture | None
    is_late: bool = False


class Outlet:
    """Writes records to a sink, in order, in a thread of its own.

    A write that fails is tried again with the same record, after 0.1 s and so on up to 5 s, for as long
    as it takes. Meanwhile records wait: pictures of the oldest are let go first, then the oldest
    records; both are counted.

    Attributes:
        wants_pictures: Whether the sink does.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        name: str,
        reopen: Callable[[], Sink],
        mark: Mark | None = None,
        pictures: int = 64,
        records: int = 100_000,
    ) -> None:
        """Starts the thread.

        Args:
            sink: From now on only the outlet uses it.
            name: For messages.
            reopen: Opens the same sink again, for `restart`.
            mark: For a sink that cannot say what it has, and has to have all; the outlet closes it.
            pictures: That wait at most.
            records: That wait at most.
        """
        self.wants_pictures = sink.wants_pictures
        self._name, self._reopen, self._mark = name, reopen, mark
        self._max_pictures, self._max_records = pictures, records
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._waiting: deque[_Item] = deque()
        self._pictured: deque[_Item] = deque()  # those of _waiting that have a picture
        self._current: _Item | None = None  # taken from _waiting, not yet written
        self._writing_since_ns: int | None = None
        self._written = self._failed = self._dropped = self._pictures_dropped = 0
        self._drops_records = self._drops_pictures = False  # a burst that was logged goes on
        self._deadline_s: float | None = None  # by which the thread has to end
        self._has_finished = False  # the thread writes nothing more
        self._sink = sink
        with self._lock:  # a thread looks first whether it is the one in _thread
            self._thread = self._start(sink)

    def put(self, record: Record, picture: Picture | None) -> None:
        """Hands over a record; returns at once, never raises."""
        self._put(_Item(record, picture if self.wants_pictures else None))

    def put_late(self, record: Record) -> None:
        """Hands over what the model said after the deadline; as `put`."""
        self._put(_Item(record, None, is_late=True))

    def missed(self, records: list[Record]) -> list[Record]:
        """Those of the last records, in the order in which they were given out, that the sink lacks.

        For the start of the line, before the first `put`. What was given out before a record that the
        sink has, it had too, though it may be elsewhere now: moved by logrotate, deleted for room.
        """
        if self._mark is not None:
            return self._mark.missed(records)
        is_known = [self._sink.knows(record.part_id) for record in records]
        first = is_known.index(True) if True in is_known else 0
        later = zip(records[first:], is_known[first:], strict=True)
        return [record for record, is_known in later if not is_known]

    @property
    def waiting(self) -> int:
        """Records that are not written yet, with late results; any thread."""
        return len(self._waiting) + (self._current is not None)

    def counters(self) -> dict[str, int]:
        """What waits and what became of the rest, and the sink's own counters; any thread.

        written: records, with late results. failed: attempts. dropped: records that were given up.
        pictures_dropped: pictures whose records are still written.
        """
        own = {
            "waiting": self.waiting,
            "written": self._written,
            "failed": self._failed,
            "dropped": self._dropped,
            "pictures_dropped": self._pictures_dropped,
        }
        try:
            return {**self._sink.counters(), **own}
        except Exception:
            logger.exception("sink %s: counters", self._name)
            return own

    def is_stalled(self, seconds: float) -> bool:
        """Whether one and the same write has been going on for longer than that."""
        since_ns = self._writing_since_ns
        return since_ns is not None and time.monotonic_ns() - since_ns > seconds * 1e9

    def restart(self) -> None:
        """Leaves the thread to its fate and goes on with a newly opened sink; returns at once.

        The record whose write is stuck is written again if the new sink does not know it, or has a mark
        because it cannot tell. The old sink is closed when its write comes back.
        """
        logger.error("sink %s: a write does not return; opening the sink again", self._name)
        with self._lock:
            if self._deadline_s is None:
                self._writing_since_ns = None
                self._thread = self._start(None)

    def close(self, timeout_s: float) -> int:
        """Writes what is left, for at most `timeout_s`, then closes the sink; may be repeated.

        Returns:
            How many records were left.
        """
        end_s = time.monotonic() + timeout_s
        with self._lock:
            if self._deadline_s is None:
                self._deadline_s = end_s
                self._wake.notify_all()
            self._wake.wait_for(lambda: self._has_finished, timeout_s)
            left = self.waiting
            is_stuck = not self._has_finished
        if not is_stuck:
            self._thread.join(SINK_CLOSE_S)
        if left:
            logger.error("sink %s: closed before %d records were written", self._name, left)
        return left

    # --- any thread

    def _put(self, item: _Item) -> None:
        message = ""
        with self._lock:
            if self._deadline_s is not None:
                self._dropped += 1
                return
            if len(self._waiting) >= self._max_records:
                message = self._drop_record()
            self._waiting.append(item)
            if item.picture is not None:
                self._pictured.append(item)
                if len(self._pictured) > self._max_pictures:
                    message = message or self._drop_picture()
            self._wake.notify_all()
        if message:
            logger.error("sink %s: %s", self._name, message)

    def _drop_record(self) -> str:
        item = self._waiting.popleft()
        if item.picture is not None:
            self._pictured.popleft()
        self._dropped += 1
        if self._drops_records:
            return ""
        self._drops_records = True
        return f"{self._max_records} records wait: the oldest are dropped from now on"

    def _drop_picture(self) -> str:
        self._pictured.popleft().picture = None
        self._pictures_dropped += 1
        if self._drops_pictures:
            return ""
        self._drops_pictures = True
        return f"{self._max_pictures} pictures wait: the oldest go from now on, their records stay"

    # --- the thread

    def _start(self, sink: Sink | None) -> threading.Thread:
        thread = threading.Thread(
            target=self._run, args=(sink,), name=f"edgead sink {self._name}", daemon=True
        )
        thread.start()
        return thread

    def _is_mine(self) -> bool:
        """Whether this thread was not given up by `restart`."""
        return self._thread is threading.current_thread()

    def _run(self, sink: Sink | None) -> None:
        with self._lock:
            pass  # whoever started this thread has set _thread by now
        if sink is None and (sink := self._open_again()) is not None:
            self._settle_current(sink)
        while sink is not None and (item := self._next()) is not None:
            self._deliver(sink, item)
        with self._lock:
            is_mine = self._is_mine()
            if is_mine:
                self._has_finished = True
                self._wake.notify_all()
        if sink is not None:
            try:
                sink.close()
            except Exception:
                logger.exception("sink %s: close", self._name)
        if is_mine and self._mark is not None:
            self._mark.close()

    def _open_again(self) -> Sink | None:
        """A new sink, whatever time it takes; None if the outlet was closed meanwhile."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                sink = self._reopen()
            except Exception as error:
                logger.error("sink %s: cannot be opened again: %s", self._name, error)
            else:
                with self._lock:
                    self._sink = sink
                return sink
            if not self._pause(pause_s):
                return None
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _settle_current(self, sink: Sink) -> None:
        """Leaves out the record that the old sink was writing, if the new one has it."""
        with self._lock:
            item = self._current
        if item is None or item.is_late or self._mark is not None:  # then the sink cannot tell
            return
        try:
            is_known = sink.knows(item.record.part_id)
        except Exception:
            logger.exception("sink %s: knows", self._name)
            return
        if is_known:
            self._finish(item, is_written=True)

    def _next(self) -> _Item | None:
        """The next to write, waiting for it; None at the end."""
        with self._lock:
            while self._is_mine():
                if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                    return None
                if self._current is not None:  # tried before
                    return self._current
                if self._waiting:
                    item = self._current = self._waiting.popleft()
                    if item.picture is not None:
                        self._pictured.popleft()
                    if not self._waiting:
                        self._drops_records = self._drops_pictures = False
                    return item
                if self._deadline_s is not None:
                    return None
                self._wake.wait()
            return None

    def _deliver(self, sink: Sink, item: _Item) -> None:
        """Writes one record, however often that has to be tried."""
        pause_s, bugs, has_failed = FIRST_PAUSE_S, 0, False
        while True:
            if not self._begin_write():
                return
            try:
                if item.is_late:
                    sink.write_late(item.record)
                else:
                    sink.write(item.record, item.picture)
            except (LineError, OSError) as error:
                if not has_failed:
                    logger.error("sink %s: %s; the record is kept and tried again", self._name, error)
            except Exception:
                bugs += 1
                logger.exception("sink %s: part %d", self._name, item.record.part_id)
            else:
                if has_failed:
                    logger.info("sink %s: takes records again", self._name)
                self._finish(item, is_written=True)
                return
            has_failed = True
            if not self._end_failed_write():
                return
            if bugs >= ATTEMPTS_AT_A_BUG:
                logger.error("sink %s: gives up part %d", self._name, item.record.part_id)
                self._finish(item, is_written=False)
                return
            if not self._pause(pause_s):
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _begin_write(self) -> bool:
        with self._lock:
            if not self._is_mine():
                return False
            self._writing_since_ns = time.monotonic_ns()
            return True

    def _end_failed_write(self) -> bool:
        with self._lock:
            if not self._is_mine():
                return False
            self._failed += 1
            self._writing_since_ns = None
            return True

    def _finish(self, item: _Item, *, is_written: bool) -> None:
        with self._lock:
            if not self._is_mine() or self._current is not item:
                return
            self._current = self._writing_since_ns = None
            self._written += is_written
            self._dropped += not is_written
        if self._mark is not None and not item.is_late:
            self._mark.set(item.record.part_id)

    def _pause(self, pause_s: float) -> bool:
        """Waits; False: the time to close has run out, or the thread was given up."""
        with self._lock:
            end_s = time.monotonic() + pause_s
            while self._is_mine():
                now_s = time.monotonic()
                if self._deadline_s is not None:
                    if now_s >= self._deadline_s:
                        return False
                    end_s = min(end_s, self._deadline_s, now_s + FIRST_PAUSE_S)
                if now_s >= end_s:
                    return True
                self._wake.wait(end_s - now_s)
            return False
