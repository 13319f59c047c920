"""Bundles that are exchanged, and models that hang or fail, while a line runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.bundle import Bundle
from edgead.errors import BundleError, CudaError, LineError
from edgead.line import bundles
from edgead.line.bundles import Bundles
from edgead.line.inspector import Inspector
from edgead.line.recipe import CameraConfig, Inspection, Recipe, Settings
from edgead.line.run import Changes, run
from edgead.line.standin import StandIn
from edgead.runtime.backend import Backend
from tests.line.conftest import BAD, Moody, Start, camera_state, image, wait_for


def test_a_bundle_put_in_while_the_old_one_is_loaded_again_stays(
    tiny: Any, tiny_bundle: Path, tmp_path: Path, gate: threading.Event
) -> None:
    new = tiny.write(tmp_path / "new.edgead", name="renewed")
    made: list[Inspector] = []

    def load(bundle: Bundle) -> Inspector:
        if bundle.path == tiny_bundle and made:
            gate.wait()
        made.append(Inspector(bundle, open_model=lambda bundle: StandIn(bundle, 0)))
        return made[-1]

    here = Bundles([tiny_bundle], load)
    gate.clear()
    here.renew(made[0], "it hangs")
    assert not here.are_ready
    here.put(tiny_bundle, here.load(tiny_bundle, new))
    gate.set()
    wait_for(lambda: len(made) == 3)
    wait_for(lambda: not made[2].enter())  # it is retired: nobody wants it any more
    assert here.name(tiny_bundle) == "renewed"
    here.close()
    wait_for(lambda: not any(thread.name == "edgead-executor" for thread in threading.enumerate()))


def test_after_a_hang_the_same_bundle_comes_back_whatever_its_file_holds(
    bench: Start,
    gate: threading.Event,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody has replaced the file and not told the line yet; and the first attempts to load fail."""
    monkeypatch.setattr(bundles, "BACKOFF_S", (0.05, 0.05))
    file = tiny.write(tmp_path / "one.edgead", name="old")
    errors: list[Exception] = []

    def open_model(bundle: Bundle) -> Backend:
        if errors:
            raise errors.pop()
        return Moody(bundle, gate, [])

    here = bench({"top": {"recipes": (Inspection(bundle=file),)}}, open_model=open_model, stall_s=0.5)
    here.line.set_threshold("top", 9.0)  # for the scores of the old one
    tiny.write(file, name="new")
    errors += [MemoryError("the hung one still has it"), LineError("no device")]
    gate.clear()
    here.sources["top"].send(image())
    wait_for(lambda: (here.line.check() or here.verdicts(0)) == ["ERROR"])
    gate.set()
    wait_for(lambda: here.line.state()["ready"])
    assert camera_state(here, "recipes") == ["old"] and camera_state(here, "threshold") == 9.0
    here.line.swap(file, file)
    assert camera_state(here, "recipes") == ["new"] and camera_state(here, "threshold") == 0.4


@pytest.mark.parametrize("supervised", [False, True])
def test_with_a_device_that_stays_lost_a_supervised_line_ends(
    supervised: bool,
    bench: Start,
    gate: threading.Event,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some faults of a GPU end with the process only; who runs without systemd keeps the line."""
    monkeypatch.setattr(bundles, "BACKOFF_S", (0.05, 0.05))
    is_lost = threading.Event()

    def open_model(bundle: Bundle) -> Backend:
        if is_lost.is_set():
            raise CudaError("illegal address", "CUDA_ERROR_ILLEGAL_ADDRESS", is_sticky=True)
        return Moody(bundle, gate, [])

    here = bench(
        {"top": {"recipes": (Inspection(bundle=tiny_bundle),)}}, open_model=open_model, stall_s=0.5
    )
    is_lost.set()
    gate.clear()
    here.sources["top"].send(image())
    wait_for(lambda: (here.line.check() or here.verdicts(0)) == ["ERROR"])
    wait_for(lambda: here.line.lost_device == "illegal address")
    if supervised:
        monkeypatch.setenv("NOTIFY_SOCKET", "@edgead-nobody-listens")
        recipe = Recipe(Settings(journal=tmp_path), (), (), {})
        assert run(recipe, opened=lambda _: here.line) == (here.line, 1)
    gate.set()
    is_lost.clear()
    if not supervised:
        wait_for(lambda: here.line.state()["ready"])
        assert here.line.lost_device == ""


def test_whatever_a_new_bundle_fails_with_the_next_one_is_taken_over(
    bench: Start, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tiny.write(tmp_path / f"{name}.edgead", name=name) for name in "ab"]
    config = CameraConfig(
        name="top",
        deadline_ms=5000.0,
        recipes=tuple(Inspection(bundle=file) for file in files),
        kind="folder",
        source=None,
    )
    recipe = Recipe(Settings(journal=tmp_path / "journal"), (config,), (), {})

    def open_model(bundle: Bundle) -> Backend:
        if bundle.manifest.name == "new a":
            raise MemoryError("no room for two")
        return StandIn(bundle, 0)

    here = bench({"top": {"recipes": config.recipes}}, open_model=open_model)
    changes = Changes(recipe, here.line)
    for file, name in zip(files, "ab", strict=True):
        tiny.write(file, name=f"new {name}")
    changes.take_over()
    said = "not taken over, the line goes on as it is: MemoryError('no room for two')"
    wait_for(lambda: said in caplog.text and camera_state(here, "recipes") == ["a", "new b"])


def test_a_bundle_is_swapped_under_load_without_losing_a_part(
    bench: Start, tiny: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    here = bench({"top": {"queue": 500}}, model_ms=2)
    new = tiny.write(tmp_path / "new.edgead", name="renewed")
    for number in range(200):
        here.sources["top"].send(image())
        if number == 80:
            here.line.swap(tiny_bundle, new)
        time.sleep(0.002)
    records = here.records(200)
    assert [record["verdict"] for record in records] == ["OK"] * 200
    assert [record["part_id"] for record in records] == list(range(1, 201))
    assert records[0]["bundle"] == "blob" and records[-1]["bundle"] == "renewed"


def test_a_new_bundle_is_judged_by_its_own_threshold(
    bench: Start, tiny: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    """And not by one that was set for the scores of the old one."""
    recipes = (Inspection(bundle=tiny_bundle), Inspection(bundle=tiny_bundle, threshold=0.2))
    here = bench({"top": {"recipes": recipes}})
    here.line.set_threshold("top", 9.0)
    here.sources["top"].send(image(BAD))
    assert here.verdicts(1) == ["OK"]
    here.line.swap(tiny_bundle, tiny.write(tmp_path / "new.edgead", name="renewed"))
    here.sources["top"].send(image(BAD))
    assert here.verdicts(2)[1] == "NG" and camera_state(here, "threshold") == 0.4
    here.line.select_recipe("top", 1)
    assert camera_state(here, "threshold") == 0.2  # the recipe file's stays


def test_drift_is_measured_anew_with_a_new_bundle(bench: Start, tiny_bundle: Path) -> None:
    """Also if it has the name of the old one, as after edgead recalibrate."""
    here = bench()

    def baseline_scores() -> int:
        drift = here.line.statistics.drift("top")
        assert drift is not None
        count: int = drift["baseline"]["scores"]
        return count

    for count in (1, 2):
        here.sources["top"].send(image())
        here.records(count)
    assert baseline_scores() == 2
    here.line.swap(tiny_bundle, tiny_bundle)
    assert baseline_scores() == 0
    here.sources["top"].send(image())
    here.records(3)
    assert baseline_scores() == 1


def test_a_bundle_that_does_not_verify_does_not_take_over(
    bench: Start, tiny: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    class Wrong(StandIn):
        def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            answers = super().infer(inputs)
            return answers | {"score": answers["score"] + 10}

    here = bench(open_model=lambda b: Wrong(b, 0) if b.manifest.name == "wrong" else StandIn(b, 0))
    damaged = tmp_path / "damaged.edgead"
    damaged.write_bytes(tiny_bundle.read_bytes()[:-100])
    with pytest.raises(BundleError):
        here.line.swap(tiny_bundle, damaged)
    wrong = tiny.write(tmp_path / "wrong.edgead", name="wrong")
    with pytest.raises(LineError, match="not taken: on this device .* verdicts differ"):
        here.line.swap(tiny_bundle, wrong)
    with pytest.raises(LineError, match="no recipe of this line uses"):
        here.line.swap(damaged, tiny_bundle)
    here.sources["top"].send(image())
    assert here.records(1)[0]["bundle"] == "blob"
