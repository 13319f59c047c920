"""Devices for the tests of the CUDA layer: both layers, over the fake driver and over a real one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from edgead.errors import BackendError
from edgead.runtime.cuda import LAYERS, Device, open_device
from tests.fake_cuda import HOST_FUNCTION, NAME, FakeCuda


@dataclass
class Box:
    """A machine with a GPU, real or not, and one layer to use it by."""

    layer: str
    fake: FakeCuda | None
    _kept: list[Any] = field(default_factory=list)

    def open(self) -> Device:
        """Opens the GPU and makes it current in this thread."""
        device = open_device(layer=self.layer)
        device.make_current()
        return device

    def launch(self, stream: int, function: Callable[[], Any]) -> None:
        """Enqueues a Python function; the stream's thread calls it as soon as Python's lock is free."""
        if self.fake is not None:
            code = self.fake.launch(stream, lambda: (function(), None)[1])
        else:
            self._kept.append(HOST_FUNCTION(lambda _: function()))
            launch = ctypes.CDLL(NAME).cuLaunchHostFunc
            code = launch(ctypes.c_void_p(stream), self._kept[-1], None)
        assert code == 0


def skip_without(layer: str) -> None:
    if importlib.util.find_spec(layer) is None:
        pytest.skip(f"{layer} is not installed")


def reason_against_gpu() -> str:
    """Why tests with a real driver cannot run in this process; empty if they can."""
    if os.environ.get("EDGEAD_FAKE_CUDA"):
        return "EDGEAD_FAKE_CUDA asks for the fake driver"
    try:
        is_fake = hasattr(ctypes.CDLL(NAME), "fake_cuda_reset")  # it is loaded only where no other is
    except OSError:
        is_fake = True
    return "no CUDA driver on this machine" if is_fake else ""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with a `box` run over the fake driver; with a real driver on the machine over that, too."""
    if "box" not in metafunc.fixturenames:
        return
    params = [pytest.param((layer, False), id=f"{layer}-fake") for layer in LAYERS]
    if not reason_against_gpu():
        gpu = pytest.mark.gpu
        params += [pytest.param((layer, True), id=f"{layer}-gpu", marks=gpu) for layer in LAYERS]
    metafunc.parametrize("box", params, indirect=True)


@pytest.fixture(params=LAYERS)
def fake_box(request: pytest.FixtureRequest, fake_cuda: FakeCuda) -> Box:
    """A layer over the fake driver, for what only that can do."""
    skip_without(request.param)
    return Box(request.param, fake_cuda)


@pytest.fixture
def box(request: pytest.FixtureRequest) -> Box:
    """A layer over the fake driver, or over a real one."""
    layer, is_real = request.param
    skip_without(layer)
    if not is_real:
        return Box(layer, request.getfixturevalue("fake_cuda"))
    try:
        open_device(layer=layer).close()
    except BackendError as error:
        pytest.skip(f"no NVIDIA GPU: {error}")
    return Box(layer, None)


@pytest.fixture
def device(box: Box) -> Iterator[Device]:
    """An open device, current in this thread."""
    opened = box.open()
    yield opened
    opened.close()


@pytest.fixture
def run_in_thread() -> Callable[[Callable[[], Any]], Any]:
    """Function that runs another one in a thread of its own and returns or raises what it does."""

    def run(function: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function).result()

    return run
