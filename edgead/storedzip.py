"""Strict reading and writing of stored (uncompressed) zip files: the container of a bundle.

`zipfile` reads whatever it can make sense of. This reader knows only the plain case and refuses
everything else, so that two zip readers cannot disagree about what a bundle holds: entries lie one after
the other from the first byte to the central directory, which ends the file; local and central headers
agree; nothing is hidden between or after them.
"""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from edgead.errors import BundleError

MAX_FILE_BYTES = 1 << 30
MAX_DIRECTORY_BYTES = 1 << 16
DAMAGED = "the file is damaged or was changed: copy it again or export it again"

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_UTF8_FLAG = 0x0800
_ENCRYPTED_FLAG = 0x0001
_ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """One member as the central directory declares it; `header` is where its local header starts."""

    name: str
    flags: int
    crc: int
    size_bytes: int
    header: int

    @property
    def data(self) -> int:
        """Offset of the first byte of the content."""
        return self.header + _LOCAL.size + len(self.name)

    @property
    def end(self) -> int:
        return self.data + self.size_bytes


def write_members(file: BinaryIO, members: Mapping[str, bytes]) -> None:
    """Writes the members in the given order; the same members always give the same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)  # the date is the fixed 1980-01-01
            info.create_system = 3  # Unix, on every platform
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)


def read_directory(file: BinaryIO, file_bytes: int, *, names: Collection[str]) -> dict[str, Entry]:
    """Checks all headers and returns the entries by name, without reading contents.

    Raises:
        BundleError: The file is not a plain stored zip, or its members are not exactly `names`.
    """
    if file_bytes > MAX_FILE_BYTES:
        raise BundleError(f"the file has {file_bytes} bytes; a bundle has at most {MAX_FILE_BYTES}")
    count, directory_bytes, directory = _read_end(file, file_bytes)
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise BundleError(
            f"the zip directory has {directory_bytes} bytes, at most {MAX_DIRECTORY_BYTES} are allowed"
        )
    entries = _read_central(_read_at(file, directory, directory_bytes), count)
    _check_names([entry.name for entry in entries], names)
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        if entry.header < position:
            raise BundleError(f"member {entry.name!r} overlaps the one before it; {DAMAGED}")
        if entry.header > position:
            raise BundleError(
                f"{entry.header - position} bytes before member {entry.name!r} belong to none; {DAMAGED}"
            )
        if entry.end > directory:
            raise BundleError(
                f"member {entry.name!r} declares {entry.size_bytes} bytes, more than there are; "
                f"{DAMAGED}"
            )
        _check_local(_read_at(file, entry.header, _LOCAL.size + len(entry.name)), entry)
        position = entry.end
    if position != directory:
        raise BundleError(
            f"{directory - position} bytes before the zip directory belong to no member; {DAMAGED}"
        )
    return {entry.name: entry for entry in entries}


def read_member(file: BinaryIO, entry: Entry) -> bytes:
    """Reads the content of a member; its checksum is the caller's to check."""
    return _read_at(file, entry.data, entry.size_bytes)


def _read_at(file: BinaryIO, offset: int, size_bytes: int) -> bytes:
    file.seek(offset)
    content = file.read(size_bytes)
    if len(content) != size_bytes:
        raise BundleError(f"the file became shorter while it was read; {DAMAGED}")
    return content


def _read_end(file: BinaryIO, file_bytes: int) -> tuple[int, int, int]:
    """Returns number of entries, size of the central directory, and its offset."""
    if file_bytes < _END.size or not _read_at(file, 0, 4).startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise BundleError(
            "is not a bundle (a zip file made by edgead); check the path, copy it again or export it "
            "again"
        )
    end = _read_at(file, file_bytes - _END.size, _END.size)
    signature, disk, start_disk, count_here, count, size, offset, comment_bytes = _END.unpack(end)
    if signature != b"PK\x05\x06":
        tail = _read_at(file, max(0, file_bytes - 70_000), min(file_bytes, 70_000))
        found = tail.rfind(b"PK\x05\x06")
        if found < 0:
            raise BundleError(
                f"has no end record: it is truncated, or has foreign bytes after its end; {DAMAGED}"
            )
        raise BundleError(
            f"has {len(tail) - found - _END.size} bytes after its end record (a zip comment or appended "
            f"data); {DAMAGED}"
        )
    if _ZIP64 in (size, offset) or count == 0xFFFF:
        raise BundleError("is a zip64 file, which a bundle never is; export it again")
    if disk or start_disk or count_here != count or comment_bytes:
        raise BundleError(f"has an inconsistent end record; {DAMAGED}")
    if offset + size != file_bytes - _END.size:
        raise BundleError(
            f"its zip directory should end at byte {offset + size}, but the end record is at "
            f"{file_bytes - _END.size}: something was inserted, removed or prepended; {DAMAGED}"
        )
    return count, size, offset


def _read_central(directory: bytes, count: int) -> list[Entry]:
    entries: list[Entry] = []
    position = 0
    while position < len(directory):
        if position + _CENTRAL.size > len(directory):
            raise BundleError(f"its zip directory is cut off; {DAMAGED}")
        (signature, _, _, flags, method, _, _, crc, stored, size, name_bytes, extra_bytes, comment_bytes,
         disk, _, external, header) = _CENTRAL.unpack_from(directory, position)  # fmt: skip
        raw = directory[position + _CENTRAL.size : position + _CENTRAL.size + name_bytes]
        if signature != b"PK\x01\x02" or len(raw) != name_bytes:
            raise BundleError(f"its zip directory is broken; {DAMAGED}")
        name = _check_name(raw)
        _check_plain(name, flags, method, external)
        if _ZIP64 in (stored, size, header):
            raise BundleError(
                f"member {name!r} is declared as zip64, which a bundle never is; export it again"
            )
        if extra_bytes or comment_bytes or disk:
            raise BundleError(
                f"member {name!r} has extra fields, a comment or a disk number in the zip directory; "
                f"{DAMAGED}"
            )
        if stored != size:
            raise BundleError(
                f"member {name!r} declares {stored} stored bytes for {size} bytes; {DAMAGED}"
            )
        entries.append(Entry(name=name, flags=flags, crc=crc, size_bytes=size, header=header))
        position += _CENTRAL.size + name_bytes
    if len(entries) != count:
        raise BundleError(
            f"its end record announces {count} members, its directory lists {len(entries)}; {DAMAGED}"
        )
    return entries


def _check_plain(name: str, flags: int, method: int, external: int) -> None:
    if flags & _ENCRYPTED_FLAG:
        raise BundleError(f"member {name!r} is encrypted; a bundle is not. Export it again")
    if method != zipfile.ZIP_STORED:
        raise BundleError(
            f"member {name!r} is compressed (zip method {method}); members must be stored. Export it "
            "again"
        )
    if flags & ~_UTF8_FLAG:
        raise BundleError(
            f"member {name!r} has the zip flags {flags:#06x}, which a bundle never has; {DAMAGED}"
        )
    kind = stat.S_IFMT(external >> 16)
    if kind not in (0, stat.S_IFREG):
        what = (
            "a symbolic link"
            if kind == stat.S_IFLNK
            else f"not a regular file (mode {external >> 16:#o})"
        )
        raise BundleError(f"member {name!r} is {what}; a bundle holds regular files only")


def _check_name(raw: bytes) -> str:
    """Names are compared with a fixed list anyway; this tells an attack from a stray file."""
    try:
        name = raw.decode("ascii")
    except UnicodeDecodeError:
        raise BundleError(f"a member has the name {raw[:60]!r}, which is not ASCII; {DAMAGED}") from None
    parts = name.split("/")
    bad_part = any(part in ("", ".", "..") for part in parts)
    if bad_part or "\\" in name or ":" in name or not name.isprintable():
        raise BundleError(
            f"member {name[:60]!r} has an unsafe name (absolute, '..', a backslash, a drive or a "
            "folder); do not use this file"
        )
    return name


def _check_names(found: list[str], names: Collection[str]) -> None:
    for name in sorted(set(found)):
        if found.count(name) > 1:
            raise BundleError(f"member {name!r} occurs {found.count(name)} times; {DAMAGED}")
    if extra := sorted(set(found) - set(names)):
        raise BundleError(
            f"has the extra member {extra[0][:60]!r}; a bundle holds only {', '.join(names)}"
        )
    if missing := sorted(set(names) - set(found)):
        raise BundleError(f"the member {missing[0]!r} is missing; {DAMAGED}")


def _check_local(raw: bytes, entry: Entry) -> None:
    signature, _, flags, method, _, _, *numbers = _LOCAL.unpack_from(raw)
    name = entry.name.encode("ascii")
    local = (signature, flags, method, *numbers, raw[_LOCAL.size :])
    expected_numbers = (entry.crc, entry.size_bytes, entry.size_bytes, len(name), 0)  # 0: no extra field
    expected = (b"PK\x03\x04", entry.flags, zipfile.ZIP_STORED, *expected_numbers, name)
    if local != expected:
        raise BundleError(f"the two zip headers of member {entry.name!r} disagree; {DAMAGED}")
