"""The lines and the bad days that the benchmark of the line runs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from edgead.bundle import Golden, write_bundle
from edgead.manifest import Calibration, InputSpec, Manifest, OutputSpec, Threshold

SIDE_PX = 64
PICTURES = 16

LINE = """\
[line]
name = "benchmark"
journal = "state"

[[camera]]
name = "top"
deadline_ms = 50
source = {{ kind = "folder", path = "frames", rate_hz = {rate_hz}, repeat = {repeat} }}

[[camera.recipe]]
bundle = "standin.edgead"

[[camera]]
name = "side"
deadline_ms = 200
grab = "live"
source = {{ kind = "folder", path = "frames", rate_hz = {rate_hz}, repeat = {repeat} }}

[[camera.recipe]]
bundle = "standin.edgead"

[[sink]]
kind = "jsonl"
path = "results.jsonl"
rotate_mib = 10000
"""

EVERYTHING = """\
seed = 1
[[fault]]
kind = "lost"
share = 0.01
[[fault]]
kind = "duplicate"
share = 0.005
[[fault]]
kind = "dark"
name = "top"
share = 0.002
[[fault]]
kind = "burst"
name = "side"
count = 20
for_s = 7
[[fault]]
kind = "model-error"
share = 0.0005
[[fault]]
kind = "model-hang"
share = 0.0002
ms = 80
[[fault]]
kind = "slow-sink"
name = "jsonl"
share = 0.001
ms = 50
[[fault]]
kind = "dead-sink"
name = "jsonl"
at_s = 5
for_s = 10
"""

KILLS = EVERYTHING.replace("seed = 1", "seed = {seed}") + "\n".join(
    # moments without a common period: as good as random for what the process is at
    f'[[fault]]\nkind = "kill"\nat_s = {start}\nfor_s = {period}'
    for start, period in ((1.31, 2.17), (2.03, 3.37), (1.77, 5.51), (2.9, 7.03))
)


def write_line(folder: Path, faults: str, *, rate_hz: float, parts: int) -> tuple[Path, Path]:
    """Writes pictures, a bundle for the stand-in model, the recipe file and the file of faults.

    Args:
        rate_hz: Of each of the two cameras.
        parts: Of both together; 0 is without end.
    """
    (folder / "frames").mkdir()
    rng = np.random.default_rng(0)
    for index in range(PICTURES):
        picture = rng.integers(60, 180, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "frames" / f"{index:02}.bmp"), picture)
    _write_bundle(folder / "standin.edgead")
    recipe, faults_file = folder / "line.toml", folder / "faults.toml"
    repeat = -(-parts // (2 * PICTURES))
    recipe.write_text(LINE.format(rate_hz=rate_hz, repeat=repeat))
    faults_file.write_text(faults)
    return recipe, faults_file


def _write_bundle(path: Path) -> None:
    """A bundle for the stand-in model, which never looks at the graph."""
    manifest = Manifest(
        method="stand-in",
        name="stand-in",
        precision="fp32",
        input=InputSpec(height=SIDE_PX, width=SIDE_PX),
        outputs={
            "score": OutputSpec(shape=("N",)),
            "anomaly_map": OutputSpec(shape=("N", SIDE_PX, SIDE_PX)),
        },
        calibration=Calibration(values=(1.0,), names=("scale",), meaning="none"),
        threshold=Threshold(value=1.0, basis="set"),
    )
    images = np.zeros((1, SIDE_PX, SIDE_PX, 3), np.uint8)
    maps = np.zeros((1, SIDE_PX, SIDE_PX), np.float32)
    write_bundle(path, manifest, b"no graph", Golden(images, np.zeros(1, np.float32), maps))
