"""Replay of a folder of images."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from edgead.errors import DataError, LineError
from edgead.image import list_images, read_image
from edgead.line.interfaces import Source
from edgead.line.sources.pacing import Replay, Stored, check_pacing


@dataclass(frozen=True, kw_only=True)
class Config:
    """A folder of images, each of them one trigger.

    Attributes:
        path: The folder, searched recursively; the images come in the order of their names.
        rate_hz: Triggers per second; None or 0: as fast as the line takes the images.
        jitter_ms: Each trigger is late by up to this much, at random.
        seed: Of the jitter.
        repeat: How many times the folder is delivered; 0 is for ever.
        triggered: The next image is delivered on each trigger from outside, instead of by itself.
    """

    path: Path
    rate_hz: float | None = None
    jitter_ms: float = 0.0
    seed: int = 0
    repeat: int = 1
    triggered: bool = False

    def __post_init__(self) -> None:
        check_pacing(self.rate_hz or 0.0, self.jitter_ms)
        if self.repeat < 0:
            raise LineError(f"repeat is {self.repeat}, expected 1 or more, or 0 for ever")
        if self.triggered and self.rate_hz:
            raise LineError("rate_hz goes with triggered = false only: leave one of them out")


def open_source(config: Config, *, camera: str) -> Source:
    """Lists the images. A file that turns out to be no image is a shot without one, with the reason.

    Raises:
        LineError: There is no such folder, or no image in it.
    """
    try:
        paths = list_images(config.path)
    except DataError as error:
        raise LineError(f"camera {camera}: path: {error}") from error
    if not paths:
        raise LineError(f"camera {camera}: path: {config.path}: no images in this folder or below it")
    rounds = itertools.repeat(None, config.repeat) if config.repeat else itertools.repeat(None)
    return Replay(
        (_read(path) for _ in rounds for path in paths),
        rate_hz=config.rate_hz or 0.0,
        jitter_ms=config.jitter_ms,
        seed=config.seed,
        is_triggered=config.triggered,
        count=len(paths) * config.repeat or math.inf,
    )


def _read(path: Path) -> Stored:
    try:
        return Stored(read_image(path), str(path))
    except DataError as error:
        return Stored(None, str(path), problem=str(error))
