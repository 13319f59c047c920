from __future__ import annotations

import heapq

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgead.line.awaiting import CLOCK_ERROR_NS, NEVER_CAME, UNSURE, Awaiting
from edgead.line.interfaces import Shot
from edgead.line.ledger import Part

MS = 1_000_000
IMAGE = np.zeros((1, 1, 3), np.uint8)


def part(part_id: int, trigger_ms: float) -> Part:
    trigger_ns = round(trigger_ms * MS)
    return Part(part_id, trigger_ns, trigger_ns + 50 * MS)


def awaiting(*trigger_ms: float) -> Awaiting:
    """Parts 1, 2 and so on, whose images may take 100 ms."""
    made = Awaiting(100)
    for part_id, moment_ms in enumerate(trigger_ms, 1):
        made.add(part(part_id, moment_ms))
    return made


def match(
    parts: Awaiting, now_ms: float, *, exposed_ms: float | None = None, is_lost: bool = False
) -> tuple[int | None, dict[str, list[int]]]:
    """Part id that an image gets which comes now, and those that are given up, by reason."""
    exposure_ns = None if exposed_ms is None else round(exposed_ms * MS)
    shot = Shot(None if is_lost else IMAGE, round(now_ms * MS), "", exposure_ns=exposure_ns)
    found, given_up = parts.match(shot, round(now_ms * MS))
    part_id = None if found is None else found.part_id
    return part_id, {
        reason: [other.part_id for other in others] for reason, others in given_up.items() if others
    }


def test_the_only_one_that_waits_gets_the_image() -> None:
    parts = awaiting(10)
    assert match(parts, 30) == (1, {})
    assert match(parts, 31) == (None, {})  # nobody asked for this one


def test_an_exposure_shows_the_part_that_was_triggered_last_before_it() -> None:
    parts = awaiting(10, 20, 30, 40)
    assert match(parts, 45, exposed_ms=33) == (3, {NEVER_CAME: [1, 2]})
    assert match(parts, 46, exposed_ms=15) == (None, {})  # an image of before
    assert match(parts, 47, exposed_ms=41) == (4, {}) and len(parts) == 0


def test_clocks_of_cameras_are_not_exact() -> None:
    before_ms = CLOCK_ERROR_NS / MS / 2
    assert match(awaiting(10), 30, exposed_ms=10 - before_ms) == (1, {})
    parts = awaiting(10, 20)
    assert match(parts, 30, exposed_ms=20 - before_ms) == (None, {UNSURE: [1, 2]})


def test_without_an_exposure_several_that_wait_get_nothing_until_none_can_be_under_way() -> None:
    parts = awaiting(10, 20)
    assert match(parts, 30) == (None, {UNSURE: [1, 2]})
    assert parts.is_unsure(119 * MS) and not parts.is_unsure(120 * MS)
    assert match(parts, 40) == (None, {})


def test_a_planned_moment_tells_parts_apart_like_an_exposure() -> None:
    """A folder says for each image at which trigger it was given out."""
    parts = awaiting(10, 20)
    shot = Shot(IMAGE, 10 * MS, "")
    found, _ = parts.match(shot, 30 * MS)
    assert found is not None and found.part_id == 1


def test_lost_images_and_old_parts() -> None:
    parts = awaiting(10, 20, 90)
    assert match(parts, 95, is_lost=True) == (1, {})
    assert match(parts, 121) == (3, {NEVER_CAME: [2]})


def test_a_trigger_that_the_camera_refused_takes_no_image_from_the_part_before() -> None:
    parts = awaiting(10, 20)
    assert match(parts, 22, exposed_ms=21, is_lost=True) == (2, {})
    assert match(parts, 23, exposed_ms=9, is_lost=True) == (None, {})  # of a part that has gone
    assert match(parts, 30) == (1, {})


def test_a_camera_that_was_opened_anew_is_not_in_doubt() -> None:
    parts = awaiting(10, 20)
    match(parts, 30)
    parts.add(part(3, 31))
    assert [other.part_id for other in parts.clear()] == [3]
    assert not parts.is_unsure(32 * MS) and match(parts, 33, exposed_ms=31) == (None, {})


@settings(max_examples=300, deadline=None)
@given(
    triggers=st.lists(
        st.tuples(st.floats(5, 150), st.sampled_from(["taken", "ignored", "refused"]), st.floats(0, 99)),
        min_size=1,
        max_size=40,
    ),
    knows_exposures=st.booleans(),
)
def test_no_part_ever_gets_the_image_of_another(
    triggers: list[tuple[float, str, float]], knows_exposures: bool
) -> None:
    """Pauses before triggers, what the camera does, how long images take: in their order.

    What it says of a trigger that it refuses may come before the images of earlier ones.
    """
    parts = Awaiting(100)
    now_ms = came_ms = 0.0
    under_way: list[tuple[float, int, float, bool]] = []  # when it comes, part, exposed, refused
    right = 0

    def deliver(until_ms: float) -> None:
        nonlocal right
        while under_way and under_way[0][0] <= until_ms:
            moment_ms, part_id, exposed_ms, is_refused = heapq.heappop(under_way)
            is_known = knows_exposures or is_refused
            got, _ = match(
                parts, moment_ms, exposed_ms=exposed_ms if is_known else None, is_lost=is_refused
            )
            assert got in (None, part_id)
            right += got is not None and not is_refused

    fired = 0
    for part_id, (pause_ms, fate, takes_ms) in enumerate(triggers, 1):
        now_ms += pause_ms
        deliver(now_ms)
        if parts.is_unsure(round(now_ms * MS)):
            continue
        parts.add(part(part_id, now_ms))
        if fate == "refused":
            heapq.heappush(under_way, (now_ms + takes_ms / 10, part_id, now_ms, True))
        elif fate == "taken":
            fired += 1
            came_ms = min(max(came_ms, now_ms + takes_ms), now_ms + 99.9)
            exposed_ms = now_ms + 0.1 * min(takes_ms, 10)
            heapq.heappush(under_way, (came_ms, part_id, exposed_ms, False))
    deliver(np.inf)
    if knows_exposures:
        assert right == fired
