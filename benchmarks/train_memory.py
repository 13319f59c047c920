"""Memory that training takes at its peak: of the host, and of the GPU if there is one.

    python -m edgead.benchmarks.train_memory [--images 300] [--steps 20] [--method efficientad-s]

Trains on noise, so that the process has done all that a training does: images stored, teacher's outputs
cached, steps, calibration. The last line that is printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from edgead.benchmarks.train_step_peer import noise_images
from edgead.methods import configure
from edgead.training.data import open_dataset
from edgead.training.train import train


def _host_peak_mib() -> int:
    """Not `getrusage`, whose figure a process has from the one that started it."""
    status = Path("/proc/self/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return round(int(kib) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", default="efficientad-s", choices=("efficientad-s", "efficientad-m"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good, penalty = Path(folder) / "data" / "good", Path(folder) / "penalty"
        noise_images(good, arguments.images, 300)
        noise_images(penalty, 8, 300)
        config = configure(arguments.method, steps=arguments.steps)
        train(open_dataset(good.parent), Path(folder) / "run", config, penalty=penalty)
    record = {
        "images": arguments.images,
        "method": arguments.method,
        "host_peak_mib": _host_peak_mib(),
        "gpu_peak_mib": None,
    }
    if torch.cuda.is_available():
        record["gpu_peak_mib"] = round(torch.cuda.max_memory_reserved() / 2**20)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
