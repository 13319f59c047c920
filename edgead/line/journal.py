"""The journal: every trigger and every verdict, on disk before anybody else hears of it.

After a crash it says which parts were open, what the next part id is, and which records the sinks may
not have got. A folder of segments, `journal-00000001.log` and on; as many are kept as hold the last
10,000 records, and those that wait for a sink. Lines of JSON:

    {"next": 18}                             first of a segment: no part id from here on was given
    {"part_id": 17, "camera": "top", ...}    a trigger; an open one stands in the next segment again
    {"verdict": "OK", "part_id": 17, ...}    its `Record`
    {"late": ...}                            what the model said of a part after its deadline

Each line is written to the file at once, which survives `kill -9`. Against power cuts `sync` says when
the disk has to have it: "second", each second, in a thread of its own; "always", before anybody hears of
the verdict, which then waits for the disk; "never" leaves it to the system.

The file `lock` says how the last process ended. If parts may be missing from the journal, because the
machine went down or the disk was full, the next ones get ids that are a million higher: sinks may have
the missing ones.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from edgead.errors import DataError, LineError
from edgead.line.verdicts import Record

logger = logging.getLogger(__name__)

SYNCS = ("never", "second", "always")
SEGMENT_PARTS = 10_000
KEPT_IN_MEMORY = 100_000
LINES_OF_A_WRITE = 1000
JUMP = 1_000_000  # in part ids
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class OpenTrigger:
    """A trigger without a verdict, of a process that is no more."""

    part_id: int
    camera: str
    trigger_ns: int  # since 1970
    tag: int | None


@dataclass
class Past:
    """What the journal of earlier processes says."""

    next_part_id: int = 1
    open_triggers: list[OpenTrigger] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)  # of the last segments, oldest first


class Journal:
    """Appends to the journal. Callers hold a lock.

    A disk that is full or gone never stops the line: lines are kept in memory (the last 100,000),
    counted as `failures`, and written when the disk takes them again.

    Attributes:
        past: What was there when it was opened.
        lacking: How many of the last records some sink may not have: those are kept, too.
        failures: Writes that the disk refused.
    """

    def __init__(self, folder: Path, *, sync: str = "second") -> None:
        """Opens the folder, made if need be, for this process alone.

        Raises:
            LineError: Another process has it, it cannot be written, or it holds what is no journal.
        """
        self._folder, self._sync = folder, sync
        self.failures = 0
        self.lacking: Callable[[], int] = lambda: len(self.past.records)  # until somebody knows better
        self._is_refused = False  # an outage of the disk, which was logged, goes on
        self._waiting: deque[bytes] = deque()
        self._file = -1
        self._full: list[int] = []  # files of segments that are full, to be closed
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise LineError(
                f"journal {folder}: {error.strerror}: name a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise LineError(
                f"journal {folder}: another process runs this line: stop it, or name another folder"
            ) from error
        try:
            self._open_triggers: dict[int, dict[str, Any]] = {}
            segments = self._segments()
            self._sizes: dict[Path, int] = {}  # of the segments that are kept: their records
            self.past = self._read(segments)
            self._next = self.past.next_part_id
            if self._may_lack_parts():
                self._next += JUMP
                logger.warning(
                    "journal %s: it may lack its last parts: part ids go on at %d", folder, self._next
                )
            self._say("running")
            self._reach_disk(os.dup(self._lock))  # a power cut must not leave that it was closed
            self._number = int(segments[-1].stem.rpartition("-")[2]) if segments else 0
            self._start_segment()
        except BaseException:
            os.close(self._lock)
            raise
        self._is_closed = threading.Event()
        self._syncing: threading.Thread | None = None
        if sync == "second":
            self._syncing = threading.Thread(target=self._sync_each_second, daemon=True)
            self._syncing.start()

    def trigger(self, camera: str, trigger_ns: int, tag: int | None) -> int:
        """Notes a trigger (nanoseconds since 1970) and gives its part id, never given before."""
        part_id = self._next
        self._next += 1
        entry = {"part_id": part_id, "camera": camera, "trigger_ns": trigger_ns, "tag": tag}
        self._open_triggers[part_id] = entry
        self._append(entry)
        return part_id

    def verdict(self, record: Record) -> None:
        """Notes the verdict on a part."""
        self._open_triggers.pop(record.part_id, None)
        self._append({"verdict": record.verdict.value, **record.to_dict()})
        self._parts_in_segment += 1
        self._sizes[self._path] = self._parts_in_segment
        if self._parts_in_segment >= SEGMENT_PARTS:
            self._start_segment()

    def late(self, record: Record) -> None:
        """Notes what the model said after the deadline."""
        self._append({"late": record.to_dict()})

    def close(self) -> None:
        """Writes out; may be repeated."""
        if self._file < 0:
            return
        self._is_closed.set()
        if self._syncing is not None:
            self._syncing.join(1)
        self._write()
        self._tidy()
        if not self._waiting:
            self._say("closed")
        os.close(self._file)
        os.close(self._lock)
        self._file = -1

    def _may_lack_parts(self) -> bool:
        """Whether ids may have been given that it does not know; `kill -9` alone loses none."""
        state, _, boot = os.pread(self._lock, 100, 0).decode(errors="replace").strip().partition(" ")
        return state == "refused" or (state == "running" and boot.strip() != _boot())

    def _say(self, state: str) -> None:
        """For the next process. All states have the same length, for which a full disk has room, too."""
        try:
            os.pwrite(self._lock, f"{state:7} {_boot()}\n".encode(), 0)
        except OSError as error:
            logger.error("journal %s: %s", self._folder / "lock", error.strerror)

    def _segments(self) -> list[Path]:
        return sorted(self._folder.glob("journal-????????.log"))

    def _start_segment(self) -> None:
        """Opens the next file; what is still open stands in it again, so that older files may go."""
        self._number += 1
        path = self._folder / f"journal-{self._number:08d}.log"
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o644)
        except OSError as error:
            if self._file < 0:
                raise LineError(f"journal {path}: {error.strerror}") from error
            self._number -= 1
            self._parts_in_segment = SEGMENT_PARTS // 2  # goes on in the old file and tries again later
            self.failures += 1
            return
        if self._file >= 0:
            self._write()
            self._full.append(self._file)
        self._file, self._path = file, path
        self._parts_in_segment = self._sizes[path] = 0
        lines = [{"next": self._next}, *self._open_triggers.values()]
        self._waiting.extendleft(_line(line) for line in reversed(lines))
        self._write()
        if self._sync != "second":
            self._tidy()

    def _tidy(self) -> None:
        """Closes full segments, and deletes those that are not needed any more: later, if it fails."""
        try:
            self._tidy_up()
        except OSError as error:  # such as no file descriptor left
            self.failures += 1
            logger.error("journal %s: %s", self._folder, error.strerror)

    def _tidy_up(self) -> None:
        current = self._path
        self._reach_disk(os.dup(self._file))  # before the segment goes that says the same
        while self._full:
            self._reach_disk(self._full.pop(0))
        kept, is_needed = SEGMENT_PARTS + self.lacking(), False
        for old in self._segments():
            if old >= current:
                break
            if size := self._sizes.get(old, 0):  # one without records is not needed in any case
                is_needed = is_needed or sum(list(self._sizes.values())) - size < kept
                if is_needed:
                    continue
            self._sizes.pop(old, None)
            old.unlink(missing_ok=True)

    def _reach_disk(self, file: int) -> None:
        try:
            if self._sync != "never":
                os.fdatasync(file)
        except OSError as error:
            logger.error("journal %s: %s", self._folder, error.strerror)
        finally:
            os.close(file)

    def _append(self, entry: dict[str, Any]) -> None:
        self._waiting.append(_line(entry))
        self._write()
        try:
            if self._sync == "always":
                os.fdatasync(self._file)
        except OSError as error:
            self._note_failure(error)
            return
        if self._is_refused and not self._waiting:
            self._is_refused = False
            self._say("running")
            logger.warning("journal %s: the disk takes it again", self._folder)

    def _sync_each_second(self) -> None:
        """Without the callers' lock: a slow disk delays no verdict."""
        while not self._is_closed.wait(1):
            self._tidy()

    def _write(self) -> None:
        """Writes all lines that wait; a line that the disk takes in part only is written whole again."""
        count = 1 if self._is_refused else LINES_OF_A_WRITE  # in an outage no more than a try
        while self._waiting:
            lines = list(islice(self._waiting, count))
            try:
                written = os.write(self._file, b"".join(lines))
            except OSError as error:
                self._note_failure(error)
                return
            for line in lines:
                if written < len(line):
                    # The new line ends the torn one, which `_read` skips.
                    self._waiting[0] = b"\n" + line.lstrip(b"\n")
                    break
                written -= len(line)
                self._waiting.popleft()
            count = LINES_OF_A_WRITE

    def _note_failure(self, error: OSError) -> None:
        if not self._is_refused:
            logger.error("journal %s: %s: it is kept in memory", self._folder, error.strerror)
            self._say("refused")
        self._is_refused = True
        self.failures += 1
        while len(self._waiting) > KEPT_IN_MEMORY:
            self._waiting.popleft()

    def _read(self, paths: list[Path]) -> Past:
        past = Past()
        triggers: dict[int, dict[str, Any]] = {}
        decided: set[int] = set()
        for path in paths:
            before = len(decided)
            for entry in _entries(path):
                if isinstance(entry, Record):
                    if entry.part_id not in decided:
                        decided.add(entry.part_id)
                        past.records.append(entry)
                elif "next" in entry:
                    past.next_part_id = max(past.next_part_id, int(entry["next"]))
                elif "part_id" in entry:
                    triggers[int(entry["part_id"])] = entry
            self._sizes[path] = len(decided) - before
        past.next_part_id = max([past.next_part_id, *(part + 1 for part in (*triggers, *decided))])
        for part_id in sorted(triggers.keys() - decided):
            self._open_triggers[part_id] = entry = triggers[part_id]
            past.open_triggers.append(
                OpenTrigger(part_id, str(entry["camera"]), int(entry["trigger_ns"]), entry.get("tag"))
            )
        return past


def _boot() -> str:
    """Another one after each start of the machine; empty where the system does not tell."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _entries(path: Path) -> Iterator[dict[str, Any] | Record]:
    """The lines of a segment; torn ones, as a power cut leaves them, are logged and skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("no object")
                yield Record.from_dict(entry) if "verdict" in entry else entry
            except (ValueError, DataError) as error:
                logger.warning("%s:%d: not readable, skipped: %s", path, number, error)
