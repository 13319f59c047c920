"""Input health: good and defective images pass, broken cameras do not; profiles survive the manifest."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.errors import BundleError, DataError
from edgead.health import HealthCheck, HealthProfile
from edgead.image import list_images, read_image
from edgead.image_facts import ImageFacts

SIDE_PX = 320


def part(seed: int, *, shift_px: tuple[int, int] = (0, 0)) -> np.ndarray:
    """uint8 [320, 320, 3]: a printed disc on a textured belt; `shift_px` is (down, right)."""
    rng = np.random.default_rng(seed)
    image = np.full((SIDE_PX, SIDE_PX, 3), 70.0) + rng.normal(0, 2)
    image += np.kron(np.random.default_rng(0).normal(0, 6, (80, 80, 1)), np.ones((4, 4, 1)))
    centre = (170 + shift_px[1] + int(rng.integers(-2, 3)), 150 + shift_px[0] + int(rng.integers(-2, 3)))
    cv2.circle(image, centre, 80, (170, 160, 150), -1, cv2.LINE_AA)
    cv2.rectangle(
        image, (centre[0] - 40, centre[1] - 10), (centre[0] + 50, centre[1] + 14), (90, 40, 30), 3
    )
    cv2.circle(image, (centre[0] - 30, centre[1] + 40), 12, (60, 60, 60), -1, cv2.LINE_AA)
    image += rng.normal(0, 2, image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def scaled(image: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(np.rint(image * np.float32(factor)), 0, 255).astype(np.uint8)


def blurred(image: np.ndarray, sigma_px: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma_px)


def moved(image: np.ndarray, down: float, right: float) -> np.ndarray:
    """Shares of height and width; the border is repeated, as a belt goes on."""
    height, width = image.shape[:2]
    rows = np.clip(np.arange(height) - round(down * height), 0, height - 1)
    columns = np.clip(np.arange(width) - round(right * width), 0, width - 1)
    return image[rows][:, columns]


@functools.cache
def profile() -> HealthProfile:
    return HealthProfile.of(part(seed) for seed in range(30))


def problem(image: np.ndarray) -> str:
    return HealthCheck(profile()).problem(image) or ""


# The check, on drawn parts


@settings(max_examples=25, deadline=None)
@given(st.integers(1000, 10**6))
def test_good_images_pass(seed: int) -> None:
    assert problem(part(seed)) == ""


@settings(max_examples=25, deadline=None)
@given(st.integers(1000, 10**6), st.floats(0, 0.6))
def test_dark_images_are_refused(seed: int, factor: float) -> None:
    # Limit 30 % below the 5 % quantile of images whose brightness varies by 3 %.
    assert problem(scaled(part(seed), factor)).startswith(("black: ", "too dark: "))


@settings(max_examples=25, deadline=None)
@given(st.integers(1000, 10**6), st.floats(1.5, 20))
def test_bright_images_are_refused(seed: int, factor: float) -> None:
    assert problem(scaled(part(seed), factor)).startswith(("too bright: ", "over-exposed: "))


@settings(max_examples=25, deadline=None)
@given(st.integers(1000, 10**6), st.floats(2.5, 12))
def test_blurred_images_are_refused(seed: int, sigma_px: float) -> None:
    assert problem(blurred(part(seed), sigma_px)).startswith("blurred: ")


@settings(max_examples=25, deadline=None)
@given(st.integers(1000, 10**6), st.floats(0.07, 0.2), st.floats(0, 2 * np.pi))
def test_moved_parts_are_refused_with_direction(seed: int, far: float, angle: float) -> None:
    down, right = far * np.sin(angle), far * np.cos(angle)
    text = problem(part(seed, shift_px=(round(down * SIDE_PX), round(right * SIDE_PX))))
    assert text.startswith("shifted: ")
    if abs(right) > 0.02:
        assert ("of the width to the right" if right > 0 else "of the width to the left") in text
    if abs(down) > 0.02:
        assert ("of the height down" if down > 0 else "of the height up") in text


def test_small_changes_pass() -> None:
    for seed in range(200, 210):
        for image in (
            scaled(part(seed), 0.85),
            scaled(part(seed), 1.15),
            blurred(part(seed), 0.5),
            part(seed, shift_px=(0, 8)),
        ):
            assert problem(image) == ""


def test_another_part_or_none_is_for_the_model() -> None:
    """What lies there may be anything, as long as the camera works."""
    rng = np.random.default_rng(5)
    belt = np.kron(rng.normal(100, 12, (80, 80, 1)), np.ones((4, 4, 3))) + rng.normal(
        0, 2, (320, 320, 3)
    )
    assert problem(np.clip(belt, 0, 255).astype(np.uint8)) == ""
    broken = part(3)
    broken[150:230, 90:300] = belt[150:230, 90:300]
    assert problem(broken) == ""


def test_sentences_hold_figure_and_limit() -> None:
    assert problem(np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8)) == (
        "black: mean brightness 0.0 of 255, this bundle's images have 83 to 89, limit 58:"
        " is the lamp on?"
    )
    assert problem(blurred(part(1), 4)).startswith("blurred: sharpness 0.")
    assert "limit 5.0% from where this bundle's parts lie" in problem(part(1, shift_px=(0, 40)))


def test_where_parts_lie_anywhere_no_shift_is_judged() -> None:
    rng = np.random.default_rng(1)
    images = [part(seed, shift_px=tuple(rng.integers(-60, 60, 2))) for seed in range(30)]
    check = HealthCheck(HealthProfile.of(images))
    assert all(check.problem(part(s, shift_px=(90, 90))) is None for s in range(50, 55))


def test_few_images_say_nothing_about_the_place() -> None:
    check = HealthCheck(HealthProfile.of([part(0), part(1)]))
    assert check.problem(part(2, shift_px=(40, 40))) is None
    assert check.problem(scaled(part(3), 0.3)) is not None


def test_frozen_images() -> None:
    check = HealthCheck(profile())
    assert check.problem(part(1)) is None
    assert check.problem(part(1)) == (
        "frozen: the same image once more, equal in every pixel: does the camera still record?"
    )
    assert "2 times more" in (check.problem(part(1)) or "")
    other = part(1)
    other[200, 200, 1] ^= 1  # the smallest possible change
    assert check.problem(other) is None
    assert check.problem(part(1)) is None, "the image before the last one is not the last one"


def test_frozen_after_more_repeats_or_never() -> None:
    patient, never = HealthCheck(None, frozen_after=3), HealthCheck(None, frozen_after=0)
    assert [bool(patient.problem(part(1))) for _ in range(5)] == [False, False, False, True, True]
    assert [never.problem(part(1)) for _ in range(5)] == [None] * 5


def test_without_a_profile_only_the_obvious() -> None:
    for image in (part(1), blurred(part(1), 6), scaled(part(1), 0.4), part(1, shift_px=(60, 60))):
        assert HealthCheck(None).problem(image) is None
    rng = np.random.default_rng(2)
    noise = np.clip(rng.normal(3, 3, (200, 300, 3)), 0, 255).astype(np.uint8)
    assert (HealthCheck(None).problem(noise) or "").startswith(
        "black: 100.0% of the pixels are at most 16"
    )
    white = np.full((200, 300), 255, np.uint8)
    assert (HealthCheck(None).problem(white) or "").startswith(
        "over-exposed: 100.0% of the pixels are at"
    )


# Facts


@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 3), (31, 900), (64, 64, 3), (255, 257, 3), (1200, 1920), (900, 900, 3)]
)
def test_facts_of_any_size(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    facts = ImageFacts.of(image)
    assert facts.thumbnail.shape == (32, 32)
    assert 0 <= facts.near_black <= 1 and 0 <= facts.saturated <= 1 and 0 <= facts.sharpness < 8
    grey = ImageFacts.of(np.full(shape, 100, np.uint8))
    assert (grey.brightness, grey.near_black, grey.saturated, grey.sharpness) == (100, 0, 0, 0)
    assert ImageFacts.of(np.asfortranarray(image)).digest == facts.digest != grey.digest


def test_sharpness_knows_neither_brightness_nor_contrast() -> None:
    image = part(1).astype(np.float32)
    dim = np.rint(image * 0.5 + 60).astype(np.uint8)
    assert ImageFacts.of(dim).sharpness == pytest.approx(
        ImageFacts.of(part(1)).sharpness, rel=0.02
    )  # rounding


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**20))
def test_one_pixel_changes_the_digest(seed: int, height: int, width: int, where: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    changed = image.copy()
    changed.reshape(-1)[where % image.size] ^= 1
    assert ImageFacts.of(changed).digest != ImageFacts.of(image).digest


def test_digest_sees_noiseless_scenes_move() -> None:
    """16 rows of 1024 RGB pixels are a round number of bytes, which a plain fold would miss."""
    digests = set()
    for row in range(0, 512, 16):
        scene = np.zeros((1024, 1024, 3), np.uint8)
        scene[row : row + 64, 300:400] = 200
        digests.add(ImageFacts.of(scene).digest)
    assert len(digests) == 32


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4), np.float32),
        np.zeros((0, 4), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_facts_refuse_other_arrays(image: np.ndarray) -> None:
    with pytest.raises(DataError, match="expected uint8"):
        ImageFacts.of(image)


# The profile in the manifest


def test_profile_comes_back_from_json() -> None:
    text = json.dumps(profile().to_dict())
    assert len(text) < 4096
    assert HealthProfile.from_dict(json.loads(text)) == profile()


def test_no_images_no_profile() -> None:
    with pytest.raises(DataError, match="no image"):
        HealthProfile.of([])


def set_to(name: str, value: object) -> Callable[[dict[str, object]], None]:
    return lambda data: data.update({name: value})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda data: data.pop("shift"), "shift"),
        (set_to("colour", 1), "colour"),
        (set_to("images", 0), "images"),
        (set_to("images", True), "images"),
        (set_to("images", 2.0), "images"),
        (set_to("images", 10**30), "images"),
        (set_to("brightness", [1, 2]), "brightness"),
        (set_to("brightness", [3, 2, 4]), "brightness"),
        (set_to("brightness", [1, 2, 256]), "brightness"),
        (set_to("near_black", [0, 0, float("nan")]), "near_black"),
        (set_to("saturated", ["0", 0, 1]), "saturated"),
        (set_to("sharpness", 3), "sharpness"),
        (set_to("shift", -0.1), "shift"),
        (set_to("peak", None), "peak"),
        (set_to("thumbnail", "A" * 100), "thumbnail"),
        (set_to("thumbnail", "A" * 10**6), "thumbnail"),
        (set_to("thumbnail", "!" * 1368), "thumbnail"),
        (set_to("thumbnail", "é" * 1368), "thumbnail"),
        (set_to("thumbnail", [0] * 1024), "thumbnail"),
    ],
)
def test_a_wrong_field_is_named(change: Callable[[dict[str, object]], object], field: str) -> None:
    data = profile().to_dict()
    change(data)
    with pytest.raises(BundleError, match=f"manifest field input_health.{field}: got .*, expected "):
        HealthProfile.from_dict(data)


def test_profile_must_be_an_object() -> None:
    with pytest.raises(BundleError, match="manifest field input_health: got 3, expected an object"):
        HealthProfile.from_dict(3)


# Real images


def read(folder: Path, count: int | None = None) -> list[np.ndarray]:
    return [read_image(path) for path in list_images(folder)[:count]]


@pytest.mark.parametrize("name", ["mvtec_bottle", "cookies"])
def test_real_images(shared: Path, name: str) -> None:
    """No good or defective image is refused; the changed ones are, each for its reason."""
    root = shared / "data" / name
    train = read(root / "train" / "good", 40)
    for fold in (0, 1):
        check = HealthCheck(HealthProfile.of(train[fold::2]))
        assert [check.problem(image) for image in train[1 - fold :: 2]] == [None] * len(
            train[1 - fold :: 2]
        )
    check = HealthCheck(HealthProfile.of(train))
    test = read(root / "test")
    good = read(root / "test" / "good")[::2]
    assert [check.problem(image) for image in test] == [None] * len(test)
    assert all((check.problem(scaled(image, 0.55)) or "").startswith("too dark: ") for image in good)
    assert all((check.problem(scaled(image, 0.02)) or "").startswith("black: ") for image in good)
    words = ("too bright: ", "over-exposed: ")
    assert all((check.problem(scaled(image, 2.5)) or "").startswith(words) for image in good)
    assert all((check.problem(blurred(image, 2.5)) or "").startswith("blurred: ") for image in good)
    if name == "mvtec_bottle":  # the cookies lie anywhere
        for down, right in ((0, 0.1), (0.08, -0.06), (-0.25, 0)):
            texts = [check.problem(moved(image, down, right)) or "" for image in good]
            assert all(text.startswith("shifted: ") for text in texts)
    else:
        assert all(check.problem(moved(image, 0.1, 0.1)) is None for image in good)
