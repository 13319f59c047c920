"""Timing of what ships and of training steps, told with the machine; installed as edgead.benchmarks."""

from __future__ import annotations

# Imported as `benchmarks` this file would become a second module beside edgead.benchmarks.
if __name__ != "edgead.benchmarks":
    raise ImportError(
        "import edgead.benchmarks, not benchmarks: setup.py maps this folder into the package. "
        "Where edgead.benchmarks is not found, run `pip install -e .` in the repository first."
    )
