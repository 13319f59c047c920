"""JSON lines: whole lines whatever happens, and a memory of what was written."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.errors import LineError
from edgead.line.sinks import jsonl
from edgead.line.sinks.jsonl import Config, JsonLines, open_sink
from edgead.line.verdicts import Record, Verdict

Make = Callable[..., Record]


def opened(path: Path, **given: Any) -> JsonLines:
    return open_sink(Config(path=path, **given), controls=None)  # type: ignore[arg-type]


def parts(path: Path) -> list[int]:
    return [json.loads(line)["part_id"] for line in path.read_text().splitlines()]


def test_each_record_is_a_line_that_reads_back(tmp_path: Path, make_record: Make) -> None:
    path = tmp_path / "new" / "results.jsonl"
    sink = opened(path)
    records = [
        make_record(1, source="Prüfling 1.png", reason='a "quoted"\nreason'),
        make_record(2, verdict=Verdict.NG, reject=True, tag=7),
        make_record(3, source="broken \udcff name.png"),
    ]
    for record in records:
        sink.write(record, None)
    late = make_record(2, verdict=Verdict.LATE, score=0.7)
    sink.write_late(late)
    sink.close()
    sink.close()
    lines = path.read_text("utf-8").split("\n")
    assert [Record.from_dict(json.loads(line)) for line in lines[:2]] == records[:2]
    assert len(lines) == 4 and lines[3] == ""
    (line,) = (tmp_path / "new" / "results.late.jsonl").read_text().splitlines()
    assert Record.from_dict(json.loads(line)) == late


def test_a_score_that_is_no_number_leaves_valid_json(tmp_path: Path, make_record: Make) -> None:
    sink = opened(tmp_path / "r.jsonl")
    sink.write(make_record(1, score=float("nan"), wait_ms=float("inf")), None)
    sink.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    data = json.loads((tmp_path / "r.jsonl").read_text(), parse_constant=refuse)
    assert data["score"] is None and data["latency_ms"]["wait"] is None
    assert data["latency_ms"]["total"] == 12.5


def test_full_files_are_kept_up_to_a_number(tmp_path: Path, make_record: Make) -> None:
    path = tmp_path / "r.jsonl"
    sink = opened(path, rotate_mib=2000 / 2**20, keep=2)
    for part_id in range(60):
        sink.write(make_record(part_id), None)
    sink.close()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["r.1.jsonl", "r.2.jsonl", "r.jsonl"]
    found = parts(tmp_path / "r.2.jsonl") + parts(tmp_path / "r.1.jsonl") + parts(path)
    assert found == list(range(found[0], 60)), "nothing is missing between the files"
    assert all(file.stat().st_size <= 2000 for file in tmp_path.iterdir())
    assert sink.counters()["rotations"] > 2


def test_no_full_file_is_kept_if_none_is_wanted(tmp_path: Path, make_record: Make) -> None:
    sink = opened(tmp_path / "r.jsonl", rotate_mib=2000 / 2**20, keep=0)
    for part_id in range(20):
        sink.write(make_record(part_id), None)
    sink.close()
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]
    assert parts(tmp_path / "r.jsonl")[-1] == 19


@pytest.mark.parametrize("rest", [b"\0" * 5000, b'{"part_id": 3, "cam', b'{"part', b"\0\0\n", b"{}x\n"])
def test_what_a_power_cut_leaves_is_moved_aside(tmp_path: Path, make_record: Make, rest: bytes) -> None:
    path = tmp_path / "r.jsonl"
    sink = opened(path)
    for part_id in (1, 2):
        sink.write(make_record(part_id), None)
    sink.close()
    with path.open("ab") as file:
        file.write(rest)
    sink = opened(path)
    assert sink.knows(2) and not sink.knows(3)
    sink.write(make_record(3), None)
    sink.close()
    assert parts(path) == [1, 2, 3]
    assert rest.rstrip(b"\0\n") in (tmp_path / "r.cut.jsonl").read_bytes()


@pytest.mark.parametrize("content", [b'{"part_id": 1', b"\0\0\0", b"{", b""])
def test_a_file_of_nothing_but_half_a_line_begins_anew(
    tmp_path: Path, make_record: Make, content: bytes
) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    sink = opened(path)
    sink.write(make_record(4), None)
    sink.close()
    assert parts(path) == [4]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_wherever_a_file_is_cut_its_whole_lines_stay(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = folder / "r.jsonl"
    chance = random.Random(seed)
    lines = [
        json.dumps({"part_id": part_id, "reason": "x" * chance.randrange(300)}).encode() + b"\n"
        for part_id in range(5)
    ]
    whole = b"".join(lines)
    end = chance.randrange(len(whole) + 1)
    path.write_bytes(whole[:end])
    opened(path).close()
    assert path.read_bytes() == b"".join(
        line for index, line in enumerate(lines) if len(b"".join(lines[: index + 1])) <= end
    )
    shutil.rmtree(folder)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letter.jsonl"
    path.write_bytes(b"Dear Sir\n")
    with pytest.raises(LineError, match="no record"):
        opened(path)
    path.write_bytes(b'{"part_id": 1}\n' + b"x" * 2**21)
    with pytest.raises(LineError, match="hold no record"):
        opened(path)
    assert path.stat().st_size == 15 + 2**21
    with pytest.raises(LineError, match=r"path is .*\.jsonl"):
        Config(path=tmp_path / "results.csv")
    with pytest.raises(LineError, match="cannot be written"):
        opened(tmp_path / "letter.jsonl" / "below.jsonl")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rotate_mib": 0.0}, "rotate_mib"),
        ({"keep": -1}, "keep"),
        ({"sync": "often"}, "sync is 'often'"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(LineError, match=words):
        Config(path=tmp_path / "r.jsonl", **given)


def test_it_knows_at_least_the_last_100000_parts_also_over_small_files(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"

    def text(first: int, end: int) -> str:
        return "".join(
            f'{{"part_id": {part_id}, "camera": "top"}}\n' for part_id in range(first, end, 2)
        )

    (tmp_path / "r.2.jsonl").write_text(text(1, 100_001))
    (tmp_path / "r.1.jsonl").write_text(text(100_001, 200_001))
    path.write_text(text(200_001, 220_001))
    sink = opened(path)
    assert all(sink.knows(part_id) for part_id in range(1, 220_001, 2))
    assert not any(sink.knows(part_id) for part_id in range(0, 220_004, 2))
    assert not sink.knows(220_003)
    sink.close()


@settings(deadline=None, max_examples=25)
@given(
    steps=st.lists(
        st.one_of(st.integers(-5, 40), st.integers(2**19, 2**21), st.just(-(2**21))), max_size=15
    )
)
def test_part_ids_are_remembered_within_a_million(steps: list[int]) -> None:
    known, kept = jsonl._PartIds(), set()
    part_id = last = 0
    for step in steps:
        part_id = max(part_id + step, 0)
        if part_id <= last - 2**20:  # begins anew
            kept, last = set(), 0
        known.add(part_id)
        last = max(last, part_id)
        kept.add(part_id)
        assert part_id in known and last + 1 not in known
        near = [other for other in kept if other > last - 2**20]
        assert all(other in known for other in near)
        for other in range(max(part_id - 20, last - 2**20 + 1, 0), part_id + 20):
            assert (other in known) == (other in kept)


def test_a_file_that_was_moved_or_deleted_is_made_anew(tmp_path: Path, make_record: Make) -> None:
    path = tmp_path / "r.jsonl"
    sink = opened(path)
    sink.write(make_record(1), None)
    path.rename(tmp_path / "elsewhere")
    sink.write(make_record(2), None)
    path.unlink()
    sink.write(make_record(3), None)
    sink.write(make_record(4), None)
    sink.close()
    assert parts(tmp_path / "elsewhere") == [1]
    assert parts(path) == [3, 4]


@pytest.mark.parametrize("name", ["r.jsonl.1", "r.jsonl-20260331"])
def test_parts_in_a_file_that_logrotate_has_moved_are_known(
    tmp_path: Path, make_record: Make, name: str
) -> None:
    sink = opened(tmp_path / "r.jsonl")
    sink.write(make_record(5), None)
    sink.close()
    (tmp_path / "r.jsonl").rename(tmp_path / name)
    (tmp_path / "r.jsonl-20260301.gz").write_bytes(b"\x1f\x8b\n\n")
    sink = opened(tmp_path / "r.jsonl")
    assert sink.knows(5) and not sink.knows(6)
    sink.close()


def test_a_file_has_one_writer(tmp_path: Path, make_record: Make) -> None:
    """Two would cut each other's lines off, as those of a write that failed."""
    path = tmp_path / "r.jsonl"
    sink = opened(path)
    sink.write(make_record(1), None)
    with pytest.raises(LineError, match="another line or sink writes to it"):
        opened(path)
    path.rename(tmp_path / "r.jsonl.1")
    sink.write(make_record(2), None)  # to the new file, which it locks
    with pytest.raises(LineError, match="another line or sink writes to it"):
        opened(path)
    program = (
        "import sys; from pathlib import Path; from edgead.line.sinks.jsonl import Config, JsonLines\n"
        "JsonLines(Config(path=Path(sys.argv[1])))\n"
    )
    other = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert "another line or sink writes to it" in other.stderr
    assert parts(path) == [2]
    sink.close()
    opened(path).close()


def test_a_sink_that_is_opened_again_takes_the_lock_of_the_one_that_hangs(
    tmp_path: Path, make_record: Make
) -> None:
    config = Config(path=tmp_path / "r.jsonl")
    stuck = JsonLines(config)
    sink = JsonLines(config)
    stuck.close()
    sink.write(make_record(1), None)
    with pytest.raises(LineError, match="another line or sink writes to it"):
        opened(config.path)
    sink.close()
    opened(config.path).close()


def test_half_a_line_that_could_not_be_taken_back_goes_before_the_next(
    tmp_path: Path, make_record: Make
) -> None:
    path = tmp_path / "r.jsonl"
    sink = opened(path)
    sink.write(make_record(1), None)
    with path.open("ab") as file:
        file.write(b'{"part_id": 2, "ca')
    sink.write(make_record(2), None)
    sink.close()
    assert parts(path) == [1, 2]


def test_a_full_disk_is_an_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk: the system cuts the write short likewise."""
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from edgead.line.sinks.jsonl import Config, open_sink
        from edgead.line.verdicts import Record, Verdict

        def record(part_id):
            return Record(part_id, "top", Verdict.OK, False, "r" * 100, "s", 1, 1.0)

        sink = open_sink(Config(path=Path(sys.argv[1]), sync="always"), controls=None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        for part_id in range(10):
            try:
                sink.write(record(part_id), None)
            except OSError as error:
                refused = part_id
                break
        with open(sys.argv[1], "rb") as file:
            assert file.read().endswith(b"}\\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sink.write(record(refused), None)
        sink.close()
        print(refused)
    """)
    path = tmp_path / "r.jsonl"
    answer = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True, timeout=20
    )
    refused = int(answer.stdout)
    assert refused > 0 and parts(path) == list(range(refused + 1))


def test_the_disk_gets_the_lines_as_the_setting_says(
    tmp_path: Path, make_record: Make, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., None]
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def count(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", count)
    monkeypatch.setattr(jsonl, "SYNC_PERIOD_S", 0.01)
    for sync, expected in (("never", 0), ("always", 3)):
        path = tmp_path / f"{sync}.jsonl"
        sink = opened(path, sync=sync)
        for part_id in range(3):
            sink.write(make_record(part_id), None)
        assert synced.count(str(path)) == expected
        sink.close()
        assert synced.count(str(path)) == expected
    path = tmp_path / "second.jsonl"
    sink = opened(path)
    sink.write(make_record(1), None)
    wait_for(lambda: synced.count(str(path)) == 1)
    sink.write_late(make_record(1))
    wait_for(lambda: str(tmp_path / "second.late.jsonl") in synced)
    sink.close()
    assert synced.count(str(path)) == 1, "nothing new, nothing to sync"
    assert synced.count(str(tmp_path)) == 3, "the folder once per file, for its name"


def test_lines_survive_a_process_that_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import itertools, sys
        from pathlib import Path
        from edgead.line.sinks.jsonl import Config, open_sink
        from edgead.line.verdicts import Record, Verdict

        sink = open_sink(Config(path=Path(sys.argv[1])), controls=None)
        for part_id in itertools.count():
            sink.write(Record(part_id, "top", Verdict.OK, False, "r", "s", 1, 1.0), None)
            print(part_id, flush=True)
    """)
    path = tmp_path / "r.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(500):
        said = int(process.stdout.readline())
    process.kill()
    process.wait()
    said = int((process.stdout.read().rsplit("\n", 2) + [str(said)])[-2] or said)
    process.stdout.close()
    sink = opened(path)
    assert parts(path)[: said + 1] == list(range(said + 1)), "all that it said it had written"
    assert sink.knows(said)
    sink.close()
