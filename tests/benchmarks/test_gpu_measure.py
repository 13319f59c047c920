"""What the acceptance run measures with: counted operations, loops, slopes, values for JSON."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import numpy as np
import pytest

from edgead.benchmarks.gpu_measure import (
    count_flop,
    gc_off,
    matmul_rate,
    percentiles,
    sample_calls,
    saturate,
    slope_per_minute,
)
from edgead.benchmarks.gpu_record import plain


class CountingSlot:
    """A slot that keeps account of what is in flight."""

    def __init__(self, log: list[str], name: str) -> None:
        self.images = np.zeros((4, 2, 2, 3), np.uint8)
        self.log, self.name, self.count = log, name, 0

    def calibrate(self, values: np.ndarray) -> None:
        raise AssertionError("not part of the loop")

    def launch(self, count: int = 1) -> None:
        assert self.count == 0, "launched twice"
        self.count = count
        self.log.append(f"launch {self.name} {count}")

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.count, "nothing was launched"
        self.count = 0
        self.log.append(f"wait {self.name}")
        return np.zeros(1, np.float32), np.zeros((1, 2, 2), np.float32)

    def close(self) -> None:
        raise AssertionError("not part of the loop")


def test_slots_are_kept_in_flight_in_turns_and_emptied_at_the_end() -> None:
    log: list[str] = []
    slots = [CountingSlot(log, "a"), CountingSlot(log, "b")]
    done, seconds = saturate(slots, 4, seconds=0)
    assert log == [
        "launch a 4", "launch b 4",
        "wait a", "launch a 4", "wait b", "launch b 4",
        "wait a", "wait b",
    ]  # fmt: skip
    assert done == 8 and seconds > 0  # one round; what was in flight when it began ended in it


def test_images_before_the_counted_time_do_not_count() -> None:
    log: list[str] = []
    slot = CountingSlot(log, "a")
    frames = np.full((2, 2, 2, 3), 7, np.uint8)
    done, _ = saturate([slot], 2, seconds=0.02, settle_s=0.01, frames=frames)
    waits = sum(line.startswith("wait") for line in log)
    assert 0 < done < 2 * (waits - 1)
    assert (slot.images[:2] == 7).all() and (slot.images[2:] == 0).all()


def test_calls_take_their_arguments_in_turn_and_the_warm_up_is_apart() -> None:
    seen: list[int] = []
    timed = sample_calls(seen.append, [1, 2, 3], calls=4, warmup=2)
    assert seen == [1, 1, 2, 1, 2, 3, 1]  # first call, warm-up, counted calls
    assert timed["calls"] == 4 and timed["warmup_calls"] == 3 and timed["first_call_ms"] >= 0


def test_percentiles_are_in_milliseconds() -> None:
    timed = percentiles(np.arange(1, 1002) * 1_000_000)
    found = [timed[name] for name in ("p50_ms", "p90_ms", "p99_ms", "p99_9_ms")]
    assert found == [501, 901, 991, 1000]
    assert timed["max_ms"] == 1001 and timed["mean_ms"] == 501 and timed["calls"] == 1001
    # Of 1..n: sqrt((n^2 - 1) / 12).
    assert timed["std_ms"] == pytest.approx(math.sqrt((1001**2 - 1) / 12), abs=1e-4)


def test_the_garbage_collector_is_on_again_after_an_error() -> None:
    with pytest.raises(ValueError), gc_off():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_slope() -> None:
    seconds = [0.0, 30.0, 60.0, 90.0]
    assert slope_per_minute(seconds, [5, 6, 7, 8]) == pytest.approx(2)
    assert slope_per_minute([3.0], [5]) is None
    assert slope_per_minute([3.0, 3.0], [5, 6]) is None


def test_operations_of_the_tiny_graph(tiny_bundle: Path) -> None:
    from edgead.bundle import Bundle

    found = count_flop(Bundle.open(tiny_bundle).model_bytes())
    # 64x64 outputs each of a 1x1 convolution over 3 channels, a 3x3 and a 9x9 one.
    assert found["flop_per_image"] == 2 * 64 * 64 * (3 + 9 + 81)
    assert found["nodes"] == 3


def test_operations_of_all_counted_nodes() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx (to make graphs) is not installed")
    make, tensor, float32 = onnx.helper.make_node, onnx.helper.make_tensor_value_info, 1
    weights = {
        "grouped": np.zeros((8, 2, 3, 3), np.float32),  # 4 channels in 2 groups -> 8
        "up": np.zeros((8, 5, 2, 2), np.float32),  # 8 channels -> 5
        "rows": np.zeros((20, 6), np.float32),
        "gemm": np.zeros((20, 7), np.float32),
    }
    nodes = [
        make("Conv", ["x", "grouped"], ["a"], group=2),
        make("ConvTranspose", ["a", "up"], ["b"], strides=[2, 2]),
        make("Flatten", ["b"], ["c"], axis=3),  # [batch * 5 * 20, 20]
        make("MatMul", ["c", "rows"], ["d"]),
        make("Gemm", ["c", "gemm"], ["e"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "all",
        [tensor("x", float32, ["batch", 4, 12, 12])],
        [tensor("d", float32, None), tensor("e", float32, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    conv = 8 * 10 * 10 * (2 * 3 * 3)
    transposed = 8 * 10 * 10 * (5 * 2 * 2)
    matmul, gemm = 100 * 6 * 20, 100 * 7 * 20
    expected = 2 * (conv + transposed + matmul + gemm)
    assert count_flop(model.SerializeToString())["flop_per_image"] == expected


def test_matmul_rate_of_a_cpu() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    found = matmul_rate("cpu", side=64, repeats=2, groups=3)
    assert 0 < found["tflops_min"] <= found["tflops"] <= found["tflops_max"]
    assert "64x64x64" in found["method"]


def test_values_for_json_name_no_folder_and_have_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    numbers = (np.float32(0.5), np.int64(3), math.inf, math.nan)
    value = {"a": numbers, "b": Path("/home/somebody/x"), 1: None}
    assert plain(value) == {"a": [0.5, 3, "inf", "nan"], "b": "~/x", "1": None}
