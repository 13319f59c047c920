"""Archive of images: all parts that are not OK, and a sample of those that are.

    FOLDER/2026-03-31/NG/000000000042_top.png         the region that was inspected, lossless
    FOLDER/2026-03-31/NG/000000000042_top.heat.jpg    the heat map over it, if there is one
    FOLDER/2026-03-31/NG/000000000042_top.json        its record
    FOLDER/2026-03-31/LATE/000000000043_top.late.json what the model said after the deadline

Days are of UTC; the number is the part id. A part whose image was lost has its record only. When the
quota is full the oldest parts are deleted, first those of earlier runs by their numbers (the clock may
have been wrong), but only files with names like these. The files are not forced to the disk: a power
cut can take those of the last half minute.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from edgead.errors import DataError, LineError
from edgead.files import write_bytes
from edgead.heat import heat_map
from edgead.image import write_image
from edgead.line.interfaces import Controls, Picture
from edgead.line.sinks.payload import encode
from edgead.line.verdicts import Record, Verdict

logger = logging.getLogger(__name__)

SUFFIXES = (".png", ".heat.jpg", ".json", ".late.json")
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_FILE = re.compile(r"((?a:\d{12,19})_[\w-]+)(\.png|\.heat\.jpg|\.json|\.late\.json)")
_UNFINISHED = re.compile(rf"\.{_FILE.pattern}\.[0-9a-f]{{8}}\.tmp")  # as edgead.files names them

_Key = tuple[int, str, str, str]  # part id, day, verdict, name of its files without suffix


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keeps the images of parts that are not OK, and of a sample of those that are.

    Attributes:
        folder: Made if need be.
        ok_share: Share of the OK parts that are kept, 0 to 1, chosen by their part id.
        quota_mib: Of all files together; the oldest parts are deleted.
        min_free_mib: Of the disk; if less is free the oldest parts are deleted, and without these
            nothing is kept.
    """

    folder: Path
    ok_share: float = 0.01
    quota_mib: float = 10_000.0
    min_free_mib: float = 1_000.0

    def __post_init__(self) -> None:
        if not 0 <= self.ok_share <= 1:
            raise LineError(f"ok_share is {self.ok_share:g}, expected 0 to 1")
        if not self.quota_mib > 0:
            raise LineError(f"quota_mib is {self.quota_mib:g}, expected more than 0")
        if not self.min_free_mib >= 0:
            raise LineError(f"min_free_mib is {self.min_free_mib:g}, expected 0 or more")


def open_sink(config: Config, *, controls: Controls) -> Archive:
    """Looks through the folder.

    Raises:
        LineError: It cannot be made, read or written.
    """
    return Archive(config)


def is_in_sample(part_id: int, share: float) -> bool:
    """Whether an OK part is kept: the same parts each time, spread evenly."""
    digest = hashlib.blake2b(str(part_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class Archive:
    """Implements `edgead.line.interfaces.Sink`."""

    wants_pictures = True

    def __init__(self, config: Config) -> None:
        self._config = config
        self._files = _Files(config.folder)
        self._skipped = 0
        self._says_full = False
        try:
            config.folder.mkdir(parents=True, exist_ok=True)
            probe = config.folder / ".edgead"
            write_bytes(probe, b"", sync=False)
            probe.unlink()
            self._files.scan()
        except OSError as error:
            raise LineError(f"folder {config.folder}: cannot be used: {error.strerror}") from error
        self._make_room()

    def write(self, record: Record, picture: Picture | None) -> None:
        """Keeps the part, if it is one to keep.

        Raises:
            LineError, OSError: The disk does not take it.
        """
        if record.verdict == Verdict.OK and not is_in_sample(record.part_id, self._config.ok_share):
            return
        if not self._make_room():
            self._skipped += 1
            if not self._says_full:
                logger.error(
                    "%s: less than %g MiB are free and there is nothing to delete: images are not kept",
                    self._config.folder,
                    self._config.min_free_mib,
                )
            self._says_full = True
            return
        self._says_full = False
        key = _key(record)
        try:
            if picture is not None:
                write_image(self._files.path(key, ".png"), picture.image)
                heat = _heat(record, picture)
                if heat is not None:
                    write_image(self._files.path(key, ".heat.jpg"), heat)
            write_bytes(self._files.path(key, ".json"), encode(record) + b"\n", sync=False)
        except (DataError, OSError) as error:
            self._give_up(key, error)
            raise LineError(str(error)) from error
        self._files.add(key)
        self._make_room()

    def write_late(self, record: Record) -> None:
        """Puts what the model said too late beside the part's record."""
        if not self._make_room():
            self._skipped += 1
            return
        key = _key(record)
        content = encode(record, is_late=True) + b"\n"
        try:
            write_bytes(self._files.path(key, ".late.json"), content, sync=False)
        except OSError as error:
            self._give_up(key, error)
            raise
        self._files.add(key)

    def knows(self, part_id: int) -> bool:
        """Whether the part is in the archive."""
        return part_id in self._files.part_ids

    def counters(self) -> dict[str, int]:
        """parts, bytes: in the archive. deleted: parts, for room. skipped: parts and late
        results, for lack of room."""
        return {
            "parts": len(self._files.part_ids),
            "bytes": self._files.total_bytes,
            "deleted": self._files.deleted,
            "skipped": self._skipped,
        }

    def close(self) -> None:
        """There is nothing to close."""

    def _make_room(self) -> bool:
        """Deletes until the quota and the free disk are as they should be; False: they are not."""
        least_bytes = self._config.min_free_mib * 2**20
        quota_bytes = self._config.quota_mib * 2**20
        while self._files.total_bytes > quota_bytes and self._files.delete_oldest():
            pass
        while shutil.disk_usage(self._config.folder).free < least_bytes:
            if not self._files.delete_oldest():
                return False
        return True

    def _give_up(self, key: _Key, error: Exception) -> None:
        """Takes back what was written of a part, which is tried again later."""
        self._files.discard(key)
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            self._files.delete_oldest()


class _Files:
    """What is in the folder, by part.

    Attributes:
        part_ids: Of the parts.
        total_bytes: Of all their files.
        deleted: Parts.
    """

    def __init__(self, folder: Path) -> None:
        self.part_ids: set[int] = set()
        self.total_bytes = self.deleted = 0
        self._folder = folder
        self._bytes: dict[_Key, int] = {}
        self._oldest_first: deque[_Key] = deque()

    def scan(self) -> None:
        """Finds the files of earlier runs, and deletes what a crash left unfinished."""
        for day in _folders(self._folder):
            if not _DAY.fullmatch(day.name):
                continue
            for verdict in _folders(day):
                if verdict.name not in Verdict.__members__:
                    continue
                for file in verdict.iterdir():
                    match = _FILE.fullmatch(file.name)
                    is_unfinished = match is None and _UNFINISHED.fullmatch(file.name)
                    if not (match or is_unfinished) or file.is_symlink() or not file.is_file():
                        continue
                    if is_unfinished or not file.stat().st_size:
                        file.unlink()
                    elif match:
                        name = match[1]
                        self._count((int(name.partition("_")[0]), day.name, verdict.name, name), file)
        self._oldest_first = deque(sorted(self._oldest_first))

    def path(self, key: _Key, suffix: str) -> Path:
        """Of a file of a part; its folder is made."""
        _, day, verdict, name = key
        folder = self._folder / day / verdict
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}{suffix}"

    def add(self, key: _Key) -> None:
        """Takes note of the files of a part that were just written."""
        self.total_bytes -= self._bytes.get(key, 0)
        if key in self._bytes:
            self._bytes[key] = 0
        for suffix in SUFFIXES:
            with suppress(FileNotFoundError):
                self._count(key, self.path(key, suffix))

    def discard(self, key: _Key) -> None:
        """Deletes the files of a part that was never added."""
        for suffix in SUFFIXES if key not in self._bytes else ():
            with suppress(OSError):
                self.path(key, suffix).unlink()

    def delete_oldest(self) -> bool:
        """False: there is none."""
        if not self._oldest_first:
            return False
        key = self._oldest_first.popleft()
        part_id, day, verdict, name = key
        folder = self._folder / day / verdict
        try:
            for suffix in SUFFIXES:
                (folder / f"{name}{suffix}").unlink(missing_ok=True)
        except OSError as error:  # it is not thought of again until the next start
            logger.error("%s: cannot be deleted: %s", folder / name, error.strerror)
        else:
            self.deleted += 1
        self.total_bytes -= self._bytes.pop(key)
        self.part_ids.discard(part_id)
        with suppress(OSError):  # not empty
            folder.rmdir()
            folder.parent.rmdir()
        return True

    def _count(self, key: _Key, file: Path) -> None:
        size = file.stat().st_size
        if key not in self._bytes:
            self._bytes[key] = 0
            self._oldest_first.append(key)
            self.part_ids.add(key[0])
        self._bytes[key] += size
        self.total_bytes += size


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def _key(record: Record) -> _Key:
    day = datetime.fromtimestamp(record.trigger_ns // 10**9, timezone.utc).strftime("%Y-%m-%d")
    camera = re.sub(r"[^\w-]", "_", record.camera)
    return record.part_id, day, record.verdict.value, f"{record.part_id:012d}_{camera}"


def _heat(record: Record, picture: Picture) -> np.ndarray | None:
    """The heat map over the image; without a threshold, on a scale of the part's own."""
    if picture.anomaly_map is None:
        return None
    threshold = record.threshold or float(picture.anomaly_map.max()) / 2
    try:
        return heat_map(picture.image, picture.anomaly_map, threshold)
    except DataError as error:
        logger.error("part %d: no heat map: %s", record.part_id, error)
        return None
