"""From an ONNX graph to an engine, with classic TensorRT (10.0 or newer) and with TensorRT for RTX.

The precision is that of the graph: networks are strongly typed and no precision flag is set. Only calls
that TensorRT 10.3 to 11.4 and TensorRT for RTX 1.7 have in common are used; the others are probed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgead.errors import EngineError
from edgead.files import write_bytes
from edgead.flavour import Flavour, failure

IMAGE = "image"
Progress = Callable[[str, int, int], None]  # name of a phase, steps done, steps in all

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        batches: Batch sizes, made ascending. Each gets an optimisation profile of its own, in this
            order, with exactly that size: the runtime fills a smaller batch up to the next one.
        workspace_mib: Limit for the builder's scratch memory; None is all of the device.
        timing_cache: File with measured kernel times, read and rewritten; makes the next build quicker.
            Classic TensorRT only.

    Raises:
        EngineError: No batch size, one below 1, or a workspace below 1.
    """

    batches: tuple[int, ...] = (1,)
    workspace_mib: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))
        if not self.batches or self.batches[0] < 1:
            raise EngineError(f"batch sizes {list(self.batches)}: expected one or more, each at least 1")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise EngineError(f"workspace of {self.workspace_mib} MiB: expected at least 1")


def build_engine(
    model: bytes,
    flavour: Flavour,
    *,
    target: str,
    options: BuildOptions = BuildOptions(),
    progress: Progress | None = None,
) -> bytes:
    """Builds an engine.

    Args:
        model: ONNX graph with an input `image` [N, ...], N free.
        flavour: The library.
        target: Compute capability, such as "sm87". Classic TensorRT builds for the GPU that is current
            in this thread, whose capability it must be.
        options: Batch sizes and limits.
        progress: Called in any thread, many times. An exception in it, also KeyboardInterrupt, ends the
            build and is raised here.

    Returns:
        The plan, as `trtexec` writes and reads it.

    Raises:
        EngineError: The graph, the target or the machine does not allow it; with all that TensorRT said,
            and with cause and remedy where they are known.
    """
    log = flavour.new_log()
    try:
        return _build(model, flavour, log, target, options, progress)
    except EngineError:
        raise
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:  # what the bindings raise
        raise failure(f"building the engine for {target} failed ({error})", log) from error


def _build(
    model: bytes,
    flavour: Flavour,
    log: Any,
    target: str,
    options: BuildOptions,
    progress: Progress | None,
) -> bytes:
    trt: Any = flavour.module
    check_target(flavour, target)
    if progress:
        progress("parse", 0, 1)
    builder, network, _parser = parse_network(model, flavour, log)
    config = _checked(builder.create_builder_config(), "the builder gives no configuration", log)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names the layers in reports
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and not what a float32 graph says
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    _set_target(config, flavour, target, log)
    _add_profiles(builder, network, config, options.batches, log)
    if options.timing_cache is not None:
        _load_timing_cache(config, flavour, options.timing_cache, log)
    monitor = _new_monitor(trt, progress, log) if progress else None
    if monitor is not None:
        config.progress_monitor = monitor
    memory = builder.build_serialized_network(network, config)
    if interrupt := (monitor and monitor.error) or log.interrupt:
        raise interrupt
    plan = bytes(_checked(memory, f"building the engine for {target} failed", log))
    if options.timing_cache is not None and not flavour.is_rtx:
        _save_timing_cache(config, options.timing_cache)
    return plan


def parse_network(model: bytes, flavour: Flavour, log: Any) -> tuple[Any, Any, Any]:
    """Returns the builder, the network and the parser, which has to live as long as the network.

    Raises:
        EngineError: TensorRT does not take the graph; with every complaint of its parser.
    """
    trt: Any = flavour.module
    builder = trt.Builder(log)
    # TensorRT 10 needs the flag; later ones are strongly typed in any case.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = _checked(builder.create_network(flags), "the builder gives no network", log)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        said = [_complaint(parser.get_error(index)) for index in range(parser.num_errors)]
        log.lines[:] = said or log.lines  # the log repeats them, in parts
        raise failure(f"{flavour.name} {flavour.version} does not take the graph", log)
    return builder, network, parser


def _complaint(item: Any) -> str:
    """Text of a ParserError."""
    if not item.node_operator():
        return str(item.desc())
    return f"node {item.node()} {item.node_name()} ({item.node_operator()}): {item.desc()}"


def targets(flavour: Flavour) -> dict[str, Any]:
    """Target ("sm86") -> value, of what can be built ahead of time; empty for classic TensorRT."""
    capabilities: Any = getattr(flavour.module, "ComputeCapability", None)
    if not flavour.is_rtx or capabilities is None:
        return {}
    members = capabilities.__members__.items()
    return {name.lower(): value for name, value in members if name.startswith("SM")}


def check_target(flavour: Flavour, target: str) -> None:
    """Raises EngineError for a target that TensorRT for RTX does not build for."""
    if flavour.is_rtx and target not in targets(flavour):
        raise EngineError(
            f"{flavour.name} {flavour.version} does not build for {target}, only for "
            f"{', '.join(targets(flavour))}: use classic TensorRT on this GPU (--backend tensorrt)"
        )


def _set_target(config: Any, flavour: Flavour, target: str, log: Any) -> None:
    if not flavour.is_rtx:
        return
    if not (hasattr(config, "num_compute_capabilities") and hasattr(config, "set_compute_capability")):
        raise EngineError(f"{flavour.name} {flavour.version} cannot build ahead of time; install 1.7")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(targets(flavour)[target], 0):
        raise failure(f"{flavour.name} {flavour.version} refuses the target {target}", log)


def _add_profiles(builder: Any, network: Any, config: Any, batches: tuple[int, ...], log: Any) -> None:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    image = next((tensor for tensor in inputs if tensor.name == IMAGE), None)
    if image is None:
        raise EngineError(
            f"the graph has the inputs {[tensor.name for tensor in inputs]}, none is called {IMAGE!r}: "
            "export the bundle again"
        )
    batch, *rest = tuple(image.shape)
    for size in batches:
        if batch not in (-1, size):
            raise EngineError(
                f"the graph takes batches of {batch} only, asked for is {size}: build with "
                f"--batch {batch}, or export the bundle again"
            )
        profile = _checked(builder.create_optimization_profile(), "the builder gives no profile", log)
        profile.set_shape(IMAGE, (size, *rest), (size, *rest), (size, *rest))
        if config.add_optimization_profile(profile) < 0:
            raise failure(f"a profile for the batch size {size} is refused", log)


def _checked(item: Any, what: str, log: Any) -> Any:
    """Returns what TensorRT gave, or raises when it gave None."""
    if item is None:
        raise failure(what, log)
    return item


def _load_timing_cache(config: Any, flavour: Flavour, path: Path, log: Any) -> None:
    if flavour.is_rtx:
        logger.warning("timing cache %s is not used: %s has none", path, flavour.name)
        return
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise EngineError(f"timing cache {path}: cannot be read ({error.strerror})") from None
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        logger.warning("timing cache %s is of another TensorRT or GPU: begun anew", path)
        cache = _checked(config.create_timing_cache(b""), "there is no timing cache", log)
        if not config.set_timing_cache(cache, False):
            raise failure("an empty timing cache is refused", log)


def _save_timing_cache(config: Any, path: Path) -> None:
    """Writes it back; a failure costs the time of the next build, not this one."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        write_bytes(path, bytes(cache.serialize()))
    except OSError as error:
        logger.warning("timing cache %s: not written (%s)", path, error.strerror)


def _new_monitor(trt: Any, progress: Progress, log: Any) -> Any:
    """An IProgressMonitor that passes on; None where the library has none. `error` is what it raised."""
    base: Any = getattr(trt, "IProgressMonitor", None)
    if base is None:
        progress("build", 0, 1)
        return None

    class Monitor(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.steps: dict[str, int] = {}
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                progress(phase_name, step + 1, self.steps.get(phase_name, step + 1))
            except BaseException as error:  # nothing may be raised through TensorRT's own frames
                self.error = error
            return (self.error or log.interrupt) is None

    return Monitor()
