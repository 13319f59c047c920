"""The demo data set: rendered photographs of a tray with six parts, in the MVTec AD folder layout.

It lets anyone run the whole chain (train, export, verify, evaluate) without downloading anything.
The pictures are drawn from formulas by `demo_parts`, `demo_scene` and `demo_defects`; nothing in
them comes from another data set. `render_distractors` makes pictures of anything but trays, for the
penalty of EfficientAD's training where no folder of natural images is at hand.

    train/good/000.jpg ...    test/good/000.jpg ...
    test/<defect>/000.jpg ...    ground_truth/<defect>/000_mask.png ...

Surface defects: scratch, stain, chip, burr. Logical ones: swapped (two parts in each other's
pockets: a wrong order), missing, doubled (one part too many, on the bar between the rows), repeated (a
second specimen of one part lies where another should). A mask covers what the defect changed; for a
logical defect it covers the whole outlines of the parts concerned, where they should be and where they
are, but not their shadows. In swapped, missing and repeated pictures each part looks and lies as in a
good one, and the pockets are alike: it is the whole that is wrong. Doubled shows itself locally, too,
because no part ever lies on the bar.

Every picture has its own generator, made from (seed, kind, number): the same seed gives the same
bytes with any number of threads, for one version of OpenCV and numpy on one kind of processor.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgead.errors import DataError
from edgead.training import demo_defects, demo_distractors
from edgead.training.demo_parts import all_parts, noise_fields
from edgead.training.demo_scene import (
    SIZE_PX,
    TRAY,
    Scene,
    compose,
    photograph,
    place,
    sample_scene,
    silhouette,
)

LOGICAL = ("swapped", "missing", "doubled", "repeated")
DEFECTS = (*demo_defects.STRUCTURAL, *LOGICAL)
SHADOW_PX = 28  # how far beside its mask a logical defect changes the picture, by the shadow of a part

_KINDS = ("train", "good", "distractor", *DEFECTS)  # the position is part of the seed: only ever append
_SHARES = (10, 10, 10, 10, 7, 7, 6, 6)  # of the defective pictures, in the order of DEFECTS
_MASK_COVERAGE = 0.08  # of a defect after the lens' blur, from which on a pixel belongs to its mask

Progress = Callable[[int, int], None]


def render_demo(
    root: Path,
    *,
    seed: int = 0,
    train: int = 120,
    good: int = 40,
    defective: int = 66,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Render the data set; nothing is left under `root` if it fails.

    Args:
        root: folder to make; may exist if it is empty.
        seed: another seed, another data set.
        train: good pictures to train on.
        good: good pictures to test with.
        defective: pictures with one defect each, spread over `DEFECTS` (10 10 10 10 7 7 6 6 of 66).
        workers: threads; None for one per processor, at most 8.
        progress: called with (pictures done, pictures in all) from the calling thread.

    Raises:
        DataError: `root` exists and is not an empty folder, or a number is negative.
    """
    _check_numbers(seed=seed, train=train, good=good, defective=defective)
    counts = {"train": train, "good": good, **spread(defective)}
    jobs = [(kind, index) for kind, count in counts.items() for index in range(count)]
    all_parts(), noise_fields(seed)  # made once, before the threads ask for them
    with _new_folder(Path(root)) as folder:
        for part in ("train/good", "test/good"):
            (folder / part).mkdir(parents=True)
        for kind in DEFECTS:
            if counts[kind]:
                (folder / "test" / kind).mkdir()
                (folder / "ground_truth" / kind).mkdir(parents=True)
        _run(lambda job: _write_example(folder, seed, *job), jobs, workers, progress)


def spread(defective: int) -> dict[str, int]:
    """How many of the defective pictures show which defect."""
    ends = np.round(np.cumsum(_SHARES) * defective / sum(_SHARES)).astype(int)
    return dict(zip(DEFECTS, np.diff(ends, prepend=0).tolist(), strict=True))


def render_distractors(
    folder: Path,
    *,
    seed: int = 0,
    count: int = 300,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Render pictures of many kinds, none of them of a tray: 256 to 512 px, RGB, `00000.jpg` ...

    Arguments and errors as `render_demo`. They stand in for natural images; real photographs do better.
    """
    _check_numbers(seed=seed, count=count)

    def write(index: int) -> None:
        rng = _generator(seed, "distractor", index)
        picture = demo_distractors.distractor(rng)
        _write_jpeg(into / f"{index:05d}.jpg", picture, quality=int(rng.integers(80, 96)))

    with _new_folder(Path(folder)) as into:
        _run(write, range(count), workers, progress)


def render_example(
    seed: int, kind: str, index: int, *, with_defect: bool = True
) -> tuple[np.ndarray, np.ndarray, Scene]:
    """Render one picture of the data set, as it is before JPEG compression.

    Args:
        kind: "train", "good" or one of `DEFECTS`.
        with_defect: False gives the same photograph (light, parts, noise) without the defect.

    Returns:
        Picture [640, 640, 3] uint8 RGB; mask of the defect [640, 640] bool (False if none); the scene.
    """
    layout, defect, camera = (_generator(seed, kind, index, stream) for stream in range(3))
    fields, scene = noise_fields(seed), sample_scene(layout)
    order = _generator(seed, kind, 0, 3)
    if kind in demo_defects.STRUCTURAL and with_defect:
        # Multiples of irrational numbers spread sizes and contrasts evenly over few pictures.
        size, contrast = (0.5 + 0.6180 * index) % 1, (0.9 + 0.7549 * index) % 1
        targets = [*range(len(scene.placements)), *([TRAY] * 2 if kind in ("scratch", "stain") else [])]
        picture, changed = compose(
            scene,
            fields,
            damage=lambda s: demo_defects.damage(kind, s, defect, fields, size=size, contrast=contrast),
            target=_in_turn(targets, index, order),
        )
        region = cv2.GaussianBlur(changed, (0, 0), scene.blur_px) > _MASK_COVERAGE
        return photograph(picture, scene, camera), region, scene
    region = np.zeros((SIZE_PX, SIZE_PX), bool)
    if kind in LOGICAL and with_defect:
        parts = range(len(scene.placements))
        choices = list(
            itertools.permutations(parts, 2)
            if kind == "repeated"
            else itertools.combinations(parts, 2 if kind == "swapped" else 1)
        )
        scene, region = _disorder(kind, scene, _in_turn(choices, index, order), defect)
    picture, _ = compose(scene, fields)
    return photograph(picture, scene, camera), region, scene


def _in_turn(choices: list, index: int, order: np.random.Generator) -> Any:
    """The choice for picture `index`: every choice comes once before any comes again."""
    return choices[order.permutation(len(choices))[index % len(choices)]]


def _disorder(
    kind: str, scene: Scene, parts: tuple[int, ...], rng: np.random.Generator
) -> tuple[Scene, np.ndarray]:
    """The scene with a logical defect, and the region that it concerns."""
    lying = list(scene.placements)
    if kind == "missing":
        concerned = [lying.pop(parts[0])]
    elif kind == "doubled":
        concerned = [place(parts[0], None, rng)]
        lying += concerned
    elif kind == "repeated":
        absent, again = parts
        concerned = [lying[absent]]
        lying[absent] = place(again, absent, rng)
        concerned.append(lying[absent])
    else:
        first, second = parts
        concerned = [lying[first], lying[second]]
        lying[first], lying[second] = place(first, second, rng), place(second, first, rng)
        concerned += [lying[first], lying[second]]
    return dataclasses.replace(scene, placements=tuple(lying)), silhouette(scene, tuple(concerned))


def _generator(seed: int, kind: str, index: int, stream: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, _KINDS.index(kind), index, stream])


def _write_example(folder: Path, seed: int, kind: str, index: int) -> None:
    picture, mask, scene = render_example(seed, kind, index)
    subset = "train/good" if kind == "train" else f"test/{kind}"
    _write_jpeg(folder / subset / f"{index:03d}.jpg", picture, quality=scene.quality)
    if kind in DEFECTS:
        _, data = cv2.imencode(".png", mask.astype(np.uint8) * 255)
        (folder / "ground_truth" / kind / f"{index:03d}_mask.png").write_bytes(data.tobytes())


def _write_jpeg(path: Path, picture: np.ndarray, *, quality: int) -> None:
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    path.write_bytes(data.tobytes())


def _run(work: Callable, jobs: Iterable, workers: int | None, progress: Progress | None) -> None:
    jobs = list(jobs)
    # Threads suffice: numpy and OpenCV let go of the interpreter's lock in nearly all of the work.
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        try:
            for done, _ in enumerate(pool.map(work, jobs), 1):
                if progress is not None:
                    progress(done, len(jobs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, that takes the place of `target` when all went well and vanishes otherwise."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(
            f"{target} exists and is not an empty folder: name a new one, or delete this one first"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        yield folder
        if target.exists():
            target.rmdir()  # Windows does not rename onto a folder
        folder.rename(target)


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 0:
            raise DataError(f"{name} is {value}: give 0 or more")
