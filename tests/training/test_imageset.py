"""Image sets: a folder and its tar shards give the same pictures; what is held out."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from edgead.errors import DataError
from edgead.image import list_images, read_image
from edgead.training.imageset import FolderImages, TarImages, hold_out, open_images


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, natural_images: Path) -> Path:
    """The natural images in two shards, with a text file beside every image as webdataset has them."""
    folder = tmp_path_factory.mktemp("shards")
    label = folder.parent / "label.cls"
    label.write_text("7")
    paths = list_images(natural_images)
    for number, part in enumerate((paths[:4], paths[4:])):
        with tarfile.open(folder / f"train-{number:06d}.tar", "w") as file:
            for path in part:
                file.add(path, path.name)
                file.add(label, path.with_suffix(".cls").name)
    return folder


def test_shards_and_folder_hold_the_same_images(shards: Path, natural_images: Path) -> None:
    packed, plain = open_images(shards), open_images(natural_images)
    assert isinstance(packed, TarImages) and isinstance(plain, FolderImages)
    assert len(packed) == len(plain) == 6
    for index, path in enumerate(list_images(natural_images)):
        assert np.array_equal(packed.read(index), read_image(path))
        assert np.array_equal(plain.read(index), read_image(path))
    one = open_images(shards / "train-000001.tar")
    assert len(one) == 2 and np.array_equal(one.read(1), packed.read(5))


def test_a_damaged_member_is_named_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.add(tmp_path / "a.jpg", "a.jpg")
    with pytest.raises(DataError, match=r"x\.tar at byte [0-9]+: not one of"):
        open_images(tmp_path / "x.tar").read(0)


def test_a_shard_that_ends_early_is_refused(shards: Path, tmp_path: Path) -> None:
    """tarfile itself takes a damaged header for the end, and says nothing of the images behind it."""
    content = (shards / "train-000000.tar").read_bytes()
    with tarfile.open(shards / "train-000000.tar") as file:
        start, end = file.getmembers()[2].offset, file.offset
    assert content[start : start + 3] != bytes(3) and content[end : end + 1024] == bytes(1024)
    damaged = {
        "a wrong byte": content[:start] + b"?" + content[start + 1 :],
        "zeros": content[:start] + bytes(512) + content[start + 512 :],
        "cut at a member": content[:start],
        "cut in a header": content[: start + 100],
        "cut in an image": content[: start + 600],
        "cut before its end mark": content[:end],
        "another behind it": content + content,
    }
    for name, part in damaged.items():
        (tmp_path / "x.tar").write_bytes(part)
        with pytest.raises(DataError, match="x.tar (is damaged or cut off|cannot be read)"):
            print(name, len(open_images(tmp_path / "x.tar")))
    (tmp_path / "x.tar").write_bytes(content[: end + 512])  # some writers are sparing
    assert len(open_images(tmp_path / "x.tar")) == 4


def test_what_is_no_set_is_refused(tmp_path: Path, shards: Path, natural_images: Path) -> None:
    with pytest.raises(DataError, match="cannot list this folder"):
        open_images(tmp_path / "none")
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "a.tar", "w:gz") as file:
        file.add(natural_images, "images")
    with pytest.raises(DataError, match="uncompressed"):
        open_images(packed)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.jpg").touch()
    (mixed / "b.tar").touch()
    with pytest.raises(DataError, match="1 tar files and 1 image files"):
        open_images(mixed)
    assert len(open_images(_empty(tmp_path / "empty"))) == 0


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


class Numbers:
    """Images that are not there: only their number counts."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> np.ndarray:
        return np.full((4, 4, 3), index % 256, np.uint8)


@pytest.mark.parametrize(
    ("images", "expected"), [(2, 1), (6, 3), (100, 8), (1000, 50), (1_300_000, 1000)]
)
def test_held_out_share(images: int, expected: int) -> None:
    train, held_out = hold_out(Numbers(images), 0.05, seed=0)
    assert (len(train), len(held_out)) == (images - expected, expected)
    assert not set(train.indices) & set(held_out.indices)
    again = hold_out(Numbers(images), 0.05, seed=0)[1]
    assert np.array_equal(held_out.indices, again.indices)
    assert held_out.read(0)[0, 0, 0] == held_out.indices[0] % 256
