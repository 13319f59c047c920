"""The archive of images, its sample and its quota."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.errors import DataError, LineError
from edgead.heat import heat_map
from edgead.image import read_image
from edgead.line.interfaces import Picture
from edgead.line.sinks import archive
from edgead.line.sinks.archive import Archive, Config, is_in_sample, open_sink
from edgead.line.verdicts import Record, Verdict

Make = Callable[..., Record]
DAY = "2023-11-14"  # of the records' trigger
DAY_NS = 86_400 * 10**9


def opened(folder: Path, **given: Any) -> Archive:
    return open_sink(Config(**{"folder": folder, "min_free_mib": 0.0, **given}), controls=None)  # type: ignore[arg-type]


def picture(seed: int = 0, *, height_px: int = 40) -> Picture:
    """Noise, which PNG cannot make smaller: 3 bytes for each pixel."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height_px, 60, 3), dtype=np.uint8)
    return Picture(image, rng.random((10, 15), dtype=np.float32))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kept(folder: Path) -> list[int]:
    return sorted(
        int(Path(name).name.split("_")[0]) for name in files(folder) if name.endswith("top.json")
    )


def test_a_part_that_is_not_ok_is_kept_as_it_was(tmp_path: Path, make_record: Make) -> None:
    sink = opened(tmp_path / "new" / "archive")
    record = make_record(42, verdict=Verdict.NG, score=0.9, threshold=0.5)
    image = np.full((40, 60, 3), (200, 120, 40), np.uint8)
    shown = Picture(image, np.tile(np.linspace(0, 1, 15, dtype=np.float32), (10, 1)))
    sink.write(record, shown)
    folder = tmp_path / "new" / "archive"
    stem = f"{DAY}/NG/000000000042_top"
    assert files(folder) == [f"{stem}.heat.jpg", f"{stem}.json", f"{stem}.png"]
    assert np.array_equal(read_image(folder / f"{stem}.png"), shown.image), (
        "lossless, in the right order"
    )
    assert shown.anomaly_map is not None
    expected = heat_map(shown.image, shown.anomaly_map, 0.5)
    heat = read_image(folder / f"{stem}.heat.jpg")
    assert np.abs(heat.astype(float) - expected).mean() < 5, "but for the JPEG"
    assert Record.from_dict(json.loads((folder / f"{stem}.json").read_text())) == record
    assert sink.knows(42) and not sink.knows(43)
    counters = sink.counters()
    assert counters == {
        "parts": 1,
        "bytes": sum((folder / name).stat().st_size for name in files(folder)),
        "deleted": 0,
        "skipped": 0,
    }


@pytest.mark.parametrize("verdict", [verdict for verdict in Verdict if verdict != Verdict.OK])
def test_without_an_image_the_record_is_kept(
    tmp_path: Path, make_record: Make, verdict: Verdict
) -> None:
    sink = opened(tmp_path)
    sink.write(make_record(1, verdict=verdict, score=None, threshold=None), None)
    assert files(tmp_path) == [f"{DAY}/{verdict.value}/000000000001_top.json"]


def test_late_results_lie_beside(tmp_path: Path, make_record: Make) -> None:
    sink = opened(tmp_path)
    late = make_record(1, verdict=Verdict.LATE, score=None, threshold=None)
    sink.write(late, Picture(picture().image, None))
    sink.write_late(make_record(1, verdict=Verdict.LATE, score=0.9))
    stem = f"{DAY}/LATE/000000000001_top"
    assert files(tmp_path) == [f"{stem}.json", f"{stem}.late.json", f"{stem}.png"]
    assert json.loads((tmp_path / f"{stem}.late.json").read_text())["score"] == 0.9
    assert sink.counters()["parts"] == 1
    assert sink.counters()["bytes"] == sum((tmp_path / name).stat().st_size for name in files(tmp_path))


def test_the_sample_of_ok_parts_is_the_same_each_time(tmp_path: Path, make_record: Make) -> None:
    shares = [sum(is_in_sample(part_id, share) for part_id in range(20_000)) for share in (0, 0.05, 1)]
    assert shares[0] == 0 and shares[2] == 20_000
    assert 850 < shares[1] < 1150  # 1000 and five standard deviations
    for name in ("a", "b"):
        sink = opened(tmp_path / name, ok_share=0.1)
        for part_id in range(100):
            sink.write(make_record(part_id), None)
    assert kept(tmp_path / "a") == kept(tmp_path / "b")
    assert kept(tmp_path / "a") == [part_id for part_id in range(100) if is_in_sample(part_id, 0.1)]


def test_the_oldest_parts_go_when_the_quota_is_full(tmp_path: Path, make_record: Make) -> None:
    part_bytes = 40 * 60 * 3  # at least: the image alone
    sink = opened(tmp_path, quota_mib=5.9 * part_bytes * 2 / 2**20)
    for part_id in range(40):
        verdict = Verdict.NG if part_id % 2 else Verdict.ERROR
        trigger_ns = make_record(0).trigger_ns + (part_id // 10) * DAY_NS
        sink.write(make_record(part_id, verdict=verdict, trigger_ns=trigger_ns), picture(part_id))
        total = sum((tmp_path / name).stat().st_size for name in files(tmp_path))
        assert sink.counters()["bytes"] == total <= 5.9 * part_bytes * 2
    left = kept(tmp_path)
    assert left == list(range(left[0], 40)) and 2 <= len(left) <= 11
    assert sink.counters()["deleted"] == 40 - len(left) and sink.counters()["parts"] == len(left)
    assert sink.knows(39) and not sink.knows(0)
    days = sorted(path.name for path in tmp_path.iterdir())
    assert DAY not in days, "empty folders go, too"


def test_new_parts_stay_whatever_the_clock_and_the_journal_say(
    tmp_path: Path, make_record: Make
) -> None:
    """A box without a battery for its clock begins in 1970; with a new journal part ids begin at 1."""
    quota_mib = 5.9 * 40 * 60 * 3 * 2 / 2**20
    for first, trigger_ns in ((100, DAY_NS * 19_000), (200, 60 * 10**9), (1, DAY_NS * 19_001)):
        sink = opened(tmp_path, quota_mib=quota_mib)
        for part_id in range(first, first + 8):
            record = make_record(part_id, verdict=Verdict.NG, trigger_ns=trigger_ns)
            sink.write(record, picture(part_id))
        assert first + 7 in kept(tmp_path) and len(kept(tmp_path)) > 1
        assert set(kept(tmp_path)) <= set(range(first, first + 8))


def test_parts_of_earlier_runs_count_and_nothing_else_is_ever_deleted(
    tmp_path: Path, make_record: Make
) -> None:
    sink = opened(tmp_path)
    for part_id in range(5):
        sink.write(make_record(part_id, verdict=Verdict.NG), picture(part_id))
    others = [
        "notes.txt",
        "000000000001_top.png",
        f"{DAY}/NG/holiday.png",
        f"{DAY}/NG/1_top.png",
        f"{DAY}/NG/000000000001_top.png.bak",
        f"{DAY}/NG/.000000000001_top.png.swp",
        f"{DAY}/NG/sub/000000000001_top.png",
        f"{DAY}/BEST/000000000001_top.png",
        "2023/NG/000000000001_top.png",
    ]
    for name in others:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    elsewhere = tmp_path.parent / "elsewhere" / "NG"
    elsewhere.mkdir(parents=True)
    (elsewhere / "000000000001_top.png").write_bytes(b"mine")
    (tmp_path / "2020-01-01").symlink_to(elsewhere.parent)
    (tmp_path / DAY / "NG" / "000000000009_top.png").symlink_to(elsewhere / "000000000001_top.png")
    unfinished = tmp_path / DAY / "NG" / ".000000000007_top.png.0123abcd.tmp"
    unfinished.write_bytes(b"half")
    empty = tmp_path / DAY / "NG" / "000000000008_top.png"  # what a power cut leaves
    empty.touch()

    again = opened(tmp_path)
    assert again.counters()["parts"] == 5 and again.counters()["bytes"] == sink.counters()["bytes"]
    assert again.knows(3) and not unfinished.exists() and not empty.exists()
    small = opened(tmp_path, quota_mib=1 / 2**20)
    assert small.counters() == {"parts": 0, "bytes": 0, "deleted": 5, "skipped": 0}
    assert all((tmp_path / name).read_bytes() == b"mine" for name in others)
    assert (elsewhere / "000000000001_top.png").is_file()
    assert (tmp_path / DAY / "NG" / "000000000009_top.png").is_symlink()


def test_too_little_free_disk_deletes_and_then_keeps_nothing(
    tmp_path: Path, make_record: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sink = opened(tmp_path)
    for part_id in range(3):
        sink.write(make_record(part_id, verdict=Verdict.NG), None)
    greedy = opened(tmp_path, min_free_mib=1e12)
    for part_id in range(3, 6):
        greedy.write(make_record(part_id, verdict=Verdict.NG), picture())
    assert files(tmp_path) == []
    greedy.write_late(make_record(5, verdict=Verdict.LATE))
    assert files(tmp_path) == []
    assert greedy.counters() == {"parts": 0, "bytes": 0, "deleted": 3, "skipped": 4}
    assert caplog.text.count("images are not kept") == 1


def test_a_disk_that_is_full_is_an_error_and_leaves_no_half_part(
    tmp_path: Path, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of a few kilobytes cannot be had everywhere: the write of the heat map fails instead."""
    sink = opened(tmp_path)
    sink.write(make_record(1, verdict=Verdict.NG), picture())
    write_image = archive.write_image

    def fail(path: Path, image: np.ndarray) -> None:
        if path.name.endswith(".heat.jpg"):
            raise DataError("no space") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_image(path, image)

    monkeypatch.setattr(archive, "write_image", fail)
    with pytest.raises(LineError, match="no space"):
        sink.write(make_record(2, verdict=Verdict.NG), picture())
    assert files(tmp_path) == [] and sink.counters()["deleted"] == 1, "the oldest makes room"
    monkeypatch.setattr(archive, "write_image", write_image)
    sink.write(make_record(2, verdict=Verdict.NG), picture())
    assert kept(tmp_path) == [2]


def test_a_late_result_for_which_the_disk_has_no_room_deletes_the_oldest_part(
    tmp_path: Path, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would be tried again for ever, and nothing behind it be written."""
    sink = opened(tmp_path)
    for part_id in (1, 2):
        sink.write(make_record(part_id, verdict=Verdict.LATE), picture())

    def refused(path: Path, content: bytes, *, sync: bool = True) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as full, pytest.raises(OSError):
        full.setattr(archive, "write_bytes", refused)
        sink.write_late(make_record(2, verdict=Verdict.LATE))
    assert kept(tmp_path) == [2] and sink.counters()["parts"] == 1
    sink.write_late(make_record(2, verdict=Verdict.LATE))
    names = [name.partition("_top")[2] for name in files(tmp_path)]
    assert names == [".heat.jpg", ".json", ".late.json", ".png"]


def test_writing_a_part_again_keeps_its_image_and_counts_it_once(
    tmp_path: Path, make_record: Make
) -> None:
    """As after a crash, when the picture is gone."""
    record = make_record(1, verdict=Verdict.NG)
    sink = opened(tmp_path)
    sink.write(record, picture())
    before = sink.counters()
    again = opened(tmp_path)
    again.write(record, None)
    assert again.counters() == before and len(files(tmp_path)) == 3


def test_a_map_that_cannot_be_drawn_costs_only_the_overlay(
    tmp_path: Path, make_record: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sink = opened(tmp_path)
    broken = Picture(picture().image, np.full((4, 4), np.inf, np.float32))
    sink.write(make_record(1, verdict=Verdict.NG), broken)
    assert [Path(name).suffix for name in files(tmp_path)] == [".json", ".png"]
    assert "no heat map" in caplog.text


def test_bad_settings_and_folders_are_refused(tmp_path: Path) -> None:
    for given in ({"ok_share": 1.5}, {"ok_share": -0.1}, {"quota_mib": 0.0}, {"min_free_mib": -1.0}):
        with pytest.raises(LineError, match=next(iter(given))):
            Config(folder=tmp_path, **given)
    (tmp_path / "file").touch()
    with pytest.raises(LineError, match="folder"):
        opened(tmp_path / "file")
