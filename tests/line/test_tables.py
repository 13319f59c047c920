from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from edgead.errors import LineError
from edgead.line.tables import Tables


@dataclass(frozen=True, kw_only=True)
class Lamp:
    color: Literal["red", "blue"]
    watts: float = 5.0
    count: int | None = None
    is_on: bool = True
    spot_px: tuple[int, int] = (0, 0)
    names: tuple[str, ...] = ()
    file: Path | None = None

    def __post_init__(self) -> None:
        if self.watts < 0:
            raise LineError(f"watts is {self.watts:g}, expected 0 or more")


def lamp(folder: Path, text: str) -> Lamp:
    path = folder / "box.toml"
    path.write_text(text)
    tables = Tables(path)
    return tables.build(Lamp, tables.data["lamp"], ("lamp",))


def test_values_take_the_types_of_the_fields(tmp_path: Path) -> None:
    text = '[lamp]\ncolor="red"\nwatts=4\ncount=2\nis_on=false\nspot_px=[1,2]\nnames=["a"]\nfile="x/y"'
    assert lamp(tmp_path, text) == Lamp(
        color="red",
        watts=4.0,
        count=2,
        is_on=False,
        spot_px=(1, 2),
        names=("a",),
        file=tmp_path / "x" / "y",
    )
    assert lamp(tmp_path, '[lamp]\ncolor="blue"') == Lamp(color="blue")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\n[lamp]\n", 2, "lamp lacks the key 'color'"),
        ("[lamp]\ncolor='red'\n\nwats=3", 4, "lamp has no key 'wats': did you mean 'watts'?"),
        ("[lamp]\ncolor='red'\nzz=3", 3, "lamp has no key 'zz': known are color, watts"),
        ("[lamp]\ncolor='pink'", 2, "lamp.color is 'pink', expected 'red' or 'blue'"),
        ("[lamp]\ncolor='red'\nwatts='3'", 3, "lamp.watts is '3', expected a number"),
        ("[lamp]\ncolor='red'\nwatts=inf", 3, "lamp.watts is inf, expected a finite number"),
        ("[lamp]\ncolor='red'\nwatts=nan", 3, "lamp.watts is nan, expected a finite number"),
        (f"[lamp]\ncolor='red'\nwatts={10**400}", 3, "lamp.watts is 1000"),
        ("[lamp]\ncolor='red'\nwatts=true", 3, "lamp.watts is True, expected a number"),
        ("[lamp]\ncolor='red'\ncount=1.5", 3, "lamp.count is 1.5, expected an integer"),
        ("[lamp]\ncolor='red'\nis_on=1", 3, "lamp.is_on is 1, expected true or false"),
        ("[lamp]\ncolor='red'\nspot_px=[1]", 3, "lamp.spot_px has 1 values, expected 2"),
        ("[lamp]\ncolor='red'\nspot_px=3", 3, "lamp.spot_px is 3, expected a list"),
        ("[lamp]\ncolor='red'\nfile=''", 3, "lamp.file is '', expected a path"),
        ("[lamp]\ncolor='red'\nwatts=-1", 3, "lamp: watts is -1, expected 0 or more"),
        ("lamp = 3", 1, "lamp is 3, expected a table of keys"),
        ("lamp = {color='red', wats=3}", 1, "lamp has no key 'wats'"),
    ],
)
def test_complaints_name_the_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(LineError) as error:
        lamp(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'box.toml'}:{line}: {words}")


def test_lines_of_tables_in_lists(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        "[[a]]\nk = 1\n[[a.b]]\nk = 1\n[[a.b]]\n# k = 3\nk = 1\n\n[[a]]\nk.x = 2\n[[a.b]]\n'k' = 1\n"
    )
    tables = Tables(path)
    assert [tables.line(key) for key in [("a", 0, "k"), ("a", 0, "b", 1, "k"), ("a", 1, "k")]] == [
        2,
        7,
        10,
    ]
    assert tables.line(("a", 1, "b", 0)) == 11
    assert tables.line(("a", 1, "b", 0, "missing", "deeper")) == 11


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = 1\n[lamp\n", "no valid TOML: .*line 2"),
        (b"\xff\xfe", "not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LineError, match=words):
        Tables(path)
