"""The folder of engines: whole pairs at any moment, whatever happens to files and processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgead.engine import EngineKey, Sidecar, Verification
from edgead.engines import cache
from edgead.errors import EngineError

KEY = EngineKey(
    graph_sha256="3f2a91c0" + 56 * "1",
    flavour="tensorrt",
    version="10.3.0",
    target="sm87",
    gpu="Orin",
    driver="12.6",
    platform="linux-aarch64-l4t36.4.3",
    batches=(1,),
    workspace_mib=None,
)
PLAN, OTHER = b"first plan" * 100, b"second plan" * 100
VERIFIED = Verification("2026-01-31T12:01:00Z", "Orin", "12.6", {"images": 8})


def described(plan: bytes = PLAN, key: EngineKey = KEY, verified: Verification | None = None) -> Sidecar:
    sidecar = cache.describe(plan, key, "bottle", 1.5)
    return replace(sidecar, utc="2026-01-31T12:00:00Z", verified=verified)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def no_engine_is_stale(_: EngineKey) -> str:
    return ""


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEAD_CACHE", str(tmp_path / "mine"))
    assert cache.default_folder() == tmp_path / "mine"
    monkeypatch.delenv("EDGEAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_folder() == tmp_path / "xdg" / "edgead" / "engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache.default_folder() == tmp_path / ".cache" / "edgead" / "engines"


def test_the_folder_in_a_home_that_has_to_be_looked_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGEAD_CACHE", "~/engines")  # as a service file has it: no shell expands it
    assert cache.default_folder() == tmp_path / "engines"

    monkeypatch.setenv("EDGEAD_CACHE", "~no-such-user/engines")
    with pytest.raises(EngineError, match=r"no folder .*home directory.*: set EDGEAD_CACHE"):
        cache.default_folder()


def test_stores_a_readable_pair_and_finds_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "engines"
    assert cache.find(folder, "bottle", KEY) is None and cache.entries(folder) == []
    entry = cache.store(folder, PLAN, described())
    digest = hashlib.sha256(PLAN).hexdigest()
    assert names(folder) == [
        f"bottle-3f2a91c0-tensorrt-sm87-{digest[:8]}.engine",
        "bottle-3f2a91c0-tensorrt-sm87.json",
    ]
    assert entry.engine_path.read_bytes() == PLAN  # plain, for trtexec
    assert json.loads(entry.path.read_text())["engine"]["sha256"] == digest
    assert cache.find(folder, "bottle", KEY) == entry == cache.entries(folder)[0]
    assert entry.read_plan() == PLAN
    if os.name == "posix":
        assert folder.stat().st_mode & 0o077 == 0  # code that others cannot replace


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bottle", "bottle"),
        ("Kappe 3/4 (rot)", "Kappe-3-4-rot"),
        ("../../etc/passwd", "etc-passwd"),
        (".hidden", "hidden"),
        ("瓶", "engine"),
        ("x" * 500, "x" * 40),
    ],
)
def test_any_name_of_a_bundle_gives_a_harmless_file_name(name: str, expected: str) -> None:
    assert cache.readable(name) == expected


def test_a_new_engine_replaces_the_old_one(tmp_path: Path) -> None:
    cache.store(tmp_path, PLAN, described(verified=VERIFIED))
    newer = replace(KEY, driver="12.8")
    entry = cache.store(tmp_path, OTHER, described(OTHER, newer))
    assert cache.find(tmp_path, "bottle", KEY) == entry and entry.read_plan() == OTHER
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    ("first", "second", "stays"),
    [(None, None, True), (VERIFIED, None, True), (VERIFIED, VERIFIED, True), (None, VERIFIED, False)],
)
def test_the_first_of_two_equal_engines_stays_unless_the_second_is_verified(
    first: Verification | None, second: Verification | None, stays: bool, tmp_path: Path
) -> None:
    cache.store(tmp_path, PLAN, described(verified=first))
    entry = cache.store(tmp_path, OTHER, described(OTHER, verified=second))
    assert entry.read_plan() == (PLAN if stays else OTHER)
    assert cache.find(tmp_path, "bottle", KEY) == entry and len(names(tmp_path)) == 2


def test_a_damaged_engine_does_not_stay(tmp_path: Path) -> None:
    old = cache.store(tmp_path, PLAN, described(verified=VERIFIED))
    old.engine_path.write_bytes(PLAN[:-1])
    assert cache.store(tmp_path, OTHER, described(OTHER)).read_plan() == OTHER


def test_engines_for_other_targets_and_libraries_are_neighbours(tmp_path: Path) -> None:
    for change in ({}, {"target": "sm86"}, {"flavour": "tensorrt-rtx"}, {"graph_sha256": "0" * 64}):
        cache.store(tmp_path, PLAN, described(key=replace(KEY, **change)))  # type: ignore[arg-type]
    assert len(cache.entries(tmp_path)) == 4


def test_an_engine_that_was_copied_here_is_found(tmp_path: Path) -> None:
    """From `edgead build --out` on another machine, under a name of the user."""
    entry = cache.write_pair(tmp_path, PLAN, described())
    assert names(tmp_path) == [
        "bottle-3f2a91c0-tensorrt-sm87.engine",
        "bottle-3f2a91c0-tensorrt-sm87.json",
    ]
    (tmp_path / "package.json").write_text("{}")
    assert cache.find(tmp_path, "cup", KEY) == entry
    assert cache.find(tmp_path, "cup", replace(KEY, target="sm86")) is None
    assert "package.json" in names(tmp_path)


def test_verification_is_recorded_unless_the_engine_was_replaced(tmp_path: Path) -> None:
    entry = cache.store(tmp_path, PLAN, described())
    cache.record(entry, VERIFIED)
    assert cache.find(tmp_path, "bottle", KEY) == replace(entry, sidecar=described(verified=VERIFIED))
    cache.record(entry, replace(VERIFIED, gpu="another"))  # `entry` is not what is there any more
    found = cache.find(tmp_path, "bottle", KEY)
    assert found and found.sidecar.verified == VERIFIED


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(0, 255), in_sidecar=st.booleans())
def test_any_damage_is_noticed(where: float, flip: int, in_sidecar: bool, tmp_path: Path) -> None:
    """A changed byte anywhere in either file, or (flip 0) its end missing from there on."""
    entry = cache.store(tmp_path, PLAN, described())
    path = entry.path if in_sidecar else entry.engine_path
    content = path.read_bytes()
    at = int(where * len(content))
    path.write_bytes(
        content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :] if flip else content[:at]
    )
    with pytest.raises(EngineError, match="is damaged"):
        found = cache.find(tmp_path, "bottle", KEY)
        assert found
        found.read_plan()


def test_a_damaged_sidecar_is_set_aside(tmp_path: Path) -> None:
    entry = cache.store(tmp_path, PLAN, described())
    entry.path.write_bytes(b"half of a sid")
    with pytest.raises(EngineError, match="sm87.json is damaged, it is no JSON text"):
        cache.find(tmp_path, "bottle", KEY)
    (aside,) = tmp_path.glob("*.corrupt-*")
    assert aside.read_bytes() == b"half of a sid" and not entry.path.exists()
    assert cache.find(tmp_path, "bottle", KEY) is None
    assert cache.store(tmp_path, OTHER, described(OTHER)).read_plan() == OTHER


def test_only_what_was_found_damaged_is_set_aside(tmp_path: Path) -> None:
    """Another process may have repaired it meanwhile."""
    entry = cache.store(tmp_path, PLAN, described())
    cache.set_aside(entry.path, b"what stood there before")
    assert entry.path.exists()
    cache.set_aside(tmp_path / "absent.json")


def test_prune_deletes_what_is_of_no_more_use(tmp_path: Path) -> None:
    kept = cache.store(tmp_path, PLAN, described())
    stale = cache.store(tmp_path, OTHER, described(OTHER, replace(KEY, target="sm86")))
    damaged = cache.store(tmp_path, OTHER, described(OTHER, replace(KEY, target="sm89")))
    damaged.engine_path.write_bytes(b"")
    litter = {
        "bottle-3f2a91c0-tensorrt-sm87.json.corrupt-20260131T120000Z": "set aside as damaged",
        "bottle-tensorrt-sm87.engine.corrupt-20260131T120000Z": "set aside as damaged",
        ".bottle-3f2a91c0-tensorrt-sm87.json.0123abcd.tmp": "left by a process that was ended",
        "bottle-3f2a91c0-tensorrt-sm87-00000000.engine": "no sidecar names it",
        "cup-00000000-tensorrt-rtx-sm86.json": "damaged",
    }
    others = ["notes.txt", "package.json", "mine.engine", ".hidden"]
    for name in (*litter, *others):
        (tmp_path / name).write_bytes(b"x")
    before = names(tmp_path)

    def why(key: EngineKey) -> str:
        return "driver 12.4, now 12.6" if key.target == "sm86" else ""

    assert (found := cache.prune(tmp_path, why, dry_run=True)) and names(tmp_path) == before
    assert cache.prune(tmp_path, why) == found
    reasons = {path.name: reason for path, reason in found}
    assert {name: reasons[name] for name in litter} == litter
    assert reasons[stale.path.name] == reasons[stale.engine_path.name] == "driver 12.4, now 12.6"
    assert "is damaged: it has 0 bytes" in reasons[damaged.engine_path.name]
    assert len(reasons) == len(litter) + 4
    assert names(tmp_path) == sorted([kept.path.name, kept.engine_path.name, *others])
    assert cache.prune(tmp_path, why) == []
    everything = cache.prune(tmp_path, why, everything=True)
    assert [path for path, _ in everything] == [kept.path, kept.engine_path]
    assert names(tmp_path) == sorted(others)
    assert cache.prune(tmp_path / "absent", why) == []


KILLED = """
import os, sys
from pathlib import Path
import edgead.files
from edgead.engines import cache
from edgead.engine import EngineKey
folder, where = Path(sys.argv[1]), sys.argv[2]
real, calls = Path.replace, []
def replace(self, target):
    calls.append(target)
    if where == "before the engine" or (where == "before the sidecar" and len(calls) == 2):
        os._exit(9)  # as SIGKILL or a power cut: nothing is tidied up
    result = real(self, target)
    if where == "after the sidecar" and len(calls) == 2:
        os._exit(9)
    return result
Path.replace = replace
key = EngineKey("3f2a91c0" + 56 * "1", "tensorrt", "10.3.0", "sm87", "Orin", "13.0", "p", (1,), None)
cache.store(folder, b"new plan", cache.describe(b"new plan", key, "bottle", 1.0))
"""


@pytest.mark.parametrize(
    ("where", "expected", "leftovers"),
    [
        ("before the engine", PLAN, 1),
        ("before the sidecar", PLAN, 2),
        ("after the sidecar", b"new plan", 1),
    ],
)
def test_a_builder_that_is_killed_leaves_a_whole_engine(
    where: str, expected: bytes, leftovers: int, tmp_path: Path
) -> None:
    cache.store(tmp_path, PLAN, described(verified=VERIFIED))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), where], timeout=60, check=False)
    assert done.returncode == 9
    assert len(names(tmp_path)) == 2 + leftovers
    found = cache.find(tmp_path, "bottle", KEY)
    assert found and found.read_plan() == expected
    assert len(cache.prune(tmp_path, no_engine_is_stale)) == leftovers
    assert len(names(tmp_path)) == 2 and found.read_plan() == expected


WRITER = """
import sys, time
from dataclasses import replace
from pathlib import Path
from edgead.engines import cache
from edgead.engine import EngineKey
folder, number = Path(sys.argv[1]), int(sys.argv[2])
if sys.argv[3] == "without":
    import fcntl
    def refuse(*_):
        raise OSError(95, "Operation not supported")  # as some network drives do
    fcntl.flock = refuse
key = EngineKey("3f2a91c0" + 56 * "1", "tensorrt", "10.3.0", "sm87", "Orin", "13.0", "p", (1,), None)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    mine = replace(key, batches=(number, 100 + turn))  # never equal: each store replaces the one before
    plan = f"{number} {turn} ".encode() * 2000
    cache.store(folder, plan, cache.describe(plan, mine, "bottle", 1.0))
    found = cache.find(folder, "bottle", key)
    try:
        plan = found.read_plan()
    except FileNotFoundError:
        continue  # replaced between the two lines above
    assert plan == " ".join([*plan.decode().split()[:2], ""]).encode() * 2000
"""


@pytest.mark.parametrize("locks", ["with", "without"])
def test_many_processes_at_once_leave_one_whole_pair(locks: str, tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number), locks],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2, 3)
    ]
    for writer in writers:
        assert writer.stdout and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    (entry,) = cache.entries(tmp_path)
    assert entry.read_plan()
    leftovers = cache.prune(tmp_path, no_engine_is_stale)
    assert names(tmp_path) == sorted([entry.path.name, entry.engine_path.name])
    assert {why for _, why in leftovers} <= (set() if locks == "with" else {"no sidecar names it"})


def test_it_goes_on_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="no fcntl on this system")

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        assert cache.store(tmp_path, PLAN, described()).read_plan() == PLAN
        (tmp_path / "bottle-3f2a91c0-tensorrt-sm87-00000000.engine").write_bytes(b"maybe just written")
        assert cache.prune(tmp_path, no_engine_is_stale) == []
    with (tmp_path / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        monkeypatch.setattr(cache, "LOCK_TIMEOUT_S", 0.05)
        key = replace(KEY, driver="13.0")
        assert cache.store(tmp_path, OTHER, described(OTHER, key)).read_plan() == OTHER
    assert "has been locked for 0.05 s: going on" in caplog.text
