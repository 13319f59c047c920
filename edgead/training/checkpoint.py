"""Checkpoints that survive a kill at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from edgead.errors import TrainingError
from edgead.files import try_lock, whole_file


@contextmanager
def alone(lock: Path, out: Path) -> Iterator[None]:
    """Holds a lock file, where there are such: two runs into one `out` would take each other's files."""
    with lock.open("ab") as file:
        if try_lock(file) is False:
            raise TrainingError(
                f"another process trains into {out}: wait for it, or name another place with --out"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically."""
    with whole_file(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, *, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint whose recorded `settings` equal the given ones.

    Raises:
        TrainingError: the file is damaged, or the run was started with other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["settings"]
    except Exception as error:  # torch raises many kinds, some with pages of advice
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"{path} cannot be read as a checkpoint ({reason[:200]}); delete it to start again"
        ) from error
    changed = [
        f"{key}: {before.get(key)!r} then, {value!r} now"
        for key, value in settings.items()
        if before.get(key) != value
    ]
    if changed:
        raise TrainingError(
            f"{path} belongs to a run with other settings ({'; '.join(changed)}):"
            " use those, or another folder"
        )
    return state
