"""Who may reset a GPU's primary context: several devices of this process share it, and it dies once.

A fault in it reaches all of them. The first one resets it and opens anew; were another to reset it again
for the same fault, that would destroy the new context with everything in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from edgead.runtime.cuda.errors import cuda_error

_DESTROYED = 709

_lock = threading.Lock()
_resets: dict[int, int] = {}  # of each GPU by this process


class PrimaryContext:
    """A device's hold on the primary context of a GPU, as it was when the device was opened."""

    def __init__(self, ordinal: int, retain: Callable[[], Any]) -> None:
        self._ordinal = ordinal
        with _lock:  # not between somebody's reset and its count
            self.handle = retain()
            self._resets = _resets.get(ordinal, 0)

    def check(self, call: str) -> None:
        """Raises the error of a destroyed context if one has reset it: its handles are wild pointers."""
        if _resets.get(self._ordinal, 0) != self._resets:
            raise cuda_error(call, _DESTROYED)

    def reset(self, function: Callable[[], object]) -> None:
        """Calls the driver's reset, unless somebody already has since this device was opened."""
        with _lock:
            if _resets.get(self._ordinal, 0) == self._resets:
                function()
                _resets[self._ordinal] = self._resets + 1
