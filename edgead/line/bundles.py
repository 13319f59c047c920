"""The bundles of a running line: one inspector each, exchanged and revived while parts go on."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from edgead.bundle import Bundle
from edgead.errors import EdgeADError, LineError
from edgead.line.inspector import Inspector

logger = logging.getLogger(__name__)

BACKOFF_S = (0.5, 30.0)


class Bundles:
    """Inspectors by the path that the recipe file names. Any thread may call it.

    Attributes:
        lost_device: Why no bundle can be loaded again before this process has ended; else empty.
    """

    def __init__(self, paths: Iterable[Path], load: Callable[[Bundle], Inspector]) -> None:
        """Loads all bundles, each once.

        Args:
            load: Verifies and warms up a bundle.

        Raises:
            EdgeADError: One of them cannot be loaded; then none is open.
        """
        self._load = load
        self._lock = threading.Lock()
        self._at_work: dict[Path, Inspector | None] = {}
        self._changes: Counter[Path] = Counter()  # how often the one at work has changed
        self._is_closed = threading.Event()
        self.lost_device = ""
        try:
            for path in dict.fromkeys(paths):
                self._at_work[path] = load(Bundle.open(path))
        except BaseException:
            self.close()
            raise

    @property
    def are_ready(self) -> bool:
        """Whether none is being loaded again."""
        return all(self._at_work.values())

    def get(self, path: Path) -> Inspector | None:
        """The inspector at work; None while it is being loaded again."""
        return self._at_work[path]

    def name(self, path: Path) -> str:
        """As its manifest says."""
        inspector = self._at_work[path]
        return path.stem if inspector is None else inspector.name

    def enter(self, path: Path) -> Inspector | None:
        """The inspector at work, which stays open until its `leave`; None while there is none."""
        with self._lock:
            inspector = self._at_work[path]
            return inspector if inspector is not None and inspector.enter() else None

    def load(self, path: Path, new: Path) -> Inspector:
        """Loads another bundle for the place of one, for `put`.

        Raises:
            EdgeADError: It cannot be loaded or verified.
        """
        if path not in self._at_work:
            raise LineError(f"no recipe of this line uses {path}")
        return self._load(Bundle.open(new))

    def put(self, path: Path, inspector: Inspector) -> None:
        """Puts another bundle in the place of one; what that has begun it finishes. Does not wait."""
        with self._lock:
            former = self._at_work[path]
            self._at_work[path] = inspector
            self._changes[path] += 1
        if former is not None:
            former.retire()
        if self._is_closed.is_set():
            inspector.retire()
        logger.warning("%s: the new bundle took over", path)

    def renew(self, inspector: Inspector, reason: str) -> None:
        """Loads a bundle again whose model hangs or gave up: in a thread, until it succeeds.

        Not its file, which somebody may have replaced: that is taken over when the line is told to.
        """
        inspector.abandon()
        with self._lock:
            paths = [path for path, at_work in self._at_work.items() if at_work is inspector]
            for path in paths:
                self._at_work[path] = None
                self._changes[path] += 1
            places = {path: self._changes[path] for path in paths}
        if paths:  # otherwise somebody else is at it
            logger.error("%s: %s: it is loaded again", inspector.bundle.path, reason)
            arguments = (places, inspector.bundle)
            threading.Thread(target=self._load_again, args=arguments, daemon=True).start()

    def close(self) -> None:
        """Ends all; may be repeated. Does not wait."""
        self._is_closed.set()
        for inspector in self._at_work.values():
            if inspector is not None:
                inspector.retire()

    def _load_again(self, places: dict[Path, int], bundle: Bundle) -> None:
        pause_s, longest_s = BACKOFF_S
        while not self._is_closed.is_set():
            try:
                inspector = self._load(bundle)
            except Exception as error:  # also MemoryError: the one that hangs may still hold its memory
                said = error if isinstance(error, EdgeADError) else repr(error)
                logger.error("%s: cannot be loaded again: %s", bundle.path, said)
                if getattr(error, "is_sticky", False):  # after the executor has reset the device in vain
                    self.lost_device = str(error)
                self._is_closed.wait(pause_s)
                pause_s = min(2 * pause_s, longest_s)
                continue
            self.lost_device = ""
            with self._lock:  # another bundle may have taken its place meanwhile
                paths = [path for path, change in places.items() if self._changes[path] == change]
                for path in paths:
                    self._at_work[path] = inspector
            if paths:
                logger.warning("%s: at work again", bundle.path)
            if not paths or self._is_closed.is_set():
                inspector.retire()
            return
