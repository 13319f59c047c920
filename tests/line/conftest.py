"""A line in one process: real threads, executor, journal and files; images and models to order."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.line import assembly
from edgead.line.interfaces import Shot
from edgead.line.line import Line
from edgead.line.recipe import CameraConfig, Inspection, Recipe, Settings, SinkConfig
from edgead.line.sinks import sink_module
from edgead.line.standin import StandIn
from edgead.runtime.backend import Backend, Slot

GOOD, BAD = (90, 90, 90), (250, 20, 20)


def image(color: tuple[int, int, int] = GOOD, seed: int = 0, side_px: int = 64) -> np.ndarray:
    """uint8 [64, 64, 3]: noise around grey; its first pixel tells a stand-in model what to say."""
    noise = np.random.default_rng(seed).integers(60, 180, (side_px, side_px, 3), dtype=np.uint8)
    noise[0, 0] = color
    return noise


class ToldSource:
    """A source that a test tells what to deliver; `fired` counts software triggers."""

    def __init__(self) -> None:
        self.fired = 0
        self._queue: queue.Queue[Shot | None | Exception] = queue.Queue()
        self._sent = 0

    def send(self, picture: np.ndarray | None, **fields: Any) -> None:
        """Delivers an image now; None is one that was lost."""
        self._sent += 1
        values: dict[str, Any] = {
            "trigger_ns": time.monotonic_ns(),
            "origin": f"told {self._sent}",
            "frame_id": self._sent,
        }
        self._queue.put(Shot(picture, **(values | fields)))

    def fail(self, error: Exception) -> None:
        """`shots` raises it."""
        self._queue.put(error)

    def end(self) -> None:
        """There are no more images."""
        self._queue.put(None)

    def shots(self) -> Iterator[Shot]:
        while (shot := self._queue.get()) is not None:
            if isinstance(shot, Exception):
                raise shot
            yield shot

    def fire(self) -> None:
        self.fired += 1

    def counters(self) -> dict[str, int]:
        return {"sent": self._sent}

    def close(self) -> None:
        self.end()


@dataclass
class Bench:
    """A line on the bench.

    Attributes:
        sources: By camera.
        results: File of the verdicts.
        reopen: Opens the source of a camera anew; gives the same one, unless a test puts another here.
    """

    line: Line
    sources: dict[str, ToldSource]
    results: Path
    reopen: Callable[[CameraConfig], ToldSource]

    def records(self, count: int, *, late: bool = False) -> list[dict[str, Any]]:
        """The first `count` records, waiting for them; fails after 20 s."""
        path = self.results.with_name("results.late.jsonl") if late else self.results
        end_s = time.monotonic() + 20
        while True:
            lines = path.read_text().splitlines() if path.exists() else []
            if len(lines) >= count:
                return [json.loads(line) for line in lines]
            assert time.monotonic() < end_s, f"{len(lines)} of {count} records: {lines[-3:]}"
            time.sleep(0.01)

    def verdicts(self, count: int) -> list[str]:
        return [record["verdict"] for record in self.records(count)]


Start = Callable[..., Bench]  # of the fixture `bench`


@pytest.fixture
def bench(tiny_bundle: Path, tmp_path: Path) -> Iterator[Start]:
    """Function that starts a line with told sources.

    Arguments: `cameras` {name: fields of CameraConfig}; `model_ms` of the stand-in model, or
    `open_model`; `sinks`, more of them, as SinkConfig; `sink`, who opens them; the rest are fields of
    Settings.
    """
    started: list[Line] = []

    def start(
        cameras: dict[str, dict[str, Any]] | None = None,
        *,
        model_ms: float = 1.0,
        open_model: Callable[[Bundle], Backend] | None = None,
        sinks: tuple[SinkConfig, ...] = (),
        sink: Callable[..., Any] = assembly.open_sink,
        **settings: Any,
    ) -> Bench:
        results = tmp_path / "results.jsonl"
        lines = sink_module("jsonl").Config(path=results, sync="never")
        configs = [
            CameraConfig(
                **{
                    "name": name,
                    "deadline_ms": 5000.0,
                    "health": False,
                    "recipes": (Inspection(bundle=tiny_bundle),),
                    "kind": "folder",
                    "source": None,
                    **fields,
                }
            )
            for name, fields in (cameras or {"top": {}}).items()
        ]
        recipe = Recipe(
            replace(Settings(journal=tmp_path / "journal", sync="never"), **settings),
            tuple(configs),
            (SinkConfig("results", "jsonl", lines), *sinks),
            {},
        )
        sources = {config.name: ToldSource() for config in configs}
        unopened = set(sources)

        def source(config: CameraConfig) -> ToldSource:
            if config.name in unopened:
                unopened.remove(config.name)
                return sources[config.name]
            return here.reopen(config)

        line = assembly.open_line(
            recipe,
            open_model=open_model or (lambda bundle: StandIn(bundle, model_ms)),
            source=source,
            sink=sink,
        )
        started.append(line)
        here = Bench(line, sources, results, lambda config: sources[config.name])
        return here

    yield start
    for line in started:
        line.stop(0.2)
    end_s = time.monotonic() + 20
    while any(thread.name == "edgead-executor" for thread in threading.enumerate()):
        assert time.monotonic() < end_s, "an executor was not closed"
        time.sleep(0.01)


class Moody(StandIn):
    """A stand-in that waits at a gate, or fails as often as it is told to."""

    def __init__(self, bundle: Bundle, gate: threading.Event, failures: list[int]) -> None:
        super().__init__(bundle, 0)
        self._gate, self._failures = gate, failures

    def open_slot(self, batch: int = 1) -> Slot:
        slot = super().open_slot(batch)
        wait = slot.wait

        def moody_wait() -> tuple[np.ndarray, np.ndarray]:
            self._gate.wait()
            if self._failures and self._failures[0] > 0:
                self._failures[0] -= 1
                raise BackendError("the device is gone")
            return wait()

        slot.wait = moody_wait  # type: ignore[method-assign]
        return slot


def gated(gate: threading.Event, failures: list[int] | None = None) -> Callable[[Bundle], Backend]:
    return lambda bundle: Moody(bundle, gate, failures or [])


class Stuck:
    """A sink whose writes wait for a gate."""

    wants_pictures = False

    def __init__(self, gate: threading.Event) -> None:
        self._gate = gate

    def write(self, record: object, picture: object) -> None:
        self._gate.wait()

    def write_late(self, record: object) -> None: ...

    def knows(self, part_id: int) -> bool:
        return True

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


@pytest.fixture
def gate() -> Any:
    """An open gate; it is opened again in the end, so that nobody is left waiting."""
    event = threading.Event()
    event.set()
    yield event
    event.set()


def camera_state(here: Bench, name: str) -> Any:
    return here.line.state()["cameras"]["top"][name]


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, "waited for 20 s"
        time.sleep(0.01)
