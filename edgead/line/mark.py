"""How far a receiver has got that cannot say so itself: the part id of the last record that it took."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from edgead.errors import LineError
from edgead.line.verdicts import Record

logger = logging.getLogger(__name__)


class Mark:
    """A small file. It survives `kill -9`; after a power cut some records may come twice."""

    def __init__(self, path: Path) -> None:
        """Opens the file, made if need be.

        Raises:
            LineError: It cannot be written.
        """
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            text = os.pread(self._file, 32, 0)
        except OSError as error:
            raise LineError(f"mark {path}: cannot be written: {error.strerror}") from error
        self._path = path
        self._is_refused = False  # by the disk, which was logged
        self._is_new = not text
        self._part_id = int(text) if text.strip().isdigit() else 0

    def set(self, part_id: int) -> None:
        """Moves it on. If the disk refuses, some records come twice."""
        try:
            os.pwrite(self._file, b"%020d\n" % part_id, 0)
        except OSError as error:
            if not self._is_refused:
                logger.error("mark %s: %s", self._path, error.strerror)
            self._is_refused = True
        else:
            self._is_refused = False

    def missed(self, records: list[Record]) -> list[Record]:
        """Of the last records, in the order in which they were given out, those after the mark.

        None of them if the receiver is new, all if the mark is older than they.
        """
        ids = [record.part_id for record in records]
        if self._is_new or (ids and self._part_id > max(ids)):
            self.set(ids[-1] if ids else 0)
            return []
        return records[ids.index(self._part_id) + 1 :] if self._part_id in ids else records

    def close(self) -> None:
        """May be repeated."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
