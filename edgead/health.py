"""Input health: is this image fit to be inspected, before anyone asks whether the part is good.

A dead lamp, a lens out of focus or a moved camera look like anomalies to a model. `HealthCheck` compares
a few figures of each image with those of the good images that the bundle was trained on
(`HealthProfile`, in its manifest) and says in a sentence what is wrong, so that the part gets
NOT_INSPECTED and people the cause.

The limits are wide on purpose: they are to find what an operator would call a broken camera. Measured on
MVTec bottle (900 x 900) and cookies (768 x 576), as images refused of images tried; the changed images
are the good ones of the test set and the first 40 of the training set:

    images                                                    bottle      cookies
    good, profile of the other 4/5 of the training images     0 of 209    0 of 31
    good, of the test set                                     0 of 20     0 of 14
    defective, of the test set                                0 of 63     0 of 32
    blurred, Gaussian of 1 px                                 0 of 60     0 of 45
    blurred, Gaussian of 2 px                                 60 of 60    45 of 45
    brightness x 0.8                                          0 of 60     0 of 45
    brightness x 0.6                                          60 of 60    44 of 45
    brightness x 2.5                                          60 of 60    45 of 45
    moved by 4 % of the width                                 0 of 60     not judged: they lie anywhere
    moved by 6, 8, 10, 15, 20, 25, 30, 35 % of the width      60 of 60    not judged
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgead.errors import BundleError, DataError
from edgead.image_facts import NEAR_BLACK, SATURATED, THUMBNAIL_PX, ImageFacts, Place

HEALTH = "input_health"  # key of a profile in run.json and in the manifest's `model`

_MIN_IMAGES_FOR_PLACE = 10
_TYPICAL_SHIFT = 0.03  # share of the width or height; parts lie alike up to this one
_TYPICAL_PEAK = 0.5  # and from this correlation


@dataclass(frozen=True, kw_only=True)
class HealthProfile:
    """What a bundle's good images look like: the optional field `input_health` of its manifest.

    Triples are the quantiles 5 %, 50 % and 95 %: a few bad images among the good ones do no harm.

    Attributes:
        images: Number of images behind the figures.
        brightness: Of `ImageFacts.brightness`, 0..255; likewise `near_black`, `saturated`, `sharpness`.
        shift: Quantile 95 % of the distance of a part from the mean place, in shares of width or height.
        peak: Quantile 5 % of the correlation at that place, 0..1; 1 for equal images.
        thumbnail: uint8 [32, 32], mean of the thumbnails, row by row.
    """

    images: int
    brightness: tuple[float, float, float]
    near_black: tuple[float, float, float]
    saturated: tuple[float, float, float]
    sharpness: tuple[float, float, float]
    shift: float
    peak: float
    thumbnail: bytes

    def __post_init__(self) -> None:
        _check(
            _is_int(self.images) and 1 <= self.images < 2**31, "images", self.images, "a count from 1"
        )
        for name, most in (("brightness", 255), ("near_black", 1), ("saturated", 1), ("sharpness", 100)):
            triple = getattr(self, name)
            good = isinstance(triple, tuple) and len(triple) == 3
            good = (
                good and all(_in_range(value, most) for value in triple) and sorted(triple) == [*triple]
            )
            _check(good, name, triple, f"three rising numbers 0..{most}")
        for name in ("shift", "peak"):
            value = getattr(self, name)
            _check(_in_range(value, 1), name, value, "a number 0..1")
        good = isinstance(self.thumbnail, bytes) and len(self.thumbnail) == THUMBNAIL_PX**2
        _check(good, "thumbnail", self.thumbnail, f"{THUMBNAIL_PX**2} bytes")

    @classmethod
    def of(cls, images: Iterable[np.ndarray]) -> HealthProfile:
        """Takes the profile of good images, each uint8 [H, W, 3] RGB as the model gets them (the same
        region and frame size as on the line); they are held one at a time.

        Raises:
            DataError: No image, or one that is not such an array.
        """
        figures, thumbnails = [], []
        for image in images:
            facts = ImageFacts.of(image)
            figures.append((facts.brightness, facts.near_black, facts.saturated, facts.sharpness))
            thumbnails.append(facts.thumbnail.astype(np.float16))
        if not figures:
            raise DataError("no image to take the input health from; expected the good training images")
        mean = np.rint(np.mean(thumbnails, axis=0, dtype=np.float64)).astype(np.uint8)
        place = Place(mean)
        shifts = [place.of(thumbnail.astype(np.float32)) for thumbnail in thumbnails]
        brightness, near_black, saturated, sharpness = (
            _rounded(np.quantile(column, (0.05, 0.5, 0.95))) for column in zip(*figures, strict=True)
        )
        return cls(
            images=len(figures),
            brightness=brightness,
            near_black=near_black,
            saturated=saturated,
            sharpness=sharpness,
            shift=round(float(np.quantile([math.hypot(s.right, s.down) for s in shifts], 0.95)), 5),
            peak=round(float(np.clip(np.quantile([s.peak for s in shifts], 0.05), 0, 1)), 5),
            thumbnail=mean.tobytes(),
        )

    def to_dict(self) -> dict[str, Any]:
        """About 2 kB as JSON; `from_dict` reads it again."""
        data: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            data[field.name] = list(value) if isinstance(value, tuple) else value
        return data | {"thumbnail": base64.b64encode(self.thumbnail).decode()}

    @classmethod
    def from_dict(cls, data: Any) -> HealthProfile:
        """Reads `to_dict`.

        Raises:
            BundleError: It is something else; names the field.
        """
        good = isinstance(data, Mapping) and all(isinstance(key, str) for key in data)
        _check(good, "", data, "an object with text keys")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in names:
            _check(name in data, name, "nothing", "this field; export the bundle again")
        for name in data:
            _check(name in names, name[:60], data[name], f"no such field; known are {', '.join(names)}")
        text = data["thumbnail"]
        try:
            # Of bounded size before it is decoded.
            good = isinstance(text, str) and len(text) <= 2 * THUMBNAIL_PX**2
            thumbnail = base64.b64decode(text, validate=True) if good else b""
        except (binascii.Error, ValueError):
            thumbnail = b""
        _check(bool(thumbnail), "thumbnail", text, f"{THUMBNAIL_PX**2} bytes in base64")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values | {"thumbnail": thumbnail})


def _rounded(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = (round(float(value), 5) for value in values)
    return low, middle, high


def _check(condition: bool, name: str, got: object, expected: str) -> None:
    if not condition:
        shown = repr(got)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        where = f"input_health.{name}" if name else "input_health"
        raise BundleError(f"manifest field {where}: got {shown}, expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _in_range(value: object, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


class HealthCheck:
    """Judges the images of one camera, one after the other."""

    def __init__(self, profile: HealthProfile | None, *, frozen_after: int = 1) -> None:
        """
        Args:
            profile: Of the bundle in use. None (a bundle from before profiles): only black, over-exposed
                and frozen images are found.
            frozen_after: How often the image before has to come again, equal in every pixel, until this
                is a problem; 0: never (a replay may hold the same image twice).
        """
        self._limits = None if profile is None else _Limits(profile)
        self._frozen_after = frozen_after
        self._last = b""
        self._repeats = 0

    def problem(self, image: np.ndarray) -> str | None:
        """Says in one sentence why this image cannot be inspected; None: it can.

        Args:
            image: uint8 [H, W, 3] RGB or [H, W] grey, what the model would get.

        Raises:
            DataError: Not such an array.
        """
        facts = ImageFacts.of(image)
        self._repeats = self._repeats + 1 if facts.digest == self._last else 0
        self._last = facts.digest
        exposure = _without_profile(facts) if self._limits is None else self._limits.exposure(facts)
        if exposure:
            return exposure
        if self._frozen_after and self._repeats >= self._frozen_after:
            times = "once more" if self._repeats == 1 else f"{self._repeats} times more"
            return f"frozen: the same image {times}, equal in every pixel: does the camera still record?"
        return (
            None if self._limits is None else self._limits.sharpness(facts) or self._limits.place(facts)
        )


def _without_profile(facts: ImageFacts) -> str | None:
    if facts.near_black >= 0.999:
        return (
            f"black: {facts.near_black:.1%} of the pixels are at most {NEAR_BLACK} of 255, limit 99.9%:"
            " is the lamp on?"
        )
    if facts.saturated >= 0.98:
        return (
            f"over-exposed: {facts.saturated:.1%} of the pixels are at least {SATURATED} of 255, limit"
            " 98.0%: check lamp, aperture and exposure time"
        )
    return None


class _Limits:
    """The limits that follow from a profile: its 5 % and 95 % quantiles and a wide margin."""

    def __init__(self, profile: HealthProfile) -> None:
        self._profile = profile
        low, middle, high = profile.brightness
        self._darkest = max(low - max(3 * (middle - low), 0.3 * low), 0.0)
        self._brightest = high + max(3 * (high - middle), 0.3 * high)
        _, middle, high = profile.saturated
        self._most_saturated = high + max(3 * (high - middle), 0.2)
        _, middle, high = profile.near_black
        self._most_black = high + max(3 * (high - middle), 0.3)
        low, middle, _ = profile.sharpness
        self._softest = min(0.6 * low, low - 3 * (middle - low))
        lie_alike = (
            profile.images >= _MIN_IMAGES_FOR_PLACE
            and profile.shift <= _TYPICAL_SHIFT
            and profile.peak >= _TYPICAL_PEAK
        )
        thumbnail = np.frombuffer(profile.thumbnail, np.uint8).reshape(THUMBNAIL_PX, THUMBNAIL_PX)
        self._place = Place(thumbnail) if lie_alike else None
        self._farthest = max(3 * profile.shift, 0.05)

    def exposure(self, facts: ImageFacts) -> str | None:
        low, _, high = self._profile.brightness
        usual = f"this bundle's images have {low:.0f} to {high:.0f}"
        if facts.brightness < self._darkest or facts.near_black > self._most_black:
            word = "black" if facts.near_black >= 0.98 else "too dark"
            ask = "is the lamp on?" if word == "black" else "check lamp and exposure time"
            if facts.brightness < self._darkest:
                limit = f"{usual}, limit {self._darkest:.0f}"
                return f"{word}: mean brightness {facts.brightness:.1f} of 255, {limit}: {ask}"
            return (
                f"{word}: {facts.near_black:.0%} of the pixels are at most {NEAR_BLACK} of 255, this"
                f" bundle's images have up to {self._profile.near_black[2]:.0%}, limit"
                f" {self._most_black:.0%}: {ask}"
            )
        if facts.saturated > self._most_saturated:
            return (
                f"over-exposed: {facts.saturated:.0%} of the pixels are at least {SATURATED} of 255,"
                f" this bundle's images have up to {self._profile.saturated[2]:.0%}, limit"
                f" {self._most_saturated:.0%}: check lamp, aperture and exposure time"
            )
        if facts.brightness > self._brightest:
            return (
                f"too bright: mean brightness {facts.brightness:.1f} of 255, {usual}, limit"
                f" {self._brightest:.0f}: check lamp, aperture and exposure time"
            )
        return None

    def sharpness(self, facts: ImageFacts) -> str | None:
        if facts.sharpness >= self._softest:
            return None
        low, _, high = self._profile.sharpness
        return (
            f"blurred: sharpness {facts.sharpness:.2f}, this bundle's images have {low:.2f} to"
            f" {high:.2f}, limit {self._softest:.2f}: check focus, motion and dirt on the lens"
        )

    def place(self, facts: ImageFacts) -> str | None:
        if self._place is None:
            return None
        shift = self._place.of(facts.thumbnail)
        far = math.hypot(shift.right, shift.down)
        # A weak peak is another part or none: that is for the model. A strong one at home as well is a
        # pattern that repeats.
        strong = shift.peak >= 0.4 * self._profile.peak and shift.at_home <= 0.5 * shift.peak
        if far <= self._farthest or not strong:
            return None
        horizontal = (
            f"{abs(shift.right):.1%} of the width to the {'right' if shift.right > 0 else 'left'}"
        )
        vertical = f"{abs(shift.down):.1%} of the height {'down' if shift.down > 0 else 'up'}"
        return (
            f"shifted: {horizontal} and {vertical}, limit {self._farthest:.1%} from where this bundle's"
            " parts lie: did the camera or the stop move?"
        )
