"""The version and where the packages lie; everything else is in pyproject.toml."""

from __future__ import annotations

import ast
from pathlib import Path

from setuptools import find_packages, setup

SUBPACKAGES = ("export", "engines", "benchmarks")  # top-level folders that install as edgead.<name>


def read_version() -> str:
    """The literal `__version__` of edgead/__init__.py, which is not imported."""
    path = Path(__file__).resolve().parent / "edgead" / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise RuntimeError(f'{path} has no line __version__ = "..."')


setup(
    version=read_version(),
    package_dir={f"edgead.{name}": name for name in SUBPACKAGES},
    packages=find_packages(include=["edgead", "edgead.*"])
    + [f"edgead.{name}" for name in SUBPACKAGES]
    + [f"edgead.{name}.{package}" for name in SUBPACKAGES for package in find_packages(name)],
)
