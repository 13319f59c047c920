"""The folder with the engines of this box.

An engine is two files:

    bottle-3f2a91c0-tensorrt-sm87-5b1c66d0.engine   the plan, as trtexec and Triton read it
    bottle-3f2a91c0-tensorrt-sm87.json              the sidecar (`edgead.engine`), which names the plan

with the beginnings of the SHA-256 of graph and plan in the names. A new engine gets a new name and comes
into force when the sidecar is replaced, which is one step: at any moment, also after a power cut and
with several processes at work, there is the old pair or the new one. A file that does not match its
checksums is set aside, as `<name>.corrupt-<UTC>`. An engine is code: keep the folder to yourself.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from edgead import __version__
from edgead.engine import EngineKey, Sidecar, Verification
from edgead.errors import EngineError
from edgead.files import try_lock, write_bytes

LOCK_TIMEOUT_S = 10.0
_STEM = r"[^/]+-[0-9a-f]{8}-(tensorrt|tensorrt-rtx)-sm\d+"
ENGINE_NAME = re.compile(_STEM + r"(-[0-9a-f]{8})?\.engine")  # copied from `edgead build --out`: without
SIDECAR_NAME = re.compile(_STEM + r"\.json")
SET_ASIDE_NAME = re.compile(r".+\.(engine|json)\.corrupt-\d{8}T\d{6}Z")
TEMPORARY_NAME = re.compile(r"\..+\.(engine|json)\.[0-9a-f]{8}\.tmp")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """An engine in the folder, as its sidecar describes it; the plan is not checked yet."""

    path: Path
    sidecar: Sidecar

    @property
    def engine_path(self) -> Path:
        return self.path.with_name(self.sidecar.file)

    def read_plan(self) -> bytes:
        """Returns the plan after checking size and SHA-256.

        Raises:
            EngineError: It is not the one that was built.
            OSError: It cannot be read.
        """
        plan = self.engine_path.read_bytes()
        try:
            self.sidecar.check_plan(plan)
        except EngineError as error:
            raise EngineError(f"{self.engine_path} is damaged: {error}") from None
        return plan


def default_folder() -> Path:
    """The environment variable EDGEAD_CACHE, else edgead/engines in the user's cache folder.

    Raises:
        EngineError: The user has no home folder, as in a container that was started with `--user`.
    """
    named, base = os.environ.get("EDGEAD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if named:
            return Path(named).expanduser()
        return (Path(base) if base else Path.home() / ".cache") / "edgead" / "engines"
    except RuntimeError as error:
        raise EngineError(
            f"no folder for the engines ({error}): set EDGEAD_CACHE to one that only this user can write"
        ) from None


def now_utc() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def readable(name: str) -> str:
    """A class of parts as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")[:40] or "engine"


def stem(bundle_name: str, key: EngineKey) -> str:
    """The name that all engines of one graph, flavour and target share."""
    return f"{readable(bundle_name)}-{key.graph_sha256[:8]}-{key.flavour}-{key.target}"


def find(
    folder: Path, bundle_name: str, key: EngineKey, fits: Callable[[Entry], bool] = lambda entry: True
) -> Entry | None:
    """Returns the engine for the graph, flavour and target of `key`; the rest of the key may differ.

    One with another name counts too: it was copied here, or is for a bundle with another name. Of
    several it is the first that `fits`, or else the first: that of the right name, then the newest.

    Raises:
        EngineError: There is one whose sidecar is damaged; it was set aside.
    """
    own = _find_by_name(folder / f"{stem(bundle_name, key)}.json")
    if own and fits(own):
        return own
    others = [entry for entry in entries(folder) if _identity(entry.sidecar.key) == _identity(key)]
    others.sort(key=lambda entry: entry.sidecar.utc, reverse=True)
    found = [own, *others] if own else others
    return next(filter(fits, found), found[0] if found else None)


def _find_by_name(path: Path) -> Entry | None:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror})") from None
    try:
        return Entry(path, Sidecar.from_bytes(content))
    except EngineError as error:
        set_aside(path, content)
        raise EngineError(f"{path} is damaged, {error}") from None


def _identity(key: EngineKey) -> tuple[str, str, str]:
    return key.graph_sha256, key.flavour, key.target


def entries(folder: Path) -> list[Entry]:
    """All engines in a folder whose sidecar is whole, by name; other files are passed over."""
    found = map(_read, sorted(folder.glob("*.json")))
    return [entry for entry in found if entry is not None]


def describe(plan: bytes, key: EngineKey, bundle_name: str, seconds: float) -> Sidecar:
    """The sidecar of an engine that was built just now."""
    digest = hashlib.sha256(plan).hexdigest()
    return Sidecar(
        key=key,
        bundle=bundle_name,
        file=f"{stem(bundle_name, key)}-{digest[:8]}.engine",
        sha256=digest,
        size_bytes=len(plan),
        utc=now_utc(),
        seconds=round(seconds, 3),
        edgead=__version__,
    )


def store(folder: Path, plan: bytes, sidecar: Sidecar) -> Entry:
    """Puts an engine into force; an engine that was is deleted afterwards.

    If another process has meanwhile stored one with the same key, which is at least as well verified,
    that one stays.

    Returns:
        The engine that is in force now.

    Raises:
        OSError: The folder cannot be written; an engine that was in force still is.
    """
    entry = Entry(folder / f"{stem(sidecar.bundle, sidecar.key)}.json", sidecar)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder):
        old = _read(entry.path)
        if old and _is_as_good(old, sidecar):
            return old
        write_bytes(entry.engine_path, plan)
        write_bytes(entry.path, sidecar.to_bytes())
        # Only what the old sidecar named: where there are no locks, others can be about to be named.
        if old and old.sidecar.file != sidecar.file and ENGINE_NAME.fullmatch(old.sidecar.file):
            old.engine_path.unlink(missing_ok=True)
    return entry


def write_pair(folder: Path, plan: bytes, sidecar: Sidecar) -> Entry:
    """Writes `<stem>.engine` and `<stem>.json`, for the user to carry elsewhere.

    Raises:
        OSError: The folder cannot be written.
    """
    name = stem(sidecar.bundle, sidecar.key)
    entry = Entry(folder / f"{name}.json", replace(sidecar, file=f"{name}.engine"))
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(entry.engine_path, plan)
    write_bytes(entry.path, entry.sidecar.to_bytes())
    return entry


def record(entry: Entry, verified: Verification) -> None:
    """Notes in the sidecar that an engine was verified, unless another engine has taken its place.

    Raises:
        OSError: The folder cannot be written.
    """
    with _locked(entry.path.parent):
        if entry.path.read_bytes() == entry.sidecar.to_bytes():
            write_bytes(entry.path, replace(entry.sidecar, verified=verified).to_bytes())


def set_aside(path: Path, content: bytes | None = None) -> None:
    """Renames a damaged file to `<name>.corrupt-<UTC>`; only warns when the folder cannot be written.

    Args:
        content: What was found damaged: if the file has changed since, it stays.
    """
    stamp = now_utc().replace(":", "").replace("-", "")
    try:
        with _locked(path.parent):
            if content is None or path.read_bytes() == content:
                path.rename(path.with_name(f"{path.name}.corrupt-{stamp}"))
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("%s is damaged and cannot be set aside (%s)", path, error.strerror)


def prune(
    folder: Path,
    why_stale: Callable[[EngineKey], str],
    *,
    everything: bool = False,
    dry_run: bool = False,
) -> list[tuple[Path, str]]:
    """Deletes engines that are of no more use, and what killed or failed processes left.

    Files of other names than ours stay, unless a sidecar describes them.

    Args:
        why_stale: Tells why no bundle on this box can use an engine of that key any more; "" if one can.
        everything: Deletes all engines.
        dry_run: Deletes nothing.

    Returns:
        The files and why each goes.

    Raises:
        OSError: The folder cannot be written.
    """
    if not folder.is_dir():
        return []
    with contextlib.nullcontext(True) if dry_run else _locked(folder) as is_held:
        found = list(_prunable(folder, why_stale, everything, with_leftovers=is_held))
        if not dry_run:
            for path, _ in found:
                path.unlink(missing_ok=True)
    return found


def _prunable(
    folder: Path, why_stale: Callable[[EngineKey], str], everything: bool, *, with_leftovers: bool
) -> Iterator[tuple[Path, str]]:
    """The sidecar of an engine comes before its plan, so that there is never a sidecar alone."""
    named = set()
    for path in sorted(folder.glob("*.json")):
        entry = _read(path)
        if entry is None:
            if SIDECAR_NAME.fullmatch(path.name):
                yield path, "damaged"
            continue
        named.add(entry.sidecar.file)
        why = "all are to go" if everything else why_stale(entry.sidecar.key) or _damage(entry)
        if why:
            yield path, why
            if entry.engine_path.is_file():
                yield entry.engine_path, why
    for path in sorted(folder.iterdir()):
        if SET_ASIDE_NAME.fullmatch(path.name):
            yield path, "set aside as damaged"
        elif with_leftovers and TEMPORARY_NAME.fullmatch(path.name):
            yield path, "left by a process that was ended"
        elif with_leftovers and ENGINE_NAME.fullmatch(path.name) and path.name not in named:
            yield path, "no sidecar names it"


def _read(path: Path) -> Entry | None:
    """The engine of a sidecar, if that is whole."""
    try:
        return Entry(path, Sidecar.from_bytes(path.read_bytes()))
    except (EngineError, OSError):
        return None


def _damage(entry: Entry) -> str:
    try:
        entry.read_plan()
    except (EngineError, OSError) as error:
        return str(error)
    return ""


def _is_as_good(old: Entry, new: Sidecar) -> bool:
    same = old.sidecar.key == new.key and (old.sidecar.verified or not new.verified)
    return bool(same) and not _damage(old)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Keeps other processes from changing the folder meanwhile; gives whether it does.

    For tidiness alone (every change is whole by itself): where there are no locks (Windows, some network
    drives) or a holder hangs, it goes on without.
    """
    with (folder / ".lock").open("ab") as file:
        give_up = time.monotonic() + LOCK_TIMEOUT_S
        while (is_held := try_lock(file)) is False:
            if time.monotonic() > give_up:
                logger.warning("%s has been locked for %g s: going on", folder, LOCK_TIMEOUT_S)
                break
            time.sleep(0.02)
        yield bool(is_held)
