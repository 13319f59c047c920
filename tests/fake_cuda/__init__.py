"""A CUDA driver without a GPU, in this process: the fixture `fake_cuda`.

The library is compiled from the C files beside this one and loaded before cuda.bindings or pycuda look
for libcuda.so.1; they find it by its name. Outside of the fixture it acts as a driver without a GPU.
Nothing of the CUDA runtime runs on it, only the driver calls of `edgead.runtime.cuda`.

Where a real driver is installed it stays out of the way, because the first one loaded serves the whole
process. `EDGEAD_FAKE_CUDA=1 python -m pytest` takes the fake one there, and the tests with a GPU skip.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NAME = "libcuda.so.1"
LIVE = ("streams", "events", "graphs", "execs", "allocations", "registrations", "contexts", "threads")
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_FOLDER = Path(__file__).resolve().parent


def build(folder: Path) -> Path:
    """Compiles the driver into a folder; raises FileNotFoundError without a C compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang)")
    library = folder / NAME
    sources = [str(_FOLDER / name) for name in ("libcuda.c", "machine.c")]
    flags = ["-std=gnu11", "-shared", "-fPIC", "-O1", "-g", "-Wall", "-pthread", f"-Wl,-soname,{NAME}"]
    done = subprocess.run(
        [compiler, *flags, *sources, "-o", str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return library


def load(library: Path) -> Any:
    """Loads the driver for everybody in the process; raises OSError if a real one is in the way."""
    in_the_way = OSError("a real CUDA driver is here; EDGEAD_FAKE_CUDA=1 takes the fake one instead")
    try:
        loaded = ctypes.CDLL(NAME, mode=os.RTLD_NOLOAD)
    except OSError:
        if not os.environ.get("EDGEAD_FAKE_CUDA") and has_driver():
            raise in_the_way from None
        loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(loaded, "fake_cuda_reset"):
        raise in_the_way
    loaded.fake_cuda_count.restype = ctypes.c_long
    loaded.fake_cuda_log.restype = ctypes.c_size_t
    loaded.fake_cuda_log.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    loaded.fake_cuda_fail.argtypes = [
        ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    loaded.fake_cuda_set.argtypes = [ctypes.c_char_p, ctypes.c_long]
    loaded.fake_cuda_set_device.argtypes = [
        ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_size_t
    ]  # fmt: skip
    loaded.fake_cuda_is_device.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, HOST_FUNCTION, ctypes.c_void_p]
    return loaded


def has_driver() -> bool:
    """Whether a fresh process finds a CUDA driver."""
    command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({NAME!r})"]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


class FakeCuda:
    """The fake driver, as tests handle it.

    Attributes:
        library: It, for calls of its functions.
        path: Its file; see `environment`.
        may_leak: True if the test cannot clean up; otherwise what is left of it fails the test.
        raised: What functions given to `launch` raised; otherwise fails the test.
    """

    def __init__(self, library: Any, path: Path) -> None:
        self.library, self.path = library, path
        self.may_leak = False
        self.raised: list[BaseException] = []
        self._functions: list[Callable[[], int | None]] = []
        self._host_function = HOST_FUNCTION(self._run)

    def start(self) -> None:
        """Restores the defaults: one GPU "Fake GPU 0", sm87, 8 GiB, driver 12.6, and no faults."""
        self.library.fake_cuda_reset(1)

    def finish(self) -> None:
        """Ends everything; raises AssertionError if something is left over."""
        leaks = self.leaks()
        if leaks and not self.may_leak:
            gc.collect()  # pycuda frees with its objects
            leaks = self.leaks()
        overruns = self.count("overruns")
        stuck = self.library.fake_cuda_reset(0)
        assert not stuck, f"{stuck} streams of the fake driver do not end"
        assert not overruns, f"{overruns} writes beyond the end of device memory"
        assert not self.raised, f"raised on a stream: {self.raised}"
        assert self.may_leak or not leaks, f"not freed: {leaks}"

    def environment(self) -> dict[str, str]:
        """Environment for a child process that is to run on the fake driver."""
        paths = [str(self.path.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "FAKE_CUDA": "1", "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}

    def set_device(
        self,
        *,
        ordinal: int = 0,
        name: str = "Fake GPU 0",
        major: int = 8,
        minor: int = 7,
        integrated: bool = False,
        memory_bytes: int = 8 << 30,
    ) -> None:
        self.library.fake_cuda_set_device(ordinal, name.encode(), major, minor, integrated, memory_bytes)

    def fail(self, name: str, nth: int, code: int, *, sticky: bool = False, times: int = 1) -> None:
        """Lets calls fail.

        Args:
            name: Of a driver function without "_v2", or "*" for every one; "work", "work:copy" and
                "work:host" are what runs on a stream, and always sticky.
            nth: The first call to fail; 1 is the next one.
            sticky: All later calls in the context give the code, too, until it is reset.
            times: How many calls fail; -1 for all. pycuda tries a failed allocation twice.
        """
        assert self.library.fake_cuda_fail(name.encode(), nth, code, sticky, times), "too many faults"

    def clear_faults(self) -> None:
        """Takes back what `fail` arranged; a context that is broken already stays so."""
        self.library.fake_cuda_heal()

    def count(self, name: str) -> int:
        """Counts something.

        Args:
            name: Of `LIVE`: handles in use. Of a driver function: its calls. Or one of bytes, calls,
                work, launches, pageable_copies, misuses (wrong handles, addresses, ranges), overruns
                and default_stream_uses.
        """
        value = int(self.library.fake_cuda_count(name.encode()))
        assert value >= 0, f"the fake driver does not count {name!r}"
        return value

    def leaks(self) -> dict[str, int]:
        """What is in use, by name; threads of destroyed streams get a moment to end."""
        for _ in range(200):
            found = {name: self.count(name) for name in LIVE}
            if found["threads"] == found["streams"]:
                break
            time.sleep(0.005)
        return {name: count for name, count in found.items() if count}

    @property
    def pageable_copies(self) -> int:
        """Copies from or to host memory that was not registered."""
        return self.count("pageable_copies")

    def log(self) -> list[str]:
        """Names of the latest calls, oldest first."""
        room = self.library.fake_cuda_log(None, 0)
        text = ctypes.create_string_buffer(room)
        self.library.fake_cuda_log(text, room)
        return text.value.decode().split()

    def clear_log(self) -> None:
        self.library.fake_cuda_clear_log()

    def _set(self, name: str, value: int) -> None:
        self.library.fake_cuda_set(name.encode(), value)

    # Pause before each piece of work; driver version such as 12060; number of GPUs; how long a wait
    # lasts until it gives up with CUDA_ERROR_TIMEOUT: who keeps Python's lock waits for himself.
    delay_us = property(fset=lambda self, value: self._set("delay_us", value))
    driver_version = property(fset=lambda self, value: self._set("driver_version", value))
    devices = property(fset=lambda self, value: self._set("devices", value))
    patience_ms = property(fset=lambda self, value: self._set("patience_ms", value))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, streams take work and do not begin it."""
        self.library.fake_cuda_hold(1)
        try:
            yield
        finally:
            self.library.fake_cuda_hold(0)

    def launch(self, stream: int, function: Callable[[], int | None]) -> int:
        """Enqueues a function, as a "kernel"; returns the driver's code. Can be captured.

        The function may return a code of CUresult, for a kernel that failed.
        """
        self._functions.append(function)
        return int(self.library.cuLaunchHostFunc(stream, self._host_function, len(self._functions)))

    def _run(self, number: int) -> None:
        try:
            code = self._functions[number - 1]()
        except BaseException as error:
            self.raised.append(error)
            code = 719
        if code:
            self.library.fake_cuda_fault(code)

    def device_array(self, address: int, nbytes: int) -> np.ndarray:
        """Device memory as "kernels" see it, uint8 [nbytes]."""
        assert self.library.fake_cuda_is_device(address, nbytes), "not within one piece of device memory"
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


@pytest.fixture(scope="session")
def fake_cuda_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled fake driver."""
    if sys.platform != "linux":
        pytest.skip("the fake CUDA driver needs Linux")
    try:
        return build(tmp_path_factory.mktemp("fake_cuda"))
    except FileNotFoundError as error:
        pytest.skip(f"the fake CUDA driver cannot be built: {error}")


@pytest.fixture
def fake_cuda(fake_cuda_file: Path) -> Iterator[FakeCuda]:
    """A fresh fake driver with one GPU. What the test does not free fails it."""
    try:
        library = load(fake_cuda_file)
    except OSError as error:
        pytest.skip(f"the fake CUDA driver cannot be loaded: {error}")
    fake = FakeCuda(library, fake_cuda_file)
    fake.start()
    yield fake
    fake.finish()
