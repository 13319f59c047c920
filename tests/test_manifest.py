"""The manifest: a table of texts that must be refused, and the round trip."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from edgead import BundleError
from edgead.manifest import FLOAT32_MAX, Manifest, Threshold


def setting(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Sets one field; "a.b" is field b of a."""

    def edit(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            data = data[parent]
        data[last] = value

    return edit


def without(path: str) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            data = data[parent]
        del data[last]

    return edit


def text(old: str, new: str) -> Callable[[dict[str, Any]], bytes]:
    """Replaces a piece of the JSON text."""
    return lambda data: json.dumps(data).replace(old, new, 1).encode()


ROWS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("empty", lambda _: b"", "not valid JSON"),
    ("not JSON", lambda _: b"{'a': 1}", "not valid JSON"),
    ("not UTF-8", lambda _: b'{"a": "\xff"}', "not valid JSON"),
    ("two values", lambda _: b"{} {}", "not valid JSON"),
    ("deep nesting", lambda _: b"[" * 200_000, "not valid JSON"),
    ("endless integer", lambda _: b'{"format": ' + b"9" * 100_000 + b"}", "not valid JSON"),
    ("a list", lambda _: b"[]", "expected an object"),
    ("repeated key", text('"method":', '"method": "x", "method":'), "the key 'method' occurs twice"),
    ("NaN", text('"value": 0.4', '"value": NaN'), "holds NaN"),
    ("Infinity", text('"value": 0.4', '"value": -Infinity'), "holds -Infinity"),
    ("overflow", text('"value": 0.4', '"value": 1e999'), "1e999 is too large"),
    ("overflow of float32", setting("threshold.value", 1e39), "threshold.value: got 1e+39"),
    ("no format", without("format"), "field format: got 'nothing'"),
    ("newer major", setting("format", [2, 0]), "format 2.0, this edgead reads 1.x: upgrade edgead"),
    ("older major", setting("format", [0, 9]), "export the bundle again"),
    ("format as text", setting("format", "1.0"), "two integers"),
    ("format of booleans", setting("format", [True, False]), "two integers"),
    ("unknown field", setting("thresold", 1), "field thresold: is unknown"),
    ("unknown inner field", setting("input.mean", 1), "field input.mean: is unknown"),
    ("missing field", without("calibration"), "field calibration: is missing"),
    ("missing inner field", without("input.resize"), "field input.resize: is missing"),
    ("name empty", setting("name", ""), "field name"),
    ("name with a line break", setting("name", "a\nb"), "field name"),
    ("name with half a character", setting("name", "\ud800"), "field name"),
    ("name too long", setting("name", "x" * 3000), "field name"),
    ("method a number", setting("method", 1), "field method: got 1"),
    ("precision", setting("precision", "int8"), "got 'int8', expected 'fp32' or 'fp16'"),
    ("input a list", setting("input", []), "field input: got [], expected an object"),
    ("height zero", setting("input.height", 0), "input.height: got 0"),
    ("height a float", setting("input.height", 64.0), "input.height: got 64.0"),
    ("height true", setting("input.height", True), "input.height: got True"),
    ("height huge", setting("input.height", 10**9), "input.height"),
    ("layout", setting("input.layout", "NCHW"), "input.layout: got 'NCHW'"),
    ("color", setting("input.color", "bgr"), "input.color: got 'bgr'"),
    ("resize", setting("input.resize", "nearest"), "input.resize: got 'nearest'"),
    ("no score", without("outputs.score"), "field outputs"),
    ("third output", setting("outputs.third", {"dtype": "float32", "shape": ["N"]}), "field outputs"),
    ("output dtype", setting("outputs.score.dtype", "float16"), "outputs.score.dtype"),
    ("output shape", setting("outputs.score.shape", ["N", 1]), "outputs.score.shape"),
    ("map shape", setting("outputs.anomaly_map.shape", ["N", 64, "W"]), "outputs.anomaly_map.shape"),
    ("map without batch", setting("outputs.anomaly_map.shape", [64, 64]), "outputs.anomaly_map.shape"),
    ("shape a number", setting("outputs.score.shape", 3), "outputs.score.shape: got 3, expected a list"),
    ("calibration values", setting("calibration.values", []), "calibration.values"),
    ("calibration null", setting("calibration.values", [1, None, 0]), "calibration.values[1]: got None"),
    ("calibration names", setting("calibration.names", ["a"]), "one name per value"),
    ("quantiles", setting("calibration.quantiles", [1]), "calibration.quantiles"),
    ("threshold as text", setting("threshold.value", "0.5"), "threshold.value: got '0.5'"),
    ("threshold null", setting("threshold.value", None), "threshold.value: got None"),
    ("threshold true", setting("threshold.value", True), "threshold.value: got True"),
    ("rate above one", setting("threshold.upper_bound", 1.5), "threshold.upper_bound"),
    ("count negative", setting("threshold.good_images", -1), "threshold.good_images"),
    ("free part a list", setting("provenance", []), "field provenance"),
    ("members a list", setting("members", []), "field members"),
    (
        "member digest",
        setting("members", {"model.onnx": {"sha256": "A" * 64, "bytes": 1}}),
        "64 lower-case hexadecimal",
    ),
    (
        "member size",
        setting("members", {"model.onnx": {"sha256": "a" * 64, "bytes": -1}}),
        "a size in bytes",
    ),
]


@pytest.mark.parametrize(
    ("edit", "message"), [pytest.param(edit, text, id=name) for name, edit, text in ROWS]
)
def test_refused(edit: Callable[[dict[str, Any]], object], message: str, tiny: Any) -> None:
    data = json.loads(tiny.manifest.to_json())
    changed = edit(data)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(changed if isinstance(changed, bytes) else json.dumps(data))
    assert message in str(caught.value)


def test_the_unedited_manifest_is_accepted(tiny: Any) -> None:
    """Otherwise the rows above could be refused for a reason of their own."""
    assert Manifest.from_json(tiny.manifest.to_json()) == tiny.manifest
    assert tiny.manifest.map_shape == (64, 64)


def test_a_newer_minor_may_have_more_fields(tiny: Any) -> None:
    data = json.loads(tiny.manifest.to_json())
    data["format"], data["unheard_of"], data["input"]["mean"] = [1, 1], {}, 0.5
    assert Manifest.from_json(json.dumps(data)).format == (1, 1)
    data["format"] = [1, 0]
    with pytest.raises(BundleError, match="is unknown"):
        Manifest.from_json(json.dumps(data))


def test_building_is_as_strict_as_reading() -> None:
    assert Threshold(value=FLOAT32_MAX, basis="limit").value == FLOAT32_MAX
    for value in (float("nan"), float("inf"), 2 * FLOAT32_MAX):
        with pytest.raises(BundleError, match="threshold.value"):
            Threshold(value=value, basis="x")


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(BundleError) as caught:
        Threshold(value=0.5, basis="x" * 100_000)
    assert len(str(caught.value)) < 300
