"""How a benchmark's command ends: what went wrong is one line, and its exit status says so."""

from __future__ import annotations

import sys
from collections.abc import Callable

from edgead.errors import EdgeADError


def exit_status(name: str, run: Callable[[], int | None], *, resumes: bool = False) -> int:
    """Runs a benchmark; its own status, or 1 after a line that says why there is no result.

    Args:
        name: Of its module, for that line.
        resumes: It goes on where it was interrupted: then Ctrl-C is told of, and the status is 130.
    """
    try:
        return run() or 0
    except (EdgeADError, OSError) as error:
        print(f"edgead.benchmarks.{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if not resumes:
            raise
        print("interrupted; the same command goes on with it", file=sys.stderr)
        return 130
