"""Writes the reference of the recipe file from the dataclasses that read it.

python -m tests.line.reference    # brings docs/line.md up to date
"""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

from edgead.line.faults import Fault
from edgead.line.recipe import CameraConfig, Inspection, Settings
from edgead.line.sinks import SINKS, sink_module
from edgead.line.sources import SOURCES, source_module

PAGE = Path(__file__).parents[2] / "docs" / "line.md"
BEGIN, END = "<!-- reference: begin -->", "<!-- reference: end -->"
NOT_KEYS = ("recipes", "kind", "source")


def described(kind: type) -> dict[str, str]:
    """Text of each field, from the sections Attributes of the docstrings of a class and its bases."""
    found = described(kind.__base__) if kind.__base__ not in (None, object) else {}
    doc = re.sub(r"\n {4}", "\n", kind.__doc__ or "")
    _, _, attributes = doc.partition("Attributes:\n")
    attributes = attributes.split("\n\n")[0]
    entries = re.split(r"\n {4}(?=[\w, ]+:)", "\n" + attributes.rstrip())
    for entry in entries[1:]:
        names, _, text = entry.partition(":")
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def rows(kind: type) -> list[str]:
    """A table of the keys of one TOML table."""
    texts, hints = described(kind), typing.get_type_hints(kind)
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(kind):
        if kind is CameraConfig and field.name in NOT_KEYS:
            continue
        mention = (text for text in texts.values() if f"`{field.name}`" in text)
        text = texts.get(field.name) or next(mention, "")
        assert text, f"{kind.__module__}.{kind.__name__}: {field.name} has no description"
        lines.append(
            f"| `{field.name}` | {default(field, hints[field.name])} | {text.replace('|', '/')} |"
        )
    return lines


def default(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.default is dataclasses.MISSING:
        return "needed"
    if field.default is None:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`".replace("'", '"')


def reference() -> str:
    """The section of docs/line.md."""
    parts = ["### [line]", "", *rows(Settings), "", "### [[camera]]", "", *rows(CameraConfig)]
    parts += ["| `source` | needed | Where its images come from: one of the tables below. |", ""]
    parts += ["### [[camera.recipe]]", "", *rows(Inspection), ""]
    for title, kinds, module_of in (
        ("source", SOURCES, source_module),
        ("[[sink]]", SINKS, sink_module),
    ):
        for kind in kinds:
            home = module_of(kind)
            config = home.Config
            summary = (config.__doc__ or "").split("\n\n")[0].replace("\n    ", " ")
            parts += [f'### {title} of kind = "{kind}"', "", summary, "", *rows(config), ""]
            if kind in ("modbus", "opcua"):  # their registers and nodes
                parts += [(home.__doc__ or "").partition("\n\n")[2].strip(), ""]
    parts += ["### [[fault]] of a file of faults", "", *rows(Fault), ""]
    return "\n".join(parts)


def page_with(text: str, page: str) -> str:
    """The page with this reference in it."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with(reference(), PAGE.read_text()))
