"""One contract for the slots of all back ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead import BackendError, Bundle
from edgead.runtime import Backend, open_backend
from tests.runtime.test_backends import CPU_BACKENDS, need

# Slot and infer may compute in batches of different sizes, that is with other kernels.
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 2e-2}


@pytest.fixture(scope="module", params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest, tiny_bundle: Path) -> Iterator[Backend]:
    need(request.param)
    opened = open_backend(Bundle.open(tiny_bundle), request.param)
    yield opened
    opened.close()


def infer(backend: Backend, images: np.ndarray, calibration: Any) -> tuple[np.ndarray, np.ndarray]:
    values = np.array(calibration, np.float32)
    outputs = backend.infer({"image": images, "calibration": values})
    return outputs["score"], outputs["anomaly_map"]


def largest(backend: Backend, wanted: int) -> int:
    return wanted if backend.max_batch is None else min(wanted, backend.max_batch)


def test_a_slot_gives_what_infer_gives(backend: Backend, tiny: Any) -> None:
    batch = largest(backend, 3)
    slot = backend.open_slot(batch)
    assert slot.images.shape == (batch, 64, 64, 3) and slot.images.dtype == np.uint8
    assert slot.images.flags.c_contiguous and slot.images.flags.writeable
    images = tiny.frames(3, spots=True)
    for count in range(1, batch + 1):
        slot.images[:count] = images[:count]
        slot.launch(count)
        scores, maps = slot.wait()
        assert scores.dtype == maps.dtype == np.float32
        assert scores.shape == (count,) and maps.shape == (count, 64, 64)
        expected = infer(backend, images[:count], tiny.manifest.calibration.values)
        np.testing.assert_allclose(scores, expected[0], rtol=0, atol=TOLERANCE[backend.precision])
        np.testing.assert_allclose(maps, expected[1], rtol=0, atol=TOLERANCE[backend.precision])
        assert np.ptp(maps) > 0.5  # the comparison says something
    slot.close()


def test_slots_do_not_share_anything(backend: Backend, tiny: Any) -> None:
    images = tiny.frames(3, spots=True, seed=4)
    values = [(2.0, 1.0, -0.05), (0.5, 0.0, 0.25), (0.0, 3.0, 0.0)]
    slots = [backend.open_slot() for _ in images]
    for slot, image, calibration in zip(slots, images, values, strict=True):
        slot.images[0] = image
        slot.calibrate(np.array(calibration, np.float32))
    for slot in slots:
        slot.launch()
    infer(backend, images[::-1][:1], (1.0, 1.0, 1.0))  # between launch and wait
    outcomes = {index: slots[index].wait() for index in (2, 0, 1)}
    for index, (scores, maps) in outcomes.items():
        expected = infer(backend, images[index : index + 1], values[index])
        np.testing.assert_allclose(scores, expected[0], rtol=0, atol=TOLERANCE[backend.precision])
        np.testing.assert_allclose(maps, expected[1], rtol=0, atol=TOLERANCE[backend.precision])
    for slot in slots:
        slot.close()


def test_one_thread_launches_and_another_waits(backend: Backend, tiny: Any) -> None:
    images = tiny.frames(8, spots=True, seed=6)
    expected = [infer(backend, image[None], tiny.manifest.calibration.values)[0][0] for image in images]
    slot = backend.open_slot()
    launched, read = threading.Semaphore(0), threading.Semaphore(1)
    scores: list[float] = []

    def wait() -> None:
        for _ in images:
            assert launched.acquire(timeout=60)
            scores.append(float(slot.wait()[0][0]))
            read.release()

    waiter = threading.Thread(target=wait)
    waiter.start()
    for image in images:
        assert read.acquire(timeout=60)
        slot.images[0] = image
        slot.launch()
        launched.release()
    waiter.join(60)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE[backend.precision])
    slot.close()


@pytest.mark.parametrize("count", [0, -1, 2])
def test_a_count_that_does_not_fit(count: int, backend: Backend) -> None:
    slot = backend.open_slot()
    with pytest.raises(BackendError, match=f"{count}"):
        slot.launch(count)
    slot.launch()
    slot.wait()
    slot.close()


def test_nothing_to_wait_for(backend: Backend) -> None:
    slot = backend.open_slot()
    for _ in range(2):
        with pytest.raises(BackendError, match="nothing was launched"):
            slot.wait()
        slot.launch()
        slot.wait()
    slot.close()


@pytest.mark.parametrize("batch", [0, -1, 10_000])
def test_a_batch_that_no_slot_has(batch: int, backend: Backend) -> None:
    if batch > 0 and backend.max_batch is None:
        pytest.skip(f"{backend.name} takes any batch")
    with pytest.raises(BackendError, match=f"{batch}"):
        backend.open_slot(batch)


def test_a_closed_slot_keeps_its_arrays(backend: Backend) -> None:
    slot, other = backend.open_slot(), backend.open_slot()
    slot.images[:] = 7
    slot.close()
    slot.close()
    with pytest.raises(BackendError, match="closed"):
        slot.launch()
    assert (slot.images == 7).all()
    slot.images[:] = 8
    other.launch()  # the others live on
    other.wait()
    other.close()


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_closing_the_back_end_closes_its_slots(name: str, tiny_bundle: Path) -> None:
    need(name)
    backend = open_backend(Bundle.open(tiny_bundle), name)
    slot = backend.open_slot()
    slot.images[:] = 7
    slot.launch()
    slot.wait()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        slot.launch()
    with pytest.raises(BackendError, match="closed"):
        backend.open_slot()
    slot.close()
    assert (slot.images == 7).all()
