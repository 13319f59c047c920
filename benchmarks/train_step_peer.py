"""Seconds per training step of other implementations, each in a process of its own.

    python -m edgead.benchmarks.train_step_peer PATH [--steps 7] [--threads 2]

PATH is a folder that holds `efficientad.py` of nelson1425/EfficientAD, or one that holds the package
`anomalib` (the site-packages of an environment where it is installed). Nothing of them comes with
edgead. The teacher has random weights, and the images are noise: only speed is measured. Both decode a
penalty image in every step, as they do when they train. They take the GPU if they see one. The last line
that is printed is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from edgead.errors import DataError
from edgead.image import write_image

WARM_UP = 3


class _Enough(Exception):
    pass


def name_of(path: Path) -> str:
    """Which peer a folder holds.

    Raises:
        DataError: none that is known.
    """
    if (path / "efficientad.py").is_file():
        return "nelson1425"
    if (path / "anomalib").is_dir():
        return "anomalib"
    raise DataError(
        f"--peer {path}: expected a folder with efficientad.py (nelson1425/EfficientAD) or with the"
        " package anomalib (site-packages of an environment that has it)"
    )


def noise_images(folder: Path, count: int, side_px: int) -> None:
    """Writes square pictures of noise into a new folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
        write_image(folder / f"{index}.png", pixels)


def nelson1425(folder: Path, steps: int) -> list[float]:
    """Times the loop of its script itself: its progress bar is replaced by a clock."""
    module: Any = importlib.import_module("efficientad")
    common: Any = importlib.import_module("common")
    import torch

    noise_images(folder / "mvtec" / "noise" / "train" / "good", 8, 256)
    noise_images(folder / "mvtec" / "noise" / "test" / "good", 1, 256)
    noise_images(folder / "penalty" / "all", 8, 512)
    weights = folder / "teacher.pth"
    torch.save(common.get_pdn_small(384).state_dict(), weights)
    ticks: list[float] = []

    class Clock:
        def __init__(self, items: Iterable[Any], **_: object) -> None:
            self.items = items

        def __iter__(self) -> Iterator[Any]:
            for item in self.items:
                _wait()
                ticks.append(time.perf_counter())
                if len(ticks) > WARM_UP + steps:
                    raise _Enough
                yield item

        def set_description(self, text: str) -> None: ...

    module.tqdm = Clock
    module.teacher_normalization = lambda *_: (torch.tensor(0.0), torch.tensor(1.0))
    options = {
        "--dataset": "mvtec_ad",
        "--subdataset": "noise",
        "--output_dir": folder / "out",
        "--weights": weights,
        "--imagenet_train_path": folder / "penalty",
        "--mvtec_ad_path": folder / "mvtec",
    }
    sys.argv = ["efficientad.py", *map(str, itertools.chain.from_iterable(options.items()))]
    try:
        module.main()
    except _Enough:
        pass
    return [after - before for before, after in itertools.pairwise(ticks[WARM_UP:])]


def anomalib(folder: Path, steps: int) -> list[float]:
    """Times `training_step`, backward and Adam of its EfficientAd, without Lightning's loop."""
    import torch
    from anomalib.data import ImageBatch
    from anomalib.models import EfficientAd

    noise_images(folder / "penalty" / "all", 8, 512)
    model: Any = EfficientAd(imagenet_dir=folder / "penalty", model_size="small")
    model.prepare_imagenette_data((256, 256))
    channels = model.model.teacher_out_channels
    statistics = {"mean": torch.zeros(1, channels, 1, 1), "std": torch.ones(1, channels, 1, 1)}
    model.model.mean_std.update(statistics)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    model.log = lambda *_, **__: None
    model.train()
    model.model.teacher.eval()
    parameters = [*model.model.student.parameters(), *model.model.ae.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=model.lr, weight_decay=model.weight_decay)
    image = torch.rand(1, 3, 256, 256, device=device)
    label = torch.zeros(1, dtype=torch.long, device=device)
    seconds = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        batch = ImageBatch(image=image.clone(), gt_label=label)
        loss = model.training_step(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _wait()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def _wait() -> None:
    """Until a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


PEERS: dict[str, Callable[[Path, int], list[float]]] = {"nelson1425": nelson1425, "anomalib": anomalib}


def _versions(*packages: str) -> Iterator[tuple[str, str]]:
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def _declare_torchvision_operators(versions: Mapping[str, str]) -> None:
    """A torchvision linked to CUDA does not import beside a CPU build of torch, which lacks these two.

    Nothing that is measured calls them.
    """
    import torch

    if torch.version.cuda is None and "+cpu" not in versions.get("torchvision", "+cpu"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_torchvision_operators"] = library  # they end with it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--search", type=Path, action="append", default=[], help="folders of packages")
    arguments = parser.parse_args()
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sys.path.extend(str(path) for path in (arguments.path, *arguments.search))  # edgead's own come first
    name = name_of(arguments.path)
    versions = dict(_versions("torchvision", "anomalib"))
    _declare_torchvision_operators(versions)
    with tempfile.TemporaryDirectory() as folder:
        seconds = PEERS[name](Path(folder), arguments.steps)
    print(json.dumps({"peer": name, "versions": versions, "step_s": seconds}))


if __name__ == "__main__":
    main()
