"""A bundle at work on the line: opened, verified and warm before its first part."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from edgead.bundle import Bundle
from edgead.errors import LineError
from edgead.health import HEALTH, HealthProfile
from edgead.line.interfaces import Shot
from edgead.line.pixels import to_rgb
from edgead.result import Result
from edgead.runtime import open_backend
from edgead.runtime.backend import Backend
from edgead.runtime.executor import SLOTS, Executor
from edgead.runtime.replay import replay

logger = logging.getLogger(__name__)

RECENT = 16
Open = Callable[[Bundle], Backend]


class Inspector:
    """One bundle, loaded once for all cameras that use it.

    It is closed when it was retired and its last part has its answer.

    Attributes:
        bundle: What was loaded.
        name: What the manifest calls it.
        threshold: The manifest's.
        needs_ns: Shortest time of the last few inferences, from start to answer; 0 before the first.
        profile: What good images of this bundle look like; None in bundles of earlier versions.
    """

    def __init__(self, bundle: Bundle, *, open_model: Open, keep_warm_ms: float | None = None) -> None:
        """Loads a bundle, replays its golden samples and opens its slots.

        Raises:
            LineError: This device gives other verdicts than the bundle's reference.
            BackendError: The back end refuses it.
        """
        self.bundle = bundle
        backend = open_model(bundle)
        try:
            check = replay(backend, bundle)
            if not check.ok:
                raise LineError(
                    f"{bundle.path}: not taken: on this device ({backend.name}, {backend.precision})"
                    f" {check}; export it again, or name another back end"
                )
            self.name = bundle.manifest.name
            self.threshold = bundle.manifest.threshold.value
            health = bundle.manifest.model.get(HEALTH)
            self.profile = None if health is None else HealthProfile.from_dict(health)
        except BaseException:
            backend.close()
            raise
        spec = bundle.manifest.input
        self._size_px = (spec.height, spec.width)
        self._executor = Executor(
            bundle.manifest,
            backend,
            reopen=lambda: open_model(bundle),
            slots=SLOTS,
            keep_warm_ms=keep_warm_ms,
        )
        self.needs_ns = 0
        self._times_ns: deque[int] = deque(maxlen=RECENT)
        self._guests = 0
        self._is_retired = self._is_closed = False
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Takes a part on: `leave` has to follow. False if it was retired."""
        with self._lock:
            if self._is_retired:
                return False
            self._guests += 1
            return True

    def leave(self) -> None:
        """The part has its answer, or will get none."""
        with self._lock:
            self._guests -= 1
        self._close_if_empty()

    def submit(self, shot: Shot, region: np.ndarray | None) -> Future[Result]:
        """Accepts an image.

        Args:
            shot: Decoded straight into the executor's buffer if it has the size of the graph's input.
            region: uint8 [H, W, 3] RGB: what of the shot is inspected, decoded already; None is all.

        Raises:
            DataError, LineError: It is no such image.
            BackendError: The executor gave up.
        """
        if region is not None:
            return self._executor.submit(region)
        assert shot.image is not None
        if shot.image.shape[:2] != self._size_px:
            return self._executor.submit(to_rgb(shot))
        with (lease := self._executor.slot()) as buffer:
            to_rgb(shot, into=buffer)
        return lease.future

    def note_time(self, elapsed_ns: int) -> None:
        """Learns from one inference; callers hold the line's lock."""
        self._times_ns.append(elapsed_ns)
        self.needs_ns = min(self._times_ns)

    def retire(self) -> None:
        """No more parts; closes it as soon as the last one has its answer. Does not wait."""
        with self._lock:
            self._is_retired = True
        self._close_if_empty()

    def abandon(self) -> None:
        """Like `retire`, of one that hangs: what is on its way is given up."""
        with self._lock:
            self._is_retired = True
            self._guests = 0
        self._close_if_empty()

    def _close_if_empty(self) -> None:
        with self._lock:
            if not self._is_retired or self._guests > 0 or self._is_closed:
                return
            self._is_closed = True
        # Not in the thread of a callback, which is the executor's own, nor in one that must not wait.
        threading.Thread(target=self._executor.close, kwargs={"wait": False}, daemon=True).start()


def bundle_opener(backend: str, threads: int | None) -> Open:
    """How a line loads graphs: the back end that was chosen first is used again after a failure."""
    chosen: dict[str, str] = {}

    def open_model(bundle: Bundle) -> Backend:
        digest = bundle.manifest.members["model.onnx"].sha256
        opened = open_backend(bundle, chosen.get(digest, backend), threads=threads)
        chosen[digest] = opened.name
        return opened

    return open_model
