"""The recipe file of a line: its cameras, their bundles, and where the verdicts go. See docs/line.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgead.errors import LineError
from edgead.line.journal import SYNCS
from edgead.line.sinks import SINKS, sink_module
from edgead.line.sources import SOURCES, source_module
from edgead.line.tables import Key, Tables
from edgead.line.verdicts import Verdict

DEADLINE_MS = (0.5, 600_000)
FILES = ("folder", "video")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The table [line].

    Attributes:
        name: Of the line, for people and topics.
        journal: Folder of the journal, where the line goes on after a crash.
        sync: When the journal has to be on the disk: "never", "second" (each second) or "always" (before
            each verdict leaves).
        reject: Verdicts whose part is rejected.
        backend: Of all bundles: "auto", or a name as in `edgead run --backend`.
        threads: Of one inference on a CPU; all cores if not given.
        in_flight: Images that the device works on at a time. More than 1 suits a GPU.
        keep_warm_ms: After this long without a part an inference is run for nothing, so that the next
            part finds the device awake.
        stall_s: A model or a sink that has not answered for this long is started anew.
    """

    name: str = "line"
    journal: Path
    sync: str = "second"
    reject: tuple[str, ...] = ("NG", "LATE", "ERROR", "NOT_INSPECTED")
    backend: str = "auto"
    threads: int | None = None
    in_flight: int = 1
    keep_warm_ms: float | None = None
    stall_s: float = 10.0

    def __post_init__(self) -> None:
        verdicts = {verdict.value for verdict in Verdict}
        for name in self.reject:
            _need(name in verdicts, f"reject names {name!r}, verdicts are {', '.join(sorted(verdicts))}")
        _need(self.sync in SYNCS, f"sync is {self.sync!r}, expected one of {', '.join(SYNCS)}")
        _need(1 <= self.in_flight <= 3, f"in_flight is {self.in_flight}, expected 1 to 3")
        _need(self.stall_s >= 0.5, f"stall_s is {self.stall_s:g}, expected at least 0.5")
        warm = self.keep_warm_ms
        _need(warm is None or warm >= 1, f"keep_warm_ms is {warm}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The table [[camera.recipe]]: one way to inspect what a camera sees. Numbered from 0.

    Attributes:
        bundle: The *.edgead file.
        roi_px: Left, top, width, height of what is inspected; the whole image if not given.
        threshold: Instead of the bundle's own.
    """

    bundle: Path
    roi_px: tuple[int, int, int, int] | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.roi_px is not None:
            left, top, width, height = self.roi_px
            good = left >= 0 and top >= 0 and width > 0 and height > 0
            _need(good, f"roi_px is {list(self.roi_px)}, expected left, top >= 0 and width, height > 0")
        value = self.threshold
        _need(value is None or math.isfinite(value), f"threshold is {value}, expected a finite number")


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """The table [[camera]].

    Attributes:
        name: Letters, digits, - and _.
        deadline_ms: From the trigger to the verdict; without an answer until then it is LATE.
        trigger: "image": each image is a trigger; "plc": the PLC triggers through a sink that it is
            connected to, and the source is fired.
        grab: "inspect-all": images wait in their order, and one that finds the queue full is
            NOT_INSPECTED; "live": the newest image takes the place of those that wait, which are
            NOT_INSPECTED; "wait": the source waits for room (files only).
        queue: Images that may wait.
        health: Whether images are looked at before they are inspected: dark, blurred, shifted, frozen.
        image_timeout_ms: How long the image of a trigger of the PLC may be under way; after that it
            counts as lost. Five deadlines, and at least a second, if not given.
        start_recipe: Number of the recipe that is used at the start.
    """

    name: str
    deadline_ms: float
    trigger: Literal["image", "plc"] = "image"
    grab: Literal["inspect-all", "live", "wait"] = "inspect-all"
    queue: int = 8
    health: bool = True
    image_timeout_ms: float | None = None
    start_recipe: int = 0
    recipes: tuple[Inspection, ...]
    kind: str
    source: Any  # a Config of the module `edgead.line.sources.<kind>`

    def __post_init__(self) -> None:
        good = self.name.replace("-", "").replace("_", "").isalnum() and len(self.name) <= 60
        _need(good, f"name is {self.name!r}, expected letters, digits, - and _")
        low, high = DEADLINE_MS
        _need(
            low <= self.deadline_ms <= high,
            f"deadline_ms is {self.deadline_ms:g}, expected {low:g} to {high:g}",
        )
        _need(1 <= self.queue <= 10_000, f"queue is {self.queue}, expected 1 to 10000")
        _need(
            self.grab != "wait" or self.kind in FILES,
            "grab is 'wait', which is for files: cameras do not wait",
        )
        known = range(len(self.recipes))
        _need(self.start_recipe in known, f"start_recipe is {self.start_recipe}, there are {len(known)}")
        timeout = self.image_timeout_ms
        _need(timeout is None or timeout > 0, f"image_timeout_ms is {timeout}, expected more than 0")


@dataclass(frozen=True)
class SinkConfig:
    """One table [[sink]]: its name, its kind, and a Config of the module `edgead.line.sinks.<kind>`."""

    name: str
    kind: str
    config: Any


@dataclass(frozen=True)
class Recipe:
    """A whole line.

    Attributes:
        where: Turns the error of opening something into one that names its line in the file.
    """

    settings: Settings
    cameras: tuple[CameraConfig, ...]
    sinks: tuple[SinkConfig, ...]
    where: Mapping[str, str]

    def place(self, what: str) -> str:
        """Where in the file something is said, such as "line.toml:12: "; empty without a file."""
        return self.where.get(what, "")


def load(path: Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        LineError: What is wrong, with the number of the line and what to write instead.
    """
    tables = Tables(path)
    data = tables.data
    for unknown in data.keys() - {"line", "camera", "sink"}:
        raise tables.error(
            (unknown,), f"no table {unknown!r} is known here: [line], [[camera]], [[sink]]"
        )
    if "line" not in data:
        raise LineError(f'{path}: has no table [line]; write [line] and journal = "FOLDER" below it')
    settings = tables.build(Settings, data["line"], ("line",))
    where: dict[str, str] = {}
    cameras: list[CameraConfig] = []
    for index, table in enumerate(_list(tables, "camera")):
        camera = _camera(tables, table, ("camera", index))
        if camera.name in {other.name for other in cameras}:
            raise tables.error(("camera", index, "name"), f"there are two cameras named {camera.name!r}")
        cameras.append(camera)
        where[f"camera {camera.name}"] = f"{path}:{tables.line(('camera', index, 'source'))}: "
    if not cameras:
        raise LineError(
            f"{path}: has no camera; write [[camera]] with name, deadline_ms, source and recipe"
        )
    sinks: list[SinkConfig] = []
    for index, table in enumerate(_list(tables, "sink")):
        sink = _sink(tables, table, ("sink", index), {other.name for other in sinks})
        sinks.append(sink)
        where[f"sink {sink.name}"] = f"{path}:{tables.line(('sink', index))}: "
        if sink.kind == "webhook" and sink.config.timeout_s >= settings.stall_s:
            raise tables.error(
                ("sink", index, "timeout_s"),
                f"timeout_s is {sink.config.timeout_s:g}, expected less than the stall_s of the line, "
                f"{settings.stall_s:g}: a slow answer would count as a hang and be asked for again",
            )
    if not sinks:
        raise LineError(
            f'{path}: has no sink, nobody would get a verdict; write [[sink]] with kind = "jsonl"'
        )
    return Recipe(settings, tuple(cameras), tuple(sinks), where)


def _camera(tables: Tables, table: Any, key: Key) -> CameraConfig:
    if not isinstance(table, Mapping):
        raise tables.error(key, "camera: expected a table")
    rest = {name: value for name, value in table.items() if name not in ("source", "recipe")}
    recipes = table.get("recipe", [])
    if not isinstance(recipes, list) or not recipes:
        raise tables.error(key, 'camera lacks a recipe: write [[camera.recipe]] and bundle = "X.edgead"')
    inspections = []
    for index, recipe in enumerate(recipes):
        where = (*key, "recipe", index)
        inspection = tables.build(Inspection, recipe, where)
        if not inspection.bundle.is_file():
            raise tables.error((*where, "bundle"), f"bundle {inspection.bundle}: there is no such file")
        inspections.append(inspection)
    kind, config = _config(tables, table.get("source"), (*key, "source"), "source")
    camera = tables.build(CameraConfig, rest, key, kind=kind, source=config, recipes=tuple(inspections))
    is_fired = getattr(config, "triggered", False) or getattr(config, "trigger", "") == "software"
    if camera.trigger == "plc" and not is_fired:
        raise tables.error(
            (*key, "trigger"),
            'trigger is "plc", but the source runs by itself: write triggered = true (folder) or '
            'trigger = "software" (gige) in its source',
        )
    if camera.trigger == "image" and is_fired:
        raise tables.error(
            (*key, "source"), 'the source waits to be triggered: write trigger = "plc" for the camera'
        )
    return camera


def _sink(tables: Tables, table: Any, key: Key, taken: set[str]) -> SinkConfig:
    name = table.get("name", table.get("kind", "")) if isinstance(table, Mapping) else ""
    if isinstance(table, Mapping):
        if "name" in table and not (isinstance(name, str) and name):
            raise tables.error((*key, "name"), f"name of the sink is {name!r:.60}, expected text")
        table = {field: value for field, value in table.items() if field != "name"}
    kind, config = _config(tables, table, key, "sink")
    if name in taken:
        raise tables.error(key, f"there are two sinks named {name!r}: give one another name")
    return SinkConfig(str(name), kind, config)


def _config(tables: Tables, table: Any, key: Key, what: Literal["source", "sink"]) -> tuple[str, Any]:
    """Kind and Config of a table with the key `kind`."""
    kinds, module_of = (SOURCES, source_module) if what == "source" else (SINKS, sink_module)
    kind = table.get("kind") if isinstance(table, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise tables.error(
            (*key, "kind"), f"{what} needs a kind, got {kind!r}: one of {', '.join(sorted(kinds))}"
        )
    fields = {name: value for name, value in table.items() if name != "kind"}
    return kind, tables.build(module_of(kind).Config, fields, key)


def _list(tables: Tables, name: str) -> list[Any]:
    found = tables.data.get(name, [])
    if not isinstance(found, list):
        raise tables.error((name,), f"write [[{name}]] with two brackets: there may be several")
    return found


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise LineError(what)
