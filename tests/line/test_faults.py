from __future__ import annotations

import itertools
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgead.line.faults import Day, Fault, FaultySource
from edgead.line.interfaces import Shot
from tests.line.conftest import ToldSource, image

SECOND = 1_000_000_000


def day(*faults: Fault, at_s: float = 0.0) -> Day:
    """It began `at_s` seconds ago."""
    return Day(faults, 0, time.monotonic_ns() - round(at_s * SECOND))


def spoiled(here: Day, count: int = 6) -> list[Shot]:
    source = ToldSource()
    for index in range(count):
        source.send(image(seed=index))
    source.end()
    return list(FaultySource(source, "top", here).shots())


def test_no_fault_changes_nothing() -> None:
    shots = spoiled(day())
    assert [shot.frame_id for shot in shots] == [1, 2, 3, 4, 5, 6]
    assert all(np.array_equal(shot.image, image(seed=i)) for i, shot in enumerate(shots))


def test_each_fault_of_a_camera() -> None:
    assert all(shot.image is None and shot.problem for shot in spoiled(day(Fault(kind="lost"))))
    assert all(shot.image is None for shot in spoiled(day(Fault(kind="unplug"))))
    dark = spoiled(day(Fault(kind="dark")))
    assert all(shot.image is not None and shot.image.max() < 4 for shot in dark)
    first, second, *_ = spoiled(day(Fault(kind="duplicate")))
    assert np.array_equal(first.image, second.image) and second.frame_id == 2
    burst = spoiled(day(Fault(kind="burst", count=4), at_s=0.001), count=6)
    assert len({shot.trigger_ns for shot in burst[-4:]}) == 1 or len(burst) == 6


def test_faults_of_another_camera_or_another_time() -> None:
    assert all(shot.image is not None for shot in spoiled(day(Fault(kind="lost", name="side"))))
    assert all(shot.image is not None for shot in spoiled(day(Fault(kind="lost", at_s=60))))
    over = day(Fault(kind="lost", for_s=1), at_s=2)
    assert all(shot.image is not None for shot in spoiled(over))


def test_share_is_that_of_the_images() -> None:
    here = day(Fault(kind="lost", share=0.25))
    lost = sum(shot.image is None for shot in spoiled(here, 2000))
    assert 400 < lost < 600 and here.hits["lost"] == lost


@given(st.floats(0, 50), st.floats(0.1, 20), st.floats(0, 100))
def test_what_repeats_begins_again_after_each_period(at_s: float, for_s: float, now_s: float) -> None:
    here = day(Fault(kind="kill", at_s=at_s, for_s=for_s), at_s=now_s)
    moments = [moment for moment, _ in itertools.islice(here.starts("kill"), 3)]
    assert moments[0] >= min(now_s, at_s) - 1e-6 and moments[0] >= at_s
    assert moments[0] <= max(at_s, now_s + for_s) + 0.5
    assert all(abs(b - a - for_s) < 1e-6 for a, b in itertools.pairwise(moments))


def test_what_does_not_repeat_begins_once() -> None:
    assert len(list(day(Fault(kind="kill", at_s=5)).starts("kill"))) == 1
    assert list(day(Fault(kind="kill", at_s=5), at_s=6).starts("kill")) == []
    two = day(Fault(kind="burst", at_s=5), Fault(kind="burst", at_s=3, name="side"))
    assert [moment for moment, _ in two.starts("burst", "side")] == [3, 5]
    assert [moment for moment, _ in two.starts("burst", "top")] == [5]
