"""Images: reading, checking, colour order, resizing, showing.

The only module that knows colour order and resizing. Elsewhere in the package an image is HWC uint8 RGB.

Reading: JPEG, PNG, BMP, TIFF and WebP, recognised by content, with 8 or 16 bits per channel (16 bits are
scaled from their full range: 65535 becomes 255). Grey becomes three equal channels, alpha is dropped,
the EXIF orientation is applied as viewers do, colour profiles are ignored, of several pages or frames
the first is taken. Refused with a DataError: damaged, cut-off and empty files, other formats,
floating-point pixels, more than MAX_PIXELS. Only PNG carries checksums: in the other formats, damage in
the middle of a file that ends properly cannot always be told from content.

Resizing: the antialiased bilinear filter of Pillow and of PyTorch's `interpolate(antialias=True)`,
written as two matrices (`resize_matrix`), so that an exported graph can hold the same operation.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

import cv2
import numpy as np

from edgead.errors import DataError
from edgead.files import write_bytes

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_QUALITY = {  # a key that a format does not know makes OpenCV complain
    ".jpg": [cv2.IMWRITE_JPEG_QUALITY, 95],
    ".jpeg": [cv2.IMWRITE_JPEG_QUALITY, 95],
    ".webp": [cv2.IMWRITE_WEBP_QUALITY, 95],
}
MAX_PIXELS = 100_000_000
COLORS = ("rgb", "bgr")

_MAX_FILE_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, uncompressed
_SIGNATURES = {  # format -> how its files begin
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "WebP": (b"RIFF",),
}
_SAVE_ANEW = "copy it again or save it anew as 8-bit PNG"

_BLOCK_PX = 4  # output rows (or columns) that share one small dense matrix
_BAND_PX = 96  # output rows whose intermediate stays in the cache
# Multiply-adds in one matrix product. From about twice this on OpenBLAS wakes its threads, which gains
# nothing for such small products, and waits for them: 190 ms instead of 1 ms on a machine whose other
# cores are busy (measured).
_PRODUCT_SIZE = 2**18

_Blocks = tuple[tuple[slice, slice, np.ndarray], ...]  # (output pixels, input pixels they need, weights)


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file; the module's docstring says what is accepted.

    Returns:
        HWC uint8 RGB, C-contiguous.

    Raises:
        DataError: naming the file and what to do about it.
    """
    return cv2.cvtColor(_decode(Path(path)), cv2.COLOR_BGR2RGB)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """As `read_image`, for the content of a file that is in memory; errors call it `name`."""
    return cv2.cvtColor(_decode_bytes(data, name, to_8_bits=True), cv2.COLOR_BGR2RGB)


def read_mask(path: str | os.PathLike[str], *, above: int = 127) -> np.ndarray:
    """Reads a defect mask.

    Args:
        above: grey value 0..255. Pixels whose brightest channel exceeds it belong to the defect. 0 is
            for masks that hold class numbers instead of black and white.

    Returns:
        HW bool, True on the defect.

    Raises:
        DataError: as `read_image`; also when a mask is not black but has nothing above `above` (class
            numbers, or 1 for 255), because it would pass for "no defect".
    """
    path = Path(path)
    grey = _decode(path, to_8_bits=False).max(axis=2)  # scaling from 16 bits would lose class numbers
    white = 255 if grey.dtype == np.uint8 else 65535
    limit = above * white // 255
    brightest = int(grey.max())
    if 0 < brightest <= limit:
        raise DataError(
            f"{path}: the brightest pixel of this mask is {brightest}, a defect has more than {limit};"
            f" save the mask with 0 for good and {white} for defect"
        )
    return grey > limit


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes an image file atomically: it is complete or not there.

    Args:
        path: ends in one of IMAGE_SUFFIXES, which chooses the format. JPEG and WebP lose detail (quality
            95).
        image: HWC uint8 RGB, or HW uint8.

    Raises:
        DataError: wrong suffix or array, too many pixels for the format, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(f"{path}: the name must end in one of {', '.join(IMAGE_SUFFIXES)}")
    if image.dtype != np.uint8 or not image.size or not (image.ndim == 2 or image.shape[2:] == (3,)):
        raise DataError(
            f"{path}: cannot write an array of shape {image.shape} and type {image.dtype};"
            " expected HWC uint8 RGB or HW uint8"
        )
    pixels = np.ascontiguousarray(image)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    kind = path.suffix.lower()
    try:
        is_encoded, data = cv2.imencode(kind, pixels, _QUALITY.get(kind, []))
    except cv2.error:  # which of the two is the version's choice
        is_encoded = False
    if not is_encoded:
        height, width = pixels.shape[:2]
        raise DataError(
            f"{path}: {kind} cannot hold {width}x{height} px; write smaller images, or another format"
        )
    try:
        write_bytes(path, data.tobytes(), sync=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error


def list_images(folder: str | os.PathLike[str], recursive: bool = True) -> list[Path]:
    """Lists the files in a folder whose names end in one of IMAGE_SUFFIXES (any case), sorted by path.

    Hidden files and folders are left out. Links to folders are followed; each real folder is visited
    once.

    Raises:
        DataError: the folder, or one below it, does not exist, is not a folder or cannot be read, or a
            name is not UTF-8: no report or record could hold it.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot list this folder: {error.strerror}") from error

    found: list[Path] = []
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        found += [
            Path(parent, name)
            for name in files
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    for path in found:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            shown = str(path).encode(errors="backslashreplace").decode()
            raise DataError(
                f"{shown}: this name is not UTF-8; rename the files, for example from a Windows archive:"
                f" convmv -r -f cp1252 -t utf-8 --notest {os.fspath(folder)}"
            ) from None
    return sorted(found, key=Path.as_posix)  # as text, the same order on every operating system


def _decode(path: Path, *, to_8_bits: bool = True) -> np.ndarray:
    """File -> HWC BGR, uint8, or uint16 where the file has it and `to_8_bits` is off."""
    return _decode_bytes(_read_bytes(path), path, to_8_bits=to_8_bits)


def _decode_bytes(data: bytes, path: Path | str, *, to_8_bits: bool) -> np.ndarray:
    kind = _checked_format(path, data)
    encoded = np.frombuffer(data, np.uint8)
    try:
        # Without IMREAD_COLOR, OpenCV would keep alpha and ignore the EXIF orientation.
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        image = None
    if image is None:
        raise DataError(f"{path}: a {kind} file that is damaged, cut off or unusual; {_SAVE_ANEW}")
    if image.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{path}: the pixels are {image.dtype}; save it with 8 or 16 bits per channel")
    if kind == "TIFF" and image.dtype == np.uint8:
        # libtiff multiplies such colours by alpha, so that dropping alpha afterwards gives another
        # picture.
        original = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
        if original is not None and original.shape[2:] == (4,) and original[..., 3].min() < 255:
            raise DataError(f"{path}: a TIFF file with transparent pixels; save it without alpha")
    return cv2.convertScaleAbs(image, alpha=1 / 257) if to_8_bits and image.dtype == np.uint16 else image


def _read_bytes(path: Path) -> bytes:
    try:
        n_bytes = path.stat().st_size
        if path.is_dir():
            raise DataError(f"{path}: this is a folder; expected an image file")
        if n_bytes > _MAX_FILE_BYTES:
            limit_mb = _MAX_FILE_BYTES / 1e6
            raise DataError(f"{path}: {n_bytes / 1e6:.0f} MB; files up to {limit_mb:.0f} MB are read")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read this image: {error.strerror}") from error
    if not data:
        raise DataError(f"{path}: the file is empty; copy or record it again")
    return data


def _checked_format(path: Path | str, data: bytes) -> str:
    """Name of the file's format, after the checks that come before decoding."""
    import imagesize  # here, because it loads urllib and xml, which a camera line does not need

    kind = next((kind for kind, starts in _SIGNATURES.items() if data.startswith(starts)), "")
    if not kind or (kind == "WebP" and data[8:12] != b"WEBP"):
        formats = ", ".join(_SIGNATURES)
        raise DataError(f"{path}: not one of {formats}: the file begins with {data[:8]!r}; {_SAVE_ANEW}")
    width_px, height_px = imagesize.get(io.BytesIO(data))
    if width_px < 1 or height_px < 1:
        raise DataError(f"{path}: a {kind} file whose header gives no image size; {_SAVE_ANEW}")
    if width_px * height_px > MAX_PIXELS:
        raise DataError(
            f"{path}: {width_px} x {height_px} is {width_px * height_px / 1e6:.0f} million pixels; up to"
            f" {MAX_PIXELS / 1e6:.0f} million are read: crop or shrink the image"
        )
    if kind == "JPEG" and not _jpeg_has_end(data):
        raise DataError(f"{path}: a JPEG file without its end; {_SAVE_ANEW}")
    return kind


def _jpeg_has_end(data: bytes) -> bool:
    """Whether the end marker follows the picture data.

    Where it does not, OpenCV 4 returns a picture that is partly grey, and the grey part could hide a
    defect.
    """
    offset = 2
    while data[offset : offset + 1] == b"\xff":
        marker = data[offset + 1 : offset + 2]
        if marker == b"\xda":  # start of scan
            break
        if marker == b"\xff":  # padding
            offset += 1
        else:  # a segment, which may hold a thumbnail with an end marker of its own
            offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return data.find(b"\xff\xd9", offset) >= 0


def as_rgb(frame: np.ndarray, *, color: str = "rgb") -> np.ndarray:
    """Brings a frame from a camera or a library into the order that the rest of the package expects.

    Args:
        frame: uint8 0..255; HW or HW1 (grey, replicated to three equal channels) or HW3; any strides.
        color: order of the channels of a HW3 frame, "rgb" or "bgr" (OpenCV).

    Returns:
        HWC uint8 RGB, C-contiguous: the frame itself where it already is that, else a copy.

    Raises:
        DataError: wrong type, dtype, shape or colour name, or an empty frame.
    """
    if color not in COLORS:
        raise DataError(f"color is {color!r}; expected one of {', '.join(COLORS)}")
    if not isinstance(frame, np.ndarray):
        raise DataError(f"the frame is a {type(frame).__name__}; pass a NumPy array: np.asarray(frame)")
    if frame.dtype != np.uint8:
        raise DataError(f"the frame's dtype is {frame.dtype}; pass uint8, 0..255, not normalised")
    if frame.ndim != 2 and (frame.ndim != 3 or frame.shape[2] not in (1, 3)):
        raise DataError(
            f"the frame's shape is {frame.shape}; expected (height, width, 3), or (height, width) for"
            " grey: one image, channels last, no alpha"
        )
    if not frame.size:
        raise DataError(f"the frame is empty: its shape is {frame.shape}")
    frame = np.ascontiguousarray(frame)
    if frame.shape[2:] != (3,):
        return cv2.cvtColor(frame, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) if color == "bgr" else frame


def resize_matrix(source_px: int, target_px: int) -> np.ndarray:
    """Matrix of the antialiased bilinear filter along one axis.

    With s = source_px / target_px, output pixel i lies at c = (i + 0.5) s - 0.5 and weighs input pixel j
    by the triangle max(0, 1 - |j - c| / max(s, 1)), normalised: the filter of Pillow's `resize(...,
    BILINEAR)`.

    Returns:
        [target_px, source_px] float32, non-negative, each row sums to 1 within float32.

    Raises:
        DataError: a size below 1.
    """
    if source_px < 1 or target_px < 1:
        raise DataError(f"cannot resize {source_px} pixels to {target_px}; both must be at least 1")
    scale = source_px / target_px
    centre = (np.arange(target_px) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(source_px) - centre[:, None])
    weights = np.maximum(0.0, 1.0 - distance / max(scale, 1.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resize(image: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Resizes with the antialiased bilinear filter, the same in training, calibration and deployment.

    Computes round(R_h X R_w^T) for each channel X in float32, with R from `resize_matrix` and one
    rounding at the end, half to even like ONNX Round. Pillow also rounds between the two directions and
    so may differ by 1.

    Args:
        image: HWC uint8.

    Returns:
        [height_px, width_px, C] uint8; `image` itself, not a copy, where it has that size.

    Raises:
        DataError: not HWC uint8, empty, or a size below 1.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or not image.size:
        raise DataError(f"cannot resize an array of shape {image.shape}, {image.dtype}; pass HWC uint8")
    source_height_px, source_width_px, channels = image.shape
    if (source_height_px, source_width_px) == (height_px, width_px):
        return image
    pixels = image.reshape(source_height_px, source_width_px * channels)
    vertical = _blocks(source_height_px, height_px)
    horizontal = _interleaved_blocks(source_width_px, width_px, channels)
    resized = np.rint(_filter(pixels, vertical, horizontal)).astype(np.uint8)
    return resized.reshape(height_px, width_px, channels)


def _filter(pixels: np.ndarray, vertical: _Blocks, horizontal: _Blocks) -> np.ndarray:
    """R_h X R_w^T as small dense products, because the matrices are nearly empty; [rows, columns * C]
    float32."""
    result = np.empty((vertical[-1][0].stop, horizontal[-1][0].stop), np.float32)
    part_px = max(1, _PRODUCT_SIZE // max(weights.size for _, _, weights in vertical))
    band_px = min(_BAND_PX, _PRODUCT_SIZE // max(weights.size for _, _, weights in horizontal))
    band_blocks = max(1, band_px // _BLOCK_PX)
    # One band of output rows goes through both directions while it is in the cache.
    band = np.empty((band_blocks * _BLOCK_PX, pixels.shape[1]), np.float32)
    for first in range(0, len(vertical), band_blocks):
        blocks = vertical[first : first + band_blocks]
        top, bottom = blocks[0][0].start, blocks[-1][0].stop
        for rows, needed, weights in blocks:
            for left in range(0, pixels.shape[1], part_px):
                part = slice(left, left + part_px)
                into = band[rows.start - top : rows.stop - top, part]
                np.matmul(weights, pixels[needed, part].astype(np.float32), out=into)
        for columns, needed, weights in horizontal:
            np.matmul(band[: bottom - top, needed], weights, out=result[top:bottom, columns])
    return result


@functools.lru_cache(maxsize=32)
def _blocks(source_px: int, target_px: int) -> _Blocks:
    """`resize_matrix` in blocks of _BLOCK_PX output pixels, weights [output, input]."""
    matrix = resize_matrix(source_px, target_px)
    blocks = []
    for start in range(0, target_px, _BLOCK_PX):
        # The last block overlaps its neighbour rather than be narrow: BLAS has other code, with threads,
        # for one row.
        start = max(0, min(start, target_px - _BLOCK_PX))
        outputs = slice(start, min(start + _BLOCK_PX, target_px))
        used = np.flatnonzero(matrix[outputs].any(axis=0))
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((outputs, inputs, np.ascontiguousarray(matrix[outputs, inputs])))
    return tuple(blocks)


@functools.lru_cache(maxsize=32)
def _interleaved_blocks(source_px: int, target_px: int, channels: int) -> _Blocks:
    """`_blocks` for rows of interleaved channels, weights [input, output] for a product from the
    right."""

    def spread(pixels: slice) -> slice:
        return slice(pixels.start * channels, pixels.stop * channels)

    identity = np.eye(channels, dtype=np.float32)
    return tuple(
        (spread(outputs), spread(inputs), np.ascontiguousarray(np.kron(weights, identity).T))
        for outputs, inputs, weights in _blocks(source_px, target_px)
    )


def enlarge(anomaly_map: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Scales a map bilinearly with half-pixel centres (PyTorch: align_corners=False), without
    antialiasing.

    Args:
        anomaly_map: HW float32.

    Returns:
        [height_px, width_px] float32.

    Raises:
        DataError: not HW, empty, or a size below 1.
    """
    if anomaly_map.ndim != 2 or not anomaly_map.size or height_px < 1 or width_px < 1:
        raise DataError(f"cannot scale a map of shape {anomaly_map.shape} to {height_px} x {width_px}")
    source = np.ascontiguousarray(anomaly_map, dtype=np.float32)
    return cv2.resize(source, (width_px, height_px), interpolation=cv2.INTER_LINEAR)
