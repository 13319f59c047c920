"""The identity of an engine and the file that says it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.engine import (
    RECIPE,
    EngineKey,
    Sidecar,
    Verification,
    l4t_release,
    this_platform,
)
from edgead.errors import EngineError

ORIN = EngineKey(
    graph_sha256="3f2a91c0" + 56 * "1",
    flavour="tensorrt",
    version="10.3.0",
    target="sm87",
    gpu="Orin",
    driver="12.6",
    platform="linux-aarch64-l4t36.4.3",
    batches=(1, 4),
    workspace_mib=1024,
)
PLAN = bytes(range(256)) * 40
SIDECAR = Sidecar(
    key=ORIN,
    bundle="bottle",
    file="bottle-3f2a91c0-tensorrt-sm87-5b1c66d0.engine",
    sha256="4a44563c0ad9bb3f9b8d44ecbb2e7fd4c6d3e7d31a6f8e63a9a4c4f0c5b5d6a7",
    size_bytes=len(PLAN),
    utc="2026-01-31T12:00:00Z",
    seconds=81.25,
    edgead="0.1.0",
    verified=Verification(
        "2026-01-31T12:01:00Z", "Orin", "12.6", {"images": 8, "flips": [], "margin": 0.25}
    ),
)

TEXTS = st.text(max_size=20)
KEYS = st.builds(
    EngineKey,
    graph_sha256=TEXTS,
    flavour=TEXTS,
    version=TEXTS,
    target=TEXTS,
    gpu=st.none() | TEXTS,
    driver=st.none() | TEXTS,
    platform=TEXTS,
    batches=st.lists(st.integers(1, 99), min_size=1, max_size=4).map(tuple),
    workspace_mib=st.none() | st.integers(1, 1 << 40),
    recipe=st.integers(0, 9),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
VERIFICATIONS = st.builds(
    Verification, utc=TEXTS, gpu=TEXTS, driver=TEXTS, replay=st.dictionaries(TEXTS, JSON, max_size=3)
)
SIDECARS = st.builds(
    Sidecar,
    key=KEYS,
    bundle=TEXTS,
    file=st.text(string.ascii_letters + " .-é", min_size=1, max_size=40).map(lambda t: t + ".engine"),
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    size_bytes=st.integers(0, 1 << 40),
    utc=TEXTS,
    seconds=st.floats(0, 1e6),
    edgead=TEXTS,
    verified=st.none() | VERIFICATIONS,
)


@given(SIDECARS)
def test_a_sidecar_survives_writing_and_reading(sidecar: Sidecar) -> None:
    assert Sidecar.from_bytes(sidecar.to_bytes()) == sidecar


@given(st.integers(0, len(SIDECAR.to_bytes()) - 1), st.integers(1, 255))
def test_any_changed_byte_of_a_sidecar_is_noticed(position: int, flip: int) -> None:
    content = bytearray(SIDECAR.to_bytes())
    content[position] ^= flip
    with pytest.raises(EngineError):
        Sidecar.from_bytes(bytes(content))


@given(st.integers(0, len(SIDECAR.to_bytes()) - 1))
def test_any_truncation_of_a_sidecar_is_noticed(length: int) -> None:
    with pytest.raises(EngineError):
        Sidecar.from_bytes(SIDECAR.to_bytes()[:length])


@given(st.binary(max_size=400))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    with pytest.raises(EngineError):
        Sidecar.from_bytes(content)


@settings(max_examples=200)
@given(JSON)
def test_no_json_breaks_the_reader(data: Any) -> None:
    for content in (data, {"format": 1, "key": data}, {**as_json(), "verified": {"replay": data}}):
        with pytest.raises(EngineError):
            Sidecar.from_bytes(json.dumps(content).encode())


def as_json() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SIDECAR.to_bytes())
    return found


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format": 2}, "its format is 2, expected 1"),
        ({"format": True}, "checksum|format"),
        ({"bundle": "cup"}, "checksum"),
        ({"extra": 1}, "checksum"),
        ({"key": []}, "fields"),
        ({"key": {}}, "fields"),
        ({"verified": {}}, "fields"),
        ({"engine": {"file": "../other.engine", "sha256": "0" * 64, "size_bytes": 1}}, "fields"),
        ({"engine": {"file": "a.engine", "sha256": "0", "size_bytes": 1}}, "fields"),
        ({"engine": {"file": "a.engine", "sha256": "0" * 64, "size_bytes": True}}, "fields"),
        ({"built": {"utc": "x", "seconds": 1e999, "edgead": "x"}}, "fields"),
        ({"built": {"utc": "x", "seconds": 1, "edgead": "x"}}, "fields"),
        ({"key": {**dataclasses.asdict(ORIN), "batches": [1.0]}}, "fields"),
        ({"key": {**dataclasses.asdict(ORIN), "gpu": 7}}, "fields"),
    ],
)
def test_refuses_what_is_not_in_the_format(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Sidecar.from_bytes(json.dumps({**as_json(), **edit}).encode())


def test_refuses_what_is_too_large_or_too_deep() -> None:
    with pytest.raises(EngineError, match="at most"):
        Sidecar.from_bytes(b" " * (1 << 20) + SIDECAR.to_bytes())
    with pytest.raises(EngineError):
        Sidecar.from_bytes(b"[" * 100_000)
    with pytest.raises(EngineError):
        Sidecar.from_bytes(b'{"format":1,"bundle":' + b"1" * 10_000 + b"}")


def test_the_file_is_readable_json() -> None:
    """The fields of the format in the module's docstring; trtexec users look things up in it."""
    data = as_json()
    assert list(data) == ["built", "bundle", "checksum", "engine", "format", "key", "verified"]
    assert data["key"]["batches"] == [1, 4] and data["key"]["target"] == "sm87"
    assert data["engine"] == {"size_bytes": len(PLAN), "file": SIDECAR.file, "sha256": SIDECAR.sha256}
    assert data["verified"]["replay"]["images"] == 8
    assert SIDECAR.to_bytes().endswith(b"}\n")


def of(plan: bytes) -> Sidecar:
    return dataclasses.replace(SIDECAR, size_bytes=len(plan), sha256=hashlib.sha256(plan).hexdigest())


@given(st.integers(0, len(PLAN) - 1), st.integers(1, 255))
def test_any_changed_byte_of_an_engine_is_noticed(position: int, flip: int) -> None:
    changed = bytearray(PLAN)
    changed[position] ^= flip
    of(PLAN).check_plan(PLAN)
    with pytest.raises(EngineError, match="SHA-256"):
        of(PLAN).check_plan(bytes(changed))


@given(st.integers(0, len(PLAN) - 1))
def test_any_truncation_of_an_engine_is_noticed(length: int) -> None:
    with pytest.raises(EngineError, match=f"it has {length} bytes, its sidecar says {len(PLAN)}"):
        of(PLAN).check_plan(PLAN[:length])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"graph_sha256": "0" * 64}, "graph 3f2a91c0, now 00000000"),
        ({"flavour": "tensorrt-rtx"}, "flavour tensorrt, now tensorrt-rtx"),
        ({"version": "10.13.3.9"}, "TensorRT 10.3.0, now 10.13.3.9"),
        ({"target": "sm86"}, "target sm87, now sm86"),
        ({"gpu": "NVIDIA RTX A2000"}, "GPU Orin, now NVIDIA RTX A2000"),
        ({"driver": "12.8"}, "driver 12.6, now 12.8"),
        ({"driver": None}, "driver 12.6, now none"),
        (
            {"platform": "linux-aarch64-l4t36.5.0"},
            "platform linux-aarch64-l4t36.4.3, now linux-aarch64-l4t36.5.0",
        ),
        ({"batches": (1, 16)}, "batches 1,4, now 1,16"),
        ({"workspace_mib": None}, "workspace MiB 1024, now none"),
        ({"recipe": RECIPE + 1}, f"edgead's recipe {RECIPE}, now {RECIPE + 1}"),
    ],
)
def test_differences_name_each_part_of_the_key(change: dict[str, Any], text: str) -> None:
    assert ORIN.differences(dataclasses.replace(ORIN, **change)) == [text]


def test_equal_keys_have_no_differences_and_each_field_is_tested_above() -> None:
    assert ORIN.differences(dataclasses.replace(ORIN)) == []
    marks = test_differences_name_each_part_of_the_key.pytestmark  # type: ignore[attr-defined]
    tested = {name for change, _ in marks[0].args[1] for name in change}
    assert tested == {field.name for field in dataclasses.fields(EngineKey)}
    several = dataclasses.replace(ORIN, driver="13.0", gpu="Thor")
    assert ORIN.differences(several) == ["GPU Orin, now Thor", "driver 12.6, now 13.0"]


def test_the_release_of_jetson_linux(tmp_path: Path) -> None:
    file = tmp_path / "nv_tegra_release"
    assert l4t_release(file) is None
    # As on JetPack 6.2, from NVIDIA's public documentation of the file.
    file.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert l4t_release(file) == "36.4.3"
    file.write_text("something else")
    assert l4t_release(file) is None


def test_the_platform() -> None:
    """An engine of TensorRT for RTX is built elsewhere: it does not name the release of a board."""
    assert this_platform("tensorrt-rtx").startswith(f"{sys.platform}-")
    assert this_platform("tensorrt").startswith(this_platform("tensorrt-rtx"))
    assert "l4t" not in this_platform("tensorrt-rtx")
