"""The engine of a bundle on this box: from the cache if it fits, else built.

A new engine is in memory only, until it has given the verdicts of the reference (`accept`): the engine
that was in force stays until then. An engine built ahead of time is stored unverified (`keep`) and
proves itself when its box loads it first.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgead.bundle import MODEL, Bundle
from edgead.engine import RECIPE, EngineKey, Sidecar, Verification, this_platform
from edgead.engines import cache
from edgead.engines.build import BuildOptions, Progress, build_engine, check_target, targets
from edgead.errors import BackendError, EngineError
from edgead.flavour import CLASSIC, NAMES, RTX, Flavour, open_flavour
from edgead.runtime.cuda import GpuInfo, open_device

NONE_YET = "there is none yet"
CACHED = "from the cache"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An engine that is ready to load.

    Attributes:
        plan: Its bytes; where they came from a file, size and SHA-256 were checked.
        sidecar: What it was built from and for.
        path: Its file; None while it is only in memory.
        verified: It has given the verdicts of the reference, on this GPU with this driver and with the
            threshold and calibration of this bundle.
        reason: Why it was built, or `CACHED`.
        folder: The cache.
        gpu: The GPU that it was prepared for, if it is at hand.
        entry: Where it is in the cache; None when it is new.
        refused: The one of the same key that it replaces because TensorRT did not load it.
    """

    plan: bytes = field(repr=False)
    sidecar: Sidecar
    path: Path | None
    verified: bool
    reason: str
    folder: Path
    gpu: GpuInfo | None
    entry: cache.Entry | None
    refused: cache.Entry | None = None

    @property
    def key(self) -> EngineKey:
        return self.sidecar.key

    @property
    def is_new(self) -> bool:
        """Built just now, and not yet accepted."""
        return self.entry is None


def prepare_engine(
    bundle: Bundle,
    flavour: Flavour,
    gpu: GpuInfo | None,
    *,
    batches: tuple[int, ...] | None = None,
    workspace_mib: int | None = None,
    target: str | None = None,
    timing_cache: Path | None = None,
    folder: Path | None = None,
    rebuild: str | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Takes an engine from the cache or builds it; one log line says why it was built.

    Args:
        bundle: A verified bundle.
        flavour: The library.
        gpu: The GPU at hand. None: build ahead of time, with TensorRT for RTX and a `target`.
        batches: As in `BuildOptions`. None takes an engine with any, and builds with those of the engine
            that is replaced.
        workspace_mib: Likewise.
        target: Compute capability, such as "sm86"; None is that of the GPU.
        timing_cache: As in `BuildOptions`.
        folder: Of the cache; None is `cache.default_folder`.
        rebuild: Why an engine in the cache is of no use although its key fits. It is set aside when the
            new one is kept, not before: TensorRT may have refused it for want of memory alone.
        progress: As in `build_engine`.

    Raises:
        EngineError: There is no such engine and none can be built.
    """
    folder = folder or cache.default_folder()
    given = BuildOptions(batches or BuildOptions.batches, workspace_mib)
    names = {"batches": batches is not None, "workspace_mib": workspace_mib is not None}
    free = [name for name, is_given in names.items() if not is_given]
    wanted = _key(bundle, flavour, gpu, target, given)
    found = _look_up(folder, bundle, wanted, free)
    if found.entry and found.plan is not None and not rebuild:
        sidecar = found.entry.sidecar
        is_verified = _holds_here(sidecar.verified, gpu, bundle)
        path = found.entry.engine_path
        return Prepared(found.plan, sidecar, path, is_verified, found.reason, folder, gpu, found.entry)
    refused = found.entry if rebuild and found.plan is not None else None
    reason = rebuild or found.reason
    key = _like(wanted, found.entry, free)
    tell = logger.info if reason == NONE_YET else logger.warning
    tell("building the %s engine of %s for %s: %s", flavour.name, bundle.path, key.target, reason)
    options = BuildOptions(key.batches, key.workspace_mib, timing_cache)
    start = time.perf_counter()
    plan = build_engine(
        bundle.model_bytes(), flavour, target=key.target, options=options, progress=progress
    )
    seconds = time.perf_counter() - start
    sidecar = cache.describe(plan, key, bundle.manifest.name, seconds)
    return Prepared(plan, sidecar, None, False, reason, folder, gpu, None, refused)


def accept(prepared: Prepared, replay: Mapping[str, Any]) -> Path | None:
    """Puts an engine into force that gave the verdicts of the reference on this box.

    Args:
        replay: The figures of that check, for the sidecar.

    Returns:
        Its file. None if the folder cannot be written, which is a warning only: the engine is in memory.
    """
    try:
        return keep(prepared, replay)
    except EngineError as error:
        again = "be built again" if prepared.is_new else "have to answer the golden samples again"
        logger.warning("%s. It is used from memory and will %s the next time", error, again)
        return None


def keep(
    prepared: Prepared, replay: Mapping[str, Any] | None = None, *, out: Path | None = None
) -> Path:
    """Stores an engine.

    Args:
        replay: As for `accept`; None stores it unverified.
        out: Folder that gets the engine and its sidecar, named as by `cache.stem`, instead of the cache.

    Raises:
        EngineError: The folder cannot be written; an engine that was there still is.
    """
    sidecar, entry = prepared.sidecar, prepared.entry
    if replay is not None:
        assert prepared.gpu is not None, "without a GPU nothing was verified"
        gpu = prepared.gpu
        sidecar = replace(
            sidecar, verified=Verification(cache.now_utc(), gpu.name, gpu.driver, _plain(replay))
        )
    folder = out or prepared.folder
    try:
        if out:
            return cache.write_pair(out, prepared.plan, sidecar).engine_path
        if entry is None:
            if prepared.refused:  # else it would be as good as the new one
                cache.set_aside(prepared.refused.engine_path)
            return cache.store(folder, prepared.plan, sidecar).engine_path
        if sidecar.verified:
            cache.record(entry, sidecar.verified)
        return entry.engine_path
    except OSError as error:
        reason = error.strerror or str(error)
        raise EngineError(
            f"the engine cannot be written to {folder} ({reason}): make room or get the rights there, "
            "or choose another folder with EDGEAD_CACHE (edgead build: --out)"
        ) from error


def choose_flavour(backend: str, gpu: GpuInfo | None) -> Flavour:
    """Opens a flavour by name. "auto": the classic one if it is installed and there is a GPU, else RTX.

    Raises:
        EngineError: It cannot be opened; for "auto": none can.
    """
    if backend != "auto":
        return open_flavour(backend)
    if gpu is None:
        return open_flavour(RTX)
    reasons = []
    for name in NAMES:
        try:
            return open_flavour(name)
        except EngineError as error:
            reasons.append(str(error))
    raise EngineError("\n".join(reasons))


def detect_gpu() -> tuple[GpuInfo | None, str]:
    """Returns the first GPU, or None and why there is none."""
    try:
        device = open_device()
    except BackendError as error:
        return None, str(error)
    info = device.info
    device.close()
    return info, ""


@dataclass(frozen=True)
class Box:
    """What engines have to fit.

    Attributes:
        gpu: None if there is none.
        why_no_gpu: "" if there is one.
        versions: Name to version of the flavours that are installed.
    """

    gpu: GpuInfo | None
    why_no_gpu: str
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> Box:
        versions = {}
        for name in NAMES:
            try:
                versions[name] = open_flavour(name).version
            except EngineError:
                continue
        return cls(*detect_gpu(), versions)

    def why_stale(self, key: EngineKey) -> str:
        """Why an engine will not be used on this box any more; "" if it can be."""
        now = replace(
            key,
            version=self.versions.get(key.flavour, key.version),
            platform=this_platform(key.flavour),
            recipe=RECIPE,
        )
        if key.gpu is not None and self.gpu is not None:
            now = replace(now, gpu=self.gpu.name, driver=self.gpu.driver)
        return "; ".join(key.differences(now))

    def why_not(self, key: EngineKey) -> str:
        """Why an engine cannot be used on this box now; "" if it can."""
        if key.flavour not in self.versions:
            return f"{key.flavour} is not installed"
        stale = self.why_stale(key)
        if stale or self.gpu is None:
            return stale or "there is no GPU"
        return "" if self.gpu.sm == key.target else f"the GPU is {self.gpu.sm}"


@dataclass(frozen=True)
class _Found:
    """An engine in the cache. Without a plan it does not fit or is damaged, as the reason says."""

    entry: cache.Entry | None
    plan: bytes | None
    reason: str


def _look_up(folder: Path, bundle: Bundle, wanted: EngineKey, free: list[str]) -> _Found:
    def differences(entry: cache.Entry) -> list[str]:
        return entry.sidecar.key.differences(_like(wanted, entry, free))

    entry = None
    for _ in range(2):
        try:
            entry = cache.find(folder, bundle.manifest.name, wanted, lambda e: not differences(e))
        except EngineError as error:
            return _Found(None, None, str(error))
        if entry is None:
            return _Found(None, None, NONE_YET)
        if found := differences(entry):
            return _Found(entry, None, f"the one in the cache is for {'; '.join(found)}")
        try:
            return _Found(entry, entry.read_plan(), CACHED)
        except FileNotFoundError:
            continue  # another process has just replaced it, or somebody deleted it
        except EngineError as error:
            cache.set_aside(entry.engine_path)
            return _Found(entry, None, str(error))
        except OSError as error:
            return _Found(entry, None, f"{entry.engine_path} cannot be read ({error.strerror})")
    assert entry is not None
    return _Found(entry, None, f"{entry.engine_path} is missing")


def _like(wanted: EngineKey, entry: cache.Entry | None, free: list[str]) -> EngineKey:
    """The wanted key, with the build options that nobody asked for as they are in the cache."""
    if entry is None:
        return wanted
    return replace(wanted, **{name: getattr(entry.sidecar.key, name) for name in free})


def _key(
    bundle: Bundle,
    flavour: Flavour,
    gpu: GpuInfo | None,
    target: str | None,
    options: BuildOptions,
) -> EngineKey:
    bound = None if flavour.is_rtx else gpu
    return EngineKey(
        graph_sha256=bundle.manifest.members[MODEL].sha256,
        flavour=flavour.name,
        version=flavour.version,
        target=choose_target(flavour, gpu, target),
        gpu=bound.name if bound else None,
        driver=bound.driver if bound else None,
        platform=this_platform(flavour.name),
        batches=options.batches,
        workspace_mib=options.workspace_mib,
    )


def choose_target(flavour: Flavour, gpu: GpuInfo | None, target: str | None) -> str:
    """The compute capability to build for; `target` None is that of the GPU.

    Raises:
        EngineError: This library cannot build for it here.
    """
    if flavour.name == CLASSIC:
        if gpu is None:
            raise EngineError(
                "classic TensorRT builds for the GPU at hand and there is none here: build on the "
                "device, or ahead of time for an RTX GPU: --backend tensorrt-rtx --target sm86"
            )
        if target not in (None, gpu.sm):
            raise EngineError(
                f"classic TensorRT builds only for the GPU at hand ({gpu.name}, {gpu.sm}), asked for is "
                f"{target}: build on that device, or with --backend tensorrt-rtx"
            )
        return gpu.sm
    chosen = target or (gpu.sm if gpu else None)
    if chosen is None:
        raise EngineError(
            "there is no GPU here whose capability could be the target: name one with --target, of "
            f"{', '.join(targets(flavour))}"
        )
    check_target(flavour, chosen)
    return chosen


def _holds_here(verified: Verification | None, gpu: GpuInfo | None, bundle: Bundle) -> bool:
    if verified is None or gpu is None:
        return False
    manifest = bundle.manifest
    return (
        (verified.gpu, verified.driver) == (gpu.name, gpu.driver)
        # Older records have neither.
        and verified.replay.get("threshold") == manifest.threshold.value
        and verified.replay.get("calibration") == list(manifest.calibration.values)
    )


def _plain(value: Any) -> Any:
    """As JSON has it; infinity and NaN, which it has not, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return float(value) if math.isfinite(value) else str(float(value))
