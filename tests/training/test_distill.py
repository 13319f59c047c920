"""Distillation: small real runs, interrupted, in two processes, from shards, and what they write."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgead.cli import build_parser
from edgead.errors import DataError, TrainingError
from edgead.image import list_images
from edgead.models.files import load_directions, load_teacher, save_safetensors
from edgead.models.resnet import ResNet
from edgead.training.distill import DistillConfig, Precision, distill
from edgead.training.distill import _Session as Session
from edgead.training.group import Group
from edgead.training.targets import Source

CONFIG = DistillConfig(steps=4, batch=1, side_px=64, held_out=0.2, checkpoint_s=0.0)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_teacher(path)[0].state_dict())


def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, random_backbone: Path, natural_images: Path
) -> None:
    seen: list[tuple[int, float]] = []
    whole = tmp_path / "whole.safetensors"
    result = distill(
        natural_images, random_backbone, whole, CONFIG, progress=lambda s, f, loss: seen.append((s, f))
    )
    assert seen == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert result.steps == 4 and result.images == 6
    assert 0.1 < result.loss < 10 and 0.1 < result.held_out_loss < 10  # targets have variance 1

    class Stop(Exception):
        pass

    def stop(step: int, fraction: float, loss: float) -> None:
        if step == 3:
            raise Stop

    resumed = tmp_path / "resumed.safetensors"
    with pytest.raises(Stop):
        distill(natural_images, random_backbone, resumed, CONFIG, progress=stop)
    assert not resumed.exists() and (tmp_path / "resumed.safetensors.checkpoint").exists()
    with pytest.raises(TrainingError, match="other settings.*batch: 1 then, 2 now"):
        distill(natural_images, random_backbone, resumed, replace(CONFIG, batch=2), resume=True)
    others = tmp_path / "others"
    others.mkdir()
    for number, path in enumerate(sorted(natural_images.iterdir())):  # as many, of other names
        shutil.copy(path, others / f"{number}{path.suffix}")
    with pytest.raises(TrainingError, match="other settings.*image_names"):
        distill(others, random_backbone, resumed, CONFIG, resume=True)
    with pytest.raises(TrainingError, match="unfinished run; go on with --resume"):
        distill(natural_images, random_backbone, resumed, CONFIG)
    steps: list[int] = []
    again = distill(
        natural_images, random_backbone, resumed, CONFIG,
        resume=True, progress=lambda s, f, loss: steps.append(s),
    )  # fmt: skip
    assert steps == [3, 4]  # the checkpoint of step 2 was the last one written
    assert (again.loss, again.held_out_loss) == (result.loss, result.held_out_loss)
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not (tmp_path / "resumed.safetensors.checkpoint").exists()
    for resume in (False, True):  # an hour's work is not replaced
        with pytest.raises(TrainingError, match="whole.safetensors exists; name another"):
            distill(natural_images, random_backbone, whole, CONFIG, resume=resume)
    metadata = load_teacher(whole)[1].metadata
    assert metadata["taps"] == "blocks.5.depthwise.linear, blocks.12.depthwise.linear"
    assert json.loads(metadata["crop"]) == [0.55, 1.0]

    curves = [
        json.loads((tmp_path / f"{n}.safetensors.loss.json").read_text()) for n in ("whole", "resumed")
    ]
    points, others = ([{**p, "seconds": 0} for p in curve["points"]] for curve in curves)
    assert points == others and [p["step"] for p in points] == [1, 2, 3, 4]
    assert points[-1]["held_out_loss"] == result.held_out_loss
    assert curves[0]["settings"]["backbone_sha256"] == metadata["backbone_sha256"]
    pytest.importorskip("matplotlib", reason="no picture of the loss without matplotlib")
    assert (tmp_path / "whole.safetensors.loss.png").read_bytes().startswith(b"\x89PNG")


def test_two_distillations_into_one_file(
    tmp_path: Path, random_backbone: Path, natural_images: Path
) -> None:
    """The second one must not take the checkpoint of the first."""
    out, problems = tmp_path / "new" / "teacher.safetensors", []

    def again(*_: object) -> None:
        with pytest.raises(TrainingError) as caught:
            distill(natural_images, random_backbone, out, CONFIG, resume=True)
        problems.append(str(caught.value))

    distill(natural_images, random_backbone, out, replace(CONFIG, steps=2), progress=again)
    assert len(problems) == 2 and f"another process trains into {out}: wait" in problems[0]
    names = ("teacher.safetensors", "teacher.safetensors.loss.json", "teacher.safetensors.loss.png")
    assert {path.name for path in out.parent.iterdir()} <= set(names)  # no lock is left


@pytest.mark.parametrize("then", ["bf16", "fp16"])
@pytest.mark.parametrize("before", ["bf16", "fp16"])
def test_a_checkpoint_of_another_gpu(random_backbone: Path, before: Precision, then: Precision) -> None:
    """bf16 on one and FP16 on an older one, both by `auto`: only the latter scales its gradients."""
    first, second = (
        Session(replace(CONFIG, precision=p), torch.device("cpu"), Source.load(random_backbone), Group())
        for p in (before, then)
    )
    first.targets.measure([torch.zeros(1, 3, 128, 128)], lambda total: total)
    second.restore(first.state())
    assert second.scaler.is_enabled() == (then == "fp16")


@pytest.mark.parametrize("name", ["teacher", "teacher.pth"])
def test_a_name_that_could_not_be_loaded_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrainingError, match=f"--out .*{name}: .* NAME.safetensors"):
        distill(tmp_path, tmp_path / "backbone.pth", tmp_path / name)


def test_directions_are_those_of_the_written_teacher(
    tmp_path: Path, random_backbone: Path, natural_images: Path
) -> None:
    path = tmp_path / "t.safetensors"
    distill(natural_images, random_backbone, path, replace(CONFIG, steps=1))
    found = load_directions(path)
    assert found is not None
    directions, energy = found
    torch.testing.assert_close(directions.T @ directions, torch.eye(384), atol=1e-4, rtol=0)
    assert (energy.diff() <= 0).all() and abs(float(energy.sum()) - 1) < 1e-4
    # features of such smooth pictures are few-dimensional
    assert float(energy[:64].sum()) > 0.9


def test_two_processes_make_the_teacher_of_one(
    tmp_path: Path, random_backbone: Path, natural_images: Path
) -> None:
    # at a low rate: Muon takes steps of one size, and makes rounding where a gradient is small as large
    config = replace(CONFIG, steps=3, batch=2, precision="fp32", whiten=0.5, learning_rate=0.001)
    alone = tmp_path / "alone.safetensors"
    expected = distill(natural_images, random_backbone, alone, config, device="cpu")
    program = (
        "import sys, torch\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from edgead.training.distill import DistillConfig, distill\n"
        "torch.set_num_threads(1)\n"
        f"config = {config!r}\n"
        "out = Path(sys.argv[3])\n"
        "r = distill(Path(sys.argv[1]), Path(sys.argv[2]), out, config, device='cpu')\n"
        "print(r.loss, r.held_out_loss)\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [tmp_path / f"rank{rank}" for rank in range(2)]  # each its own: who writes can be seen
    processes = []
    for rank, folder in enumerate(folders):
        environment = {  # what torchrun sets
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        files = [natural_images, random_backbone, folder / "t.safetensors"]
        command = [sys.executable, "-c", program, *files]
        processes.append(
            subprocess.Popen(
                [str(part) for part in command],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        losses = [float(word) for word in out.split()]
        # FP32 sums in another order
        assert losses == pytest.approx([expected.loss, expected.held_out_loss], rel=1e-3)
    assert sorted(path.name for path in folders[0].glob("*.safetensors")) == ["t.safetensors"]
    assert [path for path in folders[1].rglob("*") if path.is_file()] == []
    a, b = weights(alone), weights(folders[0] / "t.safetensors")
    # three steps of AdamW at up to 3e-5 move a weight by up to 1e-4; FP16 stores 1e-3 of its size
    for key in a:
        torch.testing.assert_close(b[key], a[key], atol=3e-5, rtol=2e-3)


def test_a_batch_that_cannot_be_shared_is_an_error() -> None:
    from edgead.training.group import Group

    assert list(Group(1, 3).share(6)) == [2, 3]
    with pytest.raises(TrainingError, match="--batch 8 counts the images of all 3 processes"):
        Group(1, 3).share(8)


def test_shards_give_what_their_folder_gives(
    tmp_path: Path, random_backbone: Path, natural_images: Path
) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as file:
        for path in list_images(natural_images):
            file.add(path, path.name)
    config = replace(CONFIG, steps=1)
    results = [
        distill(images, random_backbone, tmp_path / f"{name}.safetensors", config)
        for name, images in {"tar": tmp_path / "set.tar", "folder": natural_images}.items()
    ]
    assert results[0].held_out_loss == results[1].held_out_loss


def test_any_module_and_any_image_set_will_do(tmp_path: Path) -> None:
    class Noise:
        def __len__(self) -> int:
            return 20

        def read(self, index: int) -> np.ndarray:
            return np.random.default_rng(index).integers(0, 256, (40, 50, 3), np.uint8)

    network = torch.nn.Conv2d(3, 10, 8, 8)
    source = Source(network, lambda images: [network(images).relu()], name="one layer", layers=("a",))
    out = tmp_path / "t.safetensors"
    result = distill(Noise(), source, out, replace(CONFIG, steps=1))
    metadata = load_teacher(out)[1].metadata
    assert result.images == 20 and (metadata["backbone"], metadata["taps"]) == ("one layer", "a")


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # which torch says as oneDNN is switched off
@pytest.mark.parametrize(
    "changes",
    [
        {"size": "m"},
        {"loss": "smooth-l1", "crop": (0.2, 0.9)},
        {"precision": "bf16"},
        {"precision": "fp16", "steps": 3, "batch": 1},  # emulated on a CPU, by oneDNN at a crawl
    ],
)
def test_other_settings_train_too(
    tmp_path: Path, natural_images: Path, changes: dict[str, object]
) -> None:
    """With a ResNet of three stages and PDN-S or -M; more steps make the loss fall."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = ResNet((1, 1, 1), bottleneck=False, classes=0)
    save_safetensors(tmp_path / "resnet.safetensors", network.state_dict(), {})
    config = replace(CONFIG, **{"steps": 6, "batch": 2, "learning_rate": 0.02, **changes})  # type: ignore[arg-type]
    out = tmp_path / "t.safetensors"
    with torch.backends.mkldnn.flags(enabled=config.precision != "fp16"):
        result = distill(natural_images, tmp_path / "resnet.safetensors", out, config)
    teacher, info = load_teacher(out)
    assert teacher.size == config.size
    assert info.metadata["taps"] == "layer2, layer3"
    points = json.loads((tmp_path / "t.safetensors.loss.json").read_text())["points"]
    assert result.held_out_loss < points[0]["held_out_loss"]


def test_minutes_end_a_run_early_and_its_learning_rate_with_it(
    tmp_path: Path, random_backbone: Path, natural_images: Path
) -> None:
    fractions: list[float] = []
    config = replace(CONFIG, steps=10**6, minutes=0.02)
    result = distill(
        natural_images, random_backbone, tmp_path / "t.safetensors", config,
        progress=lambda s, f, loss: fractions.append(f),
    )  # fmt: skip
    assert result.steps == len(fractions) < 10**6
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and all(f < 1 for f in fractions[:-1])


def test_a_folder_without_images_is_an_error(tmp_path: Path, random_backbone: Path) -> None:
    with pytest.raises(DataError, match="holds 0 images"):
        distill(tmp_path, random_backbone, tmp_path / "t.safetensors", CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"minutes": 0.0}, "--minutes 0"),
        ({"minutes": float("nan")}, "--minutes nan"),
        ({"learning_rate": -1.0}, "--learning-rate -1"),
        ({"crop": (0.9, 0.5)}, "--crop 0.9 0.5"),
        ({"crop": (0.5, 1.2)}, "--crop 0.5 1.2"),
        ({"whiten": 1.5}, "--whiten 1.5"),
        ({"side_px": 100}, "--side 100"),
        ({"optimizer": "adam"}, "--optimizer adam: choose one of muon, adamw"),
        ({"loss": "l1"}, "--loss l1"),
        ({"precision": "fp8"}, "--precision fp8"),
    ],
)
def test_settings_out_of_range_are_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        replace(CONFIG, **changes)  # type: ignore[arg-type]


def test_help_names_the_true_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["distill", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    config = DistillConfig()
    for words in (
        f"training steps (default: {config.steps})",
        f"of all processes (default: {config.batch})",
        f"default: {config.optimizer}; the published run",
        "at its highest (default: {} of muon, {} of adamw)".format(
            config.rate, replace(config, optimizer="adamw").rate
        ),
        "of an image (default: {} {})".format(*config.crop),
        f"twice as many pixels (default: {config.side_px})",
        f"what is minimised (default: {config.loss})",
    ):
        assert words in text, words


def test_commands_of_the_document_parse() -> None:
    text = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s+", "", text)
    commands = re.findall(r"^ {4,}(?:edgead|torchrun .* edgead) (.+)$", joined, re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_the_command_takes_all_options(
    tmp_path: Path, random_backbone: Path, natural_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgead.cli import main

    out = tmp_path / "t.safetensors"
    command = (
        f"distill {natural_images} --backbone {random_backbone} --out {out} --steps 1 --minutes 5"
        " --batch 1 --learning-rate 0.0005 --crop 0.4 0.9 --side 64 --whiten 0.3 --loss smooth-l1"
        " --precision fp32 --layers blocks.6.expand.linear,blocks.12 --seed 3"
    )
    assert main(command.split()) == 0
    assert "PDN-S, 1 steps in" in capsys.readouterr().out
    metadata = load_teacher(out)[1].metadata
    assert metadata["taps"] == "blocks.6.expand.linear, blocks.12"
    found = {key: json.loads(metadata[key]) for key in ("minutes", "crop", "side_px", "whiten", "seed")}
    assert found == {"minutes": 5.0, "crop": [0.4, 0.9], "side_px": 64, "whiten": 0.3, "seed": 3}
