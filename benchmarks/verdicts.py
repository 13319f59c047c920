"""Two bundles of one run on images that neither has seen: do their verdicts differ?

    python -m edgead.benchmarks.verdicts WHOLE.edgead REDUCED.edgead DATA [--out FILE]

What a gate promises holds for its own images. DATA is a data set with other test images of the same
part; its labels serve the image AUROC only. Distances to the threshold are compared in spreads of the
first bundle's scores, as in the gate of `edgead export --reduce`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgead.benchmarks.command import exit_status
from edgead.benchmarks.results_file import write_results
from edgead.detector import load
from edgead.errors import DataError
from edgead.image import read_image
from edgead.metrics import image_auroc
from edgead.result import Result
from edgead.training.data import open_dataset


def distances(
    whole: Path, reduced: Path, images: Sequence[Path], *, backend: str
) -> tuple[np.ndarray, np.ndarray]:
    """Score minus threshold of each image with either bundle, float64 [N]."""
    with load(whole, backend=backend) as first, load(reduced, backend=backend) as second:
        frames = map(read_image, images)
        results = [(first(frame), second(frame)) for frame in frames]
    before, after = zip(*results, strict=True)
    return _distances(before), _distances(after)


def _distances(results: Sequence[Result]) -> np.ndarray:
    return np.array([result.score - result.threshold for result in results])


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How far the verdicts of two bundles agree.

    Args:
        before, after: Score minus threshold of each image, float [N].
        labels: 0 or 1 (defective), [N].
    """
    spread = float(np.ptp(before)) or 1.0
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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when a bundle or the data set cannot be read."""
    arguments = _parse(argv)
    return exit_status("verdicts", lambda: _run(arguments))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("whole", type=Path, metavar="WHOLE.edgead")
    parser.add_argument("reduced", type=Path, metavar="REDUCED.edgead")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    test = open_dataset(arguments.data).test
    labels = np.array([item.label for item in test])
    if len(set(labels.tolist())) < 2:
        raise DataError(f"{arguments.data}: the comparison needs good and defective test images")
    images = [item.path for item in test]
    both = distances(arguments.whole, arguments.reduced, images, backend=arguments.backend)
    results = compare(*both, labels)
    for name, value in results.items():
        print(f"{name}: {value}")
    if arguments.out:
        write_results(arguments.out, "verdicts", {"backend": arguments.backend} | results)


if __name__ == "__main__":
    sys.exit(main())
