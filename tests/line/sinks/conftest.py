"""What the tests of the sinks share."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgead.errors import LineError
from edgead.line.verdicts import Record, Verdict

LIMIT_S = 20.0


class Desk:
    """A line without cameras: gives part ids, remembers what it was asked for."""

    def __init__(self, cameras: tuple[str, ...] = ("top", "side")) -> None:
        self.cameras = cameras
        self.triggers: list[tuple[str, int | None, int]] = []  # camera, tag, part id
        self.recipes = dict.fromkeys(cameras, 0)
        self.not_triggered = {"side"}  # their images are their triggers
        self.is_ready = True
        self._lock = threading.Lock()

    def trigger(self, camera: str, tag: int | None = None) -> int:
        with self._lock:
            if camera in self.not_triggered:
                raise LineError(f"camera {camera}: its images are its triggers")
            part_id = len(self.triggers) + 1
            self.triggers.append((camera, tag, part_id))
            return part_id

    def select_recipe(self, camera: str, index: int) -> None:
        if not 0 <= index <= 2:
            raise LineError(f"camera {camera} has no recipe {index}: 0 to 2")
        self.recipes[camera] = index

    def set_threshold(self, camera: str, value: float) -> None:
        raise LineError("not in this test")

    def state(self) -> dict[str, Any]:
        cameras = {name: {"recipe": index} for name, index in self.recipes.items()}
        return {"name": "press 4", "ready": self.is_ready, "cameras": cameras, "sinks": {}}


@pytest.fixture
def controls() -> Desk:
    return Desk()


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """Records with a part id and whatever else is given."""

    def make(part_id: int, **given: Any) -> Record:
        fields: dict[str, Any] = {
            "camera": "top",
            "verdict": Verdict.OK,
            "reject": False,
            "reason": "score 0.1 < threshold 0.5",
            "source": "a.png",
            "trigger_ns": 1_700_000_000_000_000_000 + part_id * 1_000_000,
            "total_ms": 12.5,
            "score": 0.1,
            "threshold": 0.5,
        }
        return Record(part_id=part_id, **{**fields, **given})

    return make


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@pytest.fixture
def keeps_alive() -> Callable[[int], bool]:
    """Whether the system looks after all connections that were accepted at a port."""

    def look(port: int) -> bool:
        if not Path("/proc/net/tcp").exists():
            pytest.skip("only Linux tells which connections are kept alive")
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        accepted = [row[5] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "01"]
        return bool(accepted) and all(timer.startswith("02:") for timer in accepted)

    return look


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Waits for a condition, and fails after LIMIT_S."""

    def wait(condition: Callable[[], object], what: str = "") -> None:
        end_s = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end_s, f"waited in vain {what}"
            time.sleep(0.005)

    return wait
