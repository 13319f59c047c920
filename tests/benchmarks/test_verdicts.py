"""Agreement of two bundles' verdicts, against counts by hand; and of a real bundle with itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgead.benchmarks.verdicts import compare, distances, main
from edgead.image import list_images


def test_what_is_counted() -> None:
    before = np.array([-0.5, -0.1, 0.1, 0.5])
    labels = np.array([0, 0, 1, 1])
    found = compare(before, np.array([-0.4, 0.1, -0.2, 0.5]), labels)
    assert (found["images"], found["defective"], found["flips"], found["flips_to_good"]) == (4, 2, 2, 1)
    assert found["largest_distance_of_a_flip"] == pytest.approx(0.1)
    assert found["deviation"] == pytest.approx({"p50": 0.15, "p95": 0.285, "max": 0.3})  # spread 1
    assert found["image_auroc"] == [1.0, 0.75]
    assert (found["missed"], found["rejected"]) == ([0, 1], [0, 1])
    same = compare(before, before, labels)
    assert (same["flips"], same["largest_distance_of_a_flip"], same["deviation"]["max"]) == (0, 0, 0)


def test_a_bundle_agrees_with_itself(tiny_bundle: Path, demo_images: Path) -> None:
    images = list_images(demo_images / "test" / "good")
    first, second = distances(tiny_bundle, tiny_bundle, images, backend="onnxruntime")
    assert len(first) == len(images) and np.array_equal(first, second)


def test_a_wrong_file_is_one_line(
    tiny_bundle: Path, demo_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, empty = tmp_path / "x.edgead", tmp_path / "empty"
    wrong.write_bytes(tiny_bundle.read_bytes()[:1000])
    empty.mkdir()
    for bundle, data in ((wrong, demo_images), (tiny_bundle, empty)):
        assert main([str(tiny_bundle), str(bundle), str(data)]) == 1
        message = capsys.readouterr().err
        assert message.startswith("edgead.benchmarks.verdicts: error: ") and message.count("\n") == 1
