"""Two comparisons of the GPU acceptance run: with the FP32 reference, and with the naive deployment."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgead.benchmarks.gpu_bench import Bench, NotMeasured, pdn_size
from edgead.benchmarks.gpu_contract import TOLERANCE
from edgead.benchmarks.gpu_measure import gc_off
from edgead.benchmarks.timing import interleave
from edgead.runtime import Backend, replay
from edgead.runtime.backend import ANOMALY_MAP, CALIBRATION, IMAGE, SCORE
from edgead.runtime.ort import OrtBackend

if TYPE_CHECKING:
    from edgead.models.efficientad import EfficientAD

CONFIDENCE = 0.95
NAIVE_BATCHES = (1, 8)
_OWN = ("infer", "slot")


def parity(bench: Bench) -> dict[str, Any]:
    """Scores, maps and verdicts of the back end against an FP32 reference, image by image."""
    frames = bench.images.frames
    reference, scores, maps = _reference(bench, frames)
    got, map_deviation = np.empty(len(frames)), np.empty(len(frames))
    with bench.open() as backend:
        precision = backend.precision
        for index, frame in enumerate(frames):
            outputs = backend.infer({IMAGE: frame[None], CALIBRATION: bench.calibration})
            got[index] = outputs[SCORE][0]
            map_deviation[index] = np.abs(outputs[ANOMALY_MAP][0] - maps[index]).max()
        golden = replay(backend, bench.bundle)
    spread = float(np.ptp(scores))
    deviation = np.abs(got - scores)
    found: dict[str, Any] = {
        "reference": reference,
        "precision": precision,
        "images": len(frames),
        "image_source": bench.images.source,
        "score_spread": spread,
        "score_min": float(scores.min()),
        "score_max": float(scores.max()),
        "map_range": float(np.ptp(maps)),
        "score_deviation_max": float(deviation.max()),
        "map_deviation_max": float(map_deviation.max()),
        "relative": None,
    }
    if spread:
        found["relative"] = {
            "score_max": float(deviation.max()) / spread,
            "score_p99": float(np.percentile(deviation, 99)) / spread,
            "map_max": float(map_deviation.max()) / spread,
            "map_p99": float(np.percentile(map_deviation, 99)) / spread,
        }
    else:
        found["why"] = "nothing is relative: the reference gives every image the same score"
    thresholds = {
        "bundle": bench.bundle.manifest.threshold.value,
        # In the thick of the scores, where flips are likeliest: the sharper test.
        "median of the reference": float(np.median(scores)),
    }
    found["verdicts"] = {name: _flips(value, scores, got) for name, value in thresholds.items()}
    found["deviation_allowed"] = TOLERANCE
    worst = max(deviation.max(), map_deviation.max())  # NaN if anything is
    found["ok"] = golden.ok and bool(worst <= TOLERANCE * (spread or found["map_range"]))
    found["golden"] = {
        "images": golden.images,
        "flips": len(golden.flips),
        "ok": golden.ok,
        "score_deviation": golden.score_deviation,
        "map_deviation": golden.map_deviation,
    }
    return found


def _flips(threshold: float, reference: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    from edgead.calibration import binomial_upper_bound

    flipped = np.flatnonzero((reference >= threshold) != (got >= threshold))
    return {
        "threshold": threshold,
        "flips": len(flipped),
        "images": len(reference),
        "rate_upper_bound": binomial_upper_bound(len(flipped), len(reference), CONFIDENCE),
        "confidence": CONFIDENCE,
        "flipped": [{"reference": float(reference[i]), "got": float(got[i])} for i in flipped[:20]],
    }


def _reference(bench: Bench, frames: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """Name of the reference, its scores float64 [N] and its maps float32 [N, h, w]."""
    if bench.model is None:
        backend = OrtBackend(bench.bundle)
        each = [backend.infer({IMAGE: f[None], CALIBRATION: bench.calibration}) for f in frames]
        backend.close()
        scores = np.array([outputs[SCORE][0] for outputs in each], np.float64)
        weights = bench.bundle.manifest.precision
        name = f"ONNX Runtime on the CPU, the same graph (weights {weights}, computed in FP32)"
        return name, scores, np.concatenate([outputs[ANOMALY_MAP] for outputs in each])
    import torch

    from edgead.models.efficientad import anomaly_map

    maps = []
    with torch.inference_mode():
        for start in range(0, len(frames), 8):
            batch = torch.from_numpy(frames[start : start + 8].copy()).permute(0, 3, 1, 2)
            local, logical = bench.model(batch)
            maps.append(anomaly_map(local, logical, torch.from_numpy(bench.calibration)).numpy())
    joined = np.concatenate(maps)
    name = f"torch {torch.__version__} on the CPU, FP32, the three networks before they were merged"
    return name, joined.max(axis=(1, 2)).astype(np.float64), joined


def naive(bench: Bench) -> dict[str, Any]:
    """Three torch networks one after another, in the same process and in turns with the back end."""
    size = pdn_size(bench.bundle.manifest.method)
    if size is None:
        raise NotMeasured(f"the naive form of {bench.bundle.manifest.method} is not known here")
    try:
        import torch
    except ImportError:
        raise NotMeasured("torch is not installed") from None
    if not torch.cuda.is_available():
        raise NotMeasured("torch finds no CUDA device")
    from edgead.models.pdn import PDN
    from edgead.training.efficientad import build_model

    # Speed does not depend on the weights: a bundle from elsewhere is compared with random ones.
    model = bench.model or build_model(PDN("m" if size == "m" else "s"), seed=0)
    peers = {
        "naive": eager(model, "cuda"),
        "naive_channels_last": eager(model, "cuda", channels_last=True),
    }
    return {
        "what": "teacher, student and autoencoder one after another, eager torch, FP16, no graph: uint8 "
        "host image 256x256 to host score and map. channels_last is the same in the other memory layout",
        **compare(bench, peers),
    }


def compare(bench: Bench, peers: Mapping[str, Callable[[np.ndarray], object]]) -> dict[str, Any]:
    """Peers and back end in turns: medians of closed loops, and images per second of uninterrupted ones.

    Args:
        peers: Name to function of images uint8 [N, 256, 256, 3] that returns when the result is on the
            host.
    """
    batches = [batch for batch in NAIVE_BATCHES if batch <= bench.effort.batches[-1]]
    with bench.open(bench.effort.batches) as backend:
        return {f"batch_{batch}": _compare(bench, backend, peers, batch) for batch in batches}


def _compare(
    bench: Bench, backend: Backend, peers: Mapping[str, Callable[[np.ndarray], object]], batch: int
) -> dict[str, Any]:
    effort = bench.effort
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (batch, 256, 256, 3), dtype=np.uint8)
    feed = {
        IMAGE: np.resize(bench.images.frames, (batch, *bench.images.frames.shape[1:])),
        CALIBRATION: bench.calibration,
    }
    with bench.slots(backend, 1, batch) as slots:
        slot = slots[0]

        def slot_loop() -> None:
            slot.launch(batch)
            slot.wait()

        functions: dict[str, Callable[[], object]] = {
            name: functools.partial(peer, images) for name, peer in peers.items()
        }
        functions |= {"infer": lambda: backend.infer(feed), "slot": slot_loop}
        with gc_off():
            timings = interleave(functions, rounds=-(-effort.rounds // batch), warmup=effort.warmup)
        rates = {name: _rate(call, batch, effort.cell_s) for name, call in functions.items()}
    medians = {name: timing.p50 for name, timing in timings.items()}
    return {
        "p50_ms": {name: round(value, 4) for name, value in medians.items()},
        "calls_each": timings["slot"].calls,
        "images_per_s": {name: round(value, 1) for name, value in rates.items()},
        "times_naive": {
            peer: {
                "by_p50": {own: round(medians[peer] / medians[own], 3) for own in _OWN},
                "by_images_per_s": {own: round(rates[own] / rates[peer], 3) for own in _OWN},
            }
            for peer in peers
        },
    }


def _rate(call: Callable[[], object], batch: int, seconds: float) -> float:
    """Images per second of a closed loop."""
    clock, done = time.perf_counter_ns, 0
    with gc_off():
        start = now = clock()
        until = start + int(1e9 * seconds)
        while now < until:
            call()
            done += batch
            now = clock()
    return done / ((now - start) / 1e9)


def eager(
    model: EfficientAD, device: str, *, channels_last: bool = False
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The naive deployment: a function from images uint8 [N, 256, 256, 3] to scores and maps.

    FP16 on a GPU; FP32 on a CPU, where torch has no FP16 kernels worth timing. Constants lie on the
    device.
    """
    import torch

    from edgead.models.efficientad import anomaly_map
    from edgead.models.folding import IMAGENET_MEAN, IMAGENET_STD
    from edgead.models.pdn import FEATURES

    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    networks = copy.deepcopy(model).eval().to(device=device, dtype=dtype, memory_format=layout)
    mean, std = IMAGENET_MEAN.to(device), IMAGENET_STD.to(device)
    calibration = torch.tensor([1.0, 1.0, 0.0], device=device)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
            x = ((x.float() / 255 - mean) / std).to(dtype).contiguous(memory_format=layout)
            teacher = networks.teacher_features(x).float()
            student = networks.student(x).float()
            decoded = networks.autoencoder(x).float()
            local = (teacher - student[:, :FEATURES]).square().mean(1)
            logical = (decoded - student[:, FEATURES:]).square().mean(1)
            maps = anomaly_map(local, logical, calibration)
            return maps.amax(dim=(1, 2)).cpu().numpy(), maps.cpu().numpy()

    return run
