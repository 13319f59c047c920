"""Training and penalty images, a few at a time: host memory does not grow with their number.

Training images are brought to network size once and stored one after the other in a file, from which
each step reads one. The system keeps the file in memory that it can take back at any time (the page
cache); the process itself holds one image.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgead.errors import DataError, TrainingError
from edgead.files import whole_file
from edgead.image import list_images, read_image, resize
from edgead.models.efficientad import IMAGE_PX

log = logging.getLogger(__name__)

GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
NETWORK_PX = (IMAGE_PX, IMAGE_PX)
MOST_DECODERS = 8  # each holds a camera frame, which may have a hundred megapixels
MOST_STORED = 10_000  # penalty images that are decoded only once; 2 GB on disk


def iterate_images(paths: Iterable[Path], size_px: tuple[int, int] = NETWORK_PX) -> Iterator[np.ndarray]:
    """Images at network size, uint8 [*size_px, 3], in the order of their paths.

    Decoded by several threads, only so far ahead that they do not wait.

    Raises:
        DataError: an image cannot be read.
    """
    workers = min(os.cpu_count() or 1, MOST_DECODERS)
    waiting: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for path in paths:
            waiting.append(pool.submit(_load, path, size_px))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def hash_of_names(root: Path, paths: Iterable[Path], *before: str) -> str:
    """The beginning of the SHA-256 of lines: `before`, and the images' names relative to `root`."""
    names = (path.relative_to(root).as_posix() for path in paths)
    return hashlib.sha256("\n".join([*before, *names]).encode()).hexdigest()[:16]


def common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """The (height, width) in px that most of the images have; a warning tells of others."""

    def size(path: Path) -> tuple[int, int]:
        height, width, _ = read_image(path).shape
        return height, width

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_DECODERS)) as pool:
        (common, count), *others = Counter(pool.map(size, paths)).most_common()
    if others:
        log.warning(
            "%d of %d training images are not %dx%d px (height x width) as the others are, but such as"
            " %dx%d; they are resized to that",
            len(paths) - count, len(paths), *common, *others[0][0],
        )  # fmt: skip
    return common


def read_images(paths: Sequence[Path]) -> np.ndarray:
    """All images in memory, uint8 [N, 256, 256, 3]; for few of them."""
    return np.stack(list(iterate_images(paths)))


def _load(path: Path, size_px: tuple[int, int]) -> np.ndarray:
    return resize(read_image(path), *size_px)


class ImagePool:
    """Images at network size in a file; see `store_images`.

    Items are uint8 [*size_px, 3]. Any number of threads may read.
    """

    def __init__(self, file: Path, count: int, size_px: tuple[int, int] = NETWORK_PX) -> None:
        self.file, self.count, self.size_px = file, count, size_px

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        return _read(self.file, index, self.size_px)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(self.count))

    def part(self, index: int, top: int, left: int, size_px: tuple[int, int]) -> np.ndarray:
        """A part of an image, uint8 [*size_px, 3], without reading the rest."""
        shape, offset = (*self.size_px, 3), index * _bytes(self.size_px)
        image = np.memmap(self.file, np.uint8, "r", offset, shape)
        return np.array(image[top : top + size_px[0], left : left + size_px[1]])


class Tiles:
    """The tiles of all images of a pool, image by image; they are cut when they are asked for.

    After the tiles of an image comes the whole image, resized to the size of a tile.

    Args:
        corners: First row and first column of every tile of an image.
        size_px: Height and width of a tile.
    """

    def __init__(
        self, pool: ImagePool, corners: Sequence[tuple[int, int]], size_px: tuple[int, int]
    ) -> None:
        self.pool, self.corners, self.size_px = pool, corners, size_px
        self.per_image = len(corners) + 1
        self.shown_per_image = 2 * len(corners)  # see `shares`

    def __len__(self) -> int:
        return len(self.pool) * self.per_image

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        image, place = divmod(index, self.per_image)
        if self.is_whole(index):
            return self.whole(index)
        return self.pool.part(image, *self.corners[place], self.size_px)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def of(self, images: np.ndarray) -> np.ndarray:
        """Indices of all tiles of images of the pool, and of these as a whole."""
        return (images[:, None] * self.per_image + np.arange(self.per_image)).ravel()

    def shares(self, indices: np.ndarray) -> np.ndarray:
        """These indices, those of whole images as often as an image has tiles."""
        return np.repeat(indices, np.where(self.is_whole(indices), len(self.corners), 1))

    def is_whole(self, index: Any) -> Any:
        """Whether an index, or each of an array, is that of a whole image."""
        return index % self.per_image == len(self.corners)

    def whole(self, index: int) -> np.ndarray:
        """The image that a tile is of, resized to the size of a tile."""
        return resize(self.pool[index // self.per_image], *self.size_px)


Images = np.ndarray | ImagePool | Tiles  # uint8 [N, h, w, 3], or the same in a file


def store_images(paths: Sequence[Path], file: Path, size_px: tuple[int, int] = NETWORK_PX) -> ImagePool:
    """Write images at network size into a file, unless it is there already.

    Args:
        file: What its name stands for must be these very images: a file of the right size is taken as it
            is. It appears only when it is complete.

    Raises:
        DataError: an image cannot be read. TrainingError: the file cannot be written.
    """
    n_bytes = len(paths) * _bytes(size_px)
    if not (file.is_file() and file.stat().st_size == n_bytes):
        try:
            with whole_file(file) as temporary, temporary.open("wb") as out:
                for image in iterate_images(paths, size_px):
                    out.write(image.tobytes())
        except OSError as error:
            raise TrainingError(
                f"{file}: cannot write the {len(paths)} training images at network size"
                f" ({n_bytes / 1e6:.0f} MB): {error.strerror}; free some space or use another --out"
            ) from error
    return ImagePool(file, len(paths), size_px)


def _bytes(size_px: tuple[int, int]) -> int:
    return size_px[0] * size_px[1] * 3


def _read(file: Path, index: int, size_px: tuple[int, int] = NETWORK_PX) -> np.ndarray:
    # Opened each time: 20 us, and there is nothing to close and no position for threads to share.
    flat = np.fromfile(file, np.uint8, _bytes(size_px), offset=index * _bytes(size_px))
    return flat.reshape(*size_px, 3)


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of brightness, contrast, saturation times 0.8 .. 1.2: uint8 HWC -> float32 HWC 0..255."""
    x, kind, factor = image.astype(np.float32), rng.integers(3), np.float32(rng.uniform(0.8, 1.2))
    if kind == 0:
        y = factor * x
    else:
        grey = x @ GREY
        y = factor * x + (1 - factor) * (grey.mean() if kind == 1 else grey[..., None])
    return np.clip(y, 0, 255)


class PenaltyImages:
    """Natural images that the student must not imitate the teacher on.

    Which one a step sees depends on the seed.

    Args:
        folder: Searched recursively.
        store: File to keep decoded images in, so that each is decoded once: that takes longer than a
            step on a fast GPU. It is overwritten, and belongs to the caller.
    """

    def __init__(self, folder: Path, *, seed: int, store: Path | None = None) -> None:
        self.folder, self.seed, self.paths = folder, seed, list_images(folder)
        if not self.paths:
            raise DataError(
                f"{folder} holds no images, and training without penalty images loses accuracy:"
                " name a folder of natural images"
            )
        self._store, self._stored = store, set[int]()
        if store is not None:
            store.write_bytes(b"")

    def identity(self) -> str:
        """How many images there are, and the beginning of the SHA-256 of their names."""
        return f"{len(self.paths)} images, names {hash_of_names(self.folder, self.paths)}"

    def __call__(self, step: int) -> np.ndarray:
        """The centre 256x256 of the image resized to 512x512, grey with probability 0.3; uint8 HWC."""
        rng = np.random.default_rng([self.seed, step, 1])
        for _ in range(20):
            index = int(rng.integers(len(self.paths)))
            try:
                image = self._image(index)
            except DataError as error:
                log.warning("penalty image passed over: %s", error)
                continue
            if rng.random() < 0.3:
                image = np.repeat(np.rint(image @ GREY).astype(np.uint8)[..., None], 3, axis=2)
            return image
        raise DataError(
            f"20 penalty images in a row cannot be read, the last one {self.paths[index]};"
            f" check {self.folder}"
        )

    def _image(self, index: int) -> np.ndarray:
        if self._store is not None and index in self._stored:
            return _read(self._store, index)
        image = resize(read_image(self.paths[index]), 2 * IMAGE_PX, 2 * IMAGE_PX)
        edge = IMAGE_PX // 2
        image = image[edge : edge + IMAGE_PX, edge : edge + IMAGE_PX]
        if self._store is not None and index < MOST_STORED:
            self._keep(self._store, index, image)
        return image

    def _keep(self, store: Path, index: int, image: np.ndarray) -> None:
        try:
            with store.open("r+b") as file:  # seeking beyond the end leaves a hole, which takes no space
                file.seek(index * _bytes(NETWORK_PX))
                file.write(image.tobytes())
        except OSError as error:
            log.warning("%s: decoded penalty images are no longer kept: %s", store, error.strerror)
            self._store = None
        else:
            self._stored.add(index)
