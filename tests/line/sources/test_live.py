from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Mapping

import numpy as np
import pytest

from edgead.errors import LineError
from edgead.line.interfaces import Shot
from edgead.line.sources import live
from edgead.line.sources.live import WAITING_IMAGES, Live, pauses_s

LIMIT_S = 20.0


class Steps:
    """A connection that does what the test lets it do, step by step."""

    def __init__(self) -> None:
        self.steps: list = []
        self.number = 0
        self.may_go = threading.Semaphore(0)
        self.is_closed = False

    def grab(self) -> Iterable[Shot]:
        if not self.may_go.acquire(timeout=0.05):
            return []
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        self.number += 1
        return [Shot(np.zeros((2, 2), np.uint8), time.monotonic_ns(), "steps", frame_id=self.number)]

    def do(self, *steps: object) -> None:
        self.steps += steps
        self.may_go.release(len(steps))

    def fire(self) -> None:
        self.do("shot")

    def counters(self) -> Mapping[str, int]:
        return {"grabbed": self.number}

    def close(self) -> None:
        self.is_closed = True


def wait_for(condition) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.005)


def test_pauses_grow_and_stay_bounded() -> None:
    assert list(itertools.islice(pauses_s(), 8)) == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


def test_images_that_the_line_does_not_take_are_lost_but_not_in_silence() -> None:
    connection = Steps()
    source = Live("top", lambda: connection)
    shots = source.shots()
    taken = threading.Thread(target=lambda: next(shots), daemon=True)
    taken.start()
    wait_for(lambda: source._is_wanted)
    connection.do(*["shot"] * 21)
    taken.join(LIMIT_S)
    wait_for(lambda: source._shots.qsize() == 20)
    rest = [next(shots) for _ in range(20)]
    assert [shot.frame_id for shot in rest] == list(range(2, 22))
    kept = [shot.image is not None for shot in rest]
    # The first one waits, or is taken already.
    assert kept == sorted(kept, reverse=True) and sum(kept) in (WAITING_IMAGES - 1, WAITING_IMAGES)
    assert "in time" in rest[-1].problem
    counters = source.counters()
    assert counters["overflows"] == counters["lost_frames"] == 20 - sum(kept)
    assert counters["frames"] == 1 + sum(kept)
    source.close()


def test_waiting_shots_are_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "WAITING_SHOTS", 20)
    connection = Steps()
    source = Live("top", lambda: connection)
    source._is_wanted = True
    connection.do(*["shot"] * 100)
    wait_for(lambda: source.counters()["frames"] + source.counters()["lost_frames"] == 100)
    assert source._shots.qsize() == 20
    assert caplog.text.count("takes no shots") == 1
    source.close()


def test_frames_from_before_the_line_started_are_left_out() -> None:
    connection = Steps()
    source = Live("top", lambda: connection)
    connection.do(*["shot"] * 6)
    wait_for(lambda: connection.number == 6)
    shots = source.shots()
    threading.Timer(0.1, connection.do, ["shot"]).start()
    assert next(shots).frame_id == 7
    source.close()


def test_a_lost_connection_is_made_again() -> None:
    first, second = Steps(), Steps()
    attempts = iter([first, LineError("not yet"), second])

    def connect() -> Steps:
        attempt = next(attempts)
        if isinstance(attempt, Exception):
            raise attempt
        return attempt

    source = Live("top", connect)
    shots = source.shots()
    threading.Timer(0.05, first.do, ["shot", LineError("unplugged")]).start()
    assert next(shots).frame_id == 1
    wait_for(lambda: first.is_closed)
    with pytest.raises(LineError, match="top is not connected"):
        source.fire()
    wait_for(lambda: source.counters()["reconnects"] == 1)
    source.fire()
    assert next(shots).frame_id == 1
    assert source.counters()["grabbed"] == 2
    source.close()
    assert second.is_closed
    assert list(shots) == []


def test_an_unexpected_failure_ends_the_source_and_frees_the_camera() -> None:
    connection = Steps()
    source = Live("top", lambda: connection)
    connection.do(ZeroDivisionError("oops"))
    with pytest.raises(LineError, match="camera top failed.*oops"):
        next(source.shots())
    assert connection.is_closed
    source.close()


def test_no_first_connection_is_an_error() -> None:
    def connect() -> Steps:
        raise LineError("camera top: nobody there")

    with pytest.raises(LineError, match="nobody there"):
        Live("top", connect)


def test_close_ends_it_at_once_also_while_it_connects() -> None:
    connection = Steps()
    calls = []

    def connect() -> Steps:
        calls.append(1)
        if len(calls) > 1:
            time.sleep(LIMIT_S)
        return connection

    source = Live("top", connect)
    ended = threading.Event()
    threading.Thread(target=lambda: (list(source.shots()), ended.set()), daemon=True).start()
    connection.do(LineError("unplugged"))
    wait_for(lambda: len(calls) == 2)
    source.close()
    assert ended.wait(LIMIT_S / 4)
