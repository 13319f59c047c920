"""What the line says about a part."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from edgead.errors import DataError


class Verdict(str, enum.Enum):
    """Exactly one of these for each trigger.

    OK: score below the threshold, in time. NG: at or above it, in time. LATE: no answer until the
    deadline, said at that moment; what the model says later changes nothing. ERROR: the inspection
    failed. NOT_INSPECTED: there was no image fit to be inspected (lost, dropped, dark, blurred).
    """

    OK = "OK"
    NG = "NG"
    LATE = "LATE"
    ERROR = "ERROR"
    NOT_INSPECTED = "NOT_INSPECTED"


@dataclass(frozen=True, slots=True)
class Record:
    """The verdict on one part, as all sinks get it.

    Attributes:
        part_id: Counts the triggers of all cameras of the line, also over restarts: never given twice.
        camera: Name of the camera in the recipe file.
        reject: What the output to the ejector is: whether this verdict is one that rejects.
        score: None where the model gave none in time.
        threshold: The one that held; None together with the score.
        reason: One sentence: why this verdict.
        source: Where the image came from: a file, a device.
        frame_id: The source's own number of the frame, if it has one.
        tag: The number that the PLC gave to the part, if it did.
        recipe: Index of the camera's recipe.
        bundle: Name in the manifest of the bundle.
        trigger_ns: Nanoseconds since 1970, UTC, of the trigger; `exposure_ns` of the exposure.
        wait_ms: From the trigger to the start of the inference; None if there was none.
        infer_ms: The inference itself.
        total_ms: From the trigger to the verdict.
    """

    part_id: int
    camera: str
    verdict: Verdict
    reject: bool
    reason: str
    source: str
    trigger_ns: int
    total_ms: float
    score: float | None = None
    threshold: float | None = None
    frame_id: int | None = None
    tag: int | None = None
    recipe: int = 0
    bundle: str = ""
    exposure_ns: int | None = None
    wait_ms: float | None = None
    infer_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON lines; `from_dict` reads it again."""
        return {
            "part_id": self.part_id,
            "camera": self.camera,
            "verdict": self.verdict.value,
            "reject": self.reject,
            "score": self.score,
            "threshold": self.threshold,
            "reason": self.reason,
            "source": self.source,
            "frame_id": self.frame_id,
            "tag": self.tag,
            "recipe": self.recipe,
            "bundle": self.bundle,
            "trigger_time": _iso(self.trigger_ns),
            "trigger_ns": self.trigger_ns,
            "exposure_ns": self.exposure_ns,
            "latency_ms": {"wait": self.wait_ms, "infer": self.infer_ms, "total": self.total_ms},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Reads `to_dict`.

        Raises:
            DataError: A field is missing or no verdict.
        """
        try:
            latency = data["latency_ms"]
            names = ("part_id", "camera", "reject", "score", "threshold", "reason", "source", "frame_id")
            more = ("tag", "recipe", "bundle", "trigger_ns", "exposure_ns")
            return cls(
                verdict=Verdict(data["verdict"]),
                wait_ms=latency["wait"],
                infer_ms=latency["infer"],
                total_ms=latency["total"],
                **{name: data[name] for name in (*names, *more)},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"record of a part: {error!r} in {data!r:.200}") from error


def _iso(time_ns: int) -> str:
    """UTC with microseconds. Not through a float, which would round them."""
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc).replace(microsecond=rest_ns // 1000)
    return moment.isoformat(timespec="microseconds")
