from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgead.bundle import Bundle
from edgead.line.bundles import Bundles
from edgead.line.inspector import Inspector
from edgead.line.standin import StandIn


@pytest.fixture
def gate() -> Any:
    event = threading.Event()
    yield event
    event.set()


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "waited for 20 s"
        time.sleep(0.01)


def test_a_bundle_put_in_while_the_old_one_is_loaded_again_stays(
    tiny: Any, tiny_bundle: Path, tmp_path: Path, gate: threading.Event
) -> None:
    new = tiny.write(tmp_path / "new.edgead", name="renewed")
    made: list[Inspector] = []

    def load(bundle: Bundle) -> Inspector:
        if bundle.path == tiny_bundle and made:
            gate.wait()
        made.append(Inspector(bundle, open_model=lambda bundle: StandIn(bundle, 0)))
        return made[-1]

    here = Bundles([tiny_bundle], load)
    here.renew(made[0], "it hangs")
    assert not here.are_ready
    here.put(tiny_bundle, here.load(tiny_bundle, new))
    gate.set()
    wait_for(lambda: len(made) == 3)
    wait_for(lambda: not made[2].enter())  # it is retired: nobody wants it any more
    assert here.name(tiny_bundle) == "renewed"
    here.close()
    wait_for(lambda: not any(thread.name == "edgead-executor" for thread in threading.enumerate()))
