"""What the parts of a line know of each other: images come from sources, records go to sinks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgead.line.verdicts import Record

if TYPE_CHECKING:
    from edgead.line.statistics import Statistics


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """What a source delivers for one trigger.

    Attributes:
        image: uint8 [H, W] or [H, W, 3], in the order of `pixels`. None: the image is known to be lost.
        pixels: "rgb", "bgr", "mono", or an OpenCV Bayer pattern as GenICam names it: "bayer-rg",
            "bayer-gr", "bayer-gb", "bayer-bg".
        trigger_ns: `time.monotonic_ns()` of the trigger: where the source does not know, of the arrival.
        exposure_ns: `time.monotonic_ns()` of the exposure, where the source knows; of a software trigger
            that the camera refused, when it was. It tells to which part of the PLC the shot belongs.
        frame_id: The source's own number of the frame.
        origin: Where it came from: a file, a device. For people.
        problem: Why there is no image, one sentence.
    """

    image: np.ndarray | None
    trigger_ns: int
    origin: str
    pixels: str = "rgb"
    exposure_ns: int | None = None
    frame_id: int | None = None
    problem: str = ""


class Source(Protocol):
    """Delivers images. `shots` runs in a thread of its own; the rest is called from others."""

    def shots(self) -> Iterator[Shot]:
        """Blocks between the shots; ends when there are no more, or after `close`.

        A source that loses its camera connects again by itself, with back-off. A gap in the frame
        numbers gives one shot without an image for each missing frame, before the next frame.

        Raises:
            LineError: It cannot go on for good.
        """
        ...

    def fire(self) -> None:
        """Software trigger: asks for one shot. Only where the configuration says that it is triggered.

        Raises:
            LineError: The camera cannot be triggered now.
        """
        ...

    def counters(self) -> Mapping[str, int]:
        """Losses and the like since it was opened, by name in snake_case; any thread."""
        ...

    def close(self) -> None:
        """Ends `shots` within a second; may be repeated."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """The image of a part and its heat map.

    Attributes:
        image: uint8 [H, W, 3] RGB, the region that was inspected, as it came.
        anomaly_map: float32 [h, w] on the scale of the score, of the same region; None without a result.
    """

    image: np.ndarray
    anomaly_map: np.ndarray | None


class Sink(Protocol):
    """Takes records. All methods but `counters` are called in the sink's own thread, in turn.

    Attributes:
        wants_pictures: Whether `write` gets them; otherwise None.
    """

    wants_pictures: bool

    def write(self, record: Record, picture: Picture | None) -> None:
        """Takes one record; records come in the order of the triggers of each camera. May block.

        Raises:
            LineError, OSError: It could not be taken now: the caller tries the same one again later.
        """
        ...

    def write_late(self, record: Record) -> None:
        """Takes what the model said after the deadline; the verdict, LATE, was written before.

        `record` still says LATE, with the score that came too late.
        """
        ...

    def knows(self, part_id: int) -> bool:
        """Whether this part was written, also by an earlier process, as far as the sink can tell.

        At its start the line writes the last records again that a sink does not know. Sinks that keep
        nothing say True; `edgead.line.assembly.MARKED` are those that have to have all the same.
        """
        ...

    def counters(self) -> Mapping[str, int]:
        """Losses and the like, by name in snake_case; any thread."""
        ...

    def close(self) -> None:
        """Writes out what it holds, for at most a second; may be repeated."""
        ...


class Controls(Protocol):
    """What a PLC or a person may ask of a running line. Any thread; all calls return at once.

    Attributes:
        statistics: What the verdicts were.
    """

    statistics: Statistics

    @property
    def cameras(self) -> tuple[str, ...]:
        """Their names, in the order of the recipe file."""
        ...

    def trigger(self, camera: str, tag: int | None = None) -> int:
        """Opens a part and asks its camera for an image; returns the part id.

        Raises:
            LineError: No such camera, or one that is not triggered by this way; the line is starting or
                stopping.
        """
        ...

    def select_recipe(self, camera: str, index: int) -> None:
        """Parts triggered from now on are inspected by this recipe of the camera.

        Raises:
            LineError: No such camera or recipe.
        """
        ...

    def set_threshold(self, camera: str, value: float) -> None:
        """Of the camera's current recipe; holds for parts whose inspection starts from now on.

        Raises:
            LineError: No such camera, or not a finite number.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """What goes on, for people and metrics, of one moment; JSON can hold it.

        {"name", "ready": bool, "uptime_s", "cameras": {name: {"recipe", "recipes": [bundle name, ...],
        "threshold", "deadline_ms", "queue", "open_parts", "source": counters}}, "sinks": {name:
        {"waiting", "written", "failed", "dropped", ...counters}}}
        """
        ...
