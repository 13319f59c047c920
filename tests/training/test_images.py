"""Training and penalty images in files: the same pixels as read directly, and memory that stays flat."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgead.errors import DataError, TrainingError
from edgead.image import list_images, read_image, resize, write_image
from edgead.training import images as module
from edgead.training.data import open_dataset
from edgead.training.efficientad import TrainConfig
from edgead.training.images import (
    PenaltyImages,
    iterate_images,
    read_images,
    store_images,
)
from edgead.training.train import train


def test_pool_holds_what_reading_each_image_gives(tmp_path: Path, demo_images: Path) -> None:
    paths = list_images(demo_images / "train")
    pool = store_images(paths, tmp_path / "images.bin")
    expected = np.stack([resize(read_image(path), 256, 256) for path in paths])
    assert len(pool) == len(paths) and (tmp_path / "images.bin").stat().st_size == expected.nbytes
    np.testing.assert_array_equal(np.stack(list(pool)), expected)
    np.testing.assert_array_equal(read_images(paths), expected)
    assert pool[0].dtype == np.uint8
    for index in (-1, len(paths)):
        with pytest.raises(IndexError):
            pool[index]


def test_many_threads_read_one_pool(tmp_path: Path) -> None:
    paths = _flat_images(tmp_path / "in", range(0, 240, 20))
    pool = store_images(paths, tmp_path / "images.bin")
    order = np.random.default_rng(0).integers(len(pool), size=300).tolist()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda index: set(np.unique(pool[index]).tolist()), order))
    assert found == [{20 * index} for index in order]


def _flat_images(folder: Path, levels: range) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{level:03d}.png" for level in levels]
    for path, level in zip(paths, levels, strict=True):
        write_image(path, np.full((9, 7, 3), level, np.uint8))
    return paths


def test_pool_is_written_once_and_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _flat_images(tmp_path / "in", range(4))
    file = tmp_path / "images.bin"
    bad = tmp_path / "in" / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(DataError, match="bad.png"):
        store_images([*paths, bad], file)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    store_images(paths, file)
    monkeypatch.setattr(module, "iterate_images", None)  # would fail if it were called
    assert int(store_images(paths, file)[2].max()) == 2
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-1])  # of another length: not that file
    assert int(store_images(paths, file)[3].max()) == 3 and file.stat().st_size == 4 * 256 * 256 * 3


def test_a_pool_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    paths = _flat_images(tmp_path / "in", range(2))
    with pytest.raises(TrainingError, match=r"cannot write the 2 training images .* \(0 MB\)"):
        store_images(paths, tmp_path / "absent" / "images.bin")


def test_images_come_in_order_and_not_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    def load(path: Path, size_px: tuple[int, int]) -> np.ndarray:
        loaded.append(int(path.name))
        return np.full(1, int(path.name))

    monkeypatch.setattr(module, "_load", load)
    source = iterate_images(Path(str(index)) for index in range(1000))
    assert [int(next(source)[0]) for _ in range(10)] == list(range(10))
    assert len(loaded) <= 10 + 2 * module.MOST_DECODERS + 1
    source.close()  # type: ignore[attr-defined]


def test_stored_penalty_images_are_those_that_are_decoded(
    tmp_path: Path, natural_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = PenaltyImages(natural_images, seed=1)
    monkeypatch.setattr(module, "MOST_STORED", 4)  # of six: the others are decoded again
    stored = PenaltyImages(natural_images, seed=1, store=tmp_path / "penalty.bin")
    for step in range(30):
        np.testing.assert_array_equal(stored(step), plain(step))
    assert (tmp_path / "penalty.bin").stat().st_size == 4 * 256 * 256 * 3
    reads = []
    monkeypatch.setattr(module, "read_image", lambda path: reads.append(path) or read_image(path))
    for step in range(30):
        stored(step)
    assert set(reads) <= set(plain.paths[4:])


def test_unreadable_penalty_images_are_passed_over_and_a_full_disk_is_survived(
    tmp_path: Path, natural_images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in list_images(natural_images)[:2]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "zz.jpg").write_bytes(b"no image")
    plain = PenaltyImages(folder, seed=0)
    stored = PenaltyImages(folder, seed=0, store=tmp_path / "penalty.bin")
    (tmp_path / "penalty.bin").unlink()
    for step in range(12):
        np.testing.assert_array_equal(stored(step), plain(step))
    assert "penalty image passed over" in caplog.text
    assert caplog.text.count("decoded penalty images are no longer kept") == 1


def test_training_leaves_no_pools_behind_and_clears_older_ones(
    tmp_path: Path, demo_images: Path, natural_images: Path, random_teacher: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "images-0123456789abcdef.bin").write_bytes(b"of a run that was killed")
    seen = set()

    def look(fraction: float, step: int, losses: object) -> None:
        seen.update(path.name for path in run.iterdir())

    train(
        open_dataset(demo_images, seed=42), run, TrainConfig(steps=1),
        teacher=random_teacher, penalty=natural_images, progress=look,
    )  # fmt: skip
    pools = [name for name in seen if name.startswith("images-")]  # older, training, validation
    assert len(pools) == 3 and "penalty.bin" in seen
    assert {path.name for path in run.iterdir()} == {"run.json", "detector.safetensors", "losses.csv"}


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from edgead.image import list_images
from edgead.training.efficientad import _batches
from edgead.training.images import PenaltyImages, store_images

def rss_mib():
    fields = Path("/proc/self/status").read_text().split()
    return [int(fields[fields.index(name) + 1]) / 1024 for name in ("VmHWM:", "VmRSS:")]

paths, penalty, folder = list_images(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
negatives = PenaltyImages(penalty, seed=0, store=folder / "penalty.bin")
for count, file in ((100, "few.bin"), (int(sys.argv[4]), "many.bin")):
    pool = store_images([paths[i % len(paths)] for i in range(count)], folder / file)
    for image in pool:  # all of them, as the pass for the teacher's statistics does
        pass
    batches = _batches(pool, np.arange(count), negatives, 0, 0)
    for _ in range(20):
        next(batches)
    batches.close()
    print(*rss_mib())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's /proc entry")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, natural_images: Path) -> None:
    """2,000 more images are 393 MB of pixels; less than 40 MiB of growth means at most a tenth of that.

    Peak and present resident memory, of a process that stores the images, reads each and makes batches.
    """
    _flat_images(tmp_path / "in", range(0, 200, 10))
    arguments = map(str, (tmp_path / "in", natural_images, tmp_path, 2100))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (peak_few, few), (peak_many, many) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert many - few < 40 and peak_many - peak_few < 40
