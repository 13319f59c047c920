"""Replay of a video file through OpenCV."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from edgead.errors import LineError
from edgead.line.interfaces import Source
from edgead.line.sources.pacing import Replay, Stored, check_pacing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A video file, each frame of it one trigger.

    Attributes:
        path: The file.
        rate_hz: Triggers per second; None: the video's own rate; 0: as fast as the line takes them.
        jitter_ms: Each trigger is late by up to this much, at random.
        seed: Of the jitter.
    """

    path: Path
    rate_hz: float | None = None
    jitter_ms: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_pacing(self.rate_hz, self.jitter_ms)


def open_source(config: Config, *, camera: str) -> Source:
    """Opens the file and reads its first frame.

    Raises:
        LineError: There is no such file, OpenCV cannot read it, or it does not say its rate.
    """
    where = f"camera {camera}: path: {config.path}"
    if not config.path.is_file():
        raise LineError(f"{where}: there is no such file")
    video = cv2.VideoCapture(str(config.path))
    is_read, first = video.read()
    if not is_read:
        video.release()
        raise LineError(f"{where}: OpenCV cannot read this video; convert it to H.264 or Motion JPEG")
    rate_hz = video.get(cv2.CAP_PROP_FPS) if config.rate_hz is None else config.rate_hz
    try:
        if not rate_hz and config.rate_hz is None:
            raise LineError("the video does not say its frame rate: set rate_hz")
        check_pacing(rate_hz, config.jitter_ms)
    except LineError as error:
        video.release()
        raise LineError(f"{where}: {error}") from error
    return Replay(
        _frames(video, first, config.path), rate_hz=rate_hz, jitter_ms=config.jitter_ms, seed=config.seed
    )


def _frames(video: cv2.VideoCapture, first: np.ndarray, path: Path) -> Iterator[Stored]:
    announced = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    number, is_read, frame = 0, True, first
    try:
        while is_read:
            yield Stored(frame, f"{path}, frame {number}", pixels="bgr")
            is_read, frame = video.read()
            number += 1
    finally:
        video.release()
    if number < announced:
        logger.warning("%s: ends after %d of %d frames; it may be damaged", path, number, announced)
