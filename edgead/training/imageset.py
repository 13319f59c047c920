"""Sets of natural images that may be far larger than memory: a folder, or tar shards.

Only where the images are is kept in memory, never what they show: for a folder the paths, for shards
(uncompressed tar files, such as webdataset writes, or ImageNet's one per class) 20 bytes an image. Both
give any image at once, so that what a training step sees depends on seed and step alone, wherever a run
is interrupted and resumed, and any share of the set can be held out.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import Protocol

import numpy as np

from edgead.errors import DataError
from edgead.image import IMAGE_SUFFIXES, decode_image, list_images, read_image


class ImageSet(Protocol):
    """Images by number, in an order that does not change."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """HWC uint8 RGB. Raises DataError for a damaged image."""
        ...


class FolderImages:
    """The image files below a folder, sorted by path."""

    def __init__(self, paths: list[Path], root: Path | None = None) -> None:
        self.paths = [str(path) for path in paths]  # a third of the memory of Path objects
        self.root = str(root or "")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        return read_image(self.paths[index])


class TarImages:
    """The image files in tar shards, in the order of the shards' names and of their members.

    Raises:
        DataError: a shard is compressed, damaged or cut off.
    """

    def __init__(self, shards: list[Path]) -> None:
        self.shards = shards
        parts = [self._scan(shard) for shard in shards]
        self.shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(part) for part in parts])
        self.where = np.concatenate([*parts, np.empty((0, 2), np.int64)])

    @staticmethod
    def _scan(shard: Path) -> np.ndarray:
        """Offset and length in bytes of every image, int64 [N, 2]."""
        found = []
        try:
            with tarfile.open(shard, "r:") as file:
                for member in file:
                    if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                        found.append((member.offset_data, member.size))
                    # else it keeps half a kilobyte of every member
                    file.members.clear()  # type: ignore[attr-defined]
                end = file.offset
            _check_end(shard, end)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(
                f"{shard} cannot be read as an uncompressed tar file ({error});"
                " unpack it or pack it again without compression"
            ) from error
        return np.array(found, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.where)

    def read(self, index: int) -> np.ndarray:
        shard = self.shards[self.shard[index]]
        offset, size = (int(value) for value in self.where[index])
        try:
            with shard.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataError(f"{shard}: cannot be read: {error.strerror}") from error
        return decode_image(data, f"{shard} at byte {offset}")


def _check_end(shard: Path, offset: int) -> None:
    """tarfile takes whatever is no member for the end; that is a block of zeros, and zeros follow."""
    with shard.open("rb") as file:
        file.seek(offset)
        is_end = file.read(512) == bytes(512)
        while is_end and (more := file.read(1 << 20)):
            is_end = not more.strip(b"\0")
    if not is_end:
        raise DataError(
            f"{shard} is damaged or cut off at byte {offset}: neither a member nor the end mark of a tar"
            " file is there; copy it again, or unpack what is left of it and pack that again"
        )


class Subset:
    """Some images of a set."""

    def __init__(self, images: ImageSet, indices: np.ndarray) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> np.ndarray:
        return self.images.read(int(self.indices[index]))


def open_images(source: Path | str) -> ImageSet:
    """The images below a folder, in a folder's `*.tar` shards, or in one tar file.

    Raises:
        DataError: no such folder, or one that holds both shards and image files.
    """
    source = Path(source)
    if source.is_file():
        return TarImages([source])
    shards = sorted(source.rglob("*.tar"))
    paths = list_images(source)
    if shards and paths:
        raise DataError(
            f"{source} holds {len(shards)} tar files and {len(paths)} image files; name a folder of"
            " either the one or the other"
        )
    return TarImages(shards) if shards else FolderImages(paths, source)


def names_of(images: ImageSet) -> str:
    """The beginning of the SHA-256 of the names in a folder, or of the places in shards and their names.

    "" for a set of another kind, whose images nobody can tell from others.
    """
    digest = hashlib.sha256()
    if isinstance(images, FolderImages):
        for path in images.paths:
            digest.update(path.removeprefix(images.root).encode() + b"\n")
    elif isinstance(images, TarImages):
        digest.update("\n".join(shard.name for shard in images.shards).encode())
        digest.update(images.shard.tobytes() + images.where.tobytes())
    else:
        return ""
    return digest.hexdigest()[:16]


def hold_out(images: ImageSet, share: float, *, seed: int) -> tuple[Subset, Subset]:
    """Split a set at random into one for training and one that only measures.

    The second gets `share` of the images, at least 8 and at most 1,000, never more than half.

    Returns:
        Images for training, held-out images.
    """
    count = min(max(8, round(share * len(images))), 1000, len(images) // 2)
    order = np.random.default_rng(seed).permutation(len(images))
    return Subset(images, np.sort(order[count:])), Subset(images, np.sort(order[:count]))
