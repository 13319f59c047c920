"""From a trained run to a bundle, on the workstation (torch and onnx); installed as edgead.export."""

from __future__ import annotations

# Imported as `export` this file would become a second module beside edgead.export.
if __name__ != "edgead.export":
    raise ImportError(
        "import edgead.export, not export: setup.py maps this folder into the package. "
        "Where edgead.export is not found, run `pip install -e .` in the repository first."
    )
