"""Targets and limits are judged from the figures of the file, and only where they are stated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edgead.benchmarks import gpu_report


def record_of(**figures: Any) -> dict[str, Any]:
    """What the targets are judged from, as if measured on the machine that they are stated for."""
    values = {"p50": 0.4, "p99": 0.9, "rate": 6000.0, "overhead": 1.04, "naive": 3.1} | figures
    leaves = {
        "latency": {"graph": {"p50_ms": values["p50"], "p99_ms": values["p99"]}},
        "throughput": {"best": {"images_per_s": values["rate"]}},
        "overhead": {"infer_over_bare": values["overhead"], "slot_over_bare": values["overhead"]},
        "naive": {"batch_1": {"times_naive": {"naive": {"by_images_per_s": {"slot": values["naive"]}}}}},
    }
    slower = {"throughput": {"best": {"images_per_s": 1000.0}}}
    bundle = {"method": "efficientad-s", "input_px": [256, 256], "precision": "fp16"}
    sections: dict[str, Any] = {name: {"a": {"result": leaf}} for name, leaf in leaves.items()}
    sections["throughput"]["b"] = {"result": slower["throughput"]}
    limit = {"graph": {"flop_per_image": 50_000_000_000}, "card": {"tflops": 600.0}}
    sections["matmul"] = {"utc": "", "result": limit}
    facts = {"gpu": {"name": "NVIDIA H200"}, "bundle": bundle}
    return {"quick": False, "backends": ["a", "b"], "provenance": facts, "sections": sections}


def test_targets_are_judged_by_the_best_back_end() -> None:
    found = gpu_report.targets(record_of())
    assert found["applicable"]
    assert [(row["measured"], row["backend"], row["met"]) for row in found["rows"]] == [
        (0.4, "a", True), (0.9, "a", True), (6000.0, "a", True),
        (1.04, "a", True), (1.04, "a", True), (3.1, "a", True),
    ]  # fmt: skip
    missed = record_of(p50=0.51, p99=1.01, rate=4999.0, overhead=1.06, naive=2.9)
    assert [row["met"] for row in gpu_report.targets(missed)["rows"]] == [False] * 6


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda record: record.update(quick=True), "quick"),
        (lambda record: record["provenance"]["gpu"].update(name="NVIDIA L4"), "NVIDIA L4"),
        (lambda record: record["provenance"]["bundle"].update(precision="fp32"), "fp32"),
        (lambda record: record["provenance"]["bundle"].update(input_px=[512, 512]), "512"),
        (lambda record: record["provenance"]["bundle"].update(gflop_per_image=55.2), "has 55.2"),
    ],
)
def test_targets_of_another_machine_or_model_are_not_judged(
    change: Callable[[dict[str, Any]], None], told: str
) -> None:
    record = record_of()
    change(record)
    found = gpu_report.targets(record)
    assert not found["applicable"] and told in found["why_not"]
    assert {row["met"] for row in found["rows"]} == {None}


def test_share_of_the_measured_limit() -> None:
    found = gpu_report.limits(record_of())
    # 600e12 / 50e9 images/s; 6000 and 1000 of them.
    assert found == {"limit_images_per_s": 12000.0, "share": {"a": 0.5, "b": 0.0833}}
    record = record_of()
    record["sections"]["matmul"]["result"]["card"]["tflops"] = None
    assert "share" not in gpu_report.limits(record)


def test_figures_that_are_no_numbers_are_shown_as_they_are() -> None:
    """JSON has none for them: in the file they are texts."""
    record = record_of(rate="inf")
    record["backends"] = ["a"]
    (row,) = [row for row in gpu_report.targets(record)["rows"] if "throughput >=" in row["target"]][:1]
    assert row["met"] is None and row["measured"] == gpu_report.NOT_MEASURED
    assert [gpu_report._e(value) for value in ("nan", None, 0.0123)] == ["nan", "–", "1.23e-02"]
