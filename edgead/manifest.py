"""The manifest of a bundle: its fields, their limits, and its JSON text.

The format is specified at the top of `edgead.bundle`. A value that breaks it raises `BundleError`, which
names the field, on reading and on building alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from edgead.errors import BundleError

FORMAT = (1, 0)
PRECISIONS = ("fp32", "fp16")
RESIZE_ON_HOST = "antialiased bilinear, anisotropic, on the host"
RESIZE_IN_GRAPH = "none: the frame is resized in the graph"
MAX_SIDE_PX = 16384
MAX_TEXT_CHARS = 2000
FLOAT32_MAX = 3.4028234663852886e38


def _check(condition: bool, where: str, got: object, expected: str) -> None:
    if not condition:
        shown = repr(got)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        raise BundleError(f"manifest field {where}: got {shown}, expected {expected}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    """Finite, also as float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _check_text(value: object, where: str) -> None:
    good = isinstance(value, str) and 0 < len(value) <= MAX_TEXT_CHARS and value.isprintable()
    _check(good, where, value, f"printable text of 1 to {MAX_TEXT_CHARS} characters")


def _check_side(value: object, where: str) -> None:
    good = _is_int(value) and 1 <= value <= MAX_SIDE_PX
    _check(good, where, value, f"an integer 1..{MAX_SIDE_PX}")


def _check_one_of(value: object, where: str, allowed: Sequence[str]) -> None:
    _check(value in allowed, where, value, " or ".join(map(repr, allowed)))


def _check_dict(value: object, where: str) -> None:
    good = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    _check(good, where, value, "an object with text keys")


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The image input of the graph: uint8 [N, height, width, 3] RGB, 0-255.

    `resize` says who fits a frame of another size: `RESIZE_ON_HOST` or `RESIZE_IN_GRAPH` (then `height`
    and `width` are those of the camera's frame, and no other size is accepted).
    """

    height: int
    width: int
    name: str = "image"
    dtype: str = "uint8"
    layout: str = "NHWC"
    color: str = "rgb"
    resize: str = RESIZE_ON_HOST

    def __post_init__(self) -> None:
        _check_side(self.height, "input.height")
        _check_side(self.width, "input.width")
        _check_one_of(self.name, "input.name", ("image",))
        _check_one_of(self.dtype, "input.dtype", ("uint8",))
        _check_one_of(self.layout, "input.layout", ("NHWC",))
        _check_one_of(self.color, "input.color", ("rgb",))
        _check_one_of(self.resize, "input.resize", (RESIZE_ON_HOST, RESIZE_IN_GRAPH))


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """An output of the graph; its shape starts with the text "N" (the batch), the rest are sizes."""

    shape: tuple[str | int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Values of the graph's input `calibration`, float32 [len(values)], and what they mean."""

    values: tuple[float, ...]
    names: tuple[str, ...]
    meaning: str
    quantiles: dict[str, Any] = field(default_factory=dict)
    input: str = "calibration"

    def __post_init__(self) -> None:
        _check_one_of(self.input, "calibration.input", ("calibration",))
        _check(1 <= len(self.values) <= 64, "calibration.values", self.values, "1 to 64 numbers")
        for index, value in enumerate(self.values):
            _check(_is_number(value), f"calibration.values[{index}]", value, "a finite float32 number")
        _check(
            len(self.names) == len(self.values), "calibration.names", self.names, "one name per value"
        )
        for index, name in enumerate(self.names):
            _check_text(name, f"calibration.names[{index}]")
        _check_text(self.meaning, "calibration.meaning")
        _check_dict(self.quantiles, "calibration.quantiles")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A frame is anomalous when `score >= value`.

    Attributes:
        value: Finite, on the scale of the score.
        basis: How the value was found, in words.
        target_false_reject_rate: Share of good parts that may be rejected, 0..1; None when the value has
            no such target.
        upper_bound: Upper confidence bound of the false-reject rate at this value, 0..1.
        confidence: Confidence of that bound, 0..1.
        good_images: Number of good images behind the bound.
    """

    value: float
    basis: str
    target_false_reject_rate: float | None = None
    upper_bound: float | None = None
    confidence: float | None = None
    good_images: int | None = None

    def __post_init__(self) -> None:
        _check(_is_number(self.value), "threshold.value", self.value, "a finite float32 number")
        _check_text(self.basis, "threshold.basis")
        for name in ("target_false_reject_rate", "upper_bound", "confidence"):
            rate = getattr(self, name)
            _check(
                rate is None or (_is_number(rate) and 0 <= rate <= 1),
                f"threshold.{name}",
                rate,
                "0..1 or null",
            )
        count = self.good_images
        _check(
            count is None or (_is_int(count) and count >= 0),
            "threshold.good_images",
            count,
            "a count or null",
        )


@dataclass(frozen=True, kw_only=True)
class Member:
    """Checksum (64 lower-case hexadecimal digits) and size of a member of the bundle."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        digest = self.sha256
        good = (
            isinstance(digest, str) and len(digest) == 64 and not set(digest) - set("0123456789abcdef")
        )
        _check(good, "members.*.sha256", digest, "64 lower-case hexadecimal digits")
        _check(_is_int(self.bytes) and self.bytes >= 0, "members.*.bytes", self.bytes, "a size in bytes")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a device must know about the graph. `parity`, `model`, `provenance` are free objects.

    `write_bundle` fills `members`; leave it empty when you build one.
    """

    method: str
    name: str
    precision: str
    input: InputSpec
    outputs: dict[str, OutputSpec]
    calibration: Calibration
    threshold: Threshold
    parity: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    format: tuple[int, int] = FORMAT

    def __post_init__(self) -> None:
        _check_text(self.method, "method")
        _check_text(self.name, "name")
        _check_one_of(self.precision, "precision", PRECISIONS)
        _check(
            set(self.outputs) == {"score", "anomaly_map"},
            "outputs",
            sorted(self.outputs),
            "score and anomaly_map",
        )
        for name, output in self.outputs.items():
            _check_one_of(output.dtype, f"outputs.{name}.dtype", ("float32",))
        score, anomaly_map = self.outputs["score"].shape, self.outputs["anomaly_map"].shape
        _check(score == ("N",), "outputs.score.shape", score, '["N"]')
        good = len(anomaly_map) == 3 and anomaly_map[0] == "N"
        _check(good, "outputs.anomaly_map.shape", anomaly_map, '["N", height, width]')
        for side in anomaly_map[1:]:
            _check_side(side, "outputs.anomaly_map.shape")
        for free in ("parity", "model", "provenance"):
            _check_dict(getattr(self, free), free)

    @property
    def map_shape(self) -> tuple[int, int]:
        """Height and width of the anomaly map in pixels."""
        _, height, width = self.outputs["anomaly_map"].shape
        return int(height), int(width)

    @classmethod
    def from_json(cls, text: bytes | str) -> Manifest:
        """Reads the JSON text; raises BundleError that names the field."""
        return cls.from_dict(parse_json(text))

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Builds a manifest from a parsed JSON object; raises BundleError that names the field."""
        _check_dict(data, "(top level)")
        version = _version(data)
        lenient = version[1] > FORMAT[1]

        def build(kind: type, value: Any, where: str) -> Any:
            return kind(**_fields(kind, value, where, lenient=lenient))

        values = _fields(cls, data, "", lenient=lenient)
        for name in ("outputs", "members"):
            _check_dict(values[name], name)
        outputs = {key: _output(item, key, lenient=lenient) for key, item in values["outputs"].items()}
        members = {key: build(Member, item, f"members.{key}") for key, item in values["members"].items()}
        calibration = _fields(Calibration, values["calibration"], "calibration", lenient=lenient)
        for name in ("values", "names"):
            calibration[name] = _tuple(calibration[name], f"calibration.{name}")
        values |= {
            "format": version,
            "input": build(InputSpec, values["input"], "input"),
            "outputs": outputs,
            "calibration": Calibration(**calibration),
            "threshold": build(Threshold, values["threshold"], "threshold"),
            "members": members,
        }
        return cls(**values)

    def to_json(self) -> str:
        """Returns the JSON text; the same content always gives the same text."""
        return dump_json(dataclasses.asdict(self))


def parse_json(text: bytes | str) -> Any:
    """Parses strict JSON: UTF-8, no repeated key, no NaN or infinity, no number beyond float64."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise BundleError(f"manifest: the key {repeated!r} occurs twice in one object")
        return parsed

    def no_constant(name: str) -> Any:
        raise BundleError(f"manifest: holds {name}, which is not JSON; every number must be finite")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise BundleError(f"manifest: the number {digits[:40]} is too large")
        return number

    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(
            decoded, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite
        )
    except BundleError:
        raise
    except (
        ValueError,
        RecursionError,
    ) as error:  # JSONDecodeError, UnicodeDecodeError, absurdly long integers
        raise BundleError(f"manifest: not valid JSON ({error})") from None


def dump_json(data: Mapping[str, Any]) -> str:
    """Writes strict JSON with sorted keys; raises BundleError for values that JSON does not have."""
    try:
        return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"manifest: cannot be written as JSON ({error}); use finite plain Python numbers, text, "
            "lists and dicts"
        ) from None


def _version(data: Mapping[str, Any]) -> tuple[int, int]:
    """Checked before everything else: another major version may have other fields."""
    _check("format" in data, "format", "nothing", f"[{FORMAT[0]}, {FORMAT[1]}]")
    version = data["format"]
    good = (
        isinstance(version, (list, tuple))
        and len(version) == 2
        and all(_is_int(n) and n >= 0 for n in version)
    )
    _check(good, "format", version, "two integers, [major, minor]")
    if version[0] != FORMAT[0]:
        raise BundleError(
            f"manifest field format: the bundle has format {version[0]}.{version[1]}, this edgead reads "
            f"{FORMAT[0]}.x: "
            + ("upgrade edgead" if version[0] > FORMAT[0] else "export the bundle again")
        )
    return version[0], version[1]


def _fields(kind: type, value: Any, where: str, *, lenient: bool) -> dict[str, Any]:
    """Returns a copy of `value` with exactly the fields of `kind`; a newer minor may have more."""
    _check_dict(value, where or "(top level)")
    known = {item.name for item in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for missing in sorted(known - set(value)):
        raise BundleError(f"manifest field {prefix}{missing}: is missing; export the bundle again")
    for unknown in sorted(set(value) - known):
        if not lenient:
            raise BundleError(
                f"manifest field {prefix}{unknown[:60]}: is unknown; known are "
                f"{', '.join(sorted(known))}"
            )
    return {key: item for key, item in value.items() if key in known}


def _tuple(value: Any, where: str) -> tuple[Any, ...]:
    _check(isinstance(value, (list, tuple)), where, value, "a list")
    return tuple(value)


def _output(value: Any, name: str, *, lenient: bool) -> OutputSpec:
    values = _fields(OutputSpec, value, f"outputs.{name}", lenient=lenient)
    return OutputSpec(shape=_tuple(values["shape"], f"outputs.{name}.shape"), dtype=values["dtype"])
