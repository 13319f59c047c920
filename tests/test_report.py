"""Report: one self-contained page that says what the evaluation says, whatever the files are called."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from edgead.by_size import SizeConfig, by_size
from edgead.errors import EdgeADError
from edgead.evaluate import Evaluation, Row
from edgead.image import enlarge, write_image
from edgead.metrics import PixelScores
from edgead.report import SERIES, THUMBNAIL_PX, Picture, heat_scale, load_pictures, write_report
from edgead.training import data

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pil_image = pytest.importorskip("PIL.Image")

THRESHOLD = 0.5
HOSTILE = "<script>alert('x')</script>\"&$\\frac{_"
# (path, defect, score): one false reject, one missed defect.
ROWS = (
    ("test/good/000.png", "good", 0.1),
    ("test/good/001.png", "good", 0.6),
    ("test/good/002.png", "good", 0.3),
    (f"test/dent/{HOSTILE}.png", "_dent", 0.95),
    ("test/dent/001.png", "_dent", 0.45),
    ("test/x/000.png", HOSTILE, 0.8),
)


def anomaly_map(score: float) -> np.ndarray:
    """Background 0.05 with a peak of the score in the middle."""
    pixels = np.full((8, 8), 0.05, dtype=np.float32)
    pixels[3:5, 3:5] = score
    return pixels


def make_evaluation(rows: tuple[tuple[str, str, float], ...] = ROWS) -> Evaluation:
    """An evaluation as `evaluate` builds it, from rows alone."""
    table = [
        Row(path, int(defect != "good"), defect, score, score >= THRESHOLD, 5.0 + index)
        for index, (path, defect, score) in enumerate(rows)
    ]
    defects = {row.defect: [r for r in table if r.defect == row.defect] for row in table if row.label}
    good, bad = sum(not row.label for row in table), sum(row.label for row in table)
    rejects = sum(row.is_anomalous for row in table if not row.label)
    missed = sum(not row.is_anomalous for row in table if row.label)
    return Evaluation(
        dataset="parts",
        name=HOSTILE,
        method="efficientad-s",
        backend="onnxruntime",
        precision="fp32",
        date="2026-01-02T03:04:05+00:00",
        images=len(table),
        good_images=good,
        defect_images=bad,
        regions=bad,
        image_auroc=0.9123 if good and bad else float("nan"),
        pixel_auroc=float("nan"),
        au_pro_30=0.8765,
        au_pro_05=0.4321,
        f1_max=0.9,
        f1_max_threshold=0.44,
        threshold=THRESHOLD,
        threshold_basis="chosen for the test",
        false_rejects=rejects,
        false_reject_rate=rejects / good if good else float("nan"),
        missed_defects=missed,
        missed_defect_rate=missed / bad if bad else float("nan"),
        per_defect={
            name: {
                "images": len(members),
                "image_auroc": 1.0,
                "missed_defects": sum(not row.is_anomalous for row in members),
                "missed_defect_rate": sum(not row.is_anomalous for row in members) / len(members),
            }
            for name, members in defects.items()
        },
        latency_ms={"p50": 7.5, "p90": 9.5, "p99": 9.9, "max": 10.0, "calls": 6, "scope": "a call"},
        machine={"cpu": {"model": "Some CPU", "flags": ["avx2", "amx_bf16"]}, "gpu": []},
        model={},
        provenance={"seed": 0, "dataset": {"fingerprint": "ab" * 32}},
        notes=[],
        errors=[],
        rows=table,
        maps=[anomaly_map(row.score) for row in table],
    )


def make_pictures(evaluation: Evaluation) -> list[Picture]:
    """Grey frames of 300 x 600 px (height x width), with the middle marked on defects."""
    mask = np.zeros((300, 600), dtype=bool)
    mask[120:180, 240:360] = True
    image = np.full((300, 600, 3), 90, dtype=np.uint8)
    return [Picture(row.path, image, mask if row.label else None) for row in evaluation.rows]


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def with_tag(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def write_page(folder: Path, evaluation: Evaluation, pictures: list[Picture] | None = None) -> Page:
    path = folder / "report.html"
    shown = make_pictures(evaluation) if pictures is None else pictures
    write_report(path, evaluation, shown, title=f"Report {HOSTILE}", remark="Images: CC BY-SA 4.0")
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write_page(tmp_path_factory.mktemp("report"), make_evaluation())


def decoded(uri: str) -> np.ndarray:
    header, data = uri.split(",", 1)
    assert header == "data:image/jpeg;base64"
    return np.asarray(pil_image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_headline_figures_come_with_counts(page: Page) -> None:
    assert "Good parts rejected 1 of 3 false-reject rate 33.3 %" in page.text
    assert "Defects missed 1 of 3 missed-defect rate 33.3 %" in page.text
    assert "Image AUROC 0.9123" in page.text
    assert "0.8765 up to 5 %: 0.4321" in page.text
    assert "Pixel AUROC n/a" in page.text
    assert "Images: CC BY-SA 4.0" in page.text
    for text in ("Some CPU", "avx2, amx_bf16", "ab" * 32, "7.50 ms", "chosen for the test"):
        assert text in page.text


def test_the_page_needs_nothing_from_outside(page: Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
    assert not page.with_tag("link")
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", page.html)
    policy = next(a["content"] for a in page.with_tag("meta") if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_every_series_has_a_colour_of_its_own_in_both_themes(page: Page) -> None:
    for index in range(len(SERIES)):
        assert len(re.findall(rf"--s{index}: #", page.html)) == 2
    colours = re.findall(r"--s\d+: (#\w+);", page.html)
    assert len(colours) == len(set(colours)) == 2 * len(SERIES)


def test_names_from_files_are_text_and_nothing_else(page: Page) -> None:
    assert len(page.with_tag("script")) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    shown = " ".join(HOSTILE.split())
    assert page.text.count(shown) >= 4  # title, bundle, file, defect
    assert "<script>alert" not in page.html


def test_wrong_verdicts_come_first_and_are_marked(page: Page) -> None:
    classes = [str(a["class"]) for a in page.with_tag("article")]
    assert classes == ["card wrong"] * 2 + ["card"] * 4
    assert page.text.count("WRONG: good part rejected") == 1
    assert page.text.count("WRONG: defect missed") == 1
    assert page.text.count("right: defect found") == 2
    assert page.text.count("right: good part passed") == 2
    scores = re.findall(r"(?:right:|the part is)[^0-9]* (0\.\d+)", page.text)
    # The wrong ones are 0.1 and 0.05 from the threshold, the right ones 0.2, 0.3, 0.4 and 0.45.
    assert scores == ["0.600", "0.450", "0.300", "0.800", "0.100", "0.950"]


def test_there_is_a_button_per_kind_and_each_card_belongs_to_one(page: Page) -> None:
    buttons = [a["data-show"] for a in page.with_tag("button")]
    assert buttons == ["all", "wrong", "0", "1", "2"]
    kinds = [a["data-kind"] for a in page.with_tag("article")]
    assert kinds == ["0", "2", "0", "1", "0", "2"]


def test_every_verdict_has_its_picture_and_heat_map(page: Page) -> None:
    by_name = {str(a["alt"]): decoded(str(a["src"])).astype(int) for a in page.with_tag("img")}
    for path, _, score in ROWS:
        plain, heat = by_name[path], by_name[f"heat map of {path}"]
        assert plain.shape == heat.shape == (THUMBNAIL_PX // 2, THUMBNAIL_PX, 3)
        assert abs(plain - 90).max() <= 3
        assert abs(heat[:20, :20] - 90).max() <= 6
        assert (abs(heat[50:60, 105:115] - 90).max() > 40) == (score > 0.4)


def test_the_mask_is_outlined_on_the_heat_map(tmp_path: Path) -> None:
    evaluation = make_evaluation((("a.png", "dent", 0.9), ("b.png", "good", 0.1)))
    dark = dataclasses.replace(evaluation, maps=[np.zeros((8, 8), np.float32)] * 2)
    images = write_page(tmp_path, dark).with_tag("img")
    by_name = {str(a["alt"]): decoded(str(a["src"])) for a in images}
    brightest = by_name["heat map of a.png"].min(axis=2)
    # The mask covers rows 44..66 and columns 88..132 of the thumbnail; the line runs just outside of it.
    assert brightest[43, 90:130].min() > 180
    assert brightest[50:60, 95:125].max() < 120
    assert by_name["heat map of b.png"].max() < 100


def sized(bins: str) -> tuple[Evaluation, list[Picture]]:
    """An evaluation with figures by size: defects with a large component that the map shows and a speck
    of 3 x 3 px that it does not."""
    evaluation, pixels, pictures = make_evaluation(), PixelScores(), make_pictures(make_evaluation())
    for index, picture in enumerate(pictures):
        mask = np.zeros((300, 600), dtype=bool)
        if picture.mask is not None:
            mask = picture.mask.copy()
            mask[20:23, 30:33] = True
            image = picture.image.copy()
            image[20:23, 30:33] = 255
            pictures[index] = Picture(picture.path, image, mask)
        pixels.add(enlarge(evaluation.maps[index], 300, 600), mask)
    paths = [row.path for row in evaluation.rows]
    rejected = [row.is_anomalous for row in evaluation.rows]
    figures = by_size(pixels, paths, SizeConfig(bins=bins), threshold=THRESHOLD, rejected=rejected)
    return dataclasses.replace(evaluation, by_size=figures), pictures


@pytest.mark.parametrize(("bins", "missing"), [("cumulative", 0), ("disjoint", 2)])
def test_figures_by_size_have_table_plot_and_strip(tmp_path: Path, bins: str, missing: int) -> None:
    evaluation, pictures = sized(bins)
    page = write_page(tmp_path, evaluation, pictures)
    assert f"6 components, {bins} bins, exact integral" in page.text
    assert "AU-PRO@30 AU-PRO@10 AU-PRO@5 AU-PRO@1" in page.text
    assert "after the published description" in page.text
    # Areas are 9 and 7,200, three times each: q1 is 9 and q3 7,200.
    assert "Q1 up to 9 3 " in page.text
    assert page.text.count(" 0 n/a n/a n/a n/a") == missing  # Q2 and Q4 have no component of their own
    assert len(page.with_tag("svg")) == len(write_page(tmp_path, make_evaluation()).with_tag("svg")) + 1

    parts = page.text.split("The tiniest defects missed")[1].split("The tiniest defects found")
    assert parts[0].count("9 px, highest 0.050") == 3 and "no map value inside reaches" in parts[0]
    assert parts[0].count("7200 px") == 1  # of the defect whose score is below the threshold
    assert parts[1].count("7200 px") == 2
    assert " ".join(HOSTILE.split()) in parts[0] and "<script>alert" not in page.html

    shown = {str(a["alt"]): a for a in page.with_tag("img")}
    crop = decoded(str(shown["defect of 9 px in test/dent/001.png"]["src"]))
    # The speck's middle is at row 21 and column 31: 32 px around it, less what is off the image.
    assert crop.shape == (53, 63, 3)
    assert crop[20:23, 30:33].min() > 200 and crop[40:, 50:].max() < 120
    large = decoded(str(shown["heat map of a defect of 7200 px in test/x/000.png"]["src"]))
    assert large.shape == (THUMBNAIL_PX, THUMBNAIL_PX, 3)


def test_without_figures_by_size_there_is_no_such_section(page: Page) -> None:
    assert "By size of defect" not in page.text and "tiniest" not in page.text


def test_figures_that_do_not_exist_are_said_and_not_drawn(tmp_path: Path) -> None:
    only_good = make_evaluation((("a.png", "good", 0.2),))
    page = write_page(tmp_path, only_good)
    assert "Defects missed 0 of 0 missed-defect rate n/a" in page.text
    assert "Needs good and defect images." in page.text
    assert "There are no defect images." in page.text
    only_defects = write_page(tmp_path, make_evaluation((("a.png", "dent", 0.2),) * 2))
    assert "Good parts rejected 0 of 0 false-reject rate n/a" in only_defects.text


def test_notes_and_errors_are_on_the_page(tmp_path: Path) -> None:
    evaluation = dataclasses.replace(
        make_evaluation(),
        notes=["1 of 7 test images could not be used."],
        errors=[{"path": HOSTILE, "message": "damaged"}],
    )
    text = write_page(tmp_path, evaluation).text
    assert "1 of 7 test images could not be used." in text
    assert f"{' '.join(HOSTILE.split())} : damaged" in text


def test_a_row_without_picture_is_still_listed(tmp_path: Path) -> None:
    page = write_page(tmp_path, make_evaluation(), pictures=[])
    assert len(page.with_tag("article")) == len(ROWS)
    assert page.text.count("no picture") == len(ROWS)


def test_names_that_are_not_unicode_can_be_written(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", errors="surrogateescape")
    assert "caf?.png" in write_page(tmp_path, make_evaluation(((name, "good", 0.1),))).text


def test_a_failure_leaves_the_former_report_alone(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("former")

    def failing() -> Iterator[Picture]:
        raise RuntimeError("no more pictures")
        yield

    with pytest.raises(RuntimeError, match="no more pictures"):
        write_report(path, make_evaluation(), failing(), title="t")
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(EdgeADError, match="report cannot be written"):
        write_report(tmp_path / "absent" / "report.html", make_evaluation(), [], title="t")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EdgeADError, match=rf'{package}.*pip install "edgead\[report\]"'):
        write_report(tmp_path / "report.html", make_evaluation(), [], title="t")


def test_the_heat_scale_shows_the_threshold_at_half_heat() -> None:
    low, high = heat_scale(make_evaluation())
    assert low < THRESHOLD < high
    assert (low + high) / 2 <= THRESHOLD  # full heat is lower where typical defects are


@pytest.mark.parametrize("level", [0.0, 0.5, 3.0])
def test_the_heat_scale_has_a_width_for_constant_maps(level: float) -> None:
    evaluation = make_evaluation()
    flat = [np.full((8, 8), level, np.float32) for _ in evaluation.rows]
    low, high = heat_scale(dataclasses.replace(evaluation, maps=flat))
    assert low < high


def test_pictures_are_those_of_the_rows(tmp_path: Path) -> None:
    square = np.zeros((20, 30), dtype=np.uint8)
    square[5:10, 5:10] = 255
    for index, folder in enumerate(("good", "dent", "bent")):
        (tmp_path / folder).mkdir()
        write_image(tmp_path / folder / "0.png", np.full((20, 30, 3), 50 * index, np.uint8))
        write_image(tmp_path / folder / "mask.png", square)
    (tmp_path / "bent" / "mask.png").write_bytes(b"damaged")
    items = [
        data.TestItem(folder / "0.png", label, folder.name, (folder / "mask.png",) * label)
        for folder, label in ((tmp_path / "good", 0), (tmp_path / "dent", 1), (tmp_path / "bent", 1))
    ]
    dataset = data.Dataset("parts", tmp_path, "mvtec", (), (), tuple(items))
    evaluation = make_evaluation(
        (("bent/0.png", "bent", 0.9), ("dent/0.png", "dent", 0.9), ("good/0.png", "good", 0.1))
    )

    bent, dent, good = load_pictures(evaluation, dataset)
    assert [picture.path for picture in (bent, dent, good)] == ["bent/0.png", "dent/0.png", "good/0.png"]
    assert [int(picture.image.mean()) for picture in (bent, dent, good)] == [100, 50, 0]
    assert dent.mask is not None
    np.testing.assert_array_equal(dent.mask, square > 0)
    assert bent.mask is None
    assert good.mask is None
