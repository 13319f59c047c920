"""JSON lines: one record per line, in NAME.jsonl; what came too late in NAME.late.jsonl beside it.

A full file becomes NAME.1.jsonl, that one NAME.2.jsonl, and so on. Each line is one write to the file,
so that it survives `kill -9`; what a power cut left of the last line is moved to NAME.cut.jsonl when the
file is opened again. A file that was moved or deleted (logrotate) is made anew at the next record. The
file is locked: it has one writer.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
from array import array
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from edgead.errors import LineError
from edgead.files import try_lock
from edgead.line.interfaces import Controls, Picture
from edgead.line.journal import SYNCS
from edgead.line.sinks.payload import encode
from edgead.line.verdicts import Record

logger = logging.getLogger(__name__)

SYNC_PERIOD_S = 1.0

_START = b'{"part_id": '
_PART_ID = re.compile(rb'\{"part_id": (\d{1,18}),')
_READ_PARTS = 100_000
_BLOCK_BYTES = 2**20
_REMEMBERED_PARTS = 2**20


@dataclass(frozen=True, kw_only=True)
class Config:
    """Appends each record to a file as a line of JSON.

    Attributes:
        path: The file; its folder is made if need be.
        rotate_mib: Size from which a new file is begun.
        keep: How many full files are kept.
        sync: When the disk has to have a record, against power cuts: "never" leaves it to the system,
            "second" is within a second, "always" is before the next record (some milliseconds each).
    """

    path: Path
    rotate_mib: float = 100.0
    keep: int = 10
    sync: str = "second"

    def __post_init__(self) -> None:
        if self.path.suffix != ".jsonl":
            raise LineError(f"path is {self.path}, expected a name that ends in .jsonl")
        if not self.rotate_mib > 0:
            raise LineError(f"rotate_mib is {self.rotate_mib:g}, expected more than 0")
        if self.keep < 0:
            raise LineError(f"keep is {self.keep}, expected 0 or more")
        if self.sync not in SYNCS:
            raise LineError(f"sync is {self.sync!r}, expected one of {', '.join(SYNCS)}")


def open_sink(config: Config, *, controls: Controls) -> JsonLines:
    """Opens the files.

    Raises:
        LineError: They cannot be written, another line or sink writes them, or there is a file of this
            name that holds something else.
    """
    return JsonLines(config)


class JsonLines:
    """Implements `edgead.line.interfaces.Sink`."""

    wants_pictures = False

    def __init__(self, config: Config) -> None:
        path = config.path
        self._config = config
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = _Lines(path, config)
            self._parts = _read_part_ids(path, config.keep)
        except OSError as error:
            raise LineError(f"path {path}: cannot be written: {error.strerror}") from error
        self._late: _Lines | None = None
        self._sync_failures = 0
        self._ends = threading.Event()
        self._syncer = threading.Thread(target=self._sync, name=f"edgead sync {path.name}", daemon=True)
        if config.sync == "second":
            self._syncer.start()

    def write(self, record: Record, picture: Picture | None) -> None:
        """Appends a line."""
        self._lines.append(encode(record) + b"\n")
        self._parts.add(record.part_id)

    def write_late(self, record: Record) -> None:
        """Appends a line to the file of late results."""
        if self._late is None:
            self._late = _Lines(late_path(self._config.path), self._config)
        self._late.append(encode(record) + b"\n")

    def knows(self, part_id: int) -> bool:
        """Whether the part is among the last 100,000 and more, or older than the last million."""
        return part_id in self._parts

    def counters(self) -> dict[str, int]:
        """rotations: files that were full. sync_failures: times that the disk refused to sync."""
        rotations = self._lines.rotations + (self._late.rotations if self._late else 0)
        return {"rotations": rotations, "sync_failures": self._sync_failures}

    def close(self) -> None:
        """Syncs and closes the files."""
        self._ends.set()
        if self._syncer.is_alive():
            self._syncer.join(1.0)
        for lines in (self._lines, self._late):
            if lines is not None:
                lines.close()

    def _sync(self) -> None:
        """In a thread of its own, so that a slow disk delays the next sync and no record."""
        while not self._ends.wait(SYNC_PERIOD_S):
            for lines in (self._lines, self._late):
                try:
                    if lines is not None:
                        lines.sync()
                except OSError as error:
                    self._sync_failures += 1
                    logger.error("%s: cannot be synced: %s", self._config.path, error.strerror)


class _Lines:
    """A file of whole lines and its full predecessors."""

    def __init__(self, path: Path, config: Config) -> None:
        """Opens the file for appending; an incomplete last line is moved aside.

        Raises:
            LineError: The file holds something else, or has another writer.
            OSError: It cannot be opened.
        """
        self.rotations = 0
        self._path, self._config, self._keep = path, config, config.keep
        self._limit_bytes = round(config.rotate_mib * 2**20)
        self._sync, self._syncs_always = config.sync != "never", config.sync == "always"
        self._is_synced = True
        self._is_named = False  # the disk has the name of the file, too
        self._file = _open_alone(path, config)
        try:
            self._size = _repaired_size(path)
        except BaseException:
            self.close()
            raise

    def append(self, line: bytes) -> None:
        """Writes a line, or nothing of it.

        Raises:
            OSError: The disk is full or gone.
        """
        self._catch_up()
        if self._size and self._size + len(line) > self._limit_bytes:
            self._rotate()
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            if self._syncs_always:
                self._force(self._file)
        except OSError:
            with suppress(OSError):  # if this fails, too, the next append does it
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self._is_synced = self._syncs_always

    def sync(self) -> None:
        """Waits until the disk has all lines."""
        if self._is_synced or not self._sync:
            return
        self._is_synced = True
        try:
            copy = os.dup(self._file)  # a rotation closes the other one meanwhile
        except OSError:
            return  # closed
        try:
            self._force(copy)
        except OSError:
            self._is_synced = False
            raise
        finally:
            os.close(copy)

    def close(self) -> None:
        """May be repeated."""
        if self._file < 0:
            return
        try:
            self.sync()
        except OSError as error:
            logger.error("%s: cannot be synced: %s", self._path, error.strerror)
        if _LOCKED.get(self._path, (None, -1))[1] == self._file:
            del _LOCKED[self._path]
        os.close(self._file)
        self._file = -1

    def _force(self, file: int) -> None:
        os.fsync(file)
        if not self._is_named:
            self._is_named = True
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _catch_up(self) -> None:
        """Sees to what happened to the file since the last line."""
        mine = os.fstat(self._file)
        try:
            named = self._path.stat()
            is_mine = (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)
        except FileNotFoundError:
            is_mine = False
        if not is_mine:  # moved or deleted
            file = _open_alone(self._path, self._config)
            os.close(self._file)
            self._file, self._is_named = file, False
            mine = os.fstat(file)
            self._size = mine.st_size
        if mine.st_size > self._size:  # part of a line that failed and could not be taken back
            os.ftruncate(self._file, self._size)
        self._size = min(self._size, mine.st_size)

    def _rotate(self) -> None:
        self.sync()
        if self._keep:
            for number in range(self._keep - 1, 0, -1):
                with suppress(FileNotFoundError):
                    _numbered(self._path, number).replace(_numbered(self._path, number + 1))
            self._path.replace(_numbered(self._path, 1))
        else:
            self._path.unlink()
        self.rotations += 1
        self._catch_up()


class _PartIds:
    """The last million part ids, one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray(_REMEMBERED_PARTS // 8)
        self._last = -1

    def add(self, part_id: int) -> None:
        if part_id <= self._last - _REMEMBERED_PARTS:  # they begin anew: somebody deleted the journal
            self._last = -1
        if self._last < 0 or part_id - self._last >= _REMEMBERED_PARTS:
            self._bits[:] = bytes(len(self._bits))
        else:
            for between in range(self._last + 1, part_id):
                place = between % _REMEMBERED_PARTS
                self._bits[place // 8] &= ~(1 << place % 8)
        self._last = max(self._last, part_id)
        place = part_id % _REMEMBERED_PARTS
        self._bits[place // 8] |= 1 << place % 8

    def __contains__(self, part_id: int) -> bool:
        if not self._last - _REMEMBERED_PARTS < part_id <= self._last:
            return 0 <= part_id <= self._last  # older: taken as written
        place = part_id % _REMEMBERED_PARTS
        return bool(self._bits[place // 8] >> place % 8 & 1)


_LOCKED: dict[Path, tuple[Config, int]] = {}  # who writes a file, and the open file that is locked


def _open_alone(path: Path, config: Config) -> int:
    """Opens a file and locks it.

    Raises:
        LineError: Another line, or another sink, writes it.
        OSError: It cannot be opened.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if try_lock(file) is False:
        os.close(file)
        writer, locked = _LOCKED.get(path, (None, -1))
        if writer is not config:
            raise LineError(
                f"path {path}: another line or sink writes to it: give one of them another name"
            )
        file = os.dup(locked)  # of the same sink, whose write hangs: with its lock
    _LOCKED[path] = config, file
    return file


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def _read_part_ids(path: Path, keep: int) -> _PartIds:
    """Of the file and as many full ones, and then those of logrotate, as it takes for _READ_PARTS."""
    newest_first: list[array[int]] = []
    full = (_numbered(path, number) for number in range(1, keep + 1))
    moved = path.parent.glob(f"{escape(path.name)}[.-]*")  # results.jsonl.1, results.jsonl-20260331
    for file in (path, *full, *sorted(moved, key=lambda file: -file.stat().st_mtime_ns)):
        if sum(map(len, newest_first)) >= _READ_PARTS:
            break
        if file.is_file():
            with file.open("rb") as lines:
                found = (_PART_ID.match(line) for line in lines)  # quicker than to read the JSON
                newest_first.append(array("q", (int(match[1]) for match in found if match)))
    known = _PartIds()
    for part_ids in reversed(newest_first):
        for part_id in part_ids:
            known.add(part_id)
    return known


def _repaired_size(path: Path) -> int:
    """Size of a file after what follows its last whole record is gone, which is moved to another file.

    Raises:
        LineError: The file is none that this module has written.
    """
    if not path.is_file():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(len(_START))
        if start.strip(b"\0") and not (start.startswith(_START) or _START.startswith(start)):
            raise LineError(f"path {path}: begins with {start!r}, which is no record; give another name")
        end = _end_of_records(file.fileno(), size)
        if end < 0:
            raise LineError(
                f"path {path}: its last {_BLOCK_BYTES} bytes hold no record; move the file away"
            )
        if end < size:
            file.seek(end)
            rest = file.read(_BLOCK_BYTES).rstrip(b"\0")
            aside = path.with_name(f"{path.stem}.cut{path.suffix}")
            with aside.open("ab") as cut:
                cut.write(rest + b"\n")
                os.fsync(cut.fileno())
            file.truncate(end)
            os.fsync(file.fileno())
            logger.warning("%s: its last line was incomplete and is now in %s", path, aside)
    return end


def _end_of_records(file: int, size: int) -> int:
    """Where the last line ends that is whole and JSON (a power cut leaves zeros, too); -1: not found."""
    start = max(0, size - _BLOCK_BYTES)
    tail = os.pread(file, size - start, start)
    while (end := tail.rfind(b"\n") + 1) > 0:
        line = tail[tail.rfind(b"\n", 0, end - 1) + 1 : end]
        try:
            json.loads(line)
        except ValueError:
            tail = tail[: end - len(line)]
        else:
            return start + end
    return -1 if start else 0


def late_path(path: Path) -> Path:
    """Where late results go that belong to this file."""
    return path.with_name(f"{path.stem}.late{path.suffix}")
