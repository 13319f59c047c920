"""Memory that training takes at its peak: of the host, and of the GPU if there is one.

    python -m edgead.benchmarks.train_memory [--images 300] [--steps 20] [-- OPTIONS OF edgead train]

Trains on noise, so that the process has done all that a training does: images stored, teacher's outputs
cached, steps, calibration. The last line that is printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

from edgead.cli import main as edgead
from edgead.image import write_image


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("options", nargs="*", help="of edgead train, after --")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        good, penalty = Path(folder) / "data" / "good", Path(folder) / "penalty"
        for path, count in ((good, arguments.images), (penalty, 8)):
            path.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
                write_image(path / f"{index:03}.png", pixels)
        command = ["train", str(good.parent), "--out", str(Path(folder) / "run")]
        command += ["--penalty", str(penalty), "--steps", str(arguments.steps), *arguments.options]
        if status := edgead(command):
            return status
    import torch

    record = {
        "images": arguments.images,
        "options": arguments.options,
        "host_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "gpu_peak_mib": None,
    }
    if torch.cuda.is_available():
        record["gpu_peak_mib"] = round(torch.cuda.max_memory_reserved() / 2**20)
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
