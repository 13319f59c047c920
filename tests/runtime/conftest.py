"""Fixtures of the runtime's tests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fake_backend import FakeDevice

OURS = ("edgead-executor", "fake device")  # names of threads


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in OURS]


@pytest.fixture
def new_device() -> Iterator[Callable[..., FakeDevice]]:
    """Makes fake devices. Afterwards nothing of them may be open, and nobody may have misused them."""
    made: list[FakeDevice] = []

    def new(**options: Any) -> FakeDevice:
        made.append(FakeDevice(**options))
        return made[-1]

    assert names_of_threads() == []
    yield new
    for device in made:
        assert device.misuse == [] and device.is_open == []
    assert names_of_threads() == []


@pytest.fixture
def device(new_device: Callable[..., FakeDevice]) -> FakeDevice:
    return new_device()
