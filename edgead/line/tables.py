"""From the tables of a TOML file to dataclasses, with the line number in every complaint."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgead.errors import LineError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

T = TypeVar("T")
Key = tuple["str | int", ...]

_HEADER = re.compile(r"^\s*(\[\[?)\s*([\w.\- \"']+?)\s*\]\]?\s*(#.*)?$")
_ENTRY = re.compile(r"^\s*([\w\-]+|\"[^\"]+\")\s*(\.[\w\-.]+)?\s*=")


class Tables:
    """A TOML file, read, that knows the line of each key.

    Attributes:
        data: What it says.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            LineError: It cannot be read, or is no TOML.
        """
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise LineError(f"{path}: {reason}") from error
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise LineError(f"{path}: no valid TOML: {error}") from error
        self._lines = _lines(text)

    def line(self, key: Key) -> int:
        """Number of the line of a key, or of the table that it is in."""
        while key and key not in self._lines:
            key = key[:-1]
        return self._lines.get(key, 1)

    def error(self, key: Key, what: str) -> LineError:
        """The exception to raise about a key."""
        return LineError(f"{self.path}:{self.line(key)}: {what}")

    def build(self, kind: type[T], table: Any, key: Key, /, **given: Any) -> T:
        """Makes a dataclass of a table; `given` are fields that do not come from it.

        Raises:
            LineError: A key is unknown or missing, has the wrong type, or the dataclass refuses it.
        """
        name = _name(key)
        if not isinstance(table, Mapping):
            raise self.error(key, f"{name} is {table!r:.60}, expected a table of keys")
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in given}  # type: ignore[arg-type]
        for unknown in table.keys() - fields.keys():
            close = difflib.get_close_matches(unknown, fields, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(fields)}"
            raise self.error((*key, unknown), f"{name} has no key {unknown!r}: {hint}")
        values = dict(given)
        for field in fields.values():
            if field.name in table:
                values[field.name] = self._convert(
                    table[field.name], hints[field.name], (*key, field.name)
                )
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise self.error(key, f"{name} lacks the key {field.name!r}")
        try:
            return kind(**values)
        except LineError as error:
            said = [word for word in re.findall(r"\w+", str(error)) if word in fields and word in table]
            raise self.error((*key, *said[:1]), f"{name}: {error}") from error

    def _convert(self, value: Any, hint: Any, key: Key) -> Any:
        """A value as its annotation says."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            (hint,) = (argument for argument in arguments if argument is not type(None))
            return self._convert(value, hint, key)
        if origin is typing.Literal:
            if value in arguments:
                return value
            raise self.error(key, f"{_name(key)} is {value!r:.60}, expected {_choice(arguments)}")
        if origin is tuple:
            if not isinstance(value, list):
                raise self.error(key, f"{_name(key)} is {value!r:.60}, expected a list")
            kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
            if len(kinds) != len(value):
                raise self.error(key, f"{_name(key)} has {len(value)} values, expected {len(kinds)}")
            return tuple(self._convert(item, kind, key) for item, kind in zip(value, kinds, strict=True))
        if hint is Path and isinstance(value, str) and value:
            return self.path.parent.absolute() / Path(value).expanduser()
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if hint is float and is_number and abs(value) <= sys.float_info.max:  # not inf, not nan
            return float(value)
        if hint is int and is_number and isinstance(value, int):
            return value
        if hint in (str, bool) and isinstance(value, hint):
            return value
        words = {
            float: "a finite number" if is_number else "a number",
            int: "an integer",
            str: "text",
            bool: "true or false",
            Path: "a path",
        }
        raise self.error(key, f"{_name(key)} is {value!r:.60}, expected {words[hint]}")


def _choice(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)


def _name(key: Key) -> str:
    """How people say it: camera 2 source.device."""
    text = ""
    for part in key:
        text += f" {part + 1}" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text.replace(" .", " ") or "the file"


def _lines(text: str) -> dict[Key, int]:
    """Line of each table and key. Keys inside of inline tables have the line of their table."""
    lines: dict[Key, int] = {(): 1}
    counts: dict[Key, int] = {}
    table: Key = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = ()
            names = [part.strip(" \"'") for part in header[2].split(".")]
            for depth, name in enumerate(names):
                table = (*table, name)
                if header[1] == "[[" and depth == len(names) - 1:
                    counts[table] = counts.get(table, -1) + 1
                    lines.setdefault(table, number)
                if table in counts:
                    table = (*table, counts[table])
            lines[table] = number
        elif entry := _ENTRY.match(line):
            lines.setdefault((*table, entry[1].strip('"')), number)
    return lines
