from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edgead.errors import LineError
from edgead.line.mark import Mark
from tests.line.test_journal import record

LAST = [
    record(part_id) for part_id in (5, 4, 6, 8, 7)
]  # verdicts of several cameras overtake each other


def missed(path: Path) -> list[int]:
    mark = Mark(path)
    found = [one.part_id for one in mark.missed(LAST)]
    mark.close()
    mark.close()
    return found


def set_to(path: Path, part_id: int) -> None:
    mark = Mark(path)
    mark.set(part_id)
    mark.close()


def test_a_new_receiver_gets_nothing_of_before_but_all_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    assert missed(path) == []
    assert missed(path) == []
    path.unlink()
    mark = Mark(path)
    assert mark.missed([]) == []  # a new line
    mark.close()
    assert missed(path) == [5, 4, 6, 8, 7]  # none of which was taken


@pytest.mark.parametrize(
    ("part_id", "expected"),
    [
        (5, [4, 6, 8, 7]),
        (6, [8, 7]),
        (7, []),
        (2, [5, 4, 6, 8, 7]),  # longer ago than the journal goes back
        (99, []),  # a power cut took the end of the journal
    ],
)
def test_what_came_after_the_mark_is_missed(part_id: int, expected: list[int], tmp_path: Path) -> None:
    set_to(tmp_path / "mark", 10**15)
    set_to(tmp_path / "mark", part_id)
    assert missed(tmp_path / "mark") == expected


def test_a_full_disk_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mark = Mark(tmp_path / "mark")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        mark.set(6)
        mark.set(8)
    assert [r.message.rpartition(": ")[2] for r in caplog.records] == ["No space left on device"]
    mark.set(8)
    mark.close()
    assert missed(tmp_path / "mark") == [7]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LineError, match="cannot be written: No such file or directory"):
        Mark(tmp_path / "gone" / "mark")
