from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgead.errors import LineError
from edgead.line.pixels import to_rgb
from edgead.line.sources.video import Config, open_source

COUNT = 10


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames at 125 frames per second, one colour each: red grows, blue falls."""
    path = tmp_path_factory.mktemp("video") / "parts.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 125.0, (64, 48))
    assert writer.isOpened()
    for index in range(COUNT):
        writer.write(np.full((48, 64, 3), (240 - 20 * index, 100, 20 * index), np.uint8))  # BGR
    writer.release()
    return path


def test_every_frame_in_order_and_in_colour(video: Path) -> None:
    source = open_source(Config(path=video), camera="top")
    shots = list(source.shots())
    assert [shot.frame_id for shot in shots] == list(range(COUNT))
    for index, shot in enumerate(shots):
        assert shot.origin == f"{video}, frame {index}"
        mean = to_rgb(shot).mean(axis=(0, 1))
        # JPEG keeps a flat colour within a few levels.
        np.testing.assert_allclose(mean, (20 * index, 100, 240 - 20 * index), atol=6)
    assert source.counters()["images"] == COUNT
    source.close()


def test_its_own_rate_another_one_and_none(video: Path) -> None:
    def periods_ns(**settings: float) -> list[int]:
        source = open_source(Config(path=video, **settings), camera="top")
        return np.diff([shot.trigger_ns for shot in source.shots()]).tolist()

    assert periods_ns() == [8_000_000] * (COUNT - 1)
    assert periods_ns(rate_hz=500.0) == [2_000_000] * (COUNT - 1)
    assert len(periods_ns(rate_hz=0.0)) == COUNT - 1
    assert len(set(periods_ns(jitter_ms=3.0))) > 1


def test_a_video_that_is_cut_off_is_noticed(video: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = video.read_bytes()
    frames = [at for at in range(len(content)) if content.startswith(b"00dc", at)]
    cut = video.with_name("cut.avi")
    cut.write_bytes(content[: frames[6]])
    source = open_source(Config(path=cut), camera="top")
    with caplog.at_level(logging.WARNING):
        assert 0 < len(list(source.shots())) < COUNT
    assert f"of {COUNT} frames" in caplog.text


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LineError, match="camera top: path: .*no such file"):
        open_source(Config(path=tmp_path / "missing.avi"), camera="top")
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(LineError, match="cannot read this video"):
        open_source(Config(path=tmp_path / "text.avi"), camera="top")


def test_settings_that_cannot_be_are_refused(video: Path) -> None:
    with pytest.raises(LineError, match="rate_hz"):
        Config(path=video, rate_hz=-2.0)
    with pytest.raises(LineError, match="jitter_ms"):
        Config(path=video, rate_hz=0.0, jitter_ms=2.0)
