from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from edgead.errors import DataError
from edgead.image import (
    COLORS,
    MAX_PIXELS,
    as_rgb,
    enlarge,
    list_images,
    read_image,
    read_mask,
    resize,
    resize_matrix,
    write_image,
)

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}}


def picture(height_px: int = 24, width_px: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth colours, which JPEG keeps within a few levels."""
    coarse = np.random.default_rng(seed).integers(40, 216, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC))


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(1).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def encode(array: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    # Pillow's own guess of the mode is enough for all but grey with alpha.
    picture = Image.fromarray(array) if mode is None else Image.fromarray(array[..., 0]).convert(mode)
    if mode == "LA":
        picture.putalpha(Image.fromarray(array[..., 1]))
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def store(folder: Path, data: bytes, name: str = "part.bin") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_are_read_exactly(tmp_path: Path, kind: str) -> None:
    array = noise(7, 9, 3)
    image = read_image(store(tmp_path, encode(array, kind, **LOSSLESS[kind])))
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, array)


def test_jpeg_is_read_in_rgb_order(tmp_path: Path) -> None:
    array = np.zeros((16, 16, 3), np.uint8)
    array[...] = (200, 100, 20)
    image = read_image(store(tmp_path, encode(array, "JPEG", quality=95)))
    assert np.abs(image.astype(int) - array).max() <= 3  # JPEG's colour conversion and rounding


@pytest.mark.parametrize("kind", FORMATS)
def test_grey_becomes_three_equal_channels(tmp_path: Path, kind: str) -> None:
    grey = picture()[..., 0]
    image = read_image(store(tmp_path, encode(grey, kind, **LOSSLESS.get(kind, {"quality": 95}))))
    assert image.shape == (24, 32, 3)
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])
    assert np.abs(image[..., 0].astype(int) - grey).max() <= 4


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (5, 6, 4)])
def test_16_bits_are_scaled_from_their_full_range(
    tmp_path: Path, suffix: str, shape: tuple[int, ...]
) -> None:
    array = noise(*shape, dtype=np.uint16)
    array.reshape(-1)[:8] = (0, 128, 129, 257, 385, 386, 65406, 65535)  # around the steps of x / 257
    image = read_image(store(tmp_path, cv2.imencode(suffix, array)[1].tobytes()))
    bgr = array[..., :3] if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2)
    np.testing.assert_array_equal(image, np.rint(bgr[..., ::-1] / 257).astype(np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_dropped(tmp_path: Path, kind: str) -> None:
    array = np.dstack([noise(6, 8, 3), np.full((6, 8), 100, np.uint8)])
    image = read_image(store(tmp_path, encode(array, kind, **LOSSLESS[kind])))
    np.testing.assert_array_equal(image, array[..., :3])


def test_alpha_is_dropped_from_grey(tmp_path: Path) -> None:
    array = noise(6, 8, 2)
    image = read_image(store(tmp_path, encode(array, "PNG", "LA")))
    np.testing.assert_array_equal(image[..., 2], array[..., 0])


def test_tiff_with_alpha_is_read_only_where_opaque(tmp_path: Path) -> None:
    array = np.dstack([noise(6, 8, 3), np.full((6, 8), 255, np.uint8)])
    np.testing.assert_array_equal(read_image(store(tmp_path, encode(array, "TIFF"))), array[..., :3])
    array[2, 3, 3] = 254
    with pytest.raises(DataError, match="part.bin.*without alpha"):
        read_image(store(tmp_path, encode(array, "TIFF")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_pillow_does(tmp_path: Path, kind: str, orientation: int) -> None:
    if kind == "WEBP" and int(cv2.__version__.split(".")[0]) < 5:
        pytest.skip("OpenCV 4 does not apply the orientation of WebP files")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = LOSSLESS.get(kind, {"quality": 100, "subsampling": 0})
    data = encode(picture(), kind, exif=exif.tobytes(), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    image = read_image(store(tmp_path, data))
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= 2  # the JPEG decoders' rounding


@pytest.mark.parametrize("kind", ["TIFF", "PNG", "WEBP"])
def test_first_of_several_pages_is_read(tmp_path: Path, kind: str) -> None:
    if kind == "WEBP" and int(cv2.__version__.split(".")[0]) < 5:
        pytest.skip("OpenCV 4 refuses animated WebP files")
    array = noise(6, 8, 3)
    data = encode(
        array, kind, save_all=True, append_images=[Image.fromarray(255 - array)], **LOSSLESS[kind]
    )
    np.testing.assert_array_equal(read_image(store(tmp_path, data)), array)


def test_palette_and_bilevel_images(tmp_path: Path) -> None:
    palette = Image.fromarray(noise(6, 8, 3)).quantize(16)
    palette.save(tmp_path / "palette.png")
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), expected)
    bilevel = noise(6, 8) > 127
    Image.fromarray(bilevel).save(tmp_path / "bilevel.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bilevel.png")[..., 0], bilevel * 255)


def test_unicode_path_and_path_as_text(tmp_path: Path) -> None:
    path = tmp_path / "Prüfling №7 部品.png"
    write_image(path, noise(4, 4, 3))
    np.testing.assert_array_equal(read_image(str(path)), noise(4, 4, 3))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.8, 0.99, -2, -1])
def test_cut_off_file_is_refused(tmp_path: Path, kind: str, kept: float) -> None:
    data = encode(picture(120, 160), kind)
    path = store(tmp_path, data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(DataError, match="part.bin.*copy it again"):
        read_image(path)


def test_jpeg_end_marker_of_the_thumbnail_does_not_count(tmp_path: Path) -> None:
    data = encode(picture(120, 160), "JPEG")
    thumbnail = b"Exif\0\0" + encode(picture(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = data[:2] + b"\xff" + segment + data[2:]  # with one byte of padding before the marker
    assert read_image(store(tmp_path, whole)).shape == (120, 160, 3)
    assert read_image(store(tmp_path, whole + bytes(100))).shape == (120, 160, 3)
    for cut in (whole[: len(segment) + 200], whole[:-2], whole[: len(whole) // 2] + bytes(2000)):
        with pytest.raises(DataError, match="JPEG file without its end"):
            read_image(store(tmp_path, cut))


def test_png_checksums_are_verified(tmp_path: Path) -> None:
    data = bytearray(encode(noise(40, 40, 3), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(DataError, match="damaged"):
        read_image(store(tmp_path, bytes(data)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text file", "not one of JPEG, PNG, BMP, TIFF, WebP"),
        (encode(noise(4, 4, 3), "GIF"), "not one of"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "not one of"),
        (b"\xff\xd8\xff", "header gives no image size"),
        (b"II*\0\x08\0\0\0\0\0", "header gives no image size"),
        (cv2.imencode(".tif", noise(4, 4, 3).astype(np.float32))[1].tobytes(), "the pixels are float32"),
        (cv2.imencode(".tif", noise(4, 4, 3).astype(np.int16))[1].tobytes(), "the pixels are int16"),
    ],
)
def test_file_that_is_no_usable_image(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"part.bin.*{message}"):
        read_image(store(tmp_path, data))


def test_missing_file_folder_and_impossible_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.png.*No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(DataError, match="this is a folder"):
        read_image(tmp_path)
    with pytest.raises(DataError, match="too long"):
        read_image(tmp_path / ("x" * 5000))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_and_folder(tmp_path: Path) -> None:
    path = store(tmp_path, encode(picture(), "PNG"))
    path.chmod(0)
    with pytest.raises(DataError, match="part.bin.*Permission denied"):
        read_image(path)
    tmp_path.chmod(0)
    try:
        with pytest.raises(DataError, match="Permission denied"):
            list_images(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def enlarge_png(data: bytes, side_px: int) -> bytes:
    header = struct.pack(">II", side_px, side_px) + data[24:29]
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def enlarge_jpeg(data: bytes, side_px: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side_px, side_px) + data[at + 4 :]


def enlarge_bmp(data: bytes, side_px: int) -> bytes:
    return data[:18] + struct.pack("<ii", side_px, -side_px) + data[26:]


def enlarge_tiff(data: bytes, side_px: int) -> bytes:
    for tag in (256, 257):  # width, height
        at = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
        data = data[:at] + struct.pack("<I", side_px) + data[at + 4 :]
    return data


def enlarge_webp(data: bytes, side_px: int) -> bytes:
    return data[:26] + struct.pack("<HH", side_px, side_px) + data[30:]


@pytest.mark.parametrize(
    ("kind", "enlarge_header"),
    [
        ("PNG", enlarge_png),
        ("JPEG", enlarge_jpeg),
        ("BMP", enlarge_bmp),
        ("TIFF", enlarge_tiff),
        ("WEBP", enlarge_webp),
    ],
)
def test_too_many_pixels_are_refused_from_the_header(
    tmp_path: Path, kind: str, enlarge_header: Callable[[bytes, int], bytes]
) -> None:
    side_px = int(MAX_PIXELS**0.5) + 1  # the file holds a few pixels, so only its header can say so
    with pytest.raises(DataError, match=f"{side_px} x {side_px} is 100 million pixels.*: crop"):
        read_image(store(tmp_path, enlarge_header(encode(picture(), kind), side_px)))


def test_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = store(tmp_path, b"BM")
    os.truncate(path, 8 * MAX_PIXELS + 1)  # sparse: occupies nothing
    with pytest.raises(DataError, match="800 MB"):
        read_image(path)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(FORMATS), at=st.floats(0, 1), junk=st.binary(min_size=1, max_size=12))
def test_damaged_file_is_read_or_refused_but_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, at: float, junk: bytes
) -> None:
    data = bytearray(encode(picture(), kind))
    start = int(at * len(data))
    data[start : start + len(junk)] = junk
    path = store(tmp_path_factory.getbasetemp(), bytes(data), "fuzz.bin")
    try:
        image = read_image(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


# --------------------------------------------------------------------------- masks


def test_mask_is_what_is_brighter_than_127(tmp_path: Path) -> None:
    write_image(tmp_path / "mask.png", np.array([[0, 127, 128, 255]], np.uint8))
    assert read_mask(tmp_path / "mask.png").tolist() == [[False, False, True, True]]
    cv2.imwrite(str(tmp_path / "16bit.png"), np.array([[0, 255, 127 * 257, 127 * 257 + 1]], np.uint16))
    assert read_mask(tmp_path / "16bit.png").tolist() == [[False, False, False, True]]
    write_image(tmp_path / "black.png", np.zeros((2, 3), np.uint8))
    assert read_mask(tmp_path / "black.png").tolist() == [[False] * 3] * 2


def test_coloured_mask_counts_by_its_brightest_channel(tmp_path: Path) -> None:
    write_image(tmp_path / "mask.png", np.array([[[255, 0, 0], [0, 0, 90], [0, 200, 0]]], np.uint8))
    assert read_mask(tmp_path / "mask.png").tolist() == [[True, False, True]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_mask_of_class_numbers_is_refused_unless_asked_for(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "mask.png"
    cv2.imwrite(str(path), np.array([[0, 1, 7]], dtype))
    assert read_mask(path, above=0).tolist() == [[False, True, True]]
    with pytest.raises(DataError, match="mask.png: the brightest pixel of this mask is 7"):
        read_mask(path)


# ---------------------------------------------------------------- writing, listing


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_write_then_read(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    path = tmp_path / f"part{suffix}"
    write_image(path, noise(2, 2))  # is replaced
    write_image(path, noise(*shape)[::-1])
    expected = noise(*shape)[::-1]
    np.testing.assert_array_equal(read_image(path), expected if len(shape) == 3 else as_rgb(expected))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_write_image_refuses_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    store(tmp_path, b"x")
    for path in (tmp_path / "folder.png", tmp_path / "none" / "a.png", tmp_path / "part.bin" / "a.png"):
        with pytest.raises(DataError, match="cannot be written"):
            write_image(path, noise(4, 4, 3))
    with pytest.raises(DataError, match="must end in one of .bmp"):
        write_image(tmp_path / "a.gif", noise(4, 4, 3))
    for array in (noise(4, 4, 4), noise(4), noise(0, 4), noise(4, 4).astype(np.float32)):
        with pytest.raises(DataError, match="cannot write an array of shape"):
            write_image(tmp_path / "a.png", array)
    with pytest.raises(DataError, match="a.jpg: .jpg cannot hold 70000x1 px"):
        write_image(tmp_path / "a.jpg", noise(1, 70_000, 3))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder.png", "part.bin"]


def test_list_images(tmp_path: Path) -> None:
    names = ["b.png", "B.JPG", "a/z.webp", "a.tif", "10.jpeg", "9.bmp"]
    ignored = ["Thumbs.db", ".DS_Store", "._b.png", ".hidden/x.png", "notes.txt", "png", "a/.c/x.png"]
    for name in names + ignored:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = ["10.jpeg", "9.bmp", "B.JPG", "a.tif", "a/z.webp", "b.png"]  # as text, capitals first
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == expected
    assert [path.name for path in list_images(str(tmp_path), recursive=False)] == [
        name for name in expected if "/" not in name
    ]


def test_list_images_follows_links_once(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    real.mkdir()
    (real / "x.png").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(real, target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    assert list_images(root) == [root / "link" / "x.png"]


def test_list_images_of_what_is_no_folder(tmp_path: Path) -> None:
    path = store(tmp_path, b"x")
    for folder in (path, tmp_path / "missing"):
        with pytest.raises(DataError, match=f"{folder.name}: cannot list this folder"):
            list_images(folder)


# -------------------------------------------------------------------------- as_rgb


def test_as_rgb_orders_channels() -> None:
    frame = noise(5, 6, 3)
    assert as_rgb(frame) is frame
    np.testing.assert_array_equal(as_rgb(frame, color="bgr"), frame[..., ::-1])
    for color in COLORS:
        for grey in (frame[..., 0], frame[..., :1]):
            expected = np.repeat(frame[..., :1], 3, axis=2)
            np.testing.assert_array_equal(as_rgb(grey, color=color), expected)


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(
    "view", [np.s_[::2], np.s_[1:4, 2:5], np.s_[::-1, ::-1], np.s_[..., ::-1], np.s_[..., 1]]
)
def test_as_rgb_takes_any_strides(color: str, view: tuple[slice, ...]) -> None:
    frame = noise(5, 6, 3)
    frame.setflags(write=False)
    result = as_rgb(frame[view], color=color)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, as_rgb(frame[view].copy(), color=color))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32; pass uint8, 0..255"),
        (np.zeros((4, 4, 3), np.uint16), "uint16; pass uint8"),
        (np.zeros((4, 4), bool), "bool; pass uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\).*no alpha"),
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((1, 4, 4, 3), np.uint8), "one image"),
        (np.zeros(4, np.uint8), r"\(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (Image.new("RGB", (4, 4)), r"pass a NumPy array: np.asarray\(frame\)"),
        (None, "NoneType"),
    ],
)
def test_as_rgb_refuses(frame: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_rgb(frame)


def test_as_rgb_refuses_unknown_color() -> None:
    with pytest.raises(DataError, match="'BGR'; expected one of rgb, bgr"):
        as_rgb(noise(4, 4, 3), color="BGR")


# ------------------------------------------------------------------------ resizing


def test_resize_matrix_by_hand() -> None:
    # s = 2: the centres lie at 0.5 and 2.5, the triangle reaches 2 pixels: weights 3/4, 3/4, 1/4 of 7/4.
    expected = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    np.testing.assert_allclose(resize_matrix(4, 2), expected, atol=1e-7)
    # s = 1/2: plain bilinear, the outer pixels are repeated.
    expected = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_array_equal(resize_matrix(2, 4), expected.astype(np.float32))
    np.testing.assert_array_equal(resize_matrix(5, 5), np.eye(5, dtype=np.float32))


@settings(deadline=None)
@given(source_px=st.integers(1, 300), target_px=st.integers(1, 300))
def test_resize_matrix_is_an_average(source_px: int, target_px: int) -> None:
    matrix = resize_matrix(source_px, target_px)
    assert matrix.shape == (target_px, source_px) and matrix.dtype == np.float32
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-6)  # nothing prefers left or right


def exact(image: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """The definition in float64, not rounded."""
    rows = resize_matrix(image.shape[0], height_px).astype(np.float64)
    columns = resize_matrix(image.shape[1], width_px).astype(np.float64)
    return np.einsum("hy,yxc,wx->hwc", rows, image.astype(np.float64), columns, optimize=True)


SIZES = [  # source, target: down, up, both, tiny, and so wide that a product is done in parts
    ((900, 900), (256, 256)),
    ((480, 640), (256, 256)),
    ((60, 50), (256, 250)),
    ((300, 40), (97, 129)),
    ((1, 1), (9, 5)),
    ((3, 2), (1, 1)),
    ((100, 3), (99, 2)),
    ((40, 9000), (16, 100)),
    ((3000, 8), (5, 8)),
]


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resize_rounds_its_definition_once(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = noise(*source, 3)
    resized = resize(image, *target)
    assert resized.shape == (*target, 3) and resized.dtype == np.uint8 and resized.flags.c_contiguous
    # 0.5 from rounding, the rest for the float32 sums (up to 100 products of numbers below 256).
    assert np.abs(resized - exact(image, *target)).max() <= 0.5 + 1e-3


@settings(deadline=None, max_examples=50)
@given(sizes=st.tuples(*[st.integers(1, 130)] * 4), channels=st.integers(1, 4))
def test_resize_of_any_size(sizes: tuple[int, int, int, int], channels: int) -> None:
    image = noise(*sizes[:2], channels)
    resized = resize(image, *sizes[2:])
    assert resized.shape == (*sizes[2:], channels)
    assert np.abs(resized - exact(image, *sizes[2:])).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resize_agrees_with_pillow(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = noise(*source, 3)
    size = (target[1], target[0])
    expected = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    # Pillow rounds between the directions as well.
    assert np.abs(resize(image, *target).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resize_agrees_with_torch(source: tuple[int, int], target: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    image = noise(*source, 3)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(batch, target, mode="bilinear", antialias=True)
    expected = expected[0].permute(1, 2, 0).numpy()
    assert np.abs(resize(image, *target) - expected).max() <= 0.5 + 1e-3  # as above


def test_resize_rounds_half_to_even() -> None:
    image = np.array([[[0], [1], [1], [2], [254], [255]]], np.uint8)
    pairs = [resize(np.ascontiguousarray(image[:, at : at + 2]), 1, 1).item() for at in (0, 2, 4)]
    assert pairs == [0, 2, 254]  # 0.5, 1.5, 254.5


def test_resize_keeps_constants_and_the_input() -> None:
    for level in (0, 1, 254, 255):
        assert (resize(np.full((77, 91, 3), level, np.uint8), 64, 200) == level).all()
    image = noise(20, 30, 3)
    assert resize(image, 20, 30) is image
    before = image.copy()
    for view in (image[::-1], image[2:18, 5:25], image[..., ::-1]):
        np.testing.assert_array_equal(resize(view, 9, 11), resize(view.copy(), 9, 11))
    np.testing.assert_array_equal(image, before)


def test_resize_refuses() -> None:
    for array in (noise(4, 4), noise(4, 4, 3).astype(np.float32), noise(0, 4, 3)):
        with pytest.raises(DataError, match="pass HWC uint8"):
            resize(array, 2, 2)
    with pytest.raises(DataError, match="cannot resize 4 pixels to 0"):
        resize(noise(4, 4, 3), 2, 0)


# ------------------------------------------------------------------ maps, pictures


@pytest.mark.parametrize("target", [(64, 64), (100, 37), (900, 900), (20, 200)])
def test_enlarge_agrees_with_torch(target: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    anomaly_map = np.random.default_rng(2).normal(size=(64, 64)).astype(np.float32)
    batch = torch.from_numpy(anomaly_map)[None, None]
    expected = torch.nn.functional.interpolate(batch, target, mode="bilinear", align_corners=False)
    enlarged = enlarge(anomaly_map, *target)
    assert enlarged.dtype == np.float32
    # Both interpolate in float32 but compute the position, up to 64, differently: about 1e-5 of a pixel.
    np.testing.assert_allclose(enlarged, expected[0, 0].numpy(), atol=1e-4)


def test_enlarge_refuses() -> None:
    for shape, size in (((4, 4, 1), (8, 8)), ((0, 4), (8, 8)), ((4, 4), (0, 8))):
        with pytest.raises(DataError, match="cannot scale a map of shape"):
            enlarge(np.zeros(shape, np.float32), *size)


def test_a_name_that_is_not_utf_8_is_told_of(tmp_path: Path) -> None:
    """As Linux unpacks an archive of an older Windows."""
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/gr\xfcn.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DataError, match=r"gr.udcfcn.png: this name is not UTF-8; rename"):
        list_images(tmp_path)
