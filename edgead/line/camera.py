"""One camera of a running line: its open parts, its recipes, and what meets an image that comes in."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgead.errors import DataError, EdgeADError, LineError
from edgead.health import HealthCheck
from edgead.line.awaiting import Awaiting
from edgead.line.bundles import Bundles
from edgead.line.inspector import Inspector
from edgead.line.interfaces import Shot, Source
from edgead.line.ledger import Decision, Ledger, Part
from edgead.line.pixels import to_rgb
from edgead.line.recipe import CameraConfig, Inspection
from edgead.line.verdicts import Verdict
from edgead.result import Result

PLAIN_PIXELS = ("rgb", "bgr", "mono")
LOSSES = ("overflows", "superseded", "unexpected", "missing_images", "late_results")


@dataclass(slots=True, eq=False)
class Job:
    """An image on its way to its verdict.

    Attributes:
        region: uint8 [H, W, 3] RGB, what is inspected of the shot; None is all of it, not decoded yet.
        sender: The thread that gives it to its model, until that has taken it.
        is_gone: It was given up: whatever comes back is not heard.
        is_fit: Whether its image is fit to be inspected; None while that is still looked at, beside the
            inference, whose answer then waits.
        answer: What the model said before that was known.
    """

    camera: Camera
    part: Part
    shot: Shot
    region: np.ndarray | None
    inspector: Inspector | None = None
    threshold: float = 0.0
    start_ns: int = 0
    sender: threading.Thread | None = None
    is_gone: bool = False
    is_fit: bool | None = None
    answer: Decision | None = None

    @property
    def deadline_ns(self) -> int:
        return self.part.deadline_ns

    def decision(self, answer: Result | BaseException, now_ns: int) -> Decision:
        """What the model's answer, which came now, means."""
        if not isinstance(answer, Result):
            kind = "" if isinstance(answer, EdgeADError) else f"{type(answer).__name__}: "
            return Decision(Verdict.ERROR, f"{kind}{answer}", now_ns, start_ns=self.start_ns)
        is_bad = answer.score >= self.threshold
        sign = ">=" if is_bad else "<"
        return Decision(
            Verdict.NG if is_bad else Verdict.OK,
            f"score {answer.score:.4g} {sign} threshold {self.threshold:.4g}",
            now_ns,
            score=answer.score,
            threshold=self.threshold,
            start_ns=self.start_ns,
            end_ns=now_ns,
        )


class Camera:
    """State of one camera. All but `region` and `problem` is called under the line's lock.

    Attributes:
        recipe: Index of the recipe in use.
        thresholds: Per recipe, what was set by hand or in the recipe file; None is the bundle's own.
        awaiting: Parts that the PLC triggered, whose images have not come yet.
        counts: Losses by name.
        shots: What the source delivers; None while it has to be asked for them.
        reopen: Opens the source anew after it failed; None where that makes no sense (files).
        failure: Why there are no images at present.
    """

    def __init__(
        self, config: CameraConfig, source: Source, reopen: Callable[[], Source] | None = None
    ) -> None:
        self.config, self.source, self.reopen = config, source, reopen
        self.recipe = config.start_recipe
        self.thresholds = [inspection.threshold for inspection in config.recipes]
        self.ledger = Ledger(config.deadline_ms)
        self.awaiting = Awaiting(config.image_timeout_ms or max(5 * config.deadline_ms, 1000))
        self.counts = Counter(dict.fromkeys(LOSSES, 0))
        self.shots: Iterator[Shot] | None = None
        self.has_ended = self.overflows = False
        self.failure: str | None = None
        self._checks: dict[int, tuple[Inspector, HealthCheck]] = {}

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def inspection(self) -> Inspection:
        """The recipe in use."""
        return self.config.recipes[self.recipe]

    def threshold(self, recipe: int, inspector: Inspector) -> float:
        """That holds for a recipe now."""
        own = self.thresholds[recipe]
        return inspector.threshold if own is None else own

    def drop_threshold(self, recipe: int) -> float | None:
        """Takes back what was set by hand since the start; returns it, None if there was nothing."""
        own, first = self.thresholds[recipe], self.config.recipes[recipe].threshold
        self.thresholds[recipe] = first
        return None if own == first else own

    def state(self, bundles: Bundles, queue: int) -> dict[str, Any]:
        """For `Controls.state`; `queue` is how many of its images wait."""
        inspector = bundles.get(self.inspection.bundle)
        return {
            "recipe": self.recipe,
            "recipes": [bundles.name(recipe.bundle) for recipe in self.config.recipes],
            "threshold": None if inspector is None else self.threshold(self.recipe, inspector),
            "deadline_ms": self.config.deadline_ms,
            "queue": queue,
            "open_parts": len(self.ledger),
            "source": {**self.counts},
            "failure": self.failure,
        }

    def region(self, shot: Shot, recipe: int, *, decode: bool) -> np.ndarray | None:
        """What is inspected of an image, in the thread of its source.

        Returns:
            uint8 [H, W, 3] RGB, if that is not all of it or if `decode` asks for it.

        Raises:
            LineError: There is no image, or it does not fit the recipe.
        """
        if shot.image is None:
            raise LineError(shot.problem or "the image was lost")
        roi = self.config.recipes[recipe].roi_px
        region = to_rgb(shot) if decode or roi or shot.pixels not in PLAIN_PIXELS else None
        return region if roi is None or region is None else _crop(region, *roi)

    def problem(self, image: np.ndarray, recipe: int, inspector: Inspector | None) -> str | None:
        """Why an image is not fit to be inspected, if so; in the thread of its source."""
        check = self._check(recipe, inspector)
        try:
            return None if check is None else check.problem(image)
        except DataError as error:
            return str(error)

    def _check(self, recipe: int, inspector: Inspector | None) -> HealthCheck | None:
        if not self.config.health or inspector is None:
            return None
        known, check = self._checks.get(recipe, (None, None))
        if known is not inspector or check is None:
            check = HealthCheck(inspector.profile)
            self._checks[recipe] = inspector, check
        return check


def _crop(image: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    if left + width > image.shape[1] or top + height > image.shape[0]:
        raise LineError(
            f"roi_px [{left}, {top}, {width}, {height}] does not fit into this image of "
            f"{image.shape[1]} x {image.shape[0]} px"
        )
    # A view would keep the whole image in memory for as long as a sink holds its region.
    return image[top : top + height, left : left + width].copy()
