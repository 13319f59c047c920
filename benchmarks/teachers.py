"""Teachers by recipe: distils each one of a list, and says what is known of it before it is used.

    python -m edgead.benchmarks.teachers LIST.toml --images IMAGES --backbone FILE --out DIR

    [defaults]              # whatever `DistillConfig` has, and layers
    steps = 250

    [linear]                # a teacher: what differs from the defaults
    layers = ["blocks.5.depthwise.linear", "blocks.12.depthwise.linear"]

Writes DIR/linear.safetensors and so on, and after each one DIR/teachers.json and DIR/teachers.md. Call
it again to go on: finished teachers are kept, one that was killed goes on from its checkpoint, and a
recipe that has changed needs another name. What a teacher is worth in a detector tells
`edgead.benchmarks.accuracy`, with `teacher = [...]` in its list.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgead.benchmarks.accuracy_list import read_toml
from edgead.benchmarks.command import exit_status
from edgead.benchmarks.results_file import table, write_results
from edgead.errors import DataError, TrainingError
from edgead.files import write_text
from edgead.models.files import load_directions, load_teacher, read_state_dict
from edgead.training.distill import DistillConfig, as_text, distill, recipe
from edgead.training.targets import Source

DIRECTIONS = (64, 128)
"""Numbers of principal directions whose share of the features' energy is reported."""


def read_recipes(path: Path) -> dict[str, tuple[DistillConfig, tuple[str, ...] | None]]:
    """Settings and layers (None: the backbone's default ones) of each teacher, in the list's order.

    Raises:
        DataError: the list cannot be read or says something unknown.
    """
    content = read_toml(path)
    if not all(isinstance(value, dict) for value in content.values()):
        raise DataError(f"{path}: expected tables [defaults] and [NAME], and nothing outside of them")
    defaults = content.pop("defaults", {})
    if not content:
        raise DataError(f"{path}: names no teacher: expected a table [NAME] for each")
    return {name: _recipe(f"{path}: {name}", {**defaults, **own}) for name, own in content.items()}


def _recipe(where: str, values: dict[str, Any]) -> tuple[DistillConfig, tuple[str, ...] | None]:
    layers = values.pop("layers", None)
    try:
        if "crop" in values:
            if not (isinstance(values["crop"], list) and len(values["crop"]) == 2):
                raise TypeError(f"crop = {values['crop']}: expected [smallest, largest]")
            values["crop"] = tuple(values["crop"])
        return DistillConfig(**values), None if layers is None else tuple(layers)
    except (TrainingError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error


def describe(file: Path) -> dict[str, Any]:
    """What a teacher's file tells: its settings and losses, and the energy of its first directions."""
    info = load_teacher(file)[1]
    directions = load_directions(file)
    assert directions is not None, f"{file}: edgead distill stores directions"
    energy = {str(k): float(directions[1][:k].sum()) for k in DIRECTIONS}
    return {"sha256": info.sha256, "metadata": info.metadata, "energy_of_directions": energy}


def is_made(file: Path, config: DistillConfig, source: Source) -> bool:
    """Whether this file is there and was made by this recipe from this source."""
    wanted = as_text(recipe(config, source))
    if config.minutes is not None:
        del wanted["steps"]  # the file says how many were taken
    return file.exists() and wanted.items() <= read_state_dict(file)[1].items()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all teachers are made, else 1."""
    arguments = _parse(argv)
    return exit_status("teachers", lambda: _run(arguments), resumes=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("list", type=Path, metavar="LIST.toml")
    parser.add_argument("--images", type=Path, required=True, help="folder of natural images")
    parser.add_argument("--backbone", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    recipes = read_recipes(arguments.list)
    sources = {  # all at first: a wrong layer is told of before the others have taken their time
        name: Source.load(arguments.backbone, layers) for name, (_, layers) in recipes.items()
    }
    teachers: dict[str, Any] = {}
    for name, (config, _) in recipes.items():
        file = arguments.out / f"{name}.safetensors"
        if not is_made(file, config, sources[name]):
            distill(arguments.images, sources[name], file, config, device=arguments.device, resume=True)
        teachers[name] = describe(file)
        write_results(arguments.out / "teachers.json", "teachers", {"teachers": teachers})
        write_text(arguments.out / "teachers.md", teachers_table(teachers) + "\n")
        print(teachers_table({name: teachers[name]}).splitlines()[-1], flush=True)


def teachers_table(teachers: dict[str, dict[str, Any]]) -> str:
    """A line per teacher; held-out losses can be compared where layers and whitening are the same."""
    rows = []
    for name, teacher in teachers.items():
        said, energy = teacher["metadata"], teacher["energy_of_directions"]
        rows.append(
            [
                name,
                said["taps"],
                said["steps"],
                f"{float(said['seconds']):.0f}",
                *(f"{float(said[key]):.3f}" for key in ("loss", "held_out_loss")),
                *(f"{energy[str(k)]:.3f}" for k in DIRECTIONS),
            ]
        )
    share = [f"energy in {k} directions" for k in DIRECTIONS]
    return table(("teacher", "layers", "steps", "s", "loss", "held-out loss", *share), rows)


if __name__ == "__main__":
    sys.exit(main())
