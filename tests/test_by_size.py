"""Figures by size: worked example, statistics of real masks, bad masks, command, page, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgead import by_size as module
from edgead import cli
from edgead.by_size import LIMITS, BySize, SizeConfig, by_size, lines, open_pixels, robustness, tiniest
from edgead.cli import main
from edgead.detector import load
from edgead.errors import DataError
from edgead.evaluate import evaluate
from edgead.image import write_image
from edgead.metrics import PixelScores
from edgead.training.data import open_dataset

# Example A of the specification of the metrics: a 4x4 mask of two components, areas 3 and 1.
MASK = np.zeros((4, 4), dtype=bool)
MASK[[0, 0, 1, 3], [0, 1, 0, 3]] = True
MAP_A = np.array(
    [[0.9, 0.8, 0.1, 0.2], [0.7, 0.6, 0.3, 0.05], [0.0, 0.15, 0.95, 0.25], [0.12, 0.22, 0.35, 0.5]],
    dtype=np.float32,
)
SIDES_PX = (2, 3, 4, 6, 8, 12)  # bright spots of the images below
SIDE_PX = 64


def compute(
    pixels: PixelScores,
    config: SizeConfig | None = None,
    threshold: float = 0.5,
    is_rejected: bool = True,
) -> BySize:
    images = 1 + max(region.image for region in pixels.list_regions())
    paths, rejected = [f"{index}.png" for index in range(images)], [is_rejected] * images
    figures = by_size(pixels, paths, config or SizeConfig(), threshold=threshold, rejected=rejected)
    assert figures is not None
    return figures


def spots(root: Path, *, sides_px: tuple[int, ...] = SIDES_PX) -> Path:
    """MVTec layout: dim noise, and defect images with one bright square each that its mask marks."""
    rng = np.random.default_rng(5)

    def noise() -> np.ndarray:
        return rng.integers(60, 80, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)

    for part, count in (("train", 12), ("test", 3)):
        (root / part / "good").mkdir(parents=True)
        for index in range(count):
            write_image(root / part / "good" / f"{index:03}.png", noise())
    for folder in ("test/spot", "ground_truth/spot"):
        (root / folder).mkdir(parents=True)
    for index, side in enumerate(sides_px):
        image, mask = noise(), np.zeros((SIDE_PX, SIDE_PX), dtype=np.uint8)
        image[20 : 20 + side, 30 : 30 + side] = 230
        mask[20 : 20 + side, 30 : 30 + side] = 255
        write_image(root / "test" / "spot" / f"{index:03}.png", image)
        write_image(root / "ground_truth" / "spot" / f"{index:03}_mask.png", mask)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spots(tmp_path_factory.mktemp("data") / "parts")


def test_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its two components are too few for quartiles in the benchmark, and enough to work them by hand.
    monkeypatch.setattr(module, "FEWEST_COMPONENTS", 2)
    pixels = PixelScores()
    pixels.add(MAP_A, MASK)
    figures = compute(pixels)
    assert figures.limits == (0.30, 0.10, 0.05, 0.01)
    assert figures.quartiles_px == (1.5, 2.0, 2.5)
    assert [one.name for one in figures.bins] == ["Q1", "Q2", "Q3", "Q4"]
    assert [one.components for one in figures.bins] == [1, 1, 1, 2]
    found = [one.au_pro[0] for one in figures.bins]
    assert found == pytest.approx([0.444444, 0.444444, 0.444444, 0.583333], abs=1e-6)
    assert [one.au_pro[1] for one in figures.bins][3] == pytest.approx(0.083333, abs=1e-6)
    first = figures.robustness[0]
    assert (first.limit, first.mean, first.ratio, first.rho) == pytest.approx(
        (0.3, 0.479167, 0.761905, 0.365079), abs=1e-6
    )
    assert figures.background_px == 12


@pytest.mark.parametrize(
    ("name", "areas_px", "counts"),
    [
        ("mvtec_bottle", (196, 16982, 39762.5, 100219.75, 222091), [17, 34, 51, 68]),
        ("cookies", (2, 6525.5, 9314.5, 13405, 29609), [10, 19, 28, 38]),
    ],
)
def test_statistics_of_the_shared_masks(
    shared: Path, name: str, areas_px: tuple[float, ...], counts: list[int]
) -> None:
    """Source: the specification of the metrics, counted there with scipy.ndimage.label."""
    pixels, kinds = PixelScores(keep_px=10), []
    for path in sorted((shared / "data" / name / "ground_truth").rglob("*.png")):
        mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127
        pixels.add(np.zeros(mask.shape, dtype=np.float32), mask)
        kinds.append(path.parent.name)
    figures = compute(pixels)
    smallest, largest = figures.components[0].area_px, figures.components[-1].area_px
    assert (smallest, *figures.quartiles_px, largest) == areas_px
    assert [one.components for one in figures.bins] == counts
    for one in figures.bins:  # of a constant map, all of whose pixels tie
        assert one.au_pro == pytest.approx([limit / 2 for limit in LIMITS])
    if name == "mvtec_bottle":
        found = [kinds[region.image] for region in pixels.list_regions()]
        counted = {kind: found.count(kind) for kind in found}
        assert counted == {"broken_large": 20, "broken_small": 26, "contamination": 22}


def of_areas(areas_px: list[int], seed: int = 0) -> PixelScores:
    """One image per area, with a bar of that many pixels and a random map in which it stands out."""
    rng = np.random.default_rng(seed)
    pixels = PixelScores()
    for area_px in areas_px:
        mask = np.zeros((6, 40), dtype=bool)
        mask[2, :area_px] = True
        pixels.add(rng.random(mask.shape).astype(np.float32) + 0.7 * mask, mask)
    return pixels


AREAS = st.lists(st.integers(1, 40), min_size=4, max_size=12)


@settings(deadline=None, max_examples=40)
@given(AREAS, st.integers(0, 99))
def test_bins_share_the_background_and_differ_in_components(areas_px: list[int], seed: int) -> None:
    pixels = of_areas(areas_px, seed)
    cumulative = compute(pixels)
    disjoint = compute(pixels, SizeConfig(bins="disjoint"))
    ordinary = [pixels.au_pro(limit) for limit in LIMITS]
    assert cumulative.bins[3].au_pro == pytest.approx(ordinary)
    assert cumulative.bins[3].components == len(areas_px)
    assert cumulative.empty_bins == 0
    # Each component is in one disjoint bin, so that these together give the ordinary figure again.
    assert sum(one.components for one in disjoint.bins) == len(areas_px)
    together = sum(
        one.components * np.array(one.au_pro) for one in disjoint.bins if one.components
    ) / len(areas_px)
    assert together == pytest.approx(ordinary)
    for first, second in zip(cumulative.bins, disjoint.bins, strict=True):
        assert first.up_to_px == second.up_to_px
        members = [area for area in areas_px if second.above_px < area <= second.up_to_px]
        assert second.components == len(members)
        assert math.isnan(second.median_px) == (not members)


def test_an_empty_disjoint_bin_is_counted_and_in_no_mean() -> None:
    figures = compute(of_areas([3, 5, 9, 9, 9, 9]), SizeConfig(bins="disjoint"))  # q1 6, q2 = q3 9
    assert [one.components for one in figures.bins] == [2, 4, 0, 0]
    assert figures.empty_bins == 2
    for one, column in zip(figures.robustness, range(4), strict=True):
        assert one.mean == pytest.approx(np.mean([b.au_pro[column] for b in figures.bins[:2]]))
        assert math.isnan(one.ratio) and math.isnan(one.rho)
    text = "\n".join(lines(figures))
    assert "2 of 4 bins are empty" in text and "of the 2 bins with components" in text
    assert "n/a" in text and "disjoint bins" in text


@pytest.mark.parametrize(
    ("values", "mean", "ratio"),
    [
        ((0.2, 0.4, 0.6, 0.8), 0.5, 0.25),
        ((0.8, 0.6, 0.4, 0.2), 0.5, 0.25),  # small defects are found better: penalised all the same
        ((0.0, 0.0, 0.0, 0.0), 0.0, 0.0),
        ((0.0, 0.1, 0.1, 0.2), 0.1, 0.0),
        ((0.5, math.nan, 0.5, 0.5), 0.5, 1.0),
    ],
)
def test_robustness(values: tuple[float, ...], mean: float, ratio: float) -> None:
    found = robustness(0.05, values)
    assert (found.limit, found.mean, found.ratio) == pytest.approx((0.05, mean, ratio))
    assert found.rho == pytest.approx(mean * ratio)


@pytest.mark.parametrize("bins", ["cumulative", "disjoint"])
def test_fewer_than_four_components_have_q4_alone(bins: str) -> None:
    pixels = of_areas([2, 30, 7])
    figures = compute(pixels, SizeConfig(bins=bins))
    assert [(one.name, one.components, one.up_to_px) for one in figures.bins] == [("Q4", 3, 30)]
    assert figures.bins[0].au_pro[0] == pytest.approx(pixels.au_pro(0.3))
    assert figures.quartiles_px == figures.robustness == ()
    assert "Fewer than 4 components" in lines(figures)[-1]


def test_without_components_there_are_no_figures() -> None:
    pixels = PixelScores()
    pixels.add(MAP_A, np.zeros_like(MASK))
    assert by_size(pixels, ["0.png"], SizeConfig(), threshold=0.5, rejected=[True]) is None
    pixels = PixelScores()
    pixels.add(MAP_A, np.ones_like(MASK))
    assert by_size(pixels, ["0.png"], SizeConfig(), threshold=0.5, rejected=[True]) is None


def test_components_say_where_they_are_and_whether_they_were_found() -> None:
    pixels = PixelScores()
    pixels.add(np.zeros((4, 4)), np.zeros((4, 4), dtype=bool))
    pixels.add(MAP_A, MASK)
    figures = compute(pixels, threshold=0.6)
    small, large = figures.components
    assert (small.path, small.area_px, small.box_px, small.is_found) == ("1.png", 1, (3, 3, 1, 1), False)
    assert (large.path, large.area_px, large.box_px, large.is_found) == ("1.png", 3, (0, 0, 2, 2), True)
    assert (small.peak, large.peak) == pytest.approx((0.5, 0.9))
    assert tiniest(figures, 5) == {"missed": [small], "found": [large]}
    at_its_peak = compute(pixels, threshold=large.peak)
    assert [one.is_found for one in at_its_peak.components] == [False, True]
    passed = compute(pixels, threshold=0.6, is_rejected=False)  # as by a score that is a mean of the map
    assert [one.is_found for one in passed.components] == [False, False]
    assert tiniest(None, 5) == {}


def test_99_thresholds_are_labelled_and_off_at_small_limits() -> None:
    """The specification measured .0872 for .1413 at a limit of 0.01 on a set of its own."""
    rng = np.random.default_rng(0)
    mask = np.zeros((300, 300), dtype=bool)
    for index in range(8):
        mask[10 : 12 + 2 * index, 30 * index : 30 * index + 8] = True
    anomaly_map = (rng.normal(size=mask.shape) + 2.5 * mask).astype(np.float32)
    pixels = PixelScores()
    pixels.add(anomaly_map, mask)
    exact, sampled = compute(pixels), compute(pixels, SizeConfig(thresholds=99))
    assert exact.integral == "exact integral" and exact.thresholds is None
    assert "99 thresholds" in sampled.integral and "published" in lines(sampled)[0]
    first, last = (
        abs(sampled.bins[3].au_pro[column] / exact.bins[3].au_pro[column] - 1) for column in (0, 3)
    )
    assert first < 0.01 < 0.1 < last


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": "quartiles"}, "bins are 'quartiles', expected one of cumulative, disjoint"),
        ({"thresholds": 1}, "thresholds are 1, expected 2 or more"),
        ({"thresholds": 0}, "thresholds are 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SizeConfig(**settings)


# ------------------------------------------------------------------------------------------ bad masks


def test_masks_that_cannot_be_used_are_named_before_any_image_is_judged(tmp_path: Path) -> None:
    root = spots(tmp_path / "parts")
    masks = root / "ground_truth" / "spot"
    write_image(masks / "001_mask.png", np.zeros((SIDE_PX, SIDE_PX), np.uint8))
    with pytest.raises(DataError, match="1 of 6 cannot be used.*001_mask.png: this mask is empty, its"):
        open_pixels(open_dataset(root), SizeConfig())
    write_image(masks / "002_mask.png", np.full((32, SIDE_PX), 255, np.uint8))
    (masks / "004_mask.png").write_bytes(b"not a picture")
    write_image(masks / "005_mask.png", np.zeros((SIDE_PX, SIDE_PX), np.uint8))
    with pytest.raises(DataError) as caught:
        open_pixels(open_dataset(root), SizeConfig())
    text = str(caught.value)
    assert "4 of 6 cannot be used" in text and "; and 1 more" in text
    assert "002_mask.png: the mask is 64 x 32 pixels, its image" in text and "is 64 x 64" in text
    assert "004_mask.png: not one of JPEG" in text
    (masks / "003_mask.png").unlink()
    with pytest.raises(DataError, match="no masks for the defect images .*003.png; add them"):
        open_dataset(root)


def test_a_data_set_without_masks_or_without_defects_has_no_figures_by_size(tmp_path: Path) -> None:
    root = spots(tmp_path / "parts", sides_px=(3, 5))
    (root / "ground_truth").rename(tmp_path / "away")
    with pytest.raises(DataError, match="2 of 2 cannot be used: .*000.png: there is no mask for this"):
        open_pixels(open_dataset(root), SizeConfig())
    (root / "test" / "spot").rename(tmp_path / "spot")
    with pytest.raises(DataError, match="data set parts: no defect images"):
        open_pixels(open_dataset(root), SizeConfig())


def test_a_test_image_that_cannot_be_read_is_left_out(tmp_path: Path, tiny_bundle: Path) -> None:
    root = spots(tmp_path / "parts")
    (root / "test" / "spot" / "000.png").write_bytes(b"not a picture")
    (root / "test" / "good" / "000.png").write_bytes(b"")
    with load(tiny_bundle, backend="onnxruntime", threads=1) as detector:
        evaluation = evaluate(detector, open_dataset(root), sizes=SizeConfig())
    assert len(evaluation.errors) == 2
    assert evaluation.by_size is not None
    assert len(evaluation.by_size.components) == len(SIDES_PX) - 1
    assert {one.path for one in evaluation.by_size.components} == {
        f"test/spot/{index:03}.png" for index in range(1, 6)
    }


# ------------------------------------------------------------------- the command, record and page


def test_the_same_figures_as_without_a_bound_on_memory(data: Path, tiny_bundle: Path) -> None:
    dataset = open_dataset(data)
    with load(tiny_bundle, backend="onnxruntime", threads=1) as detector:
        plain = evaluate(detector, dataset)
        bounded = evaluate(detector, dataset, sizes=SizeConfig())
    assert plain.by_size is None and json.loads(plain.to_json())["by_size"] is None
    assert (bounded.au_pro_30, bounded.au_pro_05) == pytest.approx((plain.au_pro_30, plain.au_pro_05))
    assert bounded.pixel_auroc == pytest.approx(plain.pixel_auroc, abs=1e-5)  # pixels tie in a histogram
    assert bounded.image_auroc == plain.image_auroc
    assert bounded.regions == plain.regions == len(SIDES_PX)
    assert bounded.by_size is not None
    assert bounded.by_size.bins[3].au_pro[0] == pytest.approx(plain.au_pro_30)


def test_command_prints_records_and_draws(
    data: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib (for the page) is not installed")
    record, page = tmp_path / "e.json", tmp_path / "e.html"
    arguments = ["evaluate", tiny_bundle, data, "--by-size", "--backend", "onnxruntime"]
    assert main([*map(str, arguments), "--json", str(record), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "6 components" in out and "cumulative bins, exact integral" in out
    assert "AU-PRO@30  AU-PRO@10  AU-PRO@5  AU-PRO@1" in out
    assert "after the published description" in out and "four bin values" in out
    table = [line.split() for line in out.splitlines() if line.startswith("  Q")]
    assert [row[:3] for row in table] == [["Q1", "up", "to"], ["Q2", "up", "to"], ["Q3", "up", "to"],
                                          ["Q4", "up", "to"]]  # fmt: skip
    found = json.loads(record.read_text())["by_size"]
    areas_px = [side**2 for side in SIDES_PX]
    assert found["quartiles_px"] == [float(q) for q in np.quantile(areas_px, (0.25, 0.5, 0.75))]
    assert [row[4] for row in table] == ["2", "3", "4", "6"]
    for row, one in zip(table, found["bins"], strict=True):
        assert [float(text) for text in row[5:]] == pytest.approx(one["au_pro"], abs=6e-5)
    assert found["bins_mode"] == "cumulative" and found["limits"] == [0.3, 0.1, 0.05, 0.01]
    assert [one["area_px"] for one in found["components"]] == areas_px
    html = page.read_text()
    assert "By size of defect" in html and "The tiniest defects missed" in html
    assert "AU-PRO against defect size" in html and 'alt="defect of 4 px in' in html

    arguments += ["--bins", "disjoint", "--thresholds", "99", "--json", record]
    assert main([*map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert "disjoint bins, 99 thresholds at equally spaced background ranks (published recipe)" in out
    assert json.loads(record.read_text())["by_size"]["thresholds"] == 99


def test_the_command_line_names_the_bins_that_there_are() -> None:
    assert cli.SIZE_BINS == module.BINS  # cli imports nothing that --help does not need


@pytest.mark.parametrize("option", [("--bins", "disjoint"), ("--thresholds", "99")])
def test_options_without_by_size_are_refused(
    option: tuple[str, str], data: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tiny_bundle), str(data), *option]) == 1
    assert "add --by-size" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- memory

SIDE_4K_PX = 4096
CHILD = """
import sys
import numpy as np
from edgead.by_size import SizeConfig
from edgead.detector import load
from edgead.evaluate import evaluate
from edgead.report import load_pictures, write_report
from edgead.result import Result
from edgead.training.data import open_dataset

class MapsOfFullSize:
    backend, precision, threshold = "none", "fp32", 2.5

    def __init__(self, manifest):
        self.manifest, self.rng = manifest, np.random.default_rng(0)

    def __call__(self, frame):
        anomaly_map = self.rng.random(frame.shape[:2], dtype=np.float32)
        anomaly_map[frame[..., 0] > 200] += np.float32(0.9)
        return Result(3.0, True, 2.5, anomaly_map, 1.0)

with load(sys.argv[1], backend="onnxruntime", threads=1) as detector:
    manifest = detector.manifest
dataset = open_dataset(sys.argv[2])
evaluation = evaluate(MapsOfFullSize(manifest), dataset, sizes=SizeConfig())
open(sys.argv[3], "w").write(evaluation.to_json())
evaluated = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
write_report(sys.argv[4], evaluation, load_pictures(evaluation, dataset), title="4096")
print(evaluated, open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_memory_is_bounded_on_large_images(tmp_path: Path, tiny_bundle: Path) -> None:
    """Six images of 4096 x 4096 with maps of that size: 100 million random scores, hardly any tie."""
    pytest.importorskip("matplotlib", reason="matplotlib (for the page) is not installed")
    root = tmp_path / "large"
    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / folder).mkdir(parents=True)
    write_image(root / "train/good/0.png", np.zeros((8, 8, 3), np.uint8))
    image = np.full((SIDE_4K_PX, SIDE_4K_PX, 3), 60, np.uint8)
    for index in range(4):
        write_image(root / f"test/good/{index}.png", image)
    for index in range(2):
        marked = image.copy()
        for number, side in enumerate((1, 3, 40, 900)):
            marked[1000 * number : 1000 * number + side, 100 : 100 + side] = 255
        write_image(root / f"test/spot/{index}.png", marked)
        write_image(
            root / f"ground_truth/spot/{index}_mask.png", (marked[..., 0] > 200).astype("u1") * 255
        )
    files = [tiny_bundle, root, tmp_path / "e.json", tmp_path / "e.html"]
    command = [sys.executable, "-c", CHILD, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    evaluated_mib, reported_mib = (int(text) / 1024 for text in done.stdout.split())
    print(f"peak {evaluated_mib:.0f} MiB, with the report {reported_mib:.0f} MiB")
    assert evaluated_mib < 800 and reported_mib < 1000  # 570 measured; keeping all needs twice as much
    figures = json.loads((tmp_path / "e.json").read_text())["by_size"]
    assert figures["background_px"] == 6 * SIDE_4K_PX**2 - 2 * (1 + 9 + 1600 + 810000)
    assert [one["components"] for one in figures["bins"]] == [2, 4, 6, 8]
    # The background scores 0 to 1 and defects 0.9 to 1.9, both evenly: 0.9 + f of a large component are
    # above the score that a share f of the background exceeds. Integrated up to L and divided by L:
    expected = [(0.9 * 0.1 + 0.1**2 / 2 + 0.2) / 0.3, 0.95, 0.925, 0.905]
    large = [one for one in figures["components"] if one["area_px"] == 900**2]
    assert len(large) == 2
    for one in large:  # 810,000 random pixels: the standard error is below 0.0004
        assert one["au_pro"] == pytest.approx(expected, abs=0.002)


def test_a_picture_that_lies_on_its_side(tmp_path: Path) -> None:
    """PNG with EXIF: images are turned upright, headers are not."""
    root = spots(tmp_path / "parts")
    mask = np.zeros((40, 60), np.uint8)
    mask[5:9, 7:11] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.full((60, 40, 3), 70, np.uint8)).transpose(Image.Transpose.ROTATE_90)
    assert picture.size == (60, 40)
    picture.save(root / "test" / "spot" / "000.png", exif=exif)
    write_image(root / "ground_truth" / "spot" / "000_mask.png", mask.T)
    open_pixels(open_dataset(root), SizeConfig())
    write_image(root / "ground_truth" / "spot" / "000_mask.png", mask[:30])
    with pytest.raises(DataError, match="the mask is 60 x 30 pixels, its image .* is 40 x 60"):
        open_pixels(open_dataset(root), SizeConfig())
