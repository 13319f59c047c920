"""From a recipe to a running line; what cannot be opened is said with its line in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

from edgead.bundle import Bundle
from edgead.errors import EdgeADError, LineError
from edgead.line.bundles import Bundles
from edgead.line.camera import Camera
from edgead.line.desk import Desk
from edgead.line.inspector import Inspector, Open, bundle_opener
from edgead.line.interfaces import Controls, Sink, Source
from edgead.line.journal import Journal
from edgead.line.line import Line
from edgead.line.mark import Mark
from edgead.line.outlet import Outlet
from edgead.line.recipe import FILES, CameraConfig, Recipe, SinkConfig
from edgead.line.sinks import sink_module
from edgead.line.sources import source_module

MARKED = ("webhook",)  # sinks that cannot say what they have; a PLC must not get old parts again


def open_source(config: CameraConfig) -> Source:
    """Opens what a camera's images come from."""
    module = source_module(config.kind)
    source: Source = module.open_source(config.source, camera=config.name)
    return source


def open_sink(config: SinkConfig, controls: Controls) -> Sink:
    """Opens a sink."""
    sink: Sink = sink_module(config.kind).open_sink(config.config, controls=controls)
    return sink


def open_line(
    recipe: Recipe,
    *,
    open_model: Open | None = None,
    source: Callable[[CameraConfig], Source] = open_source,
    sink: Callable[[SinkConfig, Controls], Sink] = open_sink,
    start: bool = True,
) -> Line:
    """Opens all that a recipe names and starts the line.

    Args:
        recipe: See `edgead.line.recipe.load`.
        open_model: Loads the graph of a bundle; the simulator has its own, as for `source` and `sink`.
        start: Otherwise the line is only put together: nothing is taken or written.

    Raises:
        LineError: Something cannot be opened; what was open is closed again.
        EdgeADError: A bundle cannot be loaded.
    """
    settings = recipe.settings
    if open_model is None:
        open_model = bundle_opener(settings.backend, settings.threads)

    def load(bundle: Bundle) -> Inspector:
        return Inspector(bundle, open_model=open_model, keep_warm_ms=settings.keep_warm_ms)

    with ExitStack() as opened:
        journal = Journal(settings.journal, sync=settings.sync)
        opened.callback(journal.close)
        paths = [inspection.bundle for config in recipe.cameras for inspection in config.recipes]
        bundles = Bundles(paths, load)
        opened.callback(bundles.close)
        desk = Desk(journal, settings.reject)
        line = Line(settings.name, desk, bundles, in_flight=settings.in_flight, stall_s=settings.stall_s)
        cameras = []
        for config in recipe.cameras:
            with _placed(recipe, f"camera {config.name}"):
                found = source(config)
            opened.callback(found.close)
            reopen = None if config.kind in FILES else _opener(source, config)
            cameras.append(Camera(config, found, reopen))
        line.add(cameras)
        outlets = {}
        for each in recipe.sinks:
            with _placed(recipe, f"sink {each.name}"):
                first = sink(each, line)
                mark = Mark(_mark_path(settings.journal, each)) if each.kind in MARKED else None
            outlets[each.name] = outlet = Outlet(
                first, name=each.name, reopen=_sink_opener(sink, each, line), mark=mark
            )
            opened.callback(outlet.close, 0.5)
        if start:
            line.start(outlets)
            opened.pop_all()
    return line


def _mark_path(journal: Path, sink: SinkConfig) -> Path:
    return journal / f"sink-{quote(sink.name, safe='')}.mark"


def _opener(source: Callable[[CameraConfig], Source], config: CameraConfig) -> Callable[[], Source]:
    return lambda: source(config)


def _sink_opener(
    sink: Callable[[SinkConfig, Controls], Sink], config: SinkConfig, controls: Controls
) -> Callable[[], Sink]:
    return lambda: sink(config, controls)


@contextmanager
def _placed(recipe: Recipe, what: str) -> Iterator[None]:
    """Says in which line of the file it stands."""
    try:
        yield
    except EdgeADError as error:
        raise LineError(f"{recipe.place(what)}{error}") from error
