from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from edgead.errors import LineError
from edgead.image import write_image
from edgead.line.interfaces import Shot
from edgead.line.sources.folder import Config, open_source


def picture(value: int) -> np.ndarray:
    return np.full((4, 6, 3), (value, value + 1, value + 2), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, in the order of their names 10 to 50, and files that are none."""
    for name, value in {"b/2.png": 40, "a.png": 10, "b/1.PNG": 30, "c.bmp": 50, "b.png": 20}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name, picture(value))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    return tmp_path


def shots(config: Config) -> list[Shot]:
    source = open_source(config, camera="top")
    found = list(source.shots())
    source.close()
    return found


def test_every_image_once_in_the_order_of_the_names(folder: Path) -> None:
    found = shots(Config(path=folder))
    # As text: "." sorts before "/".
    assert [shot.origin for shot in found] == [
        str(folder / name) for name in ("a.png", "b.png", "b/1.PNG", "b/2.png", "c.bmp")
    ]
    for shot, value in zip(found, (10, 20, 30, 40, 50), strict=True):
        np.testing.assert_array_equal(shot.image, picture(value))
        assert (shot.pixels, shot.problem) == ("rgb", "")
    assert [shot.frame_id for shot in found] == [0, 1, 2, 3, 4]


def test_triggers_keep_to_the_rate(folder: Path) -> None:
    found = shots(Config(path=folder, rate_hz=250.0))
    assert np.diff([shot.trigger_ns for shot in found]).tolist() == [4_000_000] * 4


def test_the_folder_is_repeated(folder: Path) -> None:
    found = shots(Config(path=folder, repeat=3))
    assert [shot.frame_id for shot in found] == list(range(15))
    assert [shot.origin for shot in found[5:10]] == [shot.origin for shot in found[:5]]


def test_for_ever_is_long(folder: Path) -> None:
    source = open_source(Config(path=folder, repeat=0), camera="top")
    assert sum(1 for _ in itertools.islice(source.shots(), 40)) == 40
    source.close()


def test_a_file_that_is_no_image_is_a_shot_without_one(folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "bb.jpg").write_bytes(b"")
    source = open_source(Config(path=folder), camera="top")
    found = list(source.shots())
    assert [shot.image is None for shot in found] == [False, True, False, False, True, False]
    for shot in (found[1], found[4]):
        assert shot.origin in shot.problem
    assert source.counters() == {"images": 4, "unreadable": 2}


def test_a_file_that_goes_away_is_a_shot_without_image(folder: Path) -> None:
    source = open_source(Config(path=folder), camera="top")
    (folder / "c.bmp").unlink()
    assert list(source.shots())[-1].image is None


def test_triggered(folder: Path) -> None:
    source = open_source(Config(path=folder, triggered=True), camera="top")
    for _ in range(5):
        source.fire()
    with pytest.raises(LineError, match="all images were delivered"):
        source.fire()
    assert len(list(source.shots())) == 5


@pytest.mark.parametrize("name", ["missing", "a.png", "empty"])
def test_a_folder_without_images_is_refused(folder: Path, name: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(LineError, match=f"camera top: path: .*{name}"):
        open_source(Config(path=folder / name), camera="top")


def test_settings_that_cannot_be_are_refused(folder: Path) -> None:
    with pytest.raises(LineError, match="repeat"):
        Config(path=folder, repeat=-1)
    with pytest.raises(LineError, match="rate_hz"):
        Config(path=folder, triggered=True, rate_hz=5.0)
    with pytest.raises(LineError, match="jitter_ms"):
        Config(path=folder, jitter_ms=5.0)
