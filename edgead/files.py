"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to; it takes the place of `path` when all went well.

    If the body raises, `path` keeps what it held and the temporary file is removed. With `sync` this
    holds after a power cut, too (some milliseconds per file), where the file system can sync folders.

    Raises:
        OSError: It names `path`, not the temporary file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if sync:
            _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        try:
            _sync(path.parent)  # the new name itself must reach the disk
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # CIFS and some of FUSE sync no folders
                raise


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Writes a file whole or not at all."""
    with whole_file(path, sync=sync) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file whole or not at all."""
    write_bytes(path, text.encode())


def try_lock(file: IO[bytes] | int) -> bool | None:
    """Locks an open file until it is closed, without waiting.

    Returns:
        False if somebody else holds it; None where there are no locks (Windows, some network drives).
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ModuleNotFoundError, OSError):
        return None
    return True


def _sync(path: Path) -> None:
    if os.name != "posix":  # Windows opens no folders, and syncs only what is open for writing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
