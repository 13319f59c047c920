"""`python -m edgead`, the same as the command `edgead`."""

from __future__ import annotations

import sys

from edgead.cli import main

if __name__ == "__main__":
    sys.exit(main())
