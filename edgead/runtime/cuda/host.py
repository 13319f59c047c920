"""Host memory that belongs to us and not to the driver, which only registers (page-locks) it."""

from __future__ import annotations

import mmap

import numpy as np

from edgead.errors import BackendError


def host_pages(nbytes: int) -> np.ndarray:
    """Returns zeros on whole pages of their own, uint8 [nbytes, rounded up], alive as long as any view.

    The pages are shared with forked children. Private ones would be copied at the first write after a
    fork, and the GPU would go on with the old copy.

    Raises:
        BackendError: There is no such room.
    """
    try:
        pages = mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    except (OSError, OverflowError, ValueError) as error:
        raise BackendError(f"a host buffer of {nbytes} bytes cannot be allocated: {error}") from error
    return np.frombuffer(pages, dtype=np.uint8)
