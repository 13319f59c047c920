"""The bundle: one file that carries a trained model from the workstation to the device.

Format 1.0
==========
A bundle is a zip file, by convention `<name>.edgead`, with exactly these five members, in any order:

    manifest.json      what the model is, its threshold, and the checksums of the other members
    model.onnx         the graph: cast, normalise, networks, map, score
    golden/images.npy  uint8   [K, H, W, 3]  RGB, 0-255, K >= 1, at the size of the graph's input
    golden/scores.npy  float32 [K]           scores of the reference (PyTorch, FP32) on those images
    golden/maps.npy    float32 [K, h, w]     anomaly maps of the reference on those images

Container. Members MUST be stored (method 0) and regular files; they MUST lie one after the other from
byte 0 up to the central directory, which the end record follows, which ends the file. The two headers of
a member MUST agree. There MUST NOT be extra fields, comments, encryption, data descriptors, zip64
records, or bytes that belong to no member: appended data is refused. The file MUST NOT exceed
`storedzip.MAX_FILE_BYTES` (1 GiB) nor the manifest `MAX_MANIFEST_BYTES` (1 MiB). Time stamps,
permissions and version numbers of the zip headers MAY have any value.

Manifest. A JSON object, UTF-8, no repeated keys, finite numbers only. All fields are required, others
are refused:

    format       [major, minor]. A reader MUST refuse another major. A newer minor MAY add fields, which
                 a reader ignores; it MUST NOT add members or change the meaning of a field.
    method       name of the recipe, such as "efficientad-s"
    name         class of parts, such as "bottle"
    precision    "fp32" or "fp16": that of the weights in the graph
    input        name "image", dtype "uint8", layout "NHWC", height, width, color "rgb", resize: one of
                 the two texts `manifest.RESIZE_ON_HOST` (what `edgead.image.resize` does) and
                 `manifest.RESIZE_IN_GRAPH`
    outputs      score: float32 ["N"]; anomaly_map: float32 ["N", h, w]
    calibration  input "calibration", and values, names (of equal length), meaning, quantiles (free)
    threshold    value, basis, and target_false_reject_rate, upper_bound, confidence, good_images, which
                 MAY be null. A frame is anomalous when score >= value.
    parity       free object, as are model and provenance
    members      {name: {"sha256": hexadecimal, "bytes": size}} of the four other members

Graph. Inputs `image` uint8 [N, H, W, 3] with N free and `calibration` float32 [len(values)]; outputs as
in the manifest. The back end checks this when it loads the graph.

Arrays. NumPy's .npy format 1.0 with the header text that `numpy.save` writes: little endian, C order, no
objects.

What is checked on opening, before anything is used: all of the above except the graph. The contents of
the four members are protected by the SHA-256 in the manifest, the manifest by its CRC-32 in both zip
headers.

What is NOT checked. The checksums detect accidents, not forgery: whoever can write the file can write
matching checksums, so load bundles only from where you would install software from. Nothing in a bundle
is unpickled or run as Python, but the graph goes to the back end's ONNX parser. The CRC-32 of the
members other than the manifest is compared between the two headers, not with the content. Whether the
golden scores are right is for `edgead.runtime.replay`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edgead import storedzip
from edgead.errors import BundleError
from edgead.files import whole_file
from edgead.manifest import Manifest, Member, Threshold, dump_json, parse_json

MANIFEST = "manifest.json"
MODEL = "model.onnx"
GOLDEN_IMAGES, GOLDEN_SCORES, GOLDEN_MAPS = "golden/images.npy", "golden/scores.npy", "golden/maps.npy"
MEMBERS = (MANIFEST, MODEL, GOLDEN_IMAGES, GOLDEN_SCORES, GOLDEN_MAPS)
MAX_MANIFEST_BYTES = 1 << 20
SET_BY_HAND = "set by hand"

_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), 'shape': \(([0-9, ]{0,80})\), \} *\n"
)


@dataclass(frozen=True, eq=False)
class Golden:
    """Samples and the answers of the reference.

    Attributes:
        images: uint8 [K, H, W, 3] RGB, 0-255, at the size of the graph's input.
        scores: float32 [K].
        maps: float32 [K, h, w].
    """

    images: np.ndarray
    scores: np.ndarray
    maps: np.ndarray


class Bundle:
    """A bundle whose whole content was read and verified; later changes of the file do not reach it."""

    def __init__(self, path: Path, manifest: Manifest, members: Mapping[str, bytes]) -> None:
        self.path = path
        self.manifest = manifest
        self._members = dict(members)
        self._golden = _read_golden(manifest, members)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Reads and verifies a bundle.

        Raises:
            BundleError: The file is absent, unreadable, damaged, hostile or of another format; the
                message says which.
        """
        path = Path(path)
        try:
            if path.is_dir():
                raise BundleError("is a folder; name the bundle file")
            if path.exists() and not path.is_file():
                raise BundleError("is not a regular file")
            with path.open("rb") as file:
                return cls(path, *_read(file))
        except OSError as error:
            raise BundleError(
                f"bundle {path}: cannot be read ({error.strerror}); check the path and the rights"
            ) from None
        except BundleError as error:
            raise BundleError(f"bundle {path}: {error}") from None

    def model_bytes(self) -> bytes:
        """Returns the ONNX graph."""
        return self._members[MODEL]

    def golden(self) -> Golden:
        """Returns the golden samples as read-only arrays."""
        return self._golden


def write_bundle(
    path: str | os.PathLike[str], manifest: Manifest, model_bytes: bytes, golden: Golden
) -> None:
    """Writes a bundle atomically: afterwards `path` holds the whole new file, or what it held before.

    The same content gives the same bytes. `manifest.members` is filled here. The new file is opened and
    verified before it takes the place of an older one.

    Raises:
        BundleError: The parts do not fit together; nothing was written.
        OSError: The file cannot be written.
    """
    manifest, members = _parts(manifest, model_bytes, golden)
    _write(Path(path), {MANIFEST: manifest.to_json().encode(), **members})


def rewrite_bundle(
    bundle: Bundle, path: str | os.PathLike[str], manifest: Manifest, golden: Golden
) -> None:
    """Writes an opened bundle with another manifest and other golden samples, as `write_bundle` does.

    Fields of a newer minor stay as they are.

    Args:
        path: Where to; the file that was opened, or another one.

    Raises:
        BundleError: As `write_bundle`; or the file that is to be replaced is no longer the one that was
            opened.
        OSError: The file cannot be written.
    """
    manifest, members = _parts(manifest, bundle.model_bytes(), golden)
    old, new = parse_json(bundle._members[MANIFEST]), dataclasses.asdict(manifest)
    for part in ("input", "calibration", "threshold"):
        new[part] = old[part] | new[part]
    for part in ("outputs", "members"):
        new[part] = {name: old[part][name] | item for name, item in new[part].items()}
    path = Path(path)
    with _alone(path):
        is_same = path.resolve() == bundle.path.resolve()
        if is_same and Bundle.open(path)._members != bundle._members:
            raise BundleError(
                f"bundle {path}: not written, another command changed it meanwhile; run this one again"
            )
        _write(path, {MANIFEST: dump_json(old | new).encode(), **members})


def _parts(manifest: Manifest, model_bytes: bytes, golden: Golden) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest with the checksums of the other members, and these."""
    members = {
        MODEL: bytes(model_bytes),
        GOLDEN_IMAGES: _npy_bytes(golden.images),
        GOLDEN_SCORES: _npy_bytes(golden.scores),
        GOLDEN_MAPS: _npy_bytes(golden.maps),
    }
    digests = {
        name: Member(sha256=_sha256(content), bytes=len(content)) for name, content in members.items()
    }
    return dataclasses.replace(manifest, members=digests), members


def set_threshold(
    path: str | os.PathLike[str],
    value: float,
    *,
    basis: str = SET_BY_HAND,
    target_false_reject_rate: float | None = None,
    upper_bound: float | None = None,
    confidence: float | None = None,
    good_images: int | None = None,
) -> None:
    """Replaces the threshold of a bundle atomically; keeps all else, also fields of a newer minor.

    The statements about the old value (its target rate and bound) do not hold for the new one: they
    become null unless new ones are given. Fields as in `edgead.manifest.Threshold`.

    Raises:
        BundleError: The file is not a valid bundle or the value is not finite; the file is unchanged.
    """
    threshold = Threshold(
        value=value,
        basis=basis,
        target_false_reject_rate=target_false_reject_rate,
        upper_bound=upper_bound,
        confidence=confidence,
        good_images=good_images,
    )
    with _alone(Path(path)):
        members = Bundle.open(path)._members
        manifest = parse_json(members[MANIFEST])
        manifest["threshold"] |= dataclasses.asdict(threshold)
        _write(Path(path), {**members, MANIFEST: dump_json(manifest).encode()})


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other command changes the bundle meanwhile, where there are locks (not on Windows)."""
    with contextlib.ExitStack() as stack:
        if path.is_file():
            with contextlib.suppress(ModuleNotFoundError, OSError):
                import fcntl

                fcntl.flock(stack.enter_context(path.open("rb")), fcntl.LOCK_EX)
        yield


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(file: BinaryIO) -> tuple[Manifest, dict[str, bytes]]:
    """Reads each member once, into bytes of its own, and checks them against the manifest."""
    entries = storedzip.read_directory(file, os.fstat(file.fileno()).st_size, names=MEMBERS)
    if entries[MANIFEST].size_bytes > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{MANIFEST} has {entries[MANIFEST].size_bytes} bytes, at most {MAX_MANIFEST_BYTES} are "
            "allowed"
        )
    text = storedzip.read_member(file, entries[MANIFEST])
    if zlib.crc32(text) != entries[MANIFEST].crc:
        raise BundleError(f"{MANIFEST} does not match its CRC-32; {storedzip.DAMAGED}")
    manifest = Manifest.from_json(text)
    declared = manifest.members
    if set(declared) != set(MEMBERS) - {MANIFEST}:
        raise BundleError(
            f"manifest field members: lists {sorted(declared)}, expected "
            f"{sorted(set(MEMBERS) - {MANIFEST})}"
        )
    members = {MANIFEST: text}
    for name, member in declared.items():
        if entries[name].size_bytes != member.bytes:
            raise BundleError(
                f"member {name!r} has {entries[name].size_bytes} bytes, its manifest says "
                f"{member.bytes}; {storedzip.DAMAGED}"
            )
        members[name] = storedzip.read_member(file, entries[name])
        if _sha256(members[name]) != member.sha256:
            raise BundleError(
                f"member {name!r} does not match its SHA-256 in the manifest; {storedzip.DAMAGED}"
            )
    return manifest, members


def _read_golden(manifest: Manifest, members: Mapping[str, bytes]) -> Golden:
    frame = (manifest.input.height, manifest.input.width, 3)
    images = _read_npy(members, GOLDEN_IMAGES, "|u1", frame)
    scores = _read_npy(members, GOLDEN_SCORES, "<f4", ())
    maps = _read_npy(members, GOLDEN_MAPS, "<f4", manifest.map_shape)
    if not len(images) == len(scores) == len(maps):
        raise BundleError(
            f"golden samples: {len(images)} images, {len(scores)} scores, {len(maps)} maps; expected as "
            "many of each. Export the bundle again"
        )
    for name, values in ((GOLDEN_SCORES, scores), (GOLDEN_MAPS, maps)):
        if not np.isfinite(values).all():
            raise BundleError(f"member {name!r} holds NaN or infinity; export the bundle again")
    return Golden(images=images, scores=scores, maps=maps)


def _read_npy(
    members: Mapping[str, bytes], name: str, descr: str, item_shape: tuple[int, ...]
) -> np.ndarray:
    """Returns a view of a .npy member [K, *item_shape]. The header is matched as text."""
    content = members[name]
    header_end = 10 + int.from_bytes(content[8:10], "little")
    header = _NPY_HEADER.fullmatch(content[10:header_end])
    if not content.startswith(b"\x93NUMPY\x01\x00") or header is None:
        raise BundleError(
            f"member {name!r} is not a .npy file (format 1.0) of a plain array; export the bundle again"
        )
    found_descr, fortran = header[1].decode("ascii", "replace"), header[2] == b"True"
    shape = tuple(int(side) for side in header[3].decode().replace(",", " ").split())
    if (
        found_descr != descr
        or fortran
        or len(shape) != 1 + len(item_shape)
        or shape[1:] != item_shape
        or shape[0] < 1
    ):
        raise BundleError(
            f"member {name!r} is {found_descr} of shape "
            f"{shape}{' in Fortran order' if fortran else ''}, expected {descr} of shape (K >= 1, "
            f"{', '.join(map(str, item_shape))}). Export the bundle again"
        )
    dtype = np.dtype(descr)
    expected_bytes = dtype.itemsize
    for side in shape:
        expected_bytes *= side
    if len(content) - header_end != expected_bytes:
        raise BundleError(
            f"member {name!r} holds {len(content) - header_end} bytes of data, its shape {shape} needs "
            f"{expected_bytes}. Export the bundle again"
        )
    return np.frombuffer(content, dtype, offset=header_end).reshape(shape)


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise BundleError(
            f"golden samples: an array has the dtype {array.dtype}, expected plain numbers"
        )
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    np.save(buffer, little_endian, allow_pickle=False)
    return buffer.getvalue()


def _write(path: Path, members: Mapping[str, bytes]) -> None:
    """Writes the members in the order of the format, verifies the new file, then puts it in place."""

    def fill(file: BinaryIO) -> None:
        storedzip.write_members(file, {name: members[name] for name in MEMBERS})

    def verify(temporary: Path) -> None:
        with temporary.open("rb") as file:
            Bundle(path, *_read(file))

    try:
        _write_atomically(path, fill, verify)
    except BundleError as error:
        raise BundleError(f"bundle {path}: not written, {error}") from None


def _write_atomically(
    path: Path, fill: Callable[[BinaryIO], None], verify: Callable[[Path], None]
) -> None:
    """Replaces the target of `path` (through symbolic links) in one step that survives a power cut."""
    target = path.resolve()
    with whole_file(target) as temporary:
        with temporary.open("xb") as file:
            fill(file)
        verify(temporary)
        if target.exists():
            _keep_owner(target, temporary)
            shutil.copymode(target, temporary)


def _keep_owner(target: Path, temporary: Path) -> None:
    """After `sudo edgead ...` the file is still that of its user, as far as this process may give it."""
    if hasattr(os, "chown"):
        now = target.stat()
        for owner in ((-1, now.st_gid), (now.st_uid, -1)):
            with contextlib.suppress(PermissionError):
                os.chown(temporary, *owner)
