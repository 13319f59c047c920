"""Names and signatures of the real TensorRT bindings, old and new, without their libraries.

The classic bindings are small wheels that link to three big libraries, of which they need nine symbols:
with these as stubs they can be imported and asked. Nothing of TensorRT runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

BINDINGS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu13-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
RTX = "rtx"
MODULE = "(module)"

STUB = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
"""
DUMP = """
import importlib, json, re, sys
module = importlib.import_module(sys.argv[1])
def signatures(thing):
    lines = (getattr(thing, "__doc__", None) or "").splitlines()
    found = [re.match(r"(?:\\d+\\. )?(\\w+\\(.*\\) -> .*)", line) for line in lines]
    return [match[1] for match in found if match]
api = {"(module)": {}}
for name in dir(module):
    thing = getattr(module, name)
    api["(module)"][name] = signatures(getattr(thing, "__init__", None))
    if isinstance(thing, type):
        api[name] = {inner: signatures(getattr(thing, inner, None)) for inner in dir(thing)}
print(json.dumps(api))
"""

Api = dict[str, dict[str, list[str]]]  # class -> attribute -> signatures, if it is called


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with stand-ins for the three libraries of TensorRT 10 and 11."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler (cc) on Linux, to make stub libraries")
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub.c").write_text(STUB)
    for name in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
        for major in (10, 11):
            file = f"{name}.so.{major}"
            options = ["-shared", "-fPIC", f"-Wl,-soname,{file}", "stub.c", "-o", file]
            subprocess.run([compiler, *options], cwd=folder, check=True, timeout=60)
    return folder


class CannotDownload(Exception):
    """Said once, because pip takes its time to find out."""


def download(version: str, folder: Path) -> Path:
    """The unpacked bindings, from an earlier run or from the package index."""
    target = folder / f"{version}-{sys.implementation.cache_tag}"
    if not target.is_dir():
        wanted = f"{BINDINGS[version]}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "--only-binary=:all:"]
        command += ["--retries", "0", "--timeout", "15", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "-d", folder, wanted], capture_output=True, text=True, timeout=300, check=False
        )
        wheels = list(folder.glob(f"{BINDINGS[version].replace('-', '_')}-{version}-*.whl"))
        if done.returncode or not wheels:
            raise CannotDownload(f"pip cannot download {wanted}: {done.stderr.strip()[-200:]}")
        partial = folder / f".{target.name}.{os.getpid()}"
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(partial)
        try:
            partial.rename(target)
        except OSError:  # another test run was quicker
            shutil.rmtree(partial)
    return target


def dump(module: str, **environment: str) -> Api:
    done = subprocess.run(
        [sys.executable, "-c", DUMP, module],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Api = json.loads(done.stdout)
    return found


@pytest.fixture(scope="session")
def api_of(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Callable[[str], Api]:
    """Function that gives the names and signatures of a version."""
    failed: dict[str, CannotDownload] = {}

    @cache
    def get(version: str) -> Api:
        if version == RTX:
            if importlib.util.find_spec("tensorrt_rtx") is None:
                pytest.skip("tensorrt-rtx is not installed")
            return dump("tensorrt_rtx")
        stubs = str(request.getfixturevalue("stubs"))
        folder = Path(pytestconfig.cache.mkdir("tensorrt_bindings"))  # type: ignore[union-attr]
        try:
            if version in failed:
                raise failed[version]
            bindings = str(download(version, folder))
        except CannotDownload as error:
            failed[version] = error
            pytest.skip(str(error))
        return dump("tensorrt_bindings", LD_LIBRARY_PATH=stubs, PYTHONPATH=bindings)

    return get


@pytest.fixture(scope="session")
def apis(api_of: Callable[[str], Api]) -> dict[str, Api]:
    """All versions."""
    return {version: api_of(version) for version in (*BINDINGS, RTX)}


def fits(signature: str, positional: int, keywords: tuple[str, ...]) -> bool:
    """Whether a call can be one of `name(self: A, b: B = ..., c: C) -> D`."""
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    while (shorter := re.sub(r"[\[(<{][^\[\](){}<>]*[\])>}]", "", inside)) != inside:
        inside = shorter
    parameters = [part.strip() for part in inside.split(",") if part.strip()]
    if parameters[:1] and parameters[0].split(":")[0] == "self":
        parameters = parameters[1:]
    names = [part.split(":")[0].split("=")[0].strip() for part in parameters]
    given = set(names[:positional]) | set(keywords)
    required = {name for name, part in zip(names, parameters, strict=True) if "=" not in part}
    return positional <= len(names) and set(keywords) <= set(names[positional:]) and required <= given
