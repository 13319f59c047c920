"""Built inference engines, on the device (never torch); installed as edgead.engines."""

from __future__ import annotations

# Imported as `engines` this file would become a second module beside edgead.engines.
if __name__ != "edgead.engines":
    raise ImportError(
        "import edgead.engines, not engines: setup.py maps this folder into the package. "
        "Where edgead.engines is not found, run `pip install -e .` in the repository first."
    )
