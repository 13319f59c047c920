"""Teachers by recipe: the list, real small distillations, going on, and what stands in the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgead.benchmarks.teachers import main, read_recipes
from edgead.errors import DataError
from edgead.models.files import load_directions
from edgead.training.distill import DistillConfig

RECIPES = Path(__file__).parents[2] / "benchmarks" / "teacher_recipes.toml"
SMALL = "[defaults]\nsteps = 2\nbatch = 1\nside_px = 64\nheld_out = 0.2\n"


def test_the_recipes_of_the_list_that_comes_with_it() -> None:
    recipes = read_recipes(RECIPES)
    assert recipes["base"] == (DistillConfig(steps=250), ("blocks.5.depthwise", "blocks.12.depthwise"))
    assert recipes["whiten"][0] == DistillConfig(steps=250, whiten=1.0)
    assert recipes["small_crops"][0].crop == (0.3, 1.0) and recipes["short"][0].steps == 120
    assert recipes["linear"][1] == ("blocks.5.depthwise.linear", "blocks.12.depthwise.linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 3", "nothing outside"),
        ("[defaults]\nsteps = 3", "names no teacher"),
        ("[a]\nstep = 3", "a: .*step"),
        ("[a]\ncrop = 3", "a: crop = 3: expected .smallest"),
        ("[a]\nsteps = 0", "a: .*at least 1"),
        ("[a", "cannot read"),
    ],
)
def test_a_wrong_list_is_told_of(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_recipes(path)


def test_makes_what_is_missing_and_keeps_what_is_there(
    tmp_path: Path, random_backbone: Path, natural_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "list.toml", tmp_path / "out"
    command = [path, "--images", natural_images, "--backbone", random_backbone, "--out", out]
    arguments = list(map(str, [*command, "--device", "cpu"]))
    path.write_text(SMALL + '[one]\n[other]\nloss = "smooth-l1"\nlayers = ["blocks.2.depthwise"]\n')
    assert main(arguments) == 0
    record = json.loads((out / "teachers.json").read_text())
    assert list(record["teachers"]) == ["one", "other"] and record["machine"]
    other = record["teachers"]["other"]
    assert (
        other["metadata"]["taps"] == "blocks.2.depthwise"
        and other["metadata"]["loss_function"] == "smooth-l1"
    )
    stored = load_directions(out / "other.safetensors")
    assert stored is not None
    assert other["energy_of_directions"]["64"] == pytest.approx(float(stored[1][:64].sum()))
    assert 0 < other["energy_of_directions"]["64"] <= other["energy_of_directions"]["128"] <= 1.0001
    row = (out / "teachers.md").read_text().splitlines()[3]
    assert row.startswith("| other | blocks.2.depthwise | 2 | ")
    assert f"{float(other['metadata']['held_out_loss']):.3f}" in row

    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert main(arguments) == 0
    path.write_text(SMALL + '[one]\n[other]\nlayers = ["blocks.2.depthwise"]\n')  # another loss
    capsys.readouterr()
    assert main(arguments) == 1
    assert "other.safetensors exists; name another" in capsys.readouterr().err
    assert before == {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}

    path.write_text(SMALL + '[one]\n[wrong]\nlayers = ["blocks.99"]\n')
    capsys.readouterr()
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("edgead.benchmarks.teachers: error: ") and "blocks.99" in message
    assert message.count("\n") == 1


def test_a_teacher_by_minutes_is_made_once(
    tmp_path: Path, random_backbone: Path, natural_images: Path
) -> None:
    """Its file says how many steps fitted, not how many were the most."""
    path, out = tmp_path / "list.toml", tmp_path / "out"
    path.write_text(SMALL.replace("steps = 2", "steps = 100000") + "[one]\nminutes = 0.01\n")
    command = [path, "--images", natural_images, "--backbone", random_backbone, "--out", out]
    arguments = list(map(str, [*command, "--device", "cpu"]))
    assert main(arguments) == 0
    before = (out / "one.safetensors").stat().st_mtime_ns
    assert main(arguments) == 0 and (out / "one.safetensors").stat().st_mtime_ns == before
