"""Writing and reading bundles, the manifest, and what happens when any byte of the file changes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgead import Bundle, BundleError
from edgead.bundle import MEMBERS, Golden, rewrite_bundle, set_threshold, write_bundle
from edgead.manifest import Manifest, Threshold

WRITING = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def content(path: Path) -> tuple[object, ...]:
    """All that a bundle gives its user, comparable; raises as Bundle.open."""
    bundle = Bundle.open(path)
    golden = bundle.golden()
    return (
        bundle.manifest,
        bundle.model_bytes(),
        *(
            (array.dtype.str, array.shape, array.tobytes())
            for array in (golden.images, golden.scores, golden.maps)
        ),
    )


def test_what_is_written_is_read(tiny: Any, tiny_bundle: Path) -> None:
    bundle = Bundle.open(str(tiny_bundle))
    assert bundle.path == tiny_bundle
    assert bundle.model_bytes() == tiny.model
    assert dataclasses.replace(bundle.manifest, members={}) == tiny.manifest
    assert set(bundle.manifest.members) == {*MEMBERS} - {"manifest.json"}
    for name in ("images", "scores", "maps"):
        written, read = getattr(tiny.golden, name), getattr(bundle.golden(), name)
        assert read.dtype == written.dtype and np.array_equal(read, written) and not read.flags.writeable


def test_an_ordinary_zip_reader_agrees(tiny: Any, tiny_bundle: Path) -> None:
    with zipfile.ZipFile(tiny_bundle) as archive:
        assert archive.testzip() is None  # CRC-32 of all members
        assert tuple(archive.namelist()) == MEMBERS
        assert archive.read("model.onnx") == tiny.model
        assert json.loads(archive.read("manifest.json"))["threshold"]["value"] == 0.4
        with archive.open("golden/maps.npy") as file:
            assert np.array_equal(np.load(file, allow_pickle=False), tiny.golden.maps)


def test_the_same_content_gives_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    first = tiny.write(tmp_path / "a.edgead", provenance={"seed": 0, "steps": 1})
    second = tiny.write(tmp_path / "b.edgead", provenance={"steps": 1, "seed": 0})
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.edgead", "b.edgead"]


def test_big_endian_and_strided_golden_arrays_are_written_plain(tiny: Any, tmp_path: Path) -> None:
    golden = tiny.golden
    odd = Golden(
        np.asfortranarray(golden.images), golden.scores.astype(">f4"), np.asfortranarray(golden.maps)
    )
    assert content(tiny.write(tmp_path / "odd.edgead", golden=odd)) == content(
        tiny.write(tmp_path / "plain.edgead")
    )


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        (lambda g: Golden(g.images[:3], g.scores, g.maps), "3 images, 4 scores, 4 maps"),
        (
            lambda g: Golden(g.images[:, :32], g.scores, g.maps),
            r"expected \|u1 of shape \(K >= 1, 64, 64, 3\)",
        ),
        (
            lambda g: Golden(g.images.astype(np.float32), g.scores, g.maps),
            r"is <f4 of shape \(4, 64, 64, 3\)",
        ),
        (lambda g: Golden(g.images, g.scores.astype(np.float64), g.maps), "golden/scores.npy' is <f8"),
        (lambda g: Golden(g.images, g.scores * np.nan, g.maps), "golden/scores.npy' holds NaN"),
        (lambda g: Golden(g.images, g.scores.astype(object), g.maps), "dtype object"),
        (lambda g: Golden(g.images[:0], g.scores[:0], g.maps[:0]), "K >= 1"),
    ],
)
def test_parts_that_do_not_fit_are_not_written(
    golden: Callable[[Golden], Golden], message: str, tiny: Any, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "kept.edgead")
    before = path.read_bytes()
    with pytest.raises(BundleError, match=message):
        write_bundle(path, tiny.manifest, tiny.model, golden(tiny.golden))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["kept.edgead"]


def test_values_that_json_does_not_have_are_not_written(tiny: Any, tmp_path: Path) -> None:
    for value in (float("nan"), np.float32(1.0), {1, 2}, Path("x")):
        with pytest.raises(BundleError, match="cannot be written as JSON"):
            tiny.write(tmp_path / "x.edgead", provenance={"value": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: os.mkfifo(path), "not a regular file"),
    ],
)
def test_a_path_without_a_file(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "no.edgead"
    make(path)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(path)
    assert str(path) in str(caught.value)


def test_later_changes_of_the_file_do_not_reach_an_open_bundle(tiny: Any, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "b.edgead")
    bundle = Bundle.open(path)
    path.write_bytes(b"")
    assert bundle.model_bytes() == tiny.model
    assert np.array_equal(bundle.golden().maps, tiny.golden.maps)


# --- threshold


def test_set_threshold_keeps_everything_else(tiny: Any, tmp_path: Path) -> None:
    old = Threshold(
        value=0.4,
        basis="quantile",
        target_false_reject_rate=0.01,
        upper_bound=0.1,
        confidence=0.9,
        good_images=21,
    )
    path = tiny.write(tmp_path / "b.edgead", threshold=old)
    before = content(path)
    set_threshold(path, 0.55, basis="shift leader")
    manifest, *rest = content(path)
    assert rest == list(before[1:])
    # What was said about the old value does not hold for the new one.
    assert manifest == dataclasses.replace(
        before[0], threshold=Threshold(value=0.55, basis="shift leader")
    )  # type: ignore[type-var]
    set_threshold(path, **dataclasses.asdict(old))
    assert content(path) == before


def test_set_threshold_keeps_mode_link_and_fields_of_a_newer_minor(
    tiny_bundle: Path, tmp_path: Path, rewrite_manifest: Callable[..., Path]
) -> None:
    def newer(data: dict[str, Any]) -> None:
        data["format"], data["colour_of_the_box"], data["threshold"]["note"] = [1, 7], "red", "kept"

    path = rewrite_manifest(tmp_path / "newer.edgead", newer)
    path.chmod(0o604)
    link = tmp_path / "link.edgead"
    link.symlink_to(path.name)
    set_threshold(link, 0.9)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o604
    data = json.loads(zipfile.ZipFile(path).read("manifest.json"))
    assert (data["format"], data["colour_of_the_box"]) == ([1, 7], "red")
    assert (data["threshold"]["note"], data["threshold"]["value"]) == ("kept", 0.9)
    assert Bundle.open(path).manifest.format == (1, 7)


def test_of_two_that_rewrite_one_bundle_the_second_is_refused(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no locks on this system")
    path = tiny.write(tmp_path / "a.edgead")
    opened = Bundle.open(path)
    start = threading.Barrier(4)

    def rewrite(value: float) -> str:
        threshold = dataclasses.replace(opened.manifest.threshold, value=value)
        manifest = dataclasses.replace(opened.manifest, threshold=threshold)
        start.wait()
        try:
            rewrite_bundle(opened, path, manifest, opened.golden())
        except BundleError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(rewrite, (1.0, 2.0, 3.0, 4.0)))
    assert answers.count("") == 1 and sum("run this one again" in answer for answer in answers) == 3
    assert Bundle.open(path).manifest.threshold.value == 1.0 + answers.index("")


@pytest.mark.skipif(
    getattr(os, "geteuid", lambda: 1)() != 0, reason="only root may give a file to another user"
)
def test_a_bundle_stays_that_of_its_user(tiny: Any, tmp_path: Path) -> None:
    """After `sudo edgead set-threshold` the line, which is no root, still has to read it."""
    path = tiny.write(tmp_path / "a.edgead")
    path.chmod(0o600)
    os.chown(path, 12345, 12346)
    set_threshold(path, 0.5)
    found = path.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (12345, 12346, 0o600)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, "0.5", None, True])
def test_set_threshold_refuses_what_is_not_a_finite_number(
    value: Any, tiny: Any, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "b.edgead")
    before = path.read_bytes()
    with pytest.raises(BundleError, match="threshold.value"):
        set_threshold(path, value)
    assert path.read_bytes() == before


# --- damaged files


def same_or_refused(path: Path, original: tuple[object, ...]) -> bool:
    """True if refused; fails on any other exception and on a different content."""
    try:
        assert content(path) == original
    except BundleError as error:
        assert str(path) in str(error)
        return True
    return False


def test_every_flipped_byte_is_found_or_changes_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    good, original = tiny_bundle.read_bytes(), content(tiny_bundle)
    with zipfile.ZipFile(tiny_bundle) as archive:
        infos = archive.infolist()
        directory = archive.start_dir
    inside: set[int] = set()  # bytes of member contents
    for info in infos:
        start = info.header_offset + 30 + len(info.filename)
        inside |= set(range(start, start + info.file_size))
    rng = random.Random(0)
    framing = [position for position in range(len(good)) if position not in inside]
    manifest = range(30 + len("manifest.json"), infos[1].header_offset)
    sampled = rng.sample(sorted(inside), 300)
    # Version, time, date in local headers; also internal and external attributes in the directory.
    harmless = {info.header_offset + offset for info in infos for offset in (4, 5, 10, 11, 12, 13)}
    entry = directory
    for info in infos:
        harmless |= {entry + offset for offset in (4, 5, 6, 7, 12, 13, 14, 15, 36, 37, 38, 39, 40, 41)}
        entry += 46 + len(info.filename)
    path = Path(shutil.copy(tiny_bundle, tmp_path / "flipped.edgead"))
    with path.open(
        "r+b", buffering=0
    ) as file:  # in place: rewriting the file would take most of the time
        for position in [*framing, *manifest, *sampled]:
            flip = rng.choice([0xFF, *(1 << bit for bit in range(8))])
            os.pwrite(file.fileno(), bytes([good[position] ^ flip]), position)
            refused = same_or_refused(path, original)
            assert refused or position in harmless, f"byte {position} ^ {flip:#x} went unnoticed"
            os.pwrite(file.fileno(), good[position : position + 1], position)
    assert content(path) == original


def test_every_truncation_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    good, original, path = tiny_bundle.read_bytes(), content(tiny_bundle), tmp_path / "cut.edgead"
    rng = random.Random(1)
    for length in [*range(100), *range(len(good) - 400, len(good)), *rng.sample(range(len(good)), 100)]:
        path.write_bytes(good[:length])
        assert same_or_refused(path, original), f"cut to {length} bytes"


@given(
    at=st.floats(0, 1),
    end=st.booleans(),
    removed=st.integers(0, 80),
    inserted=st.one_of(
        st.binary(max_size=80), st.sampled_from([b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(26)])
    ),
)
@settings(WRITING, max_examples=300)
def test_arbitrary_edits_are_found_or_change_nothing(
    at: float, end: bool, removed: int, inserted: bytes, tiny_bundle: Path, tmp_path: Path
) -> None:
    good = tiny_bundle.read_bytes()
    span = 500 if end else len(good)  # the directory is in the last 500 bytes
    position = len(good) - span + int(at * span)
    changed = good[:position] + inserted + good[position + removed :]
    path = tmp_path / "edited.edgead"
    path.write_bytes(changed)
    refused = same_or_refused(path, content(tiny_bundle))
    assert refused or changed == good or len(changed) == len(good)


@given(junk=st.binary(max_size=2000))
@settings(WRITING, max_examples=100)
def test_junk_is_refused(junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "junk.edgead"
    for prefix in (b"", b"PK\x03\x04", b"PK\x05\x06"):
        path.write_bytes(prefix + junk)
        with pytest.raises(BundleError):
            Bundle.open(path)


# --- manifest

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    free=st.dictionaries(st.text(), JSON_VALUES, max_size=3),
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    rate=st.none() | st.floats(0, 1),
)
@settings(WRITING)
def test_the_manifest_survives_its_json(
    free: dict[str, Any], value: float, rate: float | None, tiny: Any
) -> None:
    threshold = Threshold(value=value, basis="x", upper_bound=rate)
    manifest = dataclasses.replace(tiny.manifest, threshold=threshold, provenance=free)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json().encode()).to_json() == manifest.to_json()


def test_a_bundle_moves_by_copying(tiny_bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copy(tiny_bundle, tmp_path / "anything"))
    assert content(copied) == content(tiny_bundle)
