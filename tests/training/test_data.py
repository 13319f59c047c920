from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.errors import DataError
from edgead.image import write_image
from edgead.training import data
from edgead.training.data import Dataset, load_mask, open_dataset


def make(root: Path, *names: str) -> Path:
    """Empty files: opening a data set does not look into the images."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def numbered(folder: str, count: int, suffix: str = ".png") -> list[str]:
    return [f"{folder}/{index:03}{suffix}" for index in range(count)]


def mvtec(root: Path) -> Path:
    return make(
        root,
        *numbered("train/good", 20),
        *numbered("test/good", 3),
        *numbered("test/crack", 2, ".jpg"),
        *numbered("test/hole", 1),
        *numbered("ground_truth/crack", 2, "_mask.png"),
        *numbered("ground_truth/hole", 1, "_mask.png"),
    )


def write_mask(path: Path, *rows: Iterable[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, np.array(rows, np.uint8))


def names(dataset: Dataset, paths: Iterable[Path]) -> list[str]:
    return [path.relative_to(dataset.root).as_posix() for path in paths]


def items(dataset: Dataset) -> list[tuple[str, int, str, list[str]]]:
    return [
        (*names(dataset, [item.path]), item.label, item.defect, names(dataset, item.masks))
        for item in dataset.test
    ]


# ---------------------------------------------------------------------------------------- layouts


def test_mvtec(tmp_path: Path) -> None:
    dataset = open_dataset(mvtec(tmp_path / "bottle"))
    assert (dataset.name, dataset.root, dataset.layout) == ("bottle", tmp_path / "bottle", "mvtec")
    assert (len(dataset.train), len(dataset.validation)) == (18, 2)
    assert items(dataset) == [
        ("test/crack/000.jpg", 1, "crack", ["ground_truth/crack/000_mask.png"]),
        ("test/crack/001.jpg", 1, "crack", ["ground_truth/crack/001_mask.png"]),
        ("test/good/000.png", 0, "good", []),
        ("test/good/001.png", 0, "good", []),
        ("test/good/002.png", 0, "good", []),
        ("test/hole/000.png", 1, "hole", ["ground_truth/hole/000_mask.png"]),
    ]
    assert dataset.saturation == ()


def test_training_images_alone_are_enough(tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, *numbered("train/good", 10)))
    assert (len(dataset.train), len(dataset.validation), dataset.test) == (9, 1, ())


def test_defects_without_any_masks(tmp_path: Path) -> None:
    root = mvtec(tmp_path)
    shutil.rmtree(root / "ground_truth")
    item = next(item for item in open_dataset(root).test if item.label)
    assert item.masks == () and not load_mask(item, (4, 5)).any()


def test_btad(tmp_path: Path) -> None:
    root = make(
        tmp_path / "01",
        *numbered("train/ok", 10, ".bmp"),
        *("test/ok/0000.bmp", "test/ko/0000.bmp", "test/ko/0001.bmp", "test/ko/0002.bmp"),
        *("ground_truth/ko/0000.png", "ground_truth/ko/0001.bmp", "ground_truth/ko/0002.JPG"),
    )
    dataset = open_dataset(root)
    assert (dataset.layout, len(dataset.train), len(dataset.validation)) == ("btad", 9, 1)
    assert items(dataset) == [
        ("test/ko/0000.bmp", 1, "ko", ["ground_truth/ko/0000.png"]),
        ("test/ko/0001.bmp", 1, "ko", ["ground_truth/ko/0001.bmp"]),
        ("test/ko/0002.bmp", 1, "ko", ["ground_truth/ko/0002.JPG"]),
        ("test/ok/0000.bmp", 0, "good", []),
    ]


def loco(root: Path) -> Path:
    make(
        root,
        *numbered("train/good", 5),
        *numbered("validation/good", 3),
        *numbered("test/good", 1),
        *numbered("test/logical_anomalies", 1),
        *numbered("test/structural_anomalies", 1),
    )
    write_mask(root / "ground_truth/logical_anomalies/000/000.png", [255, 0, 0], [0, 0, 0])
    write_mask(root / "ground_truth/logical_anomalies/000/001.png", [0, 0, 0], [0, 3, 0])
    write_mask(root / "ground_truth/structural_anomalies/000/000.png", [0, 0, 254], [0, 0, 0])
    return root


def test_loco(tmp_path: Path) -> None:
    entry = {"defect_name": "missing_pin", "pixel_value": 253, "saturation_threshold": 0.5}
    config = [entry | {"relative_saturation": True}]
    (loco(tmp_path) / "defects_config.json").write_text(json.dumps(config))
    dataset = open_dataset(tmp_path, seed=3)
    assert dataset.layout == "loco"
    assert names(dataset, dataset.train) == numbered("train/good", 5)
    assert names(dataset, dataset.validation) == numbered("validation/good", 3)
    assert [(item.label, item.defect) for item in dataset.test] == [
        (0, "good"),
        (1, "logical_anomalies"),
        (1, "structural_anomalies"),
    ]
    assert dataset.saturation == (data.Saturation("missing_pin", 253, 0.5, True),)
    union = load_mask(dataset.test[1], (2, 3))  # any value but 0 is a defect
    assert union.tolist() == [[True, False, False], [False, True, False]]
    assert load_mask(dataset.test[2], (2, 3)).sum() == 1


@pytest.mark.parametrize("text", ["{", "[1]", '[{"defect_name": "x"}]', '{"defect_name": "x"}'])
def test_loco_with_a_damaged_description(tmp_path: Path, text: str) -> None:
    (loco(tmp_path) / "defects_config.json").write_text(text)
    with pytest.raises(DataError, match="defects_config.json: expected LOCO's list"):
        open_dataset(tmp_path)


VISA_TABLE = """object,split,label,image,mask
candle,train,normal,candle/Data/Images/Normal/0001.JPG,
candle,train,normal,candle/Data/Images/Normal/0000.JPG,
candle,test,normal,candle/Data/Images/Normal/0002.JPG,
candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png
pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,
"""


def visa(root: Path, table: str | None = VISA_TABLE) -> Path:
    make(
        root / "candle",
        *("Data/Images/Normal/0000.JPG", "Data/Images/Normal/0001.JPG", "Data/Images/Normal/0002.JPG"),
        "Data/Images/Anomaly/000.JPG",
    )
    write_mask(root / "candle/Data/Masks/Anomaly/000.png", [0, 1, 6])
    if table is not None:
        (root / "split_csv").mkdir()
        (root / "split_csv" / "1cls.csv").write_text(table, encoding="utf-8-sig")  # as Excel
    return root / "candle"


def test_visa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(visa(tmp_path))
    assert (dataset.name, dataset.layout) == ("candle", "visa")
    assert len(dataset.train) == len(dataset.validation) == 1
    used = names(dataset, (*dataset.train, *dataset.validation))
    assert sorted(used) == ["Data/Images/Normal/0000.JPG", "Data/Images/Normal/0001.JPG"]
    assert items(dataset) == [
        ("Data/Images/Anomaly/000.JPG", 1, "anomaly", ["Data/Masks/Anomaly/000.png"]),
        ("Data/Images/Normal/0002.JPG", 0, "good", []),
    ]
    assert load_mask(dataset.test[0], (1, 3)).tolist() == [[False, True, True]]  # numbers of classes
    monkeypatch.chdir(tmp_path / "candle")
    assert names(open_dataset("."), open_dataset(".").train) == names(dataset, dataset.train)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "expected in .*split_csv/1cls.csv.*FileNotFoundError"),
        ("object,split,image\ncandle,train,x\n", "with the columns object, split, label.*KeyError"),
        ("object,split,label,image,mask\n\xff", "no lines for 'candle'"),
        (VISA_TABLE.replace("candle,", "wax,"), "no lines for 'candle'; .*keep its name"),
        (VISA_TABLE.replace("0002.JPG", "7777.JPG"), "files that do not exist: .*7777.JPG"),
        (VISA_TABLE.replace("train,normal", "train,anomaly"), "split 'train' and label 'anomaly'"),
        (VISA_TABLE.replace("Anomaly/000.png", "Anomaly/1.png"), "no masks for .*Anomaly/000.JPG"),
        (VISA_TABLE.replace(",candle/Data/Masks/Anomaly/000.png", ""), "no masks for .*Anomaly/000.JPG"),
    ],
)
def test_visa_with_a_wrong_split(tmp_path: Path, table: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(visa(tmp_path, table))


def test_visa_without_masks(tmp_path: Path) -> None:
    root = visa(tmp_path)
    shutil.rmtree(root / "Data" / "Masks")
    assert [item.masks for item in open_dataset(root).test] == [(), ()]


def test_plain(tmp_path: Path) -> None:
    root = make(
        tmp_path,
        *numbered("good", 50),
        *("bad/000.png", "bad/scratch/000.png", "bad/scratch/deep/7.png"),
        *("masks/000.png", "masks/scratch/000_mask.png", "masks/scratch/deep/7.png"),
    )
    dataset = open_dataset(root)
    assert dataset.layout == "plain"
    assert [item for item in items(dataset) if item[1]] == [
        ("bad/000.png", 1, "bad", ["masks/000.png"]),
        ("bad/scratch/000.png", 1, "scratch", ["masks/scratch/000_mask.png"]),
        ("bad/scratch/deep/7.png", 1, "scratch", ["masks/scratch/deep/7.png"]),
    ]
    held_out = [item.path for item in dataset.test if item.label == 0]
    used = {*dataset.train, *dataset.validation, *held_out}
    assert names(dataset, sorted(used)) == numbered("good", 50)
    # Recorded from the first version; another choice would test models on what they were trained on.
    assert " ".join(path.stem for path in held_out) == "002 003 004 022 025 029 038 040 041 042 048"


def test_plain_with_a_folder_for_each_part(tmp_path: Path) -> None:
    """Views have the same names in all folders: each has to be learned and tested."""
    views = ("cam0", "cam1", "cam2", "cam3")
    names = [f"good/{part:03}/{view}.png" for part in range(40) for view in views]
    dataset = open_dataset(make(tmp_path, *names))
    assert 16 <= len(dataset.test) <= 48  # 32 expected, three standard deviations
    for view in views:
        assert sum(path.stem == view for path in dataset.train) > 20
        assert any(item.path.stem == view for item in dataset.test)


@pytest.mark.parametrize("name", ["ok", "Good", "normal"])
def test_good_parts_in_a_folder_that_would_be_a_defect_are_refused(tmp_path: Path, name: str) -> None:
    make(mvtec(tmp_path), *numbered(f"test/{name}", 1))
    with pytest.raises(DataError, match=f"test/{name}: by the layout mvtec .*rename the folder to good"):
        open_dataset(tmp_path)


def test_masks_beside_their_images_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, *(f"train/good/{name}" for name in ("a.jpg", "a_label.bmp", "b.jpg", "c_mask.png")))
    assert len(open_dataset(tmp_path).train) == 3
    assert "1 of the 4 images look like masks of others, the first is a_label.bmp" in caplog.text


def test_plain_with_good_images_only(tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, *numbered("good", 3)))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1, 1, 1)


# ----------------------------------------------------------------------------------------- splits


@settings(deadline=None, max_examples=60)
@given(
    stems=st.sets(st.text("abc019_-", min_size=1, max_size=5), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
    layout=st.sampled_from(["mvtec", "plain"]),
)
def test_split(stems: set[str], seed: int, layout: str) -> None:
    folder = "train/good" if layout == "mvtec" else "good"
    files = [f"{folder}/{stem}.png" for stem in stems]
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        dataset = open_dataset(make(Path(first), *files), seed=seed)
        again = open_dataset(make(Path(second), *reversed(files)), seed=seed)
        other = open_dataset(first, seed=seed + 1)
    train, validation = set(dataset.train), set(dataset.validation)
    test = {item.path for item in dataset.test}
    n = len(stems) - len(test)
    assert sorted(names(dataset, train | validation | test)) == sorted(files)
    assert not test & (train | validation)
    if n == 1:
        assert train == validation
    else:
        assert not train & validation
        assert (len(train), len(validation)) == (int(0.9 * n), n - int(0.9 * n))
    if layout == "mvtec":
        assert not test
    else:
        assert len(test) >= (len(stems) > 1)
    assert names(again, again.train) == names(dataset, dataset.train)  # not the order of creation
    assert names(again, again.validation) == names(dataset, dataset.validation)
    assert other.test == dataset.test  # whatever the seed
    assert list(dataset.train) == sorted(dataset.train, key=Path.as_posix)


def test_seed_chooses_the_validation_images(tmp_path: Path) -> None:
    root = make(tmp_path, *numbered("train/good", 100))
    assert open_dataset(root).validation == open_dataset(root, seed=0).validation
    drawn = {path for seed in range(60) for path in open_dataset(root, seed=seed).validation}
    # Each image has a chance of 0.1 in each of 60 draws: 0.18 of 100 are expected never to come.
    assert len(drawn) >= 95


def test_share_of_test_images_in_the_plain_layout(tmp_path: Path) -> None:
    dataset = open_dataset(make(tmp_path, *numbered("good", 1000)))
    assert abs(len(dataset.test) - 200) < 50  # four standard deviations of a binomial distribution


def test_one_image_serves_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(make(tmp_path, "train/good/000.png"))
    assert dataset.train == dataset.validation == (tmp_path / "train/good/000.png",)
    assert "only one good image" in caplog.text


@pytest.mark.parametrize(
    "folders", [["train/good"], ["train/ok"], ["good"], ["train/good", "validation/good"]]
)
def test_no_image(tmp_path: Path, folders: list[str]) -> None:
    make(tmp_path, *(f"{folder}/Thumbs.db" for folder in folders))
    with pytest.raises(DataError, match=f"{folders[-1]}: no good images; looked for .bmp"):
        open_dataset(tmp_path)


def test_loco_without_validation_images(tmp_path: Path) -> None:
    make(tmp_path, *numbered("train/good", 3), "validation/good/.keep")
    with pytest.raises(DataError, match="validation/good: no good images"):
        open_dataset(tmp_path)


# ------------------------------------------------------------------------------- what is left out


def test_files_that_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make(
        mvtec(tmp_path),
        *("train/good/.DS_Store", "train/good/Thumbs.db", "train/good/._000.png", "train/good/a.txt"),
        *("test/.DS_Store", "test/readme.txt", "test/.hidden/000.png", "train/good/000.tif"),
    )
    dataset = open_dataset(root)
    used = sorted(names(dataset, (*dataset.train, *dataset.validation)))
    assert used == numbered("train/good", 20)  # 000.png, not 000.tif
    assert len(dataset.test) == 6
    assert "000.tif is left out, because 000.png is there as well" in caplog.text


def test_loop_of_links_ends(tmp_path: Path) -> None:
    root = mvtec(tmp_path)
    (root / "train/good/loop").symlink_to(root / "train", target_is_directory=True)
    (root / "test/crack/loop").symlink_to(root / "test/crack", target_is_directory=True)
    dataset = open_dataset(root)
    assert (len({*dataset.train, *dataset.validation}), len(dataset.test)) == (20, 6)


# ------------------------------------------------------------------------------------------ errors


def test_unknown_layout_lists_what_is_there(tmp_path: Path) -> None:
    make(tmp_path, *(f"{index:02}.png" for index in range(11)), "images/x.png")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path)
    message = str(caught.value)
    for name in ("train/good (mvtec)", "train/ok (btad)", "Data/Images/Normal (visa)", "good (plain)"):
        assert name in message
    assert message.endswith(f"found {', '.join(f'0{index}.png' for index in range(10))} and 2 more")


def test_folder_above_and_below(tmp_path: Path) -> None:
    for name in ("bottle", "cable"):
        mvtec(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it holds some: bottle, cable; name one of them"):
        open_dataset(tmp_path)
    for part in ("train", "test"):
        with pytest.raises(DataError, match="one part of the data set .*bottle: name that folder"):
            open_dataset(tmp_path / "bottle" / part)


def test_no_such_folder_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="found nothing"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="x.png: this is a file"):
        open_dataset(make(tmp_path, "x.png") / "x.png")


@pytest.mark.parametrize("layout", ["mvtec", "plain"])
def test_missing_masks_are_named(tmp_path: Path, layout: str) -> None:
    if layout == "plain":
        good, bad, masks = "good", "bad", "masks"
    else:
        good, bad, masks = "train/good", "test/crack", "ground_truth/crack"
    make(tmp_path, *numbered(good, 3), *numbered(bad, 8), f"{masks}/003.png")
    with pytest.raises(DataError, match="no masks for .*000.png, .*005.png and 2 more; add") as caught:
        open_dataset(tmp_path)
    assert "003.png" not in str(caught.value) and "006.png" not in str(caught.value)


def test_mask_of_another_size_is_named(tmp_path: Path) -> None:
    root = mvtec(tmp_path)
    write_mask(root / "ground_truth/hole/000_mask.png", [0, 255, 255], [0, 0, 0])
    item = open_dataset(root).test[-1]
    assert load_mask(item, (2, 3)).tolist() == [[False, True, True], [False] * 3]
    with pytest.raises(DataError, match="000_mask.png: the mask is 3 x 2 .*hole/000.png is 2 x 3"):
        load_mask(item, (3, 2))
    with pytest.raises(DataError, match="crack/000_mask.png: the file is empty"):
        load_mask(open_dataset(root).test[0], (2, 3))


def test_mask_with_ones_instead_of_255_is_refused(tmp_path: Path) -> None:
    root = mvtec(tmp_path)
    cv2.imwrite(str(root / "ground_truth/hole/000_mask.png"), np.array([[0, 1]], np.uint8))
    with pytest.raises(DataError, match="brightest pixel of this mask is 1"):
        load_mask(open_dataset(root).test[-1], (1, 2))


# ------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_sees_names_and_contents_of_the_training_images_only(tmp_path: Path) -> None:
    root = mvtec(tmp_path / "a")
    before = open_dataset(root).fingerprint()
    assert len(before) == 64 and int(before, 16) >= 0
    assert open_dataset(shutil.copytree(root, tmp_path / "b")).fingerprint() == before
    assert open_dataset(root, seed=1).fingerprint() == before  # the split is recorded by its seed
    (root / "test/good/000.png").write_bytes(b"changed")
    assert open_dataset(root).fingerprint() == before
    (root / "train/good/007.png").write_bytes(b"changed")
    changed = open_dataset(root).fingerprint()
    (root / "train/good/007.png").rename(root / "train/good/007a.png")  # the same place in the order
    assert len({before, changed, open_dataset(root).fingerprint()}) == 3


def test_copies_of_training_images_among_the_validation_images_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_dataset(mvtec(tmp_path))
    for index, path in enumerate((*dataset.train, *dataset.validation)):
        path.write_bytes(bytes([index]))
    dataset.warn_of_copies()
    assert not caplog.text
    dataset = open_dataset(tmp_path)
    dataset.validation[1].write_bytes(dataset.train[7].read_bytes())
    dataset.warn_of_copies()
    expected = f"{dataset.validation[1]}, the same as {dataset.train[7]}"
    assert "1 of the 2 validation images are copies" in caplog.text and expected in caplog.text
    one = open_dataset(make(tmp_path / "one", "train/good/0.png"))  # serves as both
    caplog.clear()
    one.warn_of_copies()
    assert not caplog.text


def test_fingerprint_of_a_file_that_has_gone(tmp_path: Path) -> None:
    dataset = open_dataset(mvtec(tmp_path))
    dataset.train[0].unlink()
    with pytest.raises(DataError, match=f"{dataset.train[0].name}: cannot read"):
        dataset.fingerprint()


# ------------------------------------------------------------------------------------ real data sets


@pytest.mark.parametrize(
    ("name", "counts", "n_masks"),
    # Counted in the folders; 188 and 21 are also EfficientAD's published split of MVTec's "bottle".
    [("mvtec_bottle", (188, 21, 83), 63), ("cookies", (27, 4, 46), 32)],
)
def test_real_data_sets(shared: Path, name: str, counts: tuple[int, int, int], n_masks: int) -> None:
    dataset = open_dataset(shared / "data" / name)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == counts
    defective = [item for item in dataset.test if item.label == 1]
    assert sum(len(item.masks) for item in defective) == len(defective) == n_masks
    size_px = (900, 900) if name == "mvtec_bottle" else (768, 576)
    assert all(load_mask(item, size_px).any() for item in defective[::10])
