from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from edgead.line.waiting import Waiting


@dataclass(frozen=True)
class Item:
    deadline_ns: int
    name: str = ""


def test_the_earliest_deadline_goes_first_over_all_cameras() -> None:
    waiting: Waiting[Item] = Waiting(("top", "side"))
    for camera, deadline_ns in (("top", 30), ("side", 20), ("top", 40), ("side", 35)):
        waiting.put(camera, Item(deadline_ns))
    order = []
    while taken := waiting.take(0):
        order.append(taken.deadline_ns)
    assert order == [20, 30, 35, 40]


def test_what_has_expired_is_not_taken() -> None:
    waiting: Waiting[Item] = Waiting(("top",))
    waiting.put("top", Item(10))
    waiting.put("top", Item(11))
    assert waiting.take(10) == Item(11)
    assert waiting.take(10) is None


def test_no_camera_starves() -> None:
    """A camera whose deadlines are always shorter, at twice the load that can be done."""
    waiting: Waiting[Item] = Waiting(("quick", "slow"))
    served: Counter[str] = Counter()
    for now in range(0, 10_000, 5):  # each turn takes 5, and in each a part of each camera comes
        waiting.put("quick", Item(now + 6, "quick"))
        waiting.put("slow", Item(now + 40, "slow"))
        if taken := waiting.take(now, lambda item: 5):
            served[taken.name] += taken.deadline_ns >= now + 5
    assert min(served.values()) > 0.3 * sum(served.values()), served


def test_what_cannot_be_ready_in_time_gives_way_to_what_can() -> None:
    waiting: Waiting[Item] = Waiting(("top",))
    for deadline_ns in (14, 19, 21, 30):
        waiting.put("top", Item(deadline_ns))
    assert waiting.take(10, lambda item: 10) == Item(21)
    assert waiting.take(25, lambda item: 10) == Item(30)  # nothing can: the best there is
    assert waiting.take(25, lambda item: 10) is None


def test_overload_does_not_make_everything_late() -> None:
    """Half as many can be done as come: about that many are done in time."""
    waiting: Waiting[Item] = Waiting(("top",))
    in_time = 0
    for now in range(0, 10_000, 10):
        waiting.put("top", Item(now + 35))
        waiting.put("top", Item(now + 40))
        taken = waiting.take(now, lambda item: 10)
        in_time += taken is not None and now + 10 <= taken.deadline_ns
    assert in_time >= 990


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.booleans()), max_size=60))
def test_nothing_is_lost_or_doubled(actions: list[tuple[str, int, bool]]) -> None:
    waiting: Waiting[Item] = Waiting(tuple("abc"))
    put, taken, now, deadline = [], [], 0, dict.fromkeys("abc", 0)
    for index, (camera, number, is_put) in enumerate(actions):
        if is_put:
            deadline[camera] = max(deadline[camera], now + number)
            item = Item(deadline[camera], f"{camera}{index}")
            put.append(item)
            waiting.put(camera, item)
        else:
            now += number
            if got := waiting.take(now):
                assert got.deadline_ns > now
                taken.append(got)
    while got := waiting.take(now):
        taken.append(got)
    assert len(waiting) == 0 and len(set(taken)) == len(taken)
    assert {item for item in put if item.deadline_ns > now} <= set(taken) <= set(put)
