from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgead.errors import LineError
from edgead.line import journal as module
from edgead.line.journal import Journal
from edgead.line.verdicts import Record, Verdict
from tests.line.conftest import wait_for


def record(part_id: int, verdict: Verdict = Verdict.OK) -> Record:
    return Record(
        part_id=part_id,
        camera="top",
        verdict=verdict,
        reject=verdict is not Verdict.OK,
        reason="said",
        source="a.png",
        trigger_ns=1_700_000_000_123_456_789,
        total_ms=1.5,
    )


def reopened(folder: Path) -> module.Past:
    journal = Journal(folder)
    journal.close()
    return journal.past


def test_open_parts_and_the_counter_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "folder")
    assert [journal.trigger("top", 1000 + n, tag=n) for n in range(3)] == [1, 2, 3]
    journal.verdict(record(2, Verdict.NG))
    journal.late(record(2, Verdict.LATE))
    journal.close()
    past = reopened(tmp_path / "new" / "folder")
    assert past.next_part_id == 4
    assert [(t.part_id, t.camera, t.trigger_ns, t.tag) for t in past.open_triggers] == [
        (1, "top", 1000, 0),
        (3, "top", 1002, 2),
    ]
    assert past.records == [record(2, Verdict.NG)]


def test_open_parts_stay_open_over_any_number_of_restarts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.trigger("top", 7, None)
    journal.close()
    for _ in range(5):
        past = reopened(tmp_path)
        assert [t.part_id for t in past.open_triggers] == [1] and past.next_part_id == 2


def test_segments_take_over_what_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_PARTS", 10)
    journal = Journal(tmp_path)
    stays = journal.trigger("side", 5, None)
    for _ in range(55):
        journal.verdict(record(journal.trigger("top", 6, None)))
    journal.close()
    assert len(list(tmp_path.glob("journal-*.log"))) == 2  # of 10 records and of 5
    past = reopened(tmp_path)
    assert [t.part_id for t in past.open_triggers] == [stays]
    assert past.next_part_id == 57
    assert [r.part_id for r in past.records] == list(range(42, 57))


def test_many_restarts_do_not_push_records_out(tmp_path: Path) -> None:
    for _ in range(10):
        journal = Journal(tmp_path)
        journal.verdict(record(journal.trigger("top", 6, None)))
        journal.close()
    assert [r.part_id for r in reopened(tmp_path).records] == list(range(1, 11))


def test_starts_without_a_part_leave_no_files(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    opened = journal.trigger("top", 5, None)
    journal.verdict(record(journal.trigger("top", 6, None)))
    journal.close()
    for _ in range(5):
        reopened(tmp_path)
    assert len(list(tmp_path.glob("journal-*.log"))) == 2
    past = reopened(tmp_path)
    assert [t.part_id for t in past.open_triggers] == [opened] and past.next_part_id == 3


def test_what_sinks_lack_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over starts in which nobody says yet what they lack."""
    monkeypatch.setattr(module, "SEGMENT_PARTS", 10)
    journal = Journal(tmp_path, sync="never")
    journal.lacking = lambda: 35
    for _ in range(100):
        journal.verdict(record(journal.trigger("top", 6, None)))
    journal.close()
    for _ in range(3):
        known = [r.part_id for r in reopened(tmp_path).records]
        assert known == list(range(known[0], 101)) and 45 <= len(known) <= 65
    journal = Journal(tmp_path, sync="never")
    journal.lacking = lambda: 0
    journal.close()
    assert len(reopened(tmp_path).records) <= 20


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(0, 2000))
@example(cut=391)  # the first verdict but for its end of line
def test_a_file_cut_anywhere_is_read_up_to_there(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What a power cut leaves: no verdict is made up, and no part id is given twice."""
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder)
    for _ in range(4):
        journal.verdict(record(journal.trigger("top", 9, None)))
    journal.close()
    path = folder / "journal-00000001.log"
    content = path.read_bytes()
    path.write_bytes(content[: min(cut, len(content))])
    past = reopened(folder)
    whole = [json.loads(line) for line in content[:cut].split(b"\n")[:-1]]
    triggers = [line["part_id"] for line in whole if "part_id" in line and "verdict" not in line]
    verdicts = [line["part_id"] for line in whole if "verdict" in line]
    kept = [r.part_id for r in past.records]
    assert kept[: len(verdicts)] == verdicts
    assert len(kept) - len(verdicts) in (0, 1)  # the last may be whole but for its end of line
    assert past.next_part_id > max(triggers, default=0)


@pytest.mark.parametrize("end", ["killed", "power cut", "full disk"])
def test_no_part_id_is_given_twice_where_the_journal_may_lack_some(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands in for a full disk, another boot id for a power cut."""
    program = (
        "import os, resource, signal, sys\n"
        "from pathlib import Path\n"
        "from edgead.line.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.trigger('top', 1, None)\n"
        "if sys.argv[2] == 'full disk':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "journal.trigger('top', 2, None)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), end], cwd=Path(__file__).parents[2])
    if end == "power cut":
        monkeypatch.setattr(module, "BOOT_ID", tmp_path / "boot")
        (tmp_path / "boot").write_text("fa4e")
    journal = Journal(tmp_path)
    next_id = {"killed": 3, "power cut": 3 + module.JUMP, "full disk": 2 + module.JUMP}[end]
    assert journal.trigger("top", 3, None) == next_id
    journal.close()
    monkeypatch.setattr(module, "BOOT_ID", tmp_path / "another")  # it was closed: nothing can be missing
    assert Journal(tmp_path).trigger("top", 4, None) == next_id + 1


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(LineError, match="another process runs this line"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LineError, match="name a folder that can be written"):
        Journal(tmp_path / "file" / "below")


def test_damaged_lines_are_skipped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [b'{"next": 1}', b"\x00\xff", b"[1]", b'{"verdict": "OK", "part_id": 3}']
    (tmp_path / "journal-00000001.log").write_bytes(b"\n".join(lines) + b"\n")
    assert reopened(tmp_path).records == []
    assert [r.message.split(":")[1] for r in caplog.records] == ["2", "3", "4"]


def test_a_full_disk_loses_nothing_once_it_has_room_again(tmp_path: Path) -> None:
    """The limit on the size of files stands in for a disk; the write fails in the midst of a line."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(tmp_path, sync="never")
    size = (tmp_path / "journal-00000001.log").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700, limits[1]))
        for _ in range(10):
            journal.verdict(record(journal.trigger("top", 9, None)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert journal.failures > 0
    journal.verdict(record(journal.trigger("top", 9, None)))
    journal.close()
    past = reopened(tmp_path)
    assert [r.part_id for r in past.records] == list(range(1, 12))


def test_a_moment_without_a_file_descriptor_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEGMENT_PARTS", 5)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    journal = Journal(tmp_path, sync="second")
    held = [os.open("/dev/null", os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 20, limits[1]))
        with pytest.raises(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        wait_for(lambda: journal.failures > 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in held:
            os.close(file)
    for _ in range(50):
        journal.verdict(record(journal.trigger("top", 9, None)))
    wait_for(lambda: len(list(tmp_path.glob("journal-*.log"))) == 2)
    journal.close()


def test_each_outage_of_the_disk_is_logged_and_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal, parts, is_full = Journal(tmp_path, sync="never"), 0, False
    write = os.write

    def full_write(file: int, data: bytes) -> int:
        if is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(module.os, "write", full_write)
    for count in (10, 3000):
        for number in range(count + 1):
            is_full = number < count
            journal.verdict(record(journal.trigger("top", 6, None)))
        parts += count + 1
    journal.close()
    assert [r.part_id for r in reopened(tmp_path).records] == list(range(1, parts + 1))
    said = [r.message.rpartition(": ")[2] for r in caplog.records]
    assert said == ["it is kept in memory", "the disk takes it again"] * 2


def test_what_was_said_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    """Each part id that the process printed after its verdict was noted is in the journal."""
    program = (
        "import sys; from pathlib import Path; from tests.line.test_journal import *\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "while True:\n"
        "    part = journal.trigger('top', 9, None)\n"
        "    journal.verdict(record(part))\n"
        "    os.write(1, f'{part}\\n'.encode())\n"
    )
    last = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        printed = [int(line) for line in process.stdout.read().split(b"\n")[:-1]]
        process.wait()
        past = reopened(tmp_path)
        known = [r.part_id for r in past.records]
        assert len(known) == len(set(known))
        assert set(printed) <= set(known) and min(printed, default=last + 1) > last
        last = past.next_part_id - 1
