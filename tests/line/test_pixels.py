from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgead.errors import LineError
from edgead.line.interfaces import Shot
from edgead.line.pixels import to_rgb

COLOUR = np.array([200, 120, 40], np.uint8)  # R, G, B: all different
PIXELS = ("rgb", "bgr", "mono", "bayer-rg", "bayer-gr", "bayer-gb", "bayer-bg")


def shot(image: np.ndarray | None, pixels: str, **more: str) -> Shot:
    return Shot(image, trigger_ns=0, origin="test camera", pixels=pixels, **more)


def mosaic(rgb: np.ndarray, pixels: str) -> np.ndarray:
    """What a sensor records. GenICam (PFNC) names a Bayer pattern by its first row: BayerGR begins
    G R G R, and the second row holds the third colour and the other green."""
    first = pixels.removeprefix("bayer-").upper()
    second = {"RG": "GB", "GR": "BG", "GB": "RG", "BG": "GR"}[first]
    raw = np.empty(rgb.shape[:2], np.uint8)
    for row, names in enumerate((first, second)):
        for column, name in enumerate(names):
            raw[row::2, column::2] = rgb[row::2, column::2, "RGB".index(name)]
    return raw


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("pixels", PIXELS[3:])
@pytest.mark.parametrize("into", [False, True])
def test_bayer_gives_the_colour_that_the_sensor_saw(pixels: str, into: bool) -> None:
    flat = np.broadcast_to(COLOUR, (8, 10, 3))
    target = np.zeros((8, 10, 3), np.uint8) if into else None
    rgb = to_rgb(shot(mosaic(flat, pixels), pixels), target)
    # A single colour is the same however one interpolates, so the result is exact.
    np.testing.assert_array_equal(rgb, flat)
    assert target is None or rgb is target


@pytest.mark.parametrize("pixels", PIXELS[3:])
def test_bayer_keeps_left_and_right_and_top_and_bottom(pixels: str) -> None:
    quarters = np.zeros((16, 16, 3), np.uint8)
    quarters[:8, :8], quarters[:8, 8:], quarters[8:, :8], quarters[8:, 8:] = (
        (250, 10, 10),
        (10, 250, 10),
        (10, 10, 250),
        (90, 90, 90),
    )
    rgb = to_rgb(shot(mosaic(quarters, pixels), pixels))
    for rows in (slice(2, 6), slice(10, 14)):  # clear of the borders, where colours mix
        for columns in (slice(2, 6), slice(10, 14)):
            np.testing.assert_array_equal(rgb[rows, columns], quarters[rows, columns])


def test_mono_rgb_and_bgr() -> None:
    grey, rgb = noise(5, 7), noise(5, 7, 3)
    np.testing.assert_array_equal(to_rgb(shot(grey, "mono")), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(to_rgb(shot(rgb[..., ::-1], "bgr")), rgb)
    assert to_rgb(shot(rgb, "rgb")) is rgb


@pytest.mark.parametrize("pixels", PIXELS)
def test_the_result_goes_into_the_array_that_is_given(pixels: str) -> None:
    image = noise(6, 8, 3) if pixels in ("rgb", "bgr") else noise(6, 8)
    buffers = np.zeros((3, 6, 8, 3), np.uint8)  # the slots of an executor: one of them is given
    result = to_rgb(shot(image, pixels), buffers[1])
    assert np.shares_memory(result, buffers[1])
    np.testing.assert_array_equal(buffers[1], to_rgb(shot(image, pixels)))
    assert not buffers[[0, 2]].any()


@pytest.mark.parametrize("pixels", PIXELS)
def test_views_and_read_only_images_are_taken(pixels: str) -> None:
    wide = noise(6, 20, 3) if pixels in ("rgb", "bgr") else noise(6, 20)
    view = wide[:, 4:12]
    view.flags.writeable = False
    np.testing.assert_array_equal(to_rgb(shot(view, pixels)), to_rgb(shot(view.copy(), pixels)))


@given(
    st.sampled_from(PIXELS),
    st.tuples(st.integers(0, 4), st.integers(0, 4)) | st.tuples(*[st.integers(0, 4)] * 3),
    st.sampled_from((np.uint8, np.uint16)),
)
def test_every_shape_is_converted_or_refused(pixels: str, shape: tuple[int, ...], dtype: type) -> None:
    channels = (3,) if pixels in ("rgb", "bgr") else ()
    least_px = 3 if pixels.startswith("bayer") else 1
    fits = dtype is np.uint8 and shape[2:] == channels and min(shape[:2]) >= least_px
    if fits:
        assert (
            to_rgb(shot(np.full(shape, 9, dtype), pixels)).tolist()
            == np.full((*shape[:2], 3), 9).tolist()
        )
    else:
        with pytest.raises(LineError, match="test camera"):
            to_rgb(shot(np.full(shape, 9, dtype), pixels))


@pytest.mark.parametrize(
    "target",
    [
        np.zeros((6, 9, 3), np.uint8),
        np.zeros((6, 8), np.uint8),
        np.zeros((6, 8, 3), np.float32),
        np.zeros((6, 16, 3), np.uint8)[:, ::2],
        np.broadcast_to(np.uint8(0), (6, 8, 3)),
    ],
    ids=["width", "channels", "dtype", "strides", "read-only"],
)
@pytest.mark.parametrize("pixels", ["rgb", "mono"])
def test_an_array_that_does_not_fit_is_refused(target: np.ndarray, pixels: str) -> None:
    with pytest.raises(LineError, match="test camera"):
        to_rgb(shot(noise(6, 8, 3) if pixels == "rgb" else noise(6, 8), pixels), target)


def test_a_shot_without_image_says_why() -> None:
    with pytest.raises(LineError, match="frame 7 is missing"):
        to_rgb(shot(None, "rgb", problem="frame 7 is missing"))


def test_an_unknown_pixel_format_is_named() -> None:
    with pytest.raises(LineError, match="'mono12'.*bayer-rg"):
        to_rgb(shot(noise(4, 4), "mono12"))
