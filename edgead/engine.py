"""What an engine was built from and for, and the sidecar file that says so.

An engine is native code for one library, one target and, with classic TensorRT, one GPU and driver. It
is a plain file that other tools read, so its identity lies beside it, in a JSON file. This module needs
neither TensorRT nor CUDA.

Sidecar, format 1
=================
UTF-8 JSON, exactly as `Sidecar.to_bytes` writes it: a reader refuses any other byte.

    format     1
    key        the fields of `EngineKey`
    bundle     the name of the bundle's class of parts, such as "bottle"
    engine     file: name of the engine, in the same folder; sha256: hexadecimal; size_bytes
    built      utc: "2026-01-31T12:00:00Z"; seconds: of the build; edgead: version
    verified   null, or the check that the engine gives the verdicts of the reference: utc, gpu, driver
               (of the box that checked), replay (the figures of `edgead.runtime.Replay`, with the
               threshold and calibration for which they hold)
    checksum   SHA-256 of this file without this field

What is NOT protected: the checksums detect accidents, not forgery. Whoever can write the folder can put
code there, as with every folder that programs are started from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgead.errors import EngineError
from edgead.flavour import RTX
from edgead.jetson import l4t_release

FORMAT = 1
RECIPE = 1  # of edgead.engines.build; raised when it builds otherwise, so that old engines are rebuilt
MAX_SIDECAR_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[^/\\\0]{1,250}\.engine")


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on. Two engines with equal keys are interchangeable.

    Attributes:
        graph_sha256: Of the ONNX graph in the bundle.
        flavour: A name of `edgead.flavour.NAMES`.
        version: Of the library, in full.
        target: Compute capability, such as "sm87".
        gpu: Name of the GPU; None for TensorRT for RTX, whose engines are completed when loaded.
        driver: CUDA version of the driver, such as "12.6"; None likewise.
        platform: See `this_platform`.
        batches: Sizes with a profile of their own, ascending.
        workspace_mib: Limit for the builder's scratch memory; None is the library's default.
        recipe: `RECIPE` when it was built.
    """

    graph_sha256: str
    flavour: str
    version: str
    target: str
    gpu: str | None
    driver: str | None
    platform: str
    batches: tuple[int, ...]
    workspace_mib: int | None
    recipe: int = RECIPE

    def differences(self, other: EngineKey) -> list[str]:
        """What distinguishes this key from that of now, such as "driver 12.4, now 12.6"."""
        return [
            f"{_TITLES.get(field.name, field.name)} {_show(mine)}, now {_show(now)}"
            for field in dataclasses.fields(self)
            if (mine := getattr(self, field.name)) != (now := getattr(other, field.name))
        ]


_TITLES = {
    "graph_sha256": "graph",
    "version": "TensorRT",
    "workspace_mib": "workspace MiB",
    "gpu": "GPU",
    "recipe": "edgead's recipe",
}


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    text = "none" if value is None else str(value)
    return text[:8] if _SHA256.fullmatch(text) else text


@dataclass(frozen=True)
class Verification:
    """The check of an engine against the golden samples, on one box.

    Attributes:
        utc: When.
        gpu: Name of the GPU that ran it.
        driver: CUDA version of its driver.
        replay: The figures, plain JSON values.
    """

    utc: str
    gpu: str
    driver: str
    replay: dict[str, Any]


@dataclass(frozen=True)
class Sidecar:
    """What the file beside an engine says; its fields are those of the format above."""

    key: EngineKey
    bundle: str
    file: str
    sha256: str
    size_bytes: int
    utc: str
    seconds: float
    edgead: str
    verified: Verification | None = None

    def to_bytes(self) -> bytes:
        """The content of the file."""
        data = {
            "format": FORMAT,
            "key": dataclasses.asdict(self.key),
            "bundle": self.bundle,
            "engine": {"file": self.file, "sha256": self.sha256, "size_bytes": self.size_bytes},
            "built": {"utc": self.utc, "seconds": self.seconds, "edgead": self.edgead},
            "verified": dataclasses.asdict(self.verified) if self.verified else None,
        }
        return _dump({**data, "checksum": hashlib.sha256(_dump(data)).hexdigest()})

    @classmethod
    def from_bytes(cls, content: bytes) -> Sidecar:
        """Reads a sidecar strictly.

        Raises:
            EngineError: Not a sidecar, damaged, or of another format.
        """
        data = _parse(content)
        try:
            sidecar = cls._from_json(data)
            is_same = sidecar.to_bytes() == content
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise EngineError(f"its fields are not those of format {FORMAT} ({error!r})") from None
        if not is_same:
            raise EngineError("its content does not match its checksum")
        return sidecar

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Sidecar:
        key = EngineKey(**{**data["key"], "batches": tuple(data["key"]["batches"])})
        verified = Verification(**data["verified"]) if data["verified"] is not None else None
        origin = {**data["engine"], **data["built"]}
        sidecar = cls(key=key, bundle=data["bundle"], **origin, verified=verified)
        _check_types(key, _KEY_TYPES)
        _check_types(sidecar, _SIDECAR_TYPES)
        if verified is not None:
            _check_types(verified, _VERIFIED_TYPES)
        if not all(type(batch) is int for batch in key.batches):
            raise ValueError("key.batches")
        if not _SHA256.fullmatch(sidecar.sha256) or not _FILE_NAME.fullmatch(sidecar.file):
            raise ValueError("engine")
        return sidecar

    def check_plan(self, plan: bytes) -> None:
        """Raises EngineError unless these are the bytes that were built."""
        if len(plan) != self.size_bytes:
            raise EngineError(f"it has {len(plan)} bytes, its sidecar says {self.size_bytes}")
        if hashlib.sha256(plan).hexdigest() != self.sha256:
            raise EngineError("its SHA-256 is not the one in its sidecar")


_NONE = type(None)
_Types = Mapping[str, tuple[type, ...]]
_KEY_TYPES: _Types = {
    **dict.fromkeys(("graph_sha256", "flavour", "version", "target", "platform"), (str,)),
    **dict.fromkeys(("gpu", "driver"), (str, _NONE)),
    "workspace_mib": (int, _NONE),
    "recipe": (int,),
}
_SIDECAR_TYPES: _Types = {
    **dict.fromkeys(("bundle", "file", "sha256", "utc", "edgead"), (str,)),
    "size_bytes": (int,),
    "seconds": (float,),
}
_VERIFIED_TYPES: _Types = {**dict.fromkeys(("utc", "gpu", "driver"), (str,)), "replay": (dict,)}


def _check_types(item: object, types: _Types) -> None:
    for name, allowed in types.items():
        if type(getattr(item, name)) not in allowed:
            raise TypeError(name)


def _dump(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _parse(content: bytes) -> dict[str, Any]:
    if len(content) > MAX_SIDECAR_BYTES:
        raise EngineError(f"it has {len(content)} bytes, at most {MAX_SIDECAR_BYTES} are allowed")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):  # also bytes that are not UTF-8
        raise EngineError("it is no JSON text") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise EngineError(f"its format is {found!r}, expected {FORMAT}")
    return data


def this_platform(flavour: str) -> str:
    """System and processor, such as "linux-x86_64".

    For classic TensorRT on a Jetson with the release of its system: "linux-aarch64-l4t36.4.3".
    """
    base = f"{sys.platform}-{platform.machine().lower()}"
    release = None if flavour == RTX else l4t_release()
    return f"{base}-l4t{release}" if release else base
