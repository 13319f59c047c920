"""Which of EfficientAD's two branches finds which defects: image AUROC of each by itself.

    python -m edgead.benchmarks.branches X.edgead DATA [--out FILE]

The graph's input `calibration` weighs the branches, so a branch is looked at by setting the other's
weight to zero; nothing is trained or exported anew. The score of one branch is the largest value of its
raw map, which no scale or offset would rank differently.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgead import metrics
from edgead.benchmarks.command import exit_status
from edgead.benchmarks.results_file import table, write_results
from edgead.bundle import Bundle
from edgead.errors import BundleError, DataError
from edgead.image import read_image
from edgead.judge import Judge
from edgead.runtime import open_backend
from edgead.runtime.backend import CALIBRATION, IMAGE, SCORE
from edgead.training.data import Dataset, TestItem, open_dataset

BRANCHES = ("student-teacher", "autoencoder", "both")


def branch_scores(bundle: Bundle, items: Sequence[TestItem], backend: str = "auto") -> np.ndarray:
    """Scores float64 [N, 3] of test images, in the order of `BRANCHES`.

    Raises:
        BundleError: the bundle's calibration is not that of two branches.
    """
    calibration = bundle.manifest.calibration
    if calibration.names != ("student_scale", "autoencoder_scale", "offset"):
        raise BundleError(
            f"bundle {bundle.path}: its calibration is {', '.join(calibration.names)}; expected the two"
            " scales and the offset of EfficientAD"
        )
    weights = np.array([(1, 0, 0), (0, 1, 0), calibration.values], np.float32)
    judge, session = Judge(bundle.manifest), open_backend(bundle, backend)
    scores = np.empty((len(items), len(weights)))
    try:
        for row, item in zip(scores, items, strict=True):
            image = judge.prepare(read_image(item.path), "rgb")[None]
            row[:] = [session.infer({IMAGE: image, CALIBRATION: w})[SCORE][0] for w in weights]
    finally:
        session.close()
    return scores


def measure(bundle: Bundle, dataset: Dataset, backend: str = "auto") -> dict[str, dict[str, float]]:
    """Image AUROC of every defect against all good test images: {defect: {branch: 0..1}}.

    The last defect is "all". Raises DataError where there are no good or no defective test images.
    """
    good = np.array([item.label == 0 for item in dataset.test], dtype=bool)
    if good.all() or not good.any():
        raise DataError(f"data set {dataset.name}: needs good and defective test images")
    scores = branch_scores(bundle, dataset.test, backend)
    kinds = np.array([item.defect for item in dataset.test])
    groups = {str(kind): kinds == kind for kind in np.unique(kinds[~good])} | {"all": ~good}
    result = {}
    for name, wanted in groups.items():
        chosen = good | wanted
        result[name] = {
            branch: metrics.image_auroc(scores[chosen, column], wanted[chosen])
            for column, branch in enumerate(BRANCHES)
        }
    return result


def main() -> int:
    """Returns 0, or 1 when the bundle or the data set cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bundle", type=Path, metavar="X.edgead")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    arguments = parser.parse_args()
    return exit_status("branches", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    bundle, dataset = Bundle.open(arguments.bundle), open_dataset(arguments.data)
    aurocs = measure(bundle, dataset, arguments.backend)
    rows = [[name, *(f"{row[branch]:.4f}" for branch in BRANCHES)] for name, row in aurocs.items()]
    print(table(["image AUROC", *BRANCHES], rows))
    if arguments.out:
        training = bundle.manifest.provenance.get("training", {})
        results = {"name": bundle.manifest.name, "training": training, "image_auroc": aurocs}
        write_results(arguments.out, "branches", results)


if __name__ == "__main__":
    sys.exit(main())
