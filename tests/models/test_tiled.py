"""Tiled inspection: the merged map is that of the whole frame wherever it can be, and seams are small.

Scenes are rendered here; seams are measured by inspecting one defect twice, in the middle of a tile and
between two.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import edgead
from edgead.calibration import MapScale, graph_constants
from edgead.cli import main
from edgead.errors import TrainingError
from edgead.export.graph import MergedGraph
from edgead.image import list_images, read_image, resize, resize_matrix, write_image
from edgead.methods import METHODS, Method, configure, trainer_of
from edgead.models.base import AnomalyModel
from edgead.models.efficientad import REFLECTED_PX, Border, EfficientAD
from edgead.models.folding import normalise
from edgead.models.pdn import PDN
from edgead.models.tiled import Blend, Tiled, frame_of, spread
from edgead.training.data import open_dataset
from edgead.training.efficientad import _batches, build_model
from edgead.training.images import Tiles, common_size, jitter, store_images
from edgead.training.run import read_run
from edgead.training.session import Session
from edgead.training.train import train
from tests import toy_method
from tests.toy_method import Toy


def scene(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: blocks of many sizes and weak noise."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 128.0)
    for side in (64, 32, 16):
        blocks = rng.normal(0, 12, (-(-height // side), -(-width // side), 3))
        image += np.kron(blocks, np.ones((side, side, 1)))[:height, :width]
    return np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def as_input(*images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def shrunk(frame: np.ndarray, side_px: int) -> Tensor:
    """The frame as networks of this size see it as a whole: resized, not rounded."""
    rows, columns = (resize_matrix(px, side_px) for px in frame.shape[:2])
    small = np.einsum("ih,jw,hwc->cij", rows, columns, frame.astype(np.float32), optimize=True)[None]
    assert np.abs(small[0].transpose(1, 2, 0) - resize(frame, side_px, side_px)).max() < 0.51
    return torch.from_numpy(small).float()


@given(data=st.data(), cells=st.integers(8, 40), blind=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_pieces_of_one_line_merge_to_that_line(data: st.DataObject, cells: int, blind: int) -> None:
    stride = data.draw(st.integers(cells // 2, cells - 2 * blind))
    starts = spread(data.draw(st.integers(0, 200)), stride)
    gaps = np.diff(starts)
    assert starts[0] == 0 and (gaps > 0).all() and (gaps <= stride).all()
    assert len(starts) == 1 or np.ptp(gaps) <= 1  # as even as whole cells can be
    seen = cells - 2 * blind
    blend = Blend(starts, seen, blind)
    line = torch.randn(2, 3, starts[-1] + seen, generator=torch.Generator().manual_seed(0))
    pieces = torch.stack([line[..., start : start + seen] for start in starts], -2)
    torch.testing.assert_close(blend(pieces), line, rtol=0, atol=1e-6)
    assert (blend.weights >= 0).all()


def test_weights_fall_over_the_overlap() -> None:
    """By hand: 16 cells, 8 of which overlap; a quarter of them, 2, have no weight at either end."""
    blend = Blend([0, 8], 16, 0)
    falling = [1.0, 1.0, 0.875, 0.625, 0.375, 0.125, 0.0, 0.0]
    np.testing.assert_allclose(blend.weights[0], [1.0] * 8 + falling, atol=1e-7)
    np.testing.assert_allclose(blend.weights[1], falling[::-1] + [1.0] * 8, atol=1e-7)


def test_training_sees_the_tiles_that_the_graph_cuts(tmp_path: Path) -> None:
    images = [scene(72, 100, seed=seed) for seed in range(3)]
    for index, image in enumerate(images):
        write_image(tmp_path / f"{index}.png", image)
    model = Tiled(Toy(8), tile=64, overlap=16, frame=(72, 104))
    pool = store_images(list_images(tmp_path), tmp_path / "images.bin", model.input_px)
    tiles = Tiles(pool, model.corners, (64, 64))
    assert model.corners == [(0, 0), (0, 40), (8, 0), (8, 40)] and len(tiles) == 15
    frames = [resize(image, 72, 104) for image in images]
    cut = model.grid.cut(as_input(*frames)).unflatten(0, (3, 4))
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(as_input(*(tiles[5 * index + n] for n in range(4))), cut[index])
        np.testing.assert_array_equal(tiles[5 * index + 4], resize(frame, 64, 64))  # and the whole
    with pytest.raises(IndexError):
        tiles[15]
    shown = tiles.shares(np.array([4, 0, 7, 9]))
    assert shown.tolist() == [4, 4, 4, 4, 0, 7, 9, 9, 9, 9]  # as often as the four tiles together


def random_efficientad(border: Border) -> EfficientAD:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        teacher = PDN("s")
        for parameter in teacher.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    return build_model(teacher, seed=1, border=border).eval()


@pytest.mark.parametrize(("border", "overlap"), [("published", 32), ("reflect", 64)])
@torch.inference_mode()
def test_student_map_is_that_of_the_whole_frame(border: Border, overlap: int) -> None:
    """PDNs have no padding: cells further than 16 px from an edge depend on no pixel beyond it."""
    inner = random_efficientad(border)
    frame = as_input(scene(256, 480 - overlap // 2))
    tiled = Tiled(inner, tile=256, overlap=overlap, frame=frame.shape[2:]).eval()
    student, _, _ = tiled(frame)

    x = normalise(frame)
    x = F.pad(x, REFLECTED_PX, mode="reflect") if border == "reflect" else x
    difference = (inner.teacher(x) - inner.mean) / inner.std - inner.student(x)[:, : inner.targets]
    whole = difference.square().mean(1)
    assert len(tiled.corners) == 2 and student.shape == whole.shape
    assert float((student - whole).abs().max()) < 1e-5 * float(whole.max())

    maps = tiled.anomaly_map((student,), torch.tensor([1.0, 0.5]))
    blind = 4 if border == "published" else 0
    assert tuple(maps.shape[1:]) == tiled.map_cells == (64, frame.shape[3] // 4)
    inside = maps[:, blind : 64 - blind, blind : maps.shape[2] - blind]
    torch.testing.assert_close(inside, student + 0.5)
    assert int((maps != 0).sum()) == inside.numel()  # the outer cells of the frame are zeros


@torch.inference_mode()
def test_networks_judge_the_frame_as_a_whole_too() -> None:
    """By hand: their maps of the frame at 256 px, each cell of which is as wide as 1.5 of the frame."""
    inner = random_efficientad("published")
    frame = scene(256, 384)
    tiled = Tiled(inner, tile=256, overlap=32, frame=frame.shape[:2]).eval()
    assert tiled.raw_names == ("student", "student_whole", "autoencoder") and tiled.local == 1
    raw = tiled(as_input(frame))
    small = inner(shrunk(frame, 256))
    for whole, part in zip(raw[1:], small, strict=True):
        padded = F.pad(part[:, None], (4, 4, 4, 4), mode="replicate")  # 56 cells to 64
        expected = F.interpolate(padded, size=(64, 96), mode="bilinear")[:, 0, 4:-4, 4:-4]
        torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)
        assert whole.shape == raw[0].shape == (1, 56, 88)
    graph = tiled.merged(torch.float32)
    for merged, plain in zip(graph(as_input(frame).float()), raw, strict=True):
        torch.testing.assert_close(merged, plain, rtol=1e-4, atol=1e-4 * float(plain.max()))


@torch.inference_mode()
def test_maps_of_tiles_and_of_the_whole_are_added_up() -> None:
    inner = Toy(8)
    model = Tiled(inner, tile=64, overlap=16, frame=(128, 192)).eval()
    assert model.raw_names == ("colour", "colour_whole")
    frame = scene(128, 192)
    tiles, whole = model(as_input(frame))
    assert tiles.shape == whole.shape == (1, 16, 24)
    (small,) = inner(shrunk(frame, 64))
    expected = F.interpolate(small[:, None], size=(16, 24), mode="bilinear")[:, 0]
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-4)
    maps = model.anomaly_map((tiles, whole), torch.tensor([2.0, 3.0, -1.0]))
    torch.testing.assert_close(maps, 2 * tiles + 3 * whole - 1)


def test_training_shows_the_autoencoder_whole_frames(tmp_path: Path) -> None:
    for index in range(2):
        write_image(tmp_path / f"{index}.png", scene(512, 768, seed=index))
    pool = store_images(list_images(tmp_path), tmp_path / "images.bin", (512, 768))
    corners = [(0, 0), (0, 256), (0, 512), (256, 0), (256, 256), (256, 512)]
    tiles = Tiles(pool, corners, (256, 256))
    np.testing.assert_array_equal(tiles.whole(7), resize(scene(512, 768, seed=1), 256, 256))

    class NoPenalty:
        def __call__(self, step: int) -> np.ndarray:
            return np.zeros((256, 256, 3), np.uint8)

    shown = np.array([3, 7, 7, 13])
    index, batch = next(_batches(tiles, shown, NoPenalty(), 0, 0))
    rng = np.random.default_rng([0, 0, 0])
    assert index == shown[rng.integers(4)]
    np.testing.assert_array_equal(batch[0], tiles[index])
    np.testing.assert_allclose(batch[2], jitter(tiles.whole(index), rng), atol=1e-4)


def test_with_tiles_a_run_has_as_many_steps_as_without(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", scene(512, 768))
    pool = store_images([tmp_path / "0.png"] * 10, tmp_path / "images.bin", (512, 768))
    tiles = Tiles(pool, [(0, 0), (0, 512), (256, 0), (256, 512)], (256, 256))
    counts = []
    for images in (pool, tiles):
        session = Session(
            tmp_path, toy_method.Config(steps=0), images=images, device=torch.device("cpu"), settings={}
        )
        shown = session.shares(np.arange(len(images)))
        session.lasts_epochs(50, len(shown) // 2)
        while session.fraction_done() < 1:
            session.record({"difference": 1.0})
        counts.append(session.step)
    assert counts == [250, 250]


class Slow(Toy):
    """`Toy` that answers falsely near its edges, as networks with padding do."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        (maps,) = super().forward(images)
        maps[:, [0, -1]] += 100
        maps[:, :, [0, -1]] += 100
        return (maps,)


def test_what_lies_near_the_edge_of_a_tile_has_no_weight() -> None:
    frames = as_input(scene(160, 128))
    right, false = (
        Tiled(inner, tile=64, overlap=32, frame=(160, 128)).eval() for inner in (Toy(8), Slow(8))
    )
    difference = (false(frames)[0] - right(frames)[0])[0]
    assert float(difference[1:-1, 1:-1].abs().max()) < 1e-4  # 32 px: 4 cells, the outer of them has none
    assert float(difference[0].min()) > 99  # but at the edge of the frame there is nothing else


def test_merged_graph_is_the_plain_form_for_every_batch() -> None:
    inner = Toy(8)
    inner.mean.uniform_(100, 150, generator=torch.Generator().manual_seed(0))
    model = Tiled(inner, tile=64, overlap=16, frame=(200, 128)).eval()
    frames = np.stack([scene(200, 128, seed=seed) for seed in range(3)])
    calibration = torch.tensor([0.1, 0.2, -0.5])
    plain = model.anomaly_map(model(as_input(*frames)), calibration)
    assert len(model.corners) > 8  # more than the plain form takes at once
    for count in (1, 3):
        score, maps = MergedGraph(model)(torch.from_numpy(frames[:count]), calibration)
        torch.testing.assert_close(maps, plain[:count], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(score, plain[:count].amax((1, 2)), rtol=1e-5, atol=1e-5)


def seam(inner: AnomalyModel, overlap: int, *, seed: int = 3) -> tuple[float, float]:
    """Highest map values at a defect in the middle of an overlap of two tiles, and in that of a tile.

    The two frames are parts of one scene, 128 - overlap / 2 px apart. Only tiles count: the view of the
    whole frame moves with the defect, which is no seam.
    """
    width, shift = 512 - overlap, 128 - overlap // 2
    good = scene(256, width + shift, seed=seed)
    bad = good.copy()
    column = 256 - overlap // 2
    bad[122:134, column - 6 : column + 6] = (200, 60, 60)
    model = Tiled(inner, tile=256, overlap=overlap, frame=(256, width)).eval()
    assert model.corners == [(0, 0), (0, 256 - overlap)]
    scales = [MapScale.of(raw.numpy()) for raw in model(as_input(good[:, :width]))[: model.local]]
    raw = model(as_input(bad[:, :width], bad[:, shift:]))[: model.local]
    maps = model.anomaly_map(raw, torch.from_numpy(graph_constants(*scales)))
    cell = 256 // inner.map_cells[0]
    windows = [
        maps[n, 104 // cell : 152 // cell, (middle - 24) // cell : (middle + 24) // cell]
        for n, middle in enumerate((column, column - shift))
    ]
    return float(windows[0].max()), float(windows[1].max())


def scores_with_other_tiles(inner: AnomalyModel, overlaps: tuple[int, int]) -> list[float]:
    """Scores of one frame: its defect lies in the overlap of two tiles, and in the middle of a third."""
    width, scores = 512 - overlaps[0], []
    good = scene(256, width, seed=3)
    bad = good.copy()
    bad[122:134, width // 2 - 6 : width // 2 + 6] = (200, 60, 60)
    for overlap, tiles in zip(overlaps, (2, 3), strict=True):
        model = Tiled(inner, tile=256, overlap=overlap, frame=(256, width)).eval()
        assert len(model.corners) == tiles
        scales = [MapScale.of(raw.numpy()) for raw in model(as_input(good))]
        maps = model.anomaly_map(model(as_input(bad)), torch.from_numpy(graph_constants(*scales)))
        scores.append(float(model.score(maps)))
    return scores


def fitted(method: str, files: dict[str, Path], folder: Path, **options: object) -> AnomalyModel:
    """Networks hardly trained, on two scenes."""
    trainer = trainer_of(method)(configure(method, seed=0, **options), files, folder)
    images = np.stack([scene(256, 256, seed=seed) for seed in (10, 11)])
    cpu = torch.device("cpu")
    trainer.fit(Session(folder, trainer.config, images=images, device=cpu, settings={}))
    model: AnomalyModel = trainer.model
    return model.eval()


def test_no_seam_in_efficientad(tmp_path: Path, natural_images: Path) -> None:
    """1 % is what the product promises; the overlap is the smallest."""
    inner = fitted("efficientad-s", {"penalty": natural_images}, tmp_path, steps=3)
    with torch.inference_mode():
        between, middle = seam(inner, 32)
        scores = scores_with_other_tiles(inner, (32, 64))
    assert between == pytest.approx(middle, rel=1e-3) and middle > 0.2
    assert scores[0] == pytest.approx(scores[1], rel=0.01) and scores[1] > 0.2


def test_no_seam_on_the_backbone_that_ships(tmp_path: Path) -> None:
    """With the default overlap, 64 px, the outer 16 px of a tile have no weight: what a PDN makes up.

    ProtoAD's map is smoothed over 16 px more; what comes from there is below 1e-3 of a defect.
    """
    inner = fitted("protoad", {}, tmp_path, max_prototypes=32)
    with torch.inference_mode():
        between, middle = seam(inner, 64)
        scores = scores_with_other_tiles(inner, (64, 96))
    assert between == pytest.approx(middle, rel=1e-3) and middle > 0.1
    assert scores[0] == pytest.approx(scores[1], rel=0.01) and scores[1] > 0.1


def test_deep_backbones_need_half_a_tile(tmp_path: Path, shared: Path) -> None:
    """MobileNetV2 pads with zeros and sees beyond 100 px: its seams fade with the overlap."""
    weights = shared / "weights" / "mobilenet_v2_imagenet.safetensors"
    inner = fitted("protoad", {"backbone": weights}, tmp_path, max_prototypes=64)
    change = {}
    with torch.inference_mode():
        for overlap in (32, 128):
            pairs = [seam(inner, overlap, seed=seed) for seed in (3, 4, 5)]
            change[overlap] = np.mean([abs(between / middle - 1) for between, middle in pairs])
    assert change[128] < 0.01 < change[32]


# --- from training to the verdict ----------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", Method("tests.toy_method"))


@pytest.mark.usefixtures("toy")
def test_one_graph_inspects_the_whole_frame(
    tmp_path: Path, demo_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bundle = tmp_path / "run", tmp_path / "toy.edgead"
    train_toy = ["train", str(demo_images), "--method", "toy", "--steps", "12", "--out", str(run)]
    assert main([*train_toy, "--tile", "256", "--overlap", "60"]) == 0
    height, width, _ = read_image(list_images(demo_images / "train")[0]).shape
    frame = (height // 4, width // 4)  # networks of 64 px
    tiling = {"tile": 256, "overlap": 60, "frame": list(frame)}
    record = json.loads((run / "run.json").read_text())
    assert record["architecture"] == {"cell_px": 8, "tiling": tiling}
    assert not list(run.glob("images-*"))

    assert main(["export", str(run), "--out", str(bundle)]) == 0
    assert main(["verify", str(bundle), "--backend", "onnxruntime"]) == 0, capsys.readouterr().out
    manifest = edgead.Bundle.open(bundle).manifest
    assert (manifest.input.height, manifest.input.width) == frame
    assert manifest.model["tiling"] == tiling and manifest.map_shape == (frame[0] // 8, frame[1] // 8)
    assert manifest.calibration.meaning.endswith("merged (model.tiling), and of the frame")

    model = read_run(run).model
    constants = torch.tensor(manifest.calibration.values)
    path = list_images(demo_images / "test")[0]
    with edgead.load(bundle, backend="onnxruntime") as detector, torch.inference_mode():
        result = detector(read_image(path))
        maps = model.anomaly_map(model(as_input(resize(read_image(path), *frame))), constants)
        np.testing.assert_allclose(result.anomaly_map, maps[0], rtol=1e-4, atol=1e-4)
        assert result.score == pytest.approx(float(maps.max()), rel=1e-4)

    # the networks learned the mean of the first images' tiles, after which comes the whole image
    assert isinstance(model, Tiled) and isinstance(model.inner, Toy)
    seen: list[Tensor] = []
    for path in open_dataset(demo_images, seed=0).train:
        image = resize(read_image(path), *frame)
        seen += [*model.grid.cut(as_input(image)), as_input(resize(image, 64, 64))[0]]
    assert len(seen) > 12 > len(model.corners) + 1
    np.testing.assert_allclose(model.inner.mean, torch.stack(seen[:12]).double().mean(0), atol=1e-3)


@pytest.mark.usefixtures("toy")
def test_resume_refuses_another_tiling(
    tmp_path: Path, demo_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, session: Session) -> None:
        session.begin()
        session.record({"difference": 1.0})
        session.keep(dict)
        raise KeyboardInterrupt

    dataset, config = open_dataset(demo_images), configure("toy", checkpoint_s=0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_method.Trainer, "fit", interrupted)
        train(dataset, tmp_path, config, tile=256)
    for options in ({}, {"tile": 320}, {"tile": 256, "overlap": 96}):
        with pytest.raises(TrainingError, match="other settings .tiling: {'tile': 256, 'overlap': 64, "):
            train(dataset, tmp_path, config, resume=True, **options)
    record = train(dataset, tmp_path, config, resume=True, tile=256)
    assert record["training"]["steps"] == config.steps


@pytest.mark.usefixtures("toy")
def test_options_that_do_not_fit(tmp_path: Path, demo_images: Path) -> None:
    dataset, config = open_dataset(demo_images), configure("toy")
    for options, message in (
        ({"overlap": 32}, "--overlap 32 is that of tiles: add --tile"),
        ({"tile": 0}, "--tile 0: the images are 640x640 px .* a tile can be no larger than that"),
        ({"tile": 641}, "--tile 641: the images are 640x640 px"),
        ({"tile": 256, "overlap": -1}, "--overlap -1: tiles of 256 px need an overlap of 0 to 128 px"),
        ({"tile": 256, "overlap": 129}, "--overlap 129: "),
        ({"tile": 40}, "--tile 40: a frame of 1024x1024 px, 441 tiles; at most 4096 px and 128 tiles"),
    ):
        with pytest.raises(TrainingError, match=message):
            train(dataset, tmp_path / "run", config, **options)
    with pytest.raises(TrainingError, match="32 to 128 px, because the networks inspect no cells near"):
        Tiled(random_efficientad("published"), tile=256, overlap=31, frame=(512, 512))


def test_a_score_that_large_maps_do_not_have_is_refused_before_training() -> None:
    inner = trainer_of("fbft")(configure("fbft"), {}, Path()).model
    with pytest.raises(TrainingError, match="a map of 2048x2048 px: the score needs its 4194 largest"):
        Tiled(inner, tile=256, overlap=32, frame=(2048, 2048))


def test_frames_are_the_images_in_whole_cells() -> None:
    efficientad, toy = random_efficientad("published"), Toy(8)
    assert frame_of(efficientad, (900, 900), 256) == (900, 900)
    assert frame_of(efficientad, (1023, 770), 256) == (1024, 768)  # 770 lies between two: to even
    assert frame_of(efficientad, (900, 900), 512) == (448, 448)
    assert frame_of(toy, (640, 480), 256) == (160, 120)


def test_images_of_another_size_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index, size in enumerate([(60, 80), (40, 40), (60, 80), (60, 80)]):
        write_image(tmp_path / f"{index}.png", scene(*size))
    paths = list_images(tmp_path)
    assert common_size(paths) == (60, 80)
    assert "1 of 4 training images are not 60x80 px (height x width)" in caplog.text
    assert "such as 40x40" in caplog.text
    caplog.clear()
    assert common_size(paths[2:]) == (60, 80) and not caplog.text
