"""Every name of TensorRT that edgead uses is in the real bindings, old and new, with that signature."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.real_bindings import BINDINGS, MODULE, RTX, Api, fits

ROOT = Path(__file__).resolve().parents[2]
# File -> expression (an index is "[]") -> the class of TensorRT that it is.
TRT = {"trt": MODULE, "flavour.module": MODULE, "self.flavour.module": MODULE, "self.module": MODULE}
ENGINE = {"engine": "ICudaEngine", "self._engine": "ICudaEngine", "self._runtime": "Runtime"}
NAMES: dict[str, dict[str, str]] = {
    "edgead/flavour.py": {**TRT, "base": "ILogger"},
    "engines/build.py": {
        **TRT,
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "item": "ParserError",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "image": "ITensor",
        "tensor": "ITensor",
        "cache": "ITimingCache",
        "capabilities": "ComputeCapability",
        "base": "IProgressMonitor",
    },
    "engines/report.py": {
        **TRT,
        "network": "INetworkDefinition",
        "layer": "ILayer",
        "layer.type": "LayerType",
        "tensor": "ITensor",
        "tensor.dtype": "DataType",
        "runtime": "Runtime",
        "engine": "ICudaEngine",
        "inspector": "EngineInspector",
    },
    "edgead/runtime/tensorrt.py": {
        **TRT,
        **ENGINE,
        "engine.get_tensor_mode()": "TensorIOMode",
        "engine.get_tensor_dtype()": "DataType",
        "config": "IRuntimeConfig",
        "context": "IExecutionContext",
        "self._contexts[]": "IExecutionContext",
    },
}
# What stands in an `if` -> the name whose presence it implies.
CONDITIONS = {"self._has_strategies": (MODULE, "CudaGraphStrategy")}
# Expressions that are no objects of TensorRT, although they have attributes that are called like theirs.
OTHERS = {"self", "self._backend", "self.device", "flavour", "bundle.manifest", "error", "np"}


@dataclass(frozen=True)
class Use:
    """One attribute of TensorRT in the source.

    Attributes:
        where: File and line.
        owner: Class, or `MODULE`.
        name: Of the attribute.
        call: Number of positional arguments and names of the others; None if it is not called.
        needs: What has to exist, (owner, name) each, for this line to be reached.
    """

    where: str
    owner: str
    name: str
    call: tuple[int, tuple[str, ...]] | None
    needs: tuple[tuple[str, str], ...]

    def fault(self, api: Api) -> str:
        """What is wrong with it in one version; "" if nothing is."""
        if any(name not in api.get(owner, {}) for owner, name in self.needs):
            return ""
        signatures = api.get(self.owner, {}).get(self.name)
        if signatures is None:
            return f"{self.where}: {self.owner} has no {self.name}"
        if self.call and signatures and not any(fits(text, *self.call) for text in signatures):
            return f"{self.where}: {self.owner}.{self.name} is called with {self.call}, not {signatures}"
        return ""


class Finder(ast.NodeVisitor):
    """Collects the uses in one file, and expressions that may be TensorRT's but are not in the table."""

    def __init__(self, file: str, names: dict[str, str], known: set[str]) -> None:
        self.file, self.names, self.known = file, names, known
        self.uses: list[Use] = []
        self.unknown: list[str] = []
        self.needs: list[tuple[str, str]] = []
        self.guarded: set[tuple[str, str]] = set()
        self.calls: dict[int, ast.Call] = {}

    def owner(self, node: ast.expr) -> str | None:
        key = expression(node)
        if key in self.names:
            return self.names[key]
        if isinstance(node, ast.Attribute) and self.owner(node.value) == MODULE:
            return node.attr
        return None

    def add(self, node: ast.AST, owner: str, name: str, call: ast.Call | None = None) -> None:
        arguments = None
        if call and not any(isinstance(item, ast.Starred) for item in call.args):
            arguments = len(call.args), tuple(item.arg for item in call.keywords if item.arg)
        needs = [*self.needs, *({(owner, name)} & self.guarded)]
        line = getattr(node, "lineno", 0)
        self.uses.append(Use(f"{self.file}:{line}", owner, name, arguments, tuple(needs)))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self.guarded
        self.guarded = before | {
            (owner, str(call.args[1].value))
            for call in ast.walk(node)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in ("hasattr", "getattr")
            and isinstance(call.args[1], ast.Constant)
            and (owner := self.owner(call.args[0]))
        }
        for owner, name in self.guarded - before:
            self.uses.append(Use(f"{self.file}:{node.lineno}", owner, name, None, ((owner, name),)))
        self.generic_visit(node)
        self.guarded = before

    def visit_If(self, node: ast.If) -> None:
        condition = CONDITIONS.get(ast.unparse(node.test))
        self.visit(node.test)
        self.needs += [condition] if condition else []
        for child in node.body:
            self.visit(child)
        self.needs = self.needs[:-1] if condition else self.needs
        for child in node.orelse:
            self.visit(child)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for owner in filter(None, map(self.owner, node.bases)):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    self.add(method, owner, method.name)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.calls[id(node.func)] = node
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.owner(node.value)
        call = self.calls.get(id(node))
        if owner and not node.attr.startswith("__"):
            self.add(node, owner, node.attr, call)
        elif not owner and node.attr in self.known and expression(node.value) not in OTHERS:
            self.unknown.append(f"{self.file}:{node.lineno}: {expression(node.value)}.{node.attr}")
        self.generic_visit(node)


def expression(node: ast.expr) -> str:
    """As text, without what stands in brackets."""
    if isinstance(node, ast.Subscript):
        return f"{expression(node.value)}[]"
    if isinstance(node, ast.Call):
        return f"{expression(node.func)}()"
    if isinstance(node, ast.Attribute):
        return f"{expression(node.value)}.{node.attr}"
    return ast.unparse(node)


def find(file: str, source: str, known: set[str] = frozenset()) -> Finder:  # type: ignore[assignment]
    finder = Finder(file, NAMES[file], known)
    finder.visit(ast.parse(source))
    return finder


def uses() -> Iterator[Use]:
    for file in NAMES:
        yield from find(file, (ROOT / file).read_text(encoding="utf-8")).uses


def faults(found: list[Use], api: Api) -> list[str]:
    return [fault for use in found if (fault := use.fault(api))]


@pytest.mark.parametrize("version", [*BINDINGS, RTX])
def test_what_edgead_uses_exists(version: str, api_of: Callable[[str], Api]) -> None:
    found = list(uses())
    assert len(found) > 60
    assert faults(found, api_of(version)) == []


def test_what_is_probed_exists_somewhere(apis: dict[str, Api]) -> None:
    for use in uses():
        for owner, name in {(use.owner, use.name), *use.needs}:
            assert any(name in api.get(owner, {}) for api in apis.values()), use


def test_no_expression_is_overlooked(apis: dict[str, Api]) -> None:
    """Whatever has an attribute that is called like one of TensorRT is in one of the two tables."""
    known = {
        name
        for api in apis.values()
        for owner, attributes in api.items()
        for name in attributes
        if not name.startswith("_") and owner[0] != "_"
    } - {*dir(list), *dir(dict), *dir(np.ndarray)}
    unknown = [
        line
        for file in NAMES
        for line in find(file, (ROOT / file).read_text(encoding="utf-8"), known).unknown
    ]
    assert unknown == [], "\n".join(unknown)


def test_nothing_else_touches_tensorrt() -> None:
    """Only the files in the table reach into the module, so that no other one needs to be checked."""
    touching = set()
    for folder in ("edgead", "engines", "export", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if re.search(r"\btrt\.|\.module\.[A-Z]|import tensorrt", text):
                touching.add(path.relative_to(ROOT).as_posix())
    assert touching <= set(NAMES)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("trt.Builder(log).create_network(0)", ""),
        ("trt.BuilderFlag.TF32", ""),
        ("trt.BuilderFlag.TF33", "BuilderFlag has no TF33"),
        ("trt.Bilder(log)", "(module) has no Bilder"),
        ("config.max_workspace_size = 1", "IBuilderConfig has no max_workspace_size"),
        ("config.set_flags(1)", "IBuilderConfig has no set_flags"),
        ("if hasattr(config, 'set_flags'):\n        config.set_flags(1)", ""),
        ("profile.set_shape('image', 1, 2)", "called with"),
        ("profile.set_shape('image', min=1, opt=2, max=3)", ""),
        ("profile.set_shape('image', min=1, opt=2, most=3)", "called with"),
        ("config.set_timing_cache(cache)", "called with"),
        ("class M(base):\n        def phase_begin(self): ...", "IProgressMonitor has no phase_begin"),
    ],
)
def test_a_planted_fault_is_found(line: str, fault: str, apis: dict[str, Api]) -> None:
    source = f"def f(config, profile, cache, log):\n    {line}\n"
    found = find("engines/build.py", source).uses
    assert found
    for api in apis.values():
        text = "; ".join(faults(found, api))
        assert (fault in text) if fault else not text


def test_what_only_old_or_new_versions_have_is_found(apis: dict[str, Api]) -> None:
    found = find("engines/build.py", "trt.BuilderFlag.FP16").uses
    assert [version for version, api in apis.items() if faults(found, api)] == [
        version for version in apis if version in (RTX, "11.4.0.106")
    ]
    found = find("edgead/runtime/tensorrt.py", "self._engine.create_runtime_config()").uses
    assert [version for version, api in apis.items() if faults(found, api)] == ["10.3.0"]


def test_an_unknown_variable_is_found() -> None:
    known: Any = {"create_network"}
    assert find("engines/build.py", "maker.create_network(0)", known).unknown
    assert not find("engines/build.py", "builder.create_network(0)", known).unknown
