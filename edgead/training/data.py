"""Data sets on disk: which images are for training, validation and testing, and where their masks are.

Layouts of `<root>`, one category each; images are of any format that `edgead.image` reads:

    mvtec   train/good  test/{good,<defect>}  ground_truth/<defect>/<stem>_mask.png
    btad    train/ok  test/{ok,ko}  ground_truth/ko/<stem>.png
    loco    as mvtec, and validation/good; ground_truth/<defect>/<stem>/000.png ...; defects_config.json
    visa    Data/Images/{Normal,Anomaly}  Data/Masks/Anomaly; ../split_csv/1cls.csv says what is for what
    plain   good, optional bad or bad/<defect>, optional masks with the folders and names of bad

In loco, masks hold numbers of defect classes where there is a defects_config.json.

test and ground_truth may be missing; where there are masks, each defect image must have one. Hidden
files, files that are not images, and all but the first of the files in a folder that differ only in
their suffix are left out.

Validation images come from the good training images (10 %, chosen by the seed) or, in loco, from their
own folder; never from the test images. The layout plain has no test split, so about 20 % of its good
images become test images, chosen by their names alone: another seed does not train on them. Both
choices rank the images by a hash of their names (with those of the folders below good, so that views
named alike in a folder for each part fall on both sides) and so depend neither on the order in the file
system nor on a library's random numbers.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from edgead.errors import DataError
from edgead.image import IMAGE_SUFFIXES, list_images, read_mask

logger = logging.getLogger(__name__)

_GOOD_NAMES = ("good", "ok", "normal")
_MASK_ENDING = re.compile("[_-](mask|label|gt)$", re.IGNORECASE)
_MARKERS = {  # layout -> folders that tell it; the first match counts
    "visa": ("Data/Images/Normal",),
    "loco": ("train/good", "validation/good"),
    "mvtec": ("train/good",),
    "btad": ("train/ok",),
    "plain": ("good",),
}


@dataclass(frozen=True)
class TestItem:
    """One test image.

    Attributes:
        label: 0 good, 1 defective.
        defect: "good" or the name of the defect.
        masks: files whose union is the defect; empty for good images and where there are no masks.
        mask_above: mask pixels above this grey value belong to the defect: 127, or 0 where masks hold
            numbers of defect classes.
    """

    __test__ = False  # whatever pytest thinks of the name

    path: Path
    label: int
    defect: str
    masks: tuple[Path, ...] = ()
    mask_above: int = 127


@dataclass(frozen=True)
class Saturation:
    """Area that suffices to have found a defect, for the metric sPRO; from LOCO's defects_config.json.

    Attributes:
        pixel_value: value of the defect's pixels in its masks.
        saturation_threshold: area in pixels, or as a share of the mask's area if `relative_saturation`.
    """

    defect_name: str
    pixel_value: int
    saturation_threshold: float
    relative_saturation: bool


@dataclass(frozen=True)
class Dataset:
    """What `open_dataset` found. All paths begin with `root`; the tuples of images are sorted by path.

    Attributes:
        layout: one of those in the module's docstring.
        train: good images to train on, at least one.
        validation: good images to calibrate on, at least one; the same as `train` if there is only one.
        saturation: only in LOCO, in the order of its file.
    """

    name: str
    root: Path
    layout: str
    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    test: tuple[TestItem, ...]
    saturation: tuple[Saturation, ...] = ()

    @cached_property
    def hashes(self) -> dict[Path, str]:
        """SHA-256 (hex) of the contents of the train and validation images, sorted by path."""
        found = {}
        for path in _sorted({*self.train, *self.validation}):
            try:
                found[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise DataError(f"{path}: cannot read this image: {error.strerror}") from error
        return found

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the sorted relative paths and contents of the train and validation images."""
        digest = hashlib.sha256()
        for path, content in self.hashes.items():
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{content}\n".encode())
        return digest.hexdigest()

    def warn_of_copies(self) -> None:
        """Says which validation images are copies of training images: networks know these by heart."""
        learned = {self.hashes[path]: path for path in self.train}
        copies = [path for path in self.validation if self.hashes[path] in learned]
        if copies and self.validation != self.train:
            logger.warning(
                "%d of the %d validation images are copies of training images, the first is %s, the same"
                " as %s: scale and threshold come out too low. Keep one of each",
                len(copies), len(self.validation), copies[0], learned[self.hashes[copies[0]]],
            )  # fmt: skip


def open_dataset(root: Path | str, *, seed: int = 0) -> Dataset:
    """Recognises the layout of a folder and splits its images.

    Args:
        root: folder of one category, in one of the layouts that the module's docstring lists.
        seed: chooses the validation images (not in LOCO).

    Raises:
        DataError: no such folder, no known layout, no good images, defect images without masks in a data
            set that has masks, a damaged VisA or LOCO description, or something that cannot be read.
    """
    try:
        return _open(Path(root), seed)
    except OSError as error:
        raise DataError(f"{root}: cannot read this data set: {error}") from error


def load_mask(item: TestItem, size_px: tuple[int, int]) -> np.ndarray:
    """Reads the defect mask of a test image.

    Args:
        size_px: (height, width) of the test image.

    Returns:
        HW bool: the union of the item's masks, all False where it has none.

    Raises:
        DataError: a mask is damaged or of another size than the image.
    """
    union = np.zeros(size_px, dtype=bool)
    for path in item.masks:
        mask = read_mask(path, above=item.mask_above)
        if mask.shape != union.shape:
            raise DataError(
                f"{path}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its image {item.path} is"
                f" {size_px[1]} x {size_px[0]}; save the mask in the image's size"
            )
        union |= mask
    return union


def _open(root: Path, seed: int) -> Dataset:
    layout = _layout(root)
    if layout is None:
        raise DataError(_unknown_layout(root))
    real = root.resolve()
    if layout == "plain" and real.name in ("train", "validation", "test") and _layout(real.parent):
        raise DataError(f"{root}: this is one part of the data set {real.parent}: name that folder")
    saturation: tuple[Saturation, ...] = ()
    if layout == "visa":
        good, test = _open_visa(root)
    elif layout == "plain":
        good, test = _open_plain(root)
    else:
        good, test = _open_folders(root, layout)
    if layout == "loco":
        train, validation = good, _images(root / "validation" / "good")
        saturation = _read_saturation(root / "defects_config.json")
    else:
        train, validation = _split(root, good, seed)
    if not train or not validation:
        folders = " or ".join(str(root / folder) for folder in _MARKERS[layout])
        raise DataError(f"{folders}: no good images; looked for {', '.join(IMAGE_SUFFIXES)}")
    return Dataset(real.name, root, layout, tuple(train), tuple(validation), tuple(test), saturation)


def _layout(root: Path) -> str | None:
    for layout, folders in _MARKERS.items():
        if all((root / folder).is_dir() for folder in folders):
            return layout
    return None


def _unknown_layout(root: Path) -> str:
    if not root.is_dir():
        problem = "this is a file" if root.exists() else "no such folder"
        return f"{root}: {problem}; expected the folder of a data set"
    children = sorted(child for child in root.iterdir() if not child.name.startswith("."))
    categories = [child.name for child in children if child.is_dir() and _layout(child)]
    if categories:
        return f"{root}: not a data set, but it holds some: {_some(categories)}; name one of them"
    found = [child.name + "/" * child.is_dir() for child in children]
    layouts = ", ".join(f"{' and '.join(folders)} ({name})" for name, folders in _MARKERS.items())
    return f"{root}: not a data set; looked for the folders {layouts}; found {_some(found) or 'nothing'}"


def _open_folders(root: Path, layout: str) -> tuple[list[Path], list[TestItem]]:
    """mvtec, btad, loco: (good training images, test items)."""
    good = "ok" if layout == "btad" else "good"
    above = 0 if (root / "defects_config.json").is_file() and layout == "loco" else 127
    test: list[TestItem] = []
    for folder in sorted((root / "test").iterdir()) if (root / "test").is_dir() else ():
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        if folder.name == good:
            test += [TestItem(path, 0, "good") for path in _images(folder)]
            continue
        if folder.name.lower() in _GOOD_NAMES:
            raise DataError(
                f"{folder}: by the layout {layout} these would be defects; rename the folder to {good}"
                " if these parts are good, otherwise to the defect's name"
            )
        masks = _index_masks(root / "ground_truth" / folder.name)
        for path in _images(folder):
            test.append(TestItem(path, 1, folder.name, masks[_key(path, folder)], above))
    if (root / "ground_truth").is_dir():
        _require_masks(test, root / "ground_truth")
    return _images(root / "train" / good), test


def _open_plain(root: Path) -> tuple[list[Path], list[TestItem]]:
    """(good images to train on, test items)."""
    ranks = {path: _rank(path.relative_to(root / "good").as_posix()) for path in _images(root / "good")}
    good = sorted(ranks, key=lambda path: (ranks[path], path.as_posix()))
    n_test = sum(rank < 0.2 for rank in ranks.values())
    n_test = min(max(n_test, 1), len(good) - 1) if good else 0  # at least one on either side if possible
    test = [TestItem(path, 0, "good") for path in good[:n_test]]
    bad = root / "bad"
    if bad.is_dir():
        masks = _index_masks(root / "masks")
        for path in _images(bad):
            folders = path.relative_to(bad).parts[:-1]
            test.append(TestItem(path, 1, folders[0] if folders else "bad", masks[_key(path, bad)]))
        if (root / "masks").is_dir():
            _require_masks(test, root / "masks")
    return good[n_test:], sorted(test, key=lambda item: item.path.as_posix())


def _open_visa(root: Path) -> tuple[list[Path], list[TestItem]]:
    """(good training images, test items) of the official one-class split."""
    real = root.resolve()
    table = real.parent / "split_csv" / "1cls.csv"
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file, restval="") if row["object"] == real.name]
        lines = [(row["split"], row["label"], row["image"], row["mask"]) for row in rows]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{root}: this is a category of VisA, whose official split is expected in {table}, with the"
            f" columns object, split, label, image and mask: {error!r}"
        ) from error
    if not lines:
        raise DataError(f"{table}: no lines for {real.name!r}; a category's folder must keep its name")
    has_masks = (root / "Data" / "Masks").is_dir()
    train: list[Path] = []
    test: list[TestItem] = []
    for split, label, image, mask in lines:
        path = root.joinpath(*Path(image).parts[1:])  # the table's paths begin with the category
        if split == "train" and label == "normal":
            train.append(path)
        elif split == "test" and label == "normal":
            test.append(TestItem(path, 0, "good"))
        elif split == "test" and label == "anomaly":
            masks = (root.joinpath(*Path(mask).parts[1:]),) if mask and has_masks else ()
            test.append(TestItem(path, 1, "anomaly", masks, mask_above=0))
        else:
            raise DataError(f"{table}: {image} has split {split!r} and label {label!r}, unknown in VisA")
    missing = [path for path in (*train, *(item.path for item in test)) if not path.is_file()]
    if missing:
        raise DataError(f"{table} lists files that do not exist: {_some(missing)}")
    if has_masks:
        _require_masks(test, root / "Data" / "Masks")
    return train, sorted(test, key=lambda item: item.path.as_posix())


def _images(folder: Path) -> list[Path]:
    """Image files below a folder, sorted; of files with one stem in one folder only the first."""
    first: dict[Path, Path] = {}
    for path in list_images(folder):
        kept = first.setdefault(path.with_suffix(""), path)
        if kept != path:
            logger.warning("%s is left out, because %s is there as well", path, kept.name)
    masks = [
        path
        for stem, path in first.items()
        if (image := stem.with_name(_MASK_ENDING.sub("", stem.name))) != stem and image in first
    ]
    if masks:
        logger.warning(
            "%s: %d of the %d images look like masks of others, the first is %s; they are taken as"
            " images: masks belong into a folder of their own, ground_truth or masks",
            folder, len(masks), len(first), masks[0].name,
        )  # fmt: skip
    return list(first.values())


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _index_masks(folder: Path) -> defaultdict[str, tuple[Path, ...]]:
    """Key of an image -> its masks: <stem>_mask.png, <stem>.png, or all files in the folder <stem>."""
    masks: defaultdict[str, tuple[Path, ...]] = defaultdict(tuple)
    for path in list_images(folder) if folder.is_dir() else ():
        masks[_key(path, folder).removesuffix("_mask")] += (path,)
        if path.parent != folder:
            masks[path.parent.relative_to(folder).as_posix()] += (path,)
    return masks


def _require_masks(items: Iterable[TestItem], folder: Path) -> None:
    bare = [
        item.path
        for item in items
        if item.label == 1 and not (item.masks and all(mask.is_file() for mask in item.masks))
    ]
    if bare:
        raise DataError(
            f"{folder}: no masks for the defect images {_some(bare, most=5)}; add them, or move this"
            " folder away to work without masks"
        )


def _split(root: Path, images: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """(train, validation): int(0.9 n) images and the rest."""
    if len(images) == 1:
        logger.warning("%s: only one good image; it serves for training and for validation", root)
        return images, images
    ranked = sorted(images, key=lambda path: _rank(f"{seed}/{path.relative_to(root).as_posix()}"))
    n_train = len(images) * 9 // 10
    return _sorted(ranked[:n_train]), _sorted(ranked[n_train:])


def _rank(text: str) -> float:
    """A number in [0, 1) that looks random but is always the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _sorted(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=Path.as_posix)  # as text, the same order on every operating system


def _some(names: Sequence[str | Path], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def _read_saturation(path: Path) -> tuple[Saturation, ...]:
    if not path.is_file():
        return ()
    try:
        return tuple(
            Saturation(
                str(entry["defect_name"]),
                int(entry["pixel_value"]),
                float(entry["saturation_threshold"]),
                bool(entry["relative_saturation"]),
            )
            for entry in json.loads(path.read_text(encoding="utf-8"))
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected LOCO's list of defect_name, pixel_value, saturation_threshold and"
            f" relative_saturation: {error!r}"
        ) from error
