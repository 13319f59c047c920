"""Files that a bundle reader must refuse: one row each, with a part of the message that it must give."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead import Bundle, BundleError
from edgead.bundle import MAX_MANIFEST_BYTES, MEMBERS
from edgead.storedzip import MAX_FILE_BYTES

Members = dict[str, bytes]
HUGE = 0xFFFFFFFF


@dataclass
class Raw:
    """A zip member of which everything can be wrong; None = as it should be."""

    name: str | bytes
    data: bytes
    flags: int = 0
    method: int = 0
    crc: int | None = None
    stored: int | None = None
    size: int | None = None
    mode: int = 0o100644
    offset: int | None = None
    before: bytes = b""
    extra: bytes = b""
    comment: bytes = b""
    disk: int = 0
    local: dict[str, Any] = field(default_factory=dict)


def raw_zip(
    entries: list[Raw], *, after: bytes = b"", end: dict[str, int] | None = None, comment: bytes = b""
) -> bytes:
    """Writes a zip file by the published record layouts, without checking anything."""
    body, directory = bytearray(), bytearray()
    for entry in entries:
        name = entry.name if isinstance(entry.name, bytes) else entry.name.encode()
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        stored = len(entry.data) if entry.stored is None else entry.stored
        size = stored if entry.size is None else entry.size
        body += entry.before
        offset = len(body) if entry.offset is None else entry.offset
        local = {
            "flags": entry.flags,
            "method": entry.method,
            "crc": crc,
            "stored": stored,
            "size": size,
        }
        local |= {"name": name, "extra": b""} | entry.local
        numbers = (
            20,
            local["flags"],
            local["method"],
            0,
            33,
            local["crc"],
            local["stored"],
            local["size"],
        )
        lengths = (len(local["name"]), len(local["extra"]))
        body += (
            struct.pack("<4s5H3I2H", b"PK\x03\x04", *numbers, *lengths) + local["name"] + local["extra"]
        )
        body += entry.data
        numbers = (0x0314, 20, entry.flags, entry.method, 0, 33, crc, stored, size)
        lengths = (len(name), len(entry.extra), len(entry.comment))
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\x01\x02", *numbers, *lengths, entry.disk, 0, entry.mode << 16, offset
        )
        directory += name + entry.extra + entry.comment
    body += after
    values = {"disk": 0, "start": 0, "here": len(entries), "count": len(entries), "size": len(directory)}
    values |= {"offset": len(body)} | (end or {})
    return bytes(
        body
        + directory
        + struct.pack("<4s4H2IH", b"PK\x05\x06", *values.values(), len(comment))
        + comment
    )


def entries_of(members: Members, **changes: Raw) -> list[Raw]:
    return [changes.get(name, Raw(name, data)) for name, data in members.items()]


def with_model(**wrong: Any) -> Callable[[Members], bytes]:
    """The bundle with these properties of the member model.onnx."""
    return lambda m: raw_zip(
        entries_of(m, **{"model.onnx": Raw(**{"name": "model.onnx", "data": m["model.onnx"], **wrong})})
    )


def with_extra(name: str | bytes, **wrong: Any) -> Callable[[Members], bytes]:
    return lambda m: raw_zip([*entries_of(m), Raw(name, b"x", **wrong)])


def with_manifest(edit: Callable[[dict[str, Any]], object]) -> Callable[[Members], bytes]:
    """The bundle with an edited manifest (changed in place, or replaced by what `edit` returns)."""

    def make(members: Members) -> bytes:
        data = json.loads(members["manifest.json"])
        text = edit(data)
        changed = text if isinstance(text, bytes) else json.dumps(data).encode()
        return raw_zip(entries_of({**members, "manifest.json": changed}))

    return make


def with_member(name: str, change: Callable[[bytes], bytes]) -> Callable[[Members], bytes]:
    """The bundle with another content of a member and a manifest that agrees with it."""

    def make(members: Members) -> bytes:
        content = change(members[name])
        data = json.loads(members["manifest.json"])
        data["members"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        return raw_zip(
            entries_of({**members, name: content, "manifest.json": json.dumps(data).encode()})
        )

    return make


def npy(array: np.ndarray) -> Callable[[bytes], bytes]:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return lambda _: buffer.getvalue()


def npy_header(header: str, *, version: bytes = b"\x01\x00") -> Callable[[bytes], bytes]:
    """A .npy file with this header and the data of the original."""

    def change(content: bytes) -> bytes:
        old = 10 + int.from_bytes(content[8:10], "little")
        line = header.encode() + b"\n"
        return b"\x93NUMPY" + version + len(line).to_bytes(2, "little") + line + content[old:]

    return change


class Exploit:
    """Would show in the file system if anything unpickled it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


def streamed(members: Members) -> bytes:
    """A zip written to a pipe: sizes follow the data."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return pipe.getvalue()


def compressed(members: Members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def overlapping(members: Members) -> bytes:
    """The last three members claim the same bytes, as in a bomb that unpacks to more than the file."""
    entries = entries_of(members)
    offset = len(raw_zip(entries[:2], end={"size": 0})) - 22 - sum(46 + len(e.name) for e in entries[:2])
    for entry in entries[2:]:
        entry.offset = offset
    return raw_zip(entries)


CONTAINER: list[tuple[str, Callable[[Members], bytes], str]] = [
    ("empty file", lambda m: b"", "is not a bundle"),
    ("text file", lambda m: b"version https://example.com/spec/v1\n" * 3, "is not a bundle"),
    ("zip without members", lambda m: raw_zip([]), "'golden/images.npy' is missing"),
    ("cut in half", lambda m: raw_zip(entries_of(m))[:60_000], "truncated"),
    ("last byte missing", lambda m: raw_zip(entries_of(m))[:-1], "its end record"),
    ("appended bytes", lambda m: raw_zip(entries_of(m)) + b"junk", "4 bytes after its end record"),
    (
        "appended megabyte",
        lambda m: raw_zip(entries_of(m)) + bytes(1 << 20),
        "foreign bytes after its end",
    ),
    ("zip comment", lambda m: raw_zip(entries_of(m), comment=b"hello"), "5 bytes after its end record"),
    ("prepended bytes", lambda m: b"junk" + raw_zip(entries_of(m)), "is not a bundle"),
    (
        "prepended zip header",
        lambda m: b"PK\x03\x04" + raw_zip(entries_of(m)),
        "inserted, removed or prepended",
    ),
    (
        "bytes between members",
        with_model(before=b"hidden"),
        "6 bytes before member 'model.onnx' belong to none",
    ),
    (
        "bytes after members",
        lambda m: raw_zip(entries_of(m), after=b"hid"),
        "3 bytes before the zip directory",
    ),
    (
        "wrong count",
        lambda m: raw_zip(entries_of(m), end={"here": 4, "count": 4}),
        "announces 4 members",
    ),
    ("counts disagree", lambda m: raw_zip(entries_of(m), end={"here": 4}), "inconsistent end record"),
    ("several disks", lambda m: raw_zip(entries_of(m), end={"disk": 1}), "inconsistent end record"),
    ("member on another disk", with_model(disk=1), "a disk number"),
    ("zip64 count", lambda m: raw_zip(entries_of(m), end={"here": 65535, "count": 65535}), "zip64"),
    ("zip64 offset", lambda m: raw_zip(entries_of(m), end={"offset": HUGE}), "zip64"),
    ("zip64 size of a member", with_model(stored=HUGE), "declared as zip64"),
    ("zip64 offset of a member", with_model(offset=HUGE), "declared as zip64"),
    ("zip64 field", with_model(extra=struct.pack("<HHQ", 1, 8, 1 << 40)), "extra fields"),
    ("comment of a member", with_model(comment=b"hello"), "a comment"),
    (
        "huge directory",
        lambda m: raw_zip([Raw("a", b"", comment=bytes(40_000))] * 2),
        "the zip directory has",
    ),
    (
        "broken directory",
        lambda m: raw_zip(entries_of(m)).replace(b"PK\x01\x02", b"PK\x01\x00"),
        "directory is broken",
    ),
    ("compressed", compressed, "is compressed (zip method 8)"),
    ("bomb: compressed size", with_model(method=8, size=1 << 31), "is compressed"),
    (
        "bomb: declared size",
        with_model(stored=1 << 30),
        "declares 1073741824 bytes, more than there are",
    ),
    ("bomb: overlapping members", overlapping, "overlaps the one before it"),
    ("sizes disagree", with_model(size=5), "stored bytes for 5 bytes"),
    ("encrypted", with_model(flags=1), "is encrypted"),
    ("written to a pipe", streamed, "the zip flags 0x0008"),
    ("patched data", with_model(flags=0x20), "the zip flags 0x0020"),
    ("symbolic link", with_model(mode=0o120777), "is a symbolic link"),
    ("device", with_model(mode=0o020666), "not a regular file"),
    (
        "duplicate member",
        lambda m: raw_zip([*entries_of(m), Raw("model.onnx", b"")]),
        "'model.onnx' occurs 2 times",
    ),
    ("extra member", with_extra("notes.txt"), "extra member 'notes.txt'"),
    ("other case", with_extra("MODEL.onnx"), "extra member 'MODEL.onnx'"),
    ("absolute name", with_extra("/etc/cron.d/x"), "'/etc/cron.d/x' has an unsafe name"),
    ("parent name", with_extra("golden/../../x"), "unsafe name"),
    ("dot name", with_extra("./model.onnx"), "unsafe name"),
    ("backslash name", with_extra("golden\\images.npy"), "unsafe name"),
    ("drive name", with_extra("C:x"), "unsafe name"),
    ("folder", with_extra("golden/", mode=0o040755), "unsafe name"),
    ("zero byte in name", with_extra(b"model.onnx\0.txt"), "unsafe name"),
    ("empty name", with_extra(b""), "unsafe name"),
    ("name not ASCII", with_extra("modèl.onnx", flags=0x800), "not ASCII"),
    (
        "headers disagree: name",
        with_model(local={"name": b"other.onnx"}),
        "headers of member 'model.onnx' disagree",
    ),
    (
        "headers disagree: size",
        with_model(local={"stored": 1}),
        "headers of member 'model.onnx' disagree",
    ),
    ("headers disagree: CRC", with_model(local={"crc": 1}), "headers of member 'model.onnx' disagree"),
    (
        "headers disagree: method",
        with_model(local={"method": 8}),
        "headers of member 'model.onnx' disagree",
    ),
    (
        "headers disagree: extra",
        with_model(local={"extra": b"abcd"}),
        "headers of member 'model.onnx' disagree",
    ),
    *(
        (
            f"{name} missing",
            lambda m, name=name: raw_zip([e for e in entries_of(m) if e.name != name]),
            f"'{name}' is missing",
        )
        for name in MEMBERS
    ),
    ("other model", with_model(data=b"x" * 8), "'model.onnx' has 8 bytes, its manifest says"),
    (
        "changed model",
        lambda m: raw_zip(entries_of({**m, "model.onnx": m["model.onnx"][::-1]})),
        "SHA-256",
    ),
    (
        "manifest CRC",
        lambda m: raw_zip(
            entries_of(m, **{"manifest.json": Raw("manifest.json", m["manifest.json"], crc=1)})
        ),
        "manifest.json does not match its CRC-32",
    ),
    ("manifest of another major", with_manifest(lambda d: d.update(format=[2, 0])), "upgrade edgead"),
    ("manifest lists no members", with_manifest(lambda d: d.update(members={})), "lists [], expected"),
    (
        "manifest too large",
        with_manifest(lambda d: bytes(MAX_MANIFEST_BYTES + 1)),
        "at most 1048576 are allowed",
    ),
]

SHAPE = "'shape': (4,), }"

GOLDEN: list[tuple[str, Callable[[Members], bytes], str]] = [
    ("not an array", with_member("golden/maps.npy", lambda _: b"hello"), "is not a .npy file"),
    ("empty", with_member("golden/maps.npy", lambda _: b""), "is not a .npy file"),
    (
        "pickle",
        with_member("golden/scores.npy", lambda _: pickle.dumps(Exploit())),
        "is not a .npy file",
    ),
    ("objects", with_member("golden/scores.npy", npy(np.array([Exploit()] * 4))), "is |O of shape (4,)"),
    ("structured", with_member("golden/scores.npy", npy(np.zeros(4, "f4,f4"))), "is not a .npy file"),
    (
        "float64",
        with_member("golden/scores.npy", npy(np.zeros(4))),
        "is <f8 of shape (4,), expected <f4",
    ),
    ("big endian", with_member("golden/scores.npy", npy(np.zeros(4, ">f4"))), "is >f4"),
    (
        "Fortran order",
        with_member("golden/maps.npy", npy(np.zeros((4, 64, 64), np.float32, order="F"))),
        "in Fortran order",
    ),
    (
        "wrong shape",
        with_member("golden/maps.npy", npy(np.zeros((4, 32, 64), np.float32))),
        "of shape (4, 32, 64)",
    ),
    (
        "wrong number of axes",
        with_member("golden/scores.npy", npy(np.zeros((4, 1), np.float32))),
        "of shape (4, 1)",
    ),
    (
        "fewer scores",
        with_member("golden/scores.npy", npy(np.zeros(3, np.float32))),
        "4 images, 3 scores, 4 maps",
    ),
    ("no samples", with_member("golden/scores.npy", npy(np.zeros(0, np.float32))), "K >= 1"),
    (
        "NaN",
        with_member("golden/scores.npy", npy(np.full(4, np.nan, np.float32))),
        "holds NaN or infinity",
    ),
    (
        "infinity",
        with_member("golden/maps.npy", npy(np.full((4, 64, 64), np.inf, np.float32))),
        "holds NaN or infinity",
    ),
    ("cut data", with_member("golden/scores.npy", lambda c: c[:-1]), "holds 15 bytes of data"),
    (
        "bytes after the data",
        with_member("golden/scores.npy", lambda c: c + b"x"),
        "holds 17 bytes of data",
    ),
    ("cut header", with_member("golden/scores.npy", lambda c: c[:40]), "is not a .npy file"),
    (
        "format 2",
        with_member(
            "golden/scores.npy",
            npy_header(f"{{'descr': '<f4', 'fortran_order': False, {SHAPE}", version=b"\2\0"),
        ),
        "is not a .npy file (format 1.0)",
    ),
    (
        "header bomb",
        with_member(
            "golden/images.npy",
            npy_header(
                "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999, 64, 64, 3), }"
            ),
        ),
        "needs 1228799999999987712",
    ),
    (
        "header with code",
        with_member(
            "golden/scores.npy",
            npy_header(
                "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(),), }"
            ),
        ),
        "is not a .npy file",
    ),
    (
        "negative shape",
        with_member(
            "golden/scores.npy", npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,), }")
        ),
        "is not a .npy file",
    ),
]


@pytest.fixture(scope="module")
def members(tiny_bundle: Path) -> Members:
    with zipfile.ZipFile(tiny_bundle) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_raw_writer_writes_a_good_bundle(members: Members, tmp_path: Path) -> None:
    """Otherwise the rows below could be refused for a reason of their own."""
    path = tmp_path / "good.edgead"
    for entries in (entries_of(members), entries_of(members)[::-1]):
        path.write_bytes(raw_zip(entries))
        assert Bundle.open(path).model_bytes() == members["model.onnx"]
    path.write_bytes(with_manifest(lambda data: None)(members))
    assert Bundle.open(path).manifest.name == "blob"
    path.write_bytes(with_member("golden/scores.npy", lambda content: content)(members))
    assert len(Bundle.open(path).golden().scores) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(make, message, id=f"{kind}: {name}")
        for kind, rows in (("container", CONTAINER), ("golden", GOLDEN))
        for name, make, message in rows
    ],
)
def test_hostile_file(
    make: Callable[[Members], bytes],
    message: str,
    members: Members,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.edgead"
    path.write_bytes(make(members))
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [
        "hostile.edgead"
    ]  # nothing was unpacked or unpickled


def test_a_file_above_the_limit_is_not_read(members: Members, tmp_path: Path) -> None:
    path = tmp_path / "large.edgead"
    with path.open("wb") as file:
        file.write(raw_zip(entries_of(members)))
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(BundleError, match="at most 1073741824"):
        Bundle.open(path)
