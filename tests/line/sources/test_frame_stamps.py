from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgead.line.sources import frame_stamps
from edgead.line.sources.frame_stamps import (
    LONGEST_AGE_NS,
    LONGEST_GAP,
    DeviceClock,
    FrameIds,
    missing_between,
    number_after,
)

MS = 1_000_000


def successor(number: int, bits: int) -> int:
    """As the standard says it: 0 is left out."""
    return 1 if number == 2**bits - 1 else number + 1


@given(st.data(), st.integers(2, 6) | st.just(16) | st.just(64))
def test_gaps_are_counted_also_over_the_end_of_the_counter(data: st.DataObject, bits: int) -> None:
    highest = 2**bits - 1
    previous = data.draw(st.integers(1, highest) | st.integers(max(1, highest - 40), highest))
    missing = data.draw(st.integers(0, min(60, highest - 1)))
    current = previous
    for step in range(missing + 1):
        current = successor(current, bits)
        assert number_after(previous, step + 1, bits=bits) == current
    assert missing_between(previous, current, bits=bits) == missing


@pytest.mark.parametrize(
    ("previous", "current", "missing"),
    [(1, 2, 0), (1, 5, 3), (65535, 1, 0), (65534, 1, 1), (65535, 4, 3), (0, 1, 0), (65535, 0, 65534)],
)
def test_counters_of_16_bits(previous: int, current: int, missing: int) -> None:
    assert missing_between(previous, current, bits=16) == missing


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 65535))
def test_every_frame_is_either_seen_or_missing(arrives: list[bool], start: int) -> None:
    numbers, ids, found = [start], FrameIds("camera"), list[int]()
    for _ in arrives:
        numbers.append(successor(numbers[-1], 16))
    for number, is_seen in zip(numbers, [True, *arrives], strict=True):
        if is_seen:
            found += [*ids.missing_before(number), number]
    assert found == numbers[: len(found)]
    assert len(found) == len(numbers) - [*reversed([True, *arrives])].index(True)
    assert ids.resets == 0


def test_the_longest_gap_and_one_more(caplog: pytest.LogCaptureFixture) -> None:
    ids = FrameIds("camera top")
    assert ids.missing_before(10) == []
    assert len(ids.missing_before(10 + LONGEST_GAP + 1)) == LONGEST_GAP
    with caplog.at_level(logging.WARNING):
        assert ids.missing_before(3) == []  # the camera was switched off and on
    assert ids.resets == 1 and "camera top" in caplog.text
    assert ids.missing_before(5) == [4]


def test_a_frame_without_number_takes_the_next_one() -> None:
    ids = FrameIds("camera")
    assert ids.next() is None
    ids.missing_before(65535)
    assert ids.next() == 1
    assert ids.missing_before(1) == []
    assert ids.missing_before(4) == [2, 3]


def test_a_camera_with_64_bits_is_recognised() -> None:
    ids = FrameIds("camera")
    ids.missing_before(65534)
    assert ids.missing_before(65535) == []
    assert ids.missing_before(65537) == [65536]
    assert ids.bits == 64 and ids.resets == 0


class Clocked:
    """A camera that tells its time by the features that it has; 0 ns is when it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **features: float) -> None:
        self.features, self.now_ns, self.latched_ns = features, 1_000_000 * MS, 0
        self.answer_ns = 1 * MS
        monkeypatch.setattr(frame_stamps, "time", SimpleNamespace(monotonic_ns=lambda: self.now_ns))

    def is_feature_available(self, name: str) -> bool:
        return name in self.features

    def execute_command(self, name: str) -> None:
        assert name in ("TimestampLatch", "GevTimestampControlLatch")
        self.now_ns += 1 * MS  # to the camera
        self.latched_ns = self.now_ns - 1_000_000 * MS
        self.now_ns += self.answer_ns  # and back

    def get_integer(self, name: str) -> int:
        if name == "GevTimestampTickFrequency":
            return int(self.features[name])
        return round(self.latched_ns * self.features.get("GevTimestampTickFrequency", 1e9) / 1e9)


@pytest.mark.parametrize(
    "features",
    [
        {"TimestampLatch": 1, "TimestampLatchValue": 1},
        {"GevTimestampControlLatch": 1, "GevTimestampValue": 1},
        {"GevTimestampControlLatch": 1, "GevTimestampValue": 1, "GevTimestampTickFrequency": 125e6},
    ],
)
def test_the_clock_of_a_camera_is_mapped(features: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    camera, clock = Clocked(monkeypatch, **features), DeviceClock()
    clock.find(camera)
    assert clock.is_known and clock.is_due
    assert clock.host_ns(5 * MS, camera.now_ns) is None  # not read yet
    clock.read(camera)
    assert not clock.is_due
    arrival_ns = 1_000_050 * MS
    assert clock.host_ns(20 * MS, arrival_ns) == 1_000_020 * MS
    assert clock.host_ns(51 * MS, arrival_ns) is None  # after it arrived
    assert clock.host_ns(50 * MS - LONGEST_AGE_NS - 1, arrival_ns) is None
    camera.now_ns += 11_000 * MS
    assert clock.is_due


def test_a_slow_answer_does_not_set_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was sent again: nobody knows to which of the two the answer belongs."""
    camera, clock = Clocked(monkeypatch, TimestampLatch=1, TimestampLatchValue=1), DeviceClock()
    clock.find(camera)
    camera.answer_ns = 500 * MS
    clock.read(camera)
    assert clock.host_ns(20 * MS, 1_000_050 * MS) is None and not clock.is_due
    camera.now_ns += 1_001 * MS
    camera.answer_ns = 1 * MS
    assert clock.is_due  # sooner than usual
    clock.read(camera)
    camera.now_ns += 11_000 * MS
    camera.answer_ns = 500 * MS
    clock.read(camera)
    assert clock.host_ns(20 * MS, 1_000_050 * MS) == 1_000_020 * MS  # as it was set before


def test_most_cameras_do_not_tell_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = DeviceClock()
    clock.find(Clocked(monkeypatch, TimestampLatch=1))
    assert not clock.is_known and not clock.is_due
    assert clock.host_ns(1, 2) is None
