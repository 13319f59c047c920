"""Two bundles of one run on images that neither has seen: do their verdicts differ?

    python -m edgead.benchmarks.verdicts WHOLE.edgead REDUCED.edgead DATA [--out FILE]

What a gate promises holds for its own images. DATA is a data set with other test images of the same
part; its labels serve the image AUROC only. Distances to the threshold are compared in spreads of the
first bundle's scores, as in the gate of `edgead export --reduce`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgead.benchmarks.results_file import write_results
from edgead.detector import load
from edgead.image import read_image
from edgead.metrics import image_auroc
from edgead.training.data import open_dataset


def distances(bundle: Path, images: Sequence[Path], *, backend: str) -> np.ndarray:
    """Score minus threshold of each image, float64 [N]."""
    with load(bundle, backend=backend) as detector:
        results = [detector(read_image(path)) for path in images]
    return np.array([result.score - result.threshold for result in results])


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How far the verdicts of two bundles agree.

    Args:
        before, after: Score minus threshold of each image, float [N].
        labels: 0 or 1 (defective), [N].
    """
    spread = float(np.ptp(before))
    change, flipped = np.abs(after - before) / spread, (before >= 0) != (after >= 0)
    distance = np.abs(before[flipped]) / spread
    return {
        "images": len(before),
        "defective": int(labels.sum()),
        "flips": int(flipped.sum()),
        "flips_to_good": int((flipped & (after < 0)).sum()),
        "largest_distance_of_a_flip": float(distance.max(initial=0)),
        "deviation": {
            name: float(np.quantile(change, q)) for name, q in (("p50", 0.5), ("p95", 0.95), ("max", 1))
        },
        "image_auroc": [image_auroc(scores, labels) for scores in (before, after)],
        "missed": [int(((scores < 0) & (labels == 1)).sum()) for scores in (before, after)],
        "rejected": [int(((scores >= 0) & (labels == 0)).sum()) for scores in (before, after)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("whole", type=Path, metavar="WHOLE.edgead")
    parser.add_argument("reduced", type=Path, metavar="REDUCED.edgead")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    test = open_dataset(arguments.data).test
    images, labels = [item.path for item in test], np.array([item.label for item in test])
    before, after = (
        distances(bundle, images, backend=arguments.backend)
        for bundle in (arguments.whole, arguments.reduced)
    )
    results = compare(before, after, labels)
    for name, value in results.items():
        print(f"{name}: {value}")
    if arguments.out:
        write_results(arguments.out, "verdicts", {"backend": arguments.backend} | results)


if __name__ == "__main__":
    main()
