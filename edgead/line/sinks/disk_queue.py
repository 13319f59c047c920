"""A bounded queue of records on the disk, which survives the process and the power."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgead.errors import LineError
from edgead.line.sinks.payload import encode
from edgead.line.verdicts import Record

logger = logging.getLogger(__name__)

REMEMBERED_PARTS = 100_000
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS records (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        part_id INTEGER NOT NULL,
        late INTEGER NOT NULL,
        camera TEXT NOT NULL,
        payload BLOB,  -- NULL: has left the queue
        trigger_ns INTEGER,  -- NULL: of a version that did not keep it
        UNIQUE (part_id, late)
    );
    CREATE INDEX IF NOT EXISTS waiting ON records (seq) WHERE payload IS NOT NULL;
"""


class DiskQueue:
    """Records on the disk, in their order. Any thread.

    Attributes:
        count: Records that wait.
        dropped: Records that were lost because too many waited.
    """

    def __init__(self, path: Path, limit: int) -> None:
        """Opens the file; one that is damaged is moved aside.

        Raises:
            LineError: It cannot be opened, or another process has it.
        """
        self._path, self._limit = path, limit
        self._lock = threading.Lock()
        self.dropped = 0
        self._has_changed = self._says_full = False
        self._keep: set[int] = set()  # under way, not to be dropped
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LineError(f"queue_file {path}: {error.strerror}") from error
        with self._errors():
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError) or not path.is_file():
                    raise
                aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
                for suffix in ("", "-wal", "-shm"):  # a log of the old file would damage the new one
                    with suppress(FileNotFoundError):
                        Path(f"{path}{suffix}").replace(f"{aside}{suffix}")
                logger.error("queue_file %s is damaged (%s) and is now %s", path, error, aside)
                self._open()

    def add(self, record: Record, *, is_late: bool) -> None:
        """Puts a record at the end, or nothing if it was put there before.

        A part of the same id but another trigger was one of before the journal was lost, in part or as a
        whole: both are kept.

        Raises:
            LineError: The disk is full or gone.
        """
        key = (record.part_id, is_late, record.trigger_ns)
        with self._lock, self._errors():
            with self._database:
                self._database.execute(  # no part has this id: only the payload says what it was
                    "UPDATE records SET part_id = -seq"
                    " WHERE part_id = ? AND late = ? AND trigger_ns != ?",
                    key,
                )
                added = self._database.execute(
                    "INSERT OR IGNORE INTO records (part_id, late, trigger_ns, camera, payload)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (*key, record.camera, encode(record, is_late=is_late)),
                ).rowcount
                dropped = self._drop(self.count + added - self._limit)
            self.count += added - dropped
            self.dropped += dropped
            self._has_changed = True
            is_news, self._says_full = dropped and not self._says_full, self._says_full or dropped > 0
        if is_news:
            logger.error("%s: %d records wait: the oldest are dropped now", self._path, self._limit)

    def next(self, count: int, under_way: set[int]) -> list[tuple[int, str, bool, bytes]]:
        """The first `count` that are not under way: seq, camera, whether it is late, payload."""
        with self._lock, self._errors():
            rows = self._database.execute(
                "SELECT seq, camera, late, payload FROM records INDEXED BY waiting"
                " WHERE payload IS NOT NULL ORDER BY seq LIMIT ?",
                (count + len(under_way),),
            ).fetchall()
            chosen = [row for row in rows if row[0] not in under_way][:count]
            self._keep = under_way | {row[0] for row in chosen}
        return [(seq, camera, bool(late), payload) for seq, camera, late, payload in chosen]

    def remove(self, seq: int) -> None:
        """Takes a record off; that it was there is remembered."""
        with self._lock, self._errors():
            with self._database:
                self._remove(seq)
            self.count -= 1
            self._has_changed = True
            self._says_full = self._says_full and self.count > 0

    def knows(self, part_id: int) -> bool:
        """Whether the record of a part was put there, not too long ago."""
        with self._lock, self._errors():
            query = "SELECT 1 FROM records WHERE part_id = ? AND NOT late"
            return self._database.execute(query, (part_id,)).fetchone() is not None

    def sync(self) -> None:
        """Makes sure that a power cut takes nothing; forgets what left the queue long ago."""
        with self._lock, self._errors():
            if not self._has_changed:
                return
            self._has_changed = False
            with self._database:
                self._database.execute(
                    "DELETE FROM records WHERE payload IS NULL"
                    " AND seq <= (SELECT max(seq) FROM records) - ?",
                    (REMEMBERED_PARTS,),
                )
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """May be repeated."""
        with self._lock, self._errors():
            self._database.close()

    def _open(self) -> None:
        self._database = sqlite3.connect(self._path, timeout=0.2, check_same_thread=False)
        try:
            for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_SCHEMA)
            columns = self._database.execute("PRAGMA table_info (records)").fetchall()
            if "trigger_ns" not in {column[1] for column in columns}:  # of an earlier version
                self._database.execute("ALTER TABLE records ADD COLUMN trigger_ns INTEGER")
            query = "SELECT count(*) FROM records WHERE payload IS NOT NULL"
            self.count: int = self._database.execute(query).fetchone()[0]
        except Exception:
            self._database.close()
            raise

    def _remove(self, seq: int) -> None:
        self._database.execute("UPDATE records SET payload = NULL WHERE seq = ?", (seq,))

    def _drop(self, count: int) -> int:
        """Takes off the oldest `count` that are not under way; how many these were."""
        if count <= 0:
            return 0
        rows = self._database.execute(
            "SELECT seq FROM records INDEXED BY waiting WHERE payload IS NOT NULL ORDER BY seq LIMIT ?",
            (len(self._keep) + count,),
        ).fetchall()
        oldest = [seq for (seq,) in rows if seq not in self._keep][:count]
        for seq in oldest:
            self._remove(seq)
        return len(oldest)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            what = "another process has it" if "locked" in str(error) else str(error)
            raise LineError(f"queue_file {self._path}: {what}") from error
