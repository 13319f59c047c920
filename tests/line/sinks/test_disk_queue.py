"""The queue on the disk."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.errors import LineError
from edgead.line.sinks import disk_queue
from edgead.line.sinks.disk_queue import DiskQueue
from edgead.line.verdicts import Record, Verdict

Make = Callable[..., Record]


def waiting(queue: DiskQueue, count: int = 1000) -> list[int]:
    return [json.loads(payload)["part_id"] for _, _, _, payload in queue.next(count, set())]


def test_records_leave_in_their_order_and_are_remembered(tmp_path: Path, make_record: Make) -> None:
    queue = DiskQueue(tmp_path / "new" / "queue", 10)
    for part_id in (5, 3, 4, 3):
        queue.add(make_record(part_id), is_late=False)
    queue.add(make_record(3, camera="side", score=0.9), is_late=True)
    rows = queue.next(3, set())
    assert [camera for _, camera, _, _ in rows] == ["top"] * 3 and queue.count == 4
    seqs = [seq for seq, _, _, _ in rows]
    late = queue.next(3, set(seqs))
    assert [(camera, is_late) for _, camera, is_late, _ in late] == [("side", True)]
    assert json.loads(late[0][3])["late"] is True
    queue.remove(seqs[0])
    assert waiting(queue) == [3, 4, 3] and queue.knows(5) and not queue.knows(6)
    queue.add(make_record(5), is_late=False)
    assert queue.count == 3, "it was there before"
    queue.sync()
    queue.close()
    queue.close()
    again = DiskQueue(tmp_path / "new" / "queue", 10)
    assert waiting(again) == [3, 4, 3] and again.count == 3 and again.knows(5)
    again.close()


def test_too_many_lose_the_oldest_that_is_not_under_way(
    tmp_path: Path, make_record: Make, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "queue"
    queue = DiskQueue(path, 3)
    queue.add(make_record(0), is_late=False)
    (first,) = queue.next(1, set())
    for part_id in range(1, 8):
        queue.add(make_record(part_id), is_late=False)
    assert waiting(queue) == [0, 6, 7] and (queue.count, queue.dropped) == (3, 5)
    assert caplog.text.count("3 records wait") == 1 and queue.knows(4)
    queue.remove(first[0])
    queue.close()
    queue = DiskQueue(path, 1)  # a smaller limit than before
    queue.add(make_record(8), is_late=False)
    assert waiting(queue) == [8] and queue.count == 1
    queue.close()


def test_what_left_long_ago_is_forgotten(
    tmp_path: Path, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_queue, "REMEMBERED_PARTS", 5)
    queue = DiskQueue(tmp_path / "queue", 100)
    for part_id in range(20):
        queue.add(make_record(part_id), is_late=False)
    for seq, *_ in queue.next(18, set())[1:]:
        queue.remove(seq)
    queue.sync()
    known = [part_id for part_id in range(21) if queue.knows(part_id)]
    assert known == [0, 15, 16, 17, 18, 19], "the first still waits"
    queue.close()


def test_a_part_id_that_is_given_again_is_another_part(tmp_path: Path, make_record: Make) -> None:
    """As after the journal was deleted."""
    queue = DiskQueue(tmp_path / "queue", 10)
    for part_id in (1, 2):
        queue.add(make_record(part_id), is_late=False)
    queue.remove(queue.next(1, set())[0][0])
    for part_id in (1, 2, 2):
        queue.add(make_record(part_id, verdict=Verdict.NG, trigger_ns=5), is_late=False)
    rows = [json.loads(payload) for _, _, _, payload in queue.next(10, set())]
    assert [(row["part_id"], row["verdict"]) for row in rows] == [(2, "OK"), (1, "NG"), (2, "NG")]
    assert queue.count == 3
    queue.close()


def test_the_queue_of_an_earlier_version_is_taken_on(tmp_path: Path, make_record: Make) -> None:
    path = tmp_path / "queue"
    with sqlite3.connect(path) as database:
        database.executescript(
            "CREATE TABLE records (seq INTEGER PRIMARY KEY AUTOINCREMENT, part_id INTEGER NOT NULL,"
            " late INTEGER NOT NULL, camera TEXT NOT NULL, payload BLOB, UNIQUE (part_id, late));"
            """INSERT INTO records VALUES (7, 1, 0, 'top', '{"part_id": 1}');"""
        )
    database.close()
    for _ in range(2):
        queue = DiskQueue(path, 10)
        for part_id in (1, 2):
            queue.add(make_record(part_id), is_late=False)
        assert waiting(queue) == [1, 2] and queue.count == 2
        queue.close()


def test_only_one_has_the_queue(tmp_path: Path) -> None:
    queue = DiskQueue(tmp_path / "queue", 3)
    with pytest.raises(LineError, match="another process has it"):
        DiskQueue(tmp_path / "queue", 3)
    queue.close()
    with pytest.raises(LineError, match="queue_file"):
        DiskQueue(tmp_path / "queue" / "below", 3)


@pytest.mark.parametrize("content", [b"no data base, but more than a page of it " * 200, None])
def test_a_damaged_queue_is_moved_aside(
    tmp_path: Path, make_record: Make, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "queue"
    if content is None:  # a data base with a page of noise
        queue = DiskQueue(path, 1000)
        for part_id in range(200):
            queue.add(make_record(part_id), is_late=False)
        queue.close()
        content = path.read_bytes()
        content = content[:100] + b"\x5a" * 8000 + content[8100:]
    path.write_bytes(content)
    queue = DiskQueue(path, 3)
    queue.add(make_record(1), is_late=False)
    assert waiting(queue) == [1] and "is damaged" in caplog.text
    queue.close()
    (aside,) = tmp_path.glob("queue.damaged-*")
    assert aside.read_bytes() == content


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk."""
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from edgead.errors import LineError
        from edgead.line.sinks.disk_queue import DiskQueue
        from edgead.line.verdicts import Record, Verdict

        def record(part_id):
            return Record(part_id, "top", Verdict.OK, False, "r" * 1000, "s", 1, 1.0)

        queue = DiskQueue(Path(sys.argv[1]), 1000)
        free = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, free))
        for part_id in range(1000):
            try:
                queue.add(record(part_id), is_late=False)
            except LineError:
                break
        assert queue.count == part_id, queue.count
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))
        queue.add(record(part_id), is_late=False)
        assert queue.count == part_id + 1 == len(queue.next(1000, set()))
        print(part_id)
    """)
    answer = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "queue"], capture_output=True, text=True, timeout=20
    )
    assert answer.returncode == 0, answer.stderr
    assert 0 < int(answer.stdout) < 999


def test_a_killed_process_leaves_all_that_it_stored(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import itertools, sys
        from pathlib import Path
        from edgead.line.sinks.disk_queue import DiskQueue
        from edgead.line.verdicts import Record, Verdict

        queue = DiskQueue(Path(sys.argv[1]), 100_000)
        for part_id in itertools.count():
            queue.add(Record(part_id, "top", Verdict.OK, False, "r", "s", 1, 1.0), is_late=False)
            print(part_id, flush=True)
    """)
    path = tmp_path / "queue"
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(300):
        said = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    queue = DiskQueue(path, 100_000)
    found = waiting(queue, 100_000)
    assert found == list(range(len(found))) and len(found) > said
    queue.close()


@settings(deadline=None, max_examples=30)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 12)), st.tuples(st.just("send"), st.integers(0, 3))
        ),
        max_size=50,
    ),
    limit=st.integers(1, 5),
)
def test_each_record_leaves_once_in_order_or_is_counted(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], limit: int
) -> None:
    queue = DiskQueue(tmp_path_factory.mktemp("queue") / "queue", limit)
    added: list[int] = []
    sent: list[int] = []
    for what, number in [*steps, ("send", 100)]:
        if what == "add":
            record = Record(number, "top", Verdict.OK, False, "", "", 0, 0.0)
            queue.add(record, is_late=False)
            added += [] if number in added else [number]
        else:
            for seq, _, _, payload in queue.next(number, set()):
                sent.append(json.loads(payload)["part_id"])
                queue.remove(seq)
        assert queue.count <= limit
    assert len(sent) + queue.dropped == len(added) and queue.count == 0
    assert sent == [part_id for part_id in added if part_id in sent]
    queue.close()
