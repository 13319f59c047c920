"""Pictures for the status page: the latest of each camera and the last NG ones.

Only references are kept; they are encoded in the thread of whoever asks, and for all who ask at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

import cv2
import numpy as np

from edgead.errors import DataError
from edgead.heat import heat_map
from edgead.line.interfaces import Picture
from edgead.line.verdicts import Record, Verdict

logger = logging.getLogger(__name__)

NG_PICTURES = 16
NG_BYTES = 256 * 2**20
LIVE_PX = 640  # longer side
SMALL_PX = 240
LIVE_PERIOD_S = 0.2  # no camera's picture is encoded more often than that

_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 85]
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1]  # quick; a third larger than the default


class _Live:
    """The latest picture of a camera, and what it was encoded to, with and without heat map."""

    def __init__(self) -> None:
        self.number = 0
        self.latest: tuple[Record, Picture] | None = None
        self.encoding = threading.Lock()
        self.encoded: dict[bool, tuple[int, float, Record, bytes]] = {}


class Pictures:
    """Any thread."""

    def __init__(self, cameras: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._live = {camera: _Live() for camera in cameras}
        self._ng: OrderedDict[int, tuple[Record, Picture]] = OrderedDict()

    def add(self, record: Record, picture: Picture) -> None:
        """Keeps a picture for as long as it is the latest, or among the last NG ones."""
        with self._lock:
            live = self._live[record.camera]
            live.number += 1
            live.latest = record, picture
            if record.verdict is Verdict.NG:
                self._ng[record.part_id] = record, picture
                size = sum(kept.image.nbytes for _, kept in self._ng.values())
                while len(self._ng) > NG_PICTURES or (size > NG_BYTES and len(self._ng) > 1):
                    _, (_, oldest) = self._ng.popitem(last=False)
                    size -= oldest.image.nbytes

    def live(self, camera: str, *, after: int, with_heat: bool) -> tuple[int, Record, bytes] | None:
        """The latest picture as JPEG, with its number and record; None: there is none after `after`.

        Raises:
            KeyError: No such camera.
        """
        live = self._live[camera]
        with live.encoding:
            known = live.encoded.get(with_heat)
            with self._lock:
                number, latest = live.number, live.latest
            is_due = known is None or time.monotonic() - known[1] >= LIVE_PERIOD_S
            if latest is not None and is_due and (known is None or known[0] != number):
                record, picture = latest
                jpeg = _encode(shown(record, picture, LIVE_PX, with_heat=with_heat), ".jpg", _JPEG)
                known = live.encoded[with_heat] = number, time.monotonic(), record, jpeg
        if known is None or known[0] == after:
            return None
        return known[0], known[2], known[3]

    def ng(self) -> list[Record]:
        """Records of the NG pictures, the newest first."""
        with self._lock:
            return [record for record, _ in reversed(self._ng.values())]

    def ng_original(self, part_id: int) -> tuple[Record, bytes]:
        """The image of an NG part as PNG. Raises KeyError: not kept."""
        record, picture = self._find(part_id)
        return record, _encode(picture.image, ".png", _PNG)

    def ng_heat(self, part_id: int) -> tuple[Record, bytes]:
        """The image of an NG part with its heat map as JPEG, full size. Raises KeyError: not kept."""
        record, picture = self._find(part_id)
        side_px = max(picture.image.shape[:2])
        return record, _encode(shown(record, picture, side_px, with_heat=True), ".jpg", _JPEG)

    def ng_small(self, part_id: int) -> tuple[Record, bytes]:
        """As `ng_heat`, as a thumbnail."""
        record, picture = self._find(part_id)
        return record, _encode(shown(record, picture, SMALL_PX, with_heat=True), ".jpg", _JPEG)

    def _find(self, part_id: int) -> tuple[Record, Picture]:
        with self._lock:
            return self._ng[part_id]


NG_KINDS: dict[str, Callable[[Pictures, int], tuple[Record, bytes]]] = {
    "original.png": Pictures.ng_original,
    "heat.jpg": Pictures.ng_heat,
    "small.jpg": Pictures.ng_small,
}


def shown(record: Record, picture: Picture, longer_px: int, *, with_heat: bool) -> np.ndarray:
    """The image, at most `longer_px` on its longer side, and over it the heat map where there is one."""
    image = picture.image
    height_px, width_px = image.shape[:2]
    scale = longer_px / max(height_px, width_px)
    if scale < 1:
        size = max(1, round(width_px * scale)), max(1, round(height_px * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if not with_heat or picture.anomaly_map is None or record.threshold is None:
        return image
    try:
        return heat_map(image, picture.anomaly_map, record.threshold)
    except DataError as error:
        logger.debug("part %d: no heat map: %s", record.part_id, error)
        return image


def _encode(image: np.ndarray, suffix: str, parameters: list[int]) -> bytes:
    return bytes(cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), parameters)[1])
