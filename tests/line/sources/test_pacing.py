from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgead.errors import LineError
from edgead.line.interfaces import Shot
from edgead.line.sources.pacing import AHEAD, Replay, Stored, check_pacing, offsets_ns

LIMIT_S = 20.0


def stored(count: int) -> Iterator[Stored]:
    for index in range(count):
        yield Stored(np.full((2, 2, 3), index, np.uint8), f"image {index}")


@given(st.floats(1e-3, 1e5), st.floats(0, 5000), st.integers(0, 2**32))
def test_moments_stay_on_their_schedule(rate_hz: float, jitter_ms: float, seed: int) -> None:
    moments = list(itertools.islice(offsets_ns(rate_hz, jitter_ms, seed), 200))
    assert moments == sorted(moments)
    for index, moment_ns in enumerate(moments):
        # Each within its own window, however many came before it. 1 ns: rounding to whole nanoseconds.
        assert index * 1e9 / rate_hz - 1 <= moment_ns <= index * 1e9 / rate_hz + jitter_ms * 1e6 + 1
    assert moments == list(itertools.islice(offsets_ns(rate_hz, jitter_ms, seed), 200))


def test_a_period_that_is_no_whole_number_does_not_drift() -> None:
    moment_ns = next(itertools.islice(offsets_ns(60.0, 0.0, 0), 1_000_000, None))
    assert moment_ns == round(1_000_000 * 1e9 / 60)


def test_jitter_uses_its_range_and_differs_by_seed() -> None:
    def delays_ms(seed: int) -> np.ndarray:
        return (
            np.array(list(itertools.islice(offsets_ns(10, 8.0, seed), 2000))) / 1e6
            - np.arange(2000) * 100
        )

    # Mean of 2000 uniform values: 4 with a standard error of 8 / sqrt(12 * 2000) = 0.05.
    assert delays_ms(0).mean() == pytest.approx(4.0, abs=0.3)
    assert delays_ms(0).min() < 0.2 and delays_ms(0).max() > 7.8
    assert not np.allclose(delays_ms(0), delays_ms(1))


def test_a_line_that_dawdles_does_not_move_the_triggers() -> None:
    shots = []
    for shot in Replay(stored(12), rate_hz=200.0, jitter_ms=2.0, seed=3).shots():
        assert time.monotonic_ns() >= shot.trigger_ns  # never before its time
        shots.append(shot)
        if shot.frame_id in (2, 3):
            time.sleep(0.02)  # four periods
    planned = list(itertools.islice(offsets_ns(200.0, 2.0, 3), 12))
    assert [shot.trigger_ns - shots[0].trigger_ns for shot in shots] == [p - planned[0] for p in planned]
    assert [shot.frame_id for shot in shots] == list(range(12))
    assert [int(shot.image[0, 0, 0]) for shot in shots] == list(range(12))


def test_without_a_rate_an_image_comes_when_it_is_taken() -> None:
    source = Replay(stored(3))
    for shot in source.shots():
        now_ns = time.monotonic_ns()
        assert 0 <= now_ns - shot.trigger_ns
        time.sleep(0.005)
    assert source.counters() == {"images": 3, "unreadable": 0}


def test_only_a_few_images_are_decoded_ahead() -> None:
    begun = []

    def counted() -> Iterator[Stored]:
        for image in stored(50):
            begun.append(image.origin)
            yield image

    shots = Replay(counted()).shots()
    for taken in range(1, 6):
        next(shots)
        wait_for(lambda taken=taken: len(begun) == taken + AHEAD)
        time.sleep(0.02)  # for one that would be too many
        assert len(begun) == taken + AHEAD


def test_each_trigger_gives_the_next_image_with_its_moment() -> None:
    source = Replay(stored(3), is_triggered=True, count=3)
    shots: list[Shot] = []
    thread = threading.Thread(target=lambda: shots.extend(source.shots()), daemon=True)
    thread.start()
    time.sleep(0.02)
    assert shots == []
    for number in range(3):
        before_ns = time.monotonic_ns()
        source.fire()
        after_ns = time.monotonic_ns()
        wait_for(lambda number=number: len(shots) == number + 1)
        assert before_ns <= shots[number].trigger_ns <= after_ns
        assert shots[number].origin == f"image {number}"
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    with pytest.raises(LineError, match="all images were delivered"):
        source.fire()


def test_triggers_that_come_at_once_are_all_answered() -> None:
    source = Replay(stored(30), is_triggered=True)
    for _ in range(30):
        source.fire()
    assert [shot.frame_id for shot in source.shots()] == list(range(30))


def test_a_source_that_runs_by_itself_cannot_be_triggered() -> None:
    with pytest.raises(LineError, match="runs by itself"):
        Replay(stored(1)).fire()


@pytest.mark.parametrize(
    "source",
    [
        Replay(stored(100), rate_hz=0.001),
        Replay(stored(100), is_triggered=True),
        Replay(itertools.chain(stored(1), (time.sleep(LIMIT_S) for _ in range(1)))),
    ],
    ids=["waits for its moment", "waits for a trigger", "waits for the disk"],
)
def test_close_ends_it_wherever_it_waits(source: Replay) -> None:
    thread = threading.Thread(target=lambda: list(source.shots()), daemon=True)
    thread.start()
    wait_for(lambda: thread.is_alive())
    time.sleep(0.05)
    start_s = time.monotonic()
    source.close()
    source.close()
    thread.join(LIMIT_S / 2)
    assert not thread.is_alive(), f"still waiting after {time.monotonic() - start_s:.1f} s"
    with pytest.raises(LineError):
        source.fire()


def test_an_unexpected_failure_ends_the_source_with_an_error() -> None:
    def failing() -> Iterator[Stored]:
        yield from stored(1)
        raise MemoryError("no memory")

    shots = Replay(failing()).shots()
    assert next(shots).origin == "image 0"
    with pytest.raises(LineError, match="no memory"):
        next(shots)


@pytest.mark.parametrize(
    ("rate_hz", "jitter_ms", "key"),
    [
        (-1.0, 0.0, "rate_hz"),
        (float("nan"), 0.0, "rate_hz"),
        (float("inf"), 0.0, "rate_hz"),
        (10.0, -1.0, "jitter_ms"),
        (10.0, float("nan"), "jitter_ms"),
        (0.0, 1.0, "jitter_ms"),
    ],
)
def test_values_that_cannot_be_are_refused(rate_hz: float, jitter_ms: float, key: str) -> None:
    with pytest.raises(LineError, match=key):
        check_pacing(rate_hz, jitter_ms)


def wait_for(condition) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.002)
