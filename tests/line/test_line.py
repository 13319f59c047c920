from __future__ import annotations

import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from edgead.bundle import Bundle
from edgead.errors import LineError
from edgead.line import bundles
from edgead.line.assembly import open_sink
from edgead.line.interfaces import Controls, Sink
from edgead.line.recipe import Inspection, SinkConfig
from edgead.line.standin import StandIn
from edgead.runtime.backend import Backend, Slot
from tests.line.conftest import (
    BAD,
    GOOD,
    Moody,
    Start,
    Stuck,
    camera_state,
    gated,
    image,
    wait_for,
)


def test_each_image_is_a_part_with_its_verdict(bench: Start) -> None:
    here = bench()
    for color in (GOOD, BAD, GOOD):
        here.sources["top"].send(image(color))
    lost_at_ns = time.monotonic_ns()  # a trigger that the camera refused says when it was
    here.sources["top"].send(None, problem="frame 4 was lost on the wire", exposure_ns=lost_at_ns)
    here.sources["top"].end()
    records = here.records(4)
    assert [record["part_id"] for record in records] == [1, 2, 3, 4]
    assert [record["verdict"] for record in records] == ["OK", "NG", "OK", "NOT_INSPECTED"]
    assert [record["reject"] for record in records] == [False, True, False, True]
    first, second, _, lost = records
    assert first["score"] < first["threshold"] == 0.4 <= second["score"]
    assert second["reason"].startswith("score 1.4 >= threshold 0.4")
    assert lost["reason"] == "frame 4 was lost on the wire" and lost["score"] is None
    assert lost["exposure_ns"] is None
    assert (first["camera"], first["source"], first["frame_id"]) == ("top", "told 1", 1)
    assert first["bundle"] == "blob" and first["recipe"] == 0 and first["tag"] is None
    latency = first["latency_ms"]
    assert 0 <= latency["wait"] <= latency["wait"] + latency["infer"] <= latency["total"] + 1e-6
    assert abs(first["trigger_ns"] - time.time_ns()) < 60e9
    assert here.line.wait(20)


def test_late_is_said_at_the_deadline_and_the_result_is_written_beside(
    bench: Start, gate: threading.Event
) -> None:
    gate.clear()
    here = bench({"top": {"deadline_ms": 60.0}}, open_model=gated(gate))
    here.sources["top"].send(image(BAD))
    (late,) = here.records(1)  # while the model still computes
    assert late["verdict"] == "LATE" and late["reject"] and late["score"] is None
    assert late["latency_ms"]["total"] >= 60
    gate.set()
    (result,) = here.records(1, late=True)
    assert result["part_id"] == 1 and result["verdict"] == "LATE" and result["score"] > 0.4
    assert len(here.records(1)) == 1
    assert camera_state(here, "source")["late_results"] == 1


def test_a_full_queue_is_said_and_counted(bench: Start, gate: threading.Event) -> None:
    gate.clear()
    here = bench({"top": {"queue": 2}}, open_model=gated(gate))
    here.sources["top"].send(image())
    wait_for(lambda: camera_state(here, "open_parts") == 1 and camera_state(here, "queue") == 0)
    for _ in range(5):
        here.sources["top"].send(image())
    wait_for(lambda: camera_state(here, "source")["overflows"] == 3)
    gate.set()
    assert here.verdicts(6) == ["OK", "OK", "OK", *["NOT_INSPECTED"] * 3]
    assert here.records(6)[3]["reason"].startswith("2 images were waiting already")


def test_live_takes_the_newest(bench: Start, gate: threading.Event) -> None:
    gate.clear()
    here = bench({"top": {"grab": "live"}}, open_model=gated(gate))
    here.sources["top"].send(image())
    wait_for(lambda: camera_state(here, "open_parts") == 1 and camera_state(here, "queue") == 0)
    for _ in range(4):
        here.sources["top"].send(image())
    wait_for(lambda: camera_state(here, "source")["superseded"] >= 3)
    gate.set()
    verdicts = here.verdicts(5)
    assert verdicts[-1] == "OK" and verdicts.count("NOT_INSPECTED") == 3
    assert any("newer image" in record["reason"] for record in here.records(5))


def test_a_camera_that_refuses_the_trigger(bench: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    here = bench({"top": {"trigger": "plc"}})

    def refuse() -> None:
        raise LineError("no connection")

    monkeypatch.setattr(here.sources["top"], "fire", refuse)
    here.line.trigger("top")
    (record,) = here.records(1)
    assert record["verdict"] == "NOT_INSPECTED"
    assert record["reason"] == "the camera was not triggered: no connection"


def test_images_that_never_come_are_counted_although_none_comes_after_them(bench: Start) -> None:
    fields = {"trigger": "plc", "deadline_ms": 5.0, "image_timeout_ms": 20.0}
    here = bench({"top": fields})
    for _ in range(3):
        here.line.trigger("top")
    assert here.verdicts(3) == ["LATE"] * 3
    wait_for(lambda: camera_state(here, "source")["missing_images"] == 3)


def test_controls_refuse_what_there_is_not(bench: Start) -> None:
    line = bench().line
    with pytest.raises(LineError, match="there is no camera 'side': top"):
        line.trigger("side")
    with pytest.raises(LineError, match="its images are its triggers"):
        line.trigger("top")
    with pytest.raises(LineError, match="has no recipe 1: 0 to 0"):
        line.select_recipe("top", 1)
    with pytest.raises(LineError, match="expected a finite number"):
        line.set_threshold("top", float("nan"))


def test_a_plc_is_refused_until_the_line_runs(bench: Start) -> None:
    """Its sink listens while others are still opened: its verdict could not leave."""
    seen: list[object] = []

    def sink(config: SinkConfig, controls: Controls) -> Sink:
        seen.append(controls.state()["ready"])
        with pytest.raises(LineError, match="the line is starting"):
            controls.trigger("top", 7)
        return open_sink(config, controls)

    here = bench({"top": {"trigger": "plc"}}, sink=sink)
    assert seen == [False] and here.line.state()["ready"] and not here.sources["top"].fired
    assert here.line.trigger("top", 8) == 1 and here.sources["top"].fired == 1


def test_a_recipe_switch_holds_for_triggers_from_then_on(
    bench: Start, gate: threading.Event, tiny_bundle: Path
) -> None:
    gate.clear()
    strict = Inspection(bundle=tiny_bundle, threshold=-5.0)
    recipes = (Inspection(bundle=tiny_bundle), strict)
    here = bench({"top": {"recipes": recipes}}, open_model=gated(gate))
    here.sources["top"].send(image())
    here.sources["top"].send(image())
    wait_for(lambda: camera_state(here, "open_parts") == 2)
    here.line.select_recipe("top", 1)
    here.sources["top"].send(image())
    wait_for(lambda: camera_state(here, "open_parts") == 3)
    gate.set()
    records = here.records(3)
    assert [(r["recipe"], r["verdict"]) for r in records] == [(0, "OK"), (0, "OK"), (1, "NG")]
    here.line.set_threshold("top", 9.0)
    here.sources["top"].send(image(BAD))
    assert here.records(4)[3]["threshold"] == 9.0


def test_a_region_is_inspected_alone(bench: Start, tiny_bundle: Path) -> None:
    """Only the region's first pixel is red: the stand-in sees it, so the region was cut out."""
    recipe = Inspection(bundle=tiny_bundle, roi_px=(10, 20, 64, 64))
    here = bench({"top": {"recipes": (recipe,)}})
    big = image(GOOD, side_px=128)
    big[20, 10] = BAD
    here.sources["top"].send(big)
    here.sources["top"].send(image())
    first, second = here.records(2)
    assert first["verdict"] == "NG"
    assert second["verdict"] == "NOT_INSPECTED" and "does not fit into this image" in second["reason"]


def test_a_sink_that_holds_a_region_does_not_hold_its_image(
    bench: Start, gate: threading.Event, tiny_bundle: Path
) -> None:
    gate.clear()
    stuck = Stuck(gate)
    stuck.wants_pictures = True
    here = bench(
        {"top": {"recipes": (Inspection(bundle=tiny_bundle, roi_px=(0, 0, 64, 64)),)}},
        sinks=(SinkConfig("stuck", "stuck", None),),
        sink=lambda c, controls: stuck if c.kind == "stuck" else open_sink(c, controls),
    )
    frame = image(side_px=128)
    is_alive = weakref.ref(frame)
    here.sources["top"].send(frame)
    del frame
    here.sources["top"].send(image(side_px=128))  # whose thread has let go of the first
    assert here.verdicts(2) == ["OK", "OK"] and here.line.state()["sinks"]["stuck"]["waiting"] == 2
    wait_for(lambda: is_alive() is None)


def test_an_image_that_is_none_is_an_error_of_its_part_alone(bench: Start) -> None:
    here = bench()
    here.sources["top"].send(np.zeros((4, 4), np.float32))
    here.sources["top"].send(image())
    first, second = here.records(2)
    assert first["verdict"] in ("ERROR", "NOT_INSPECTED") and first["reject"]
    assert second["verdict"] == "OK"


def test_a_model_that_fails_for_good_is_loaded_again(
    bench: Start, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor opens it again once, then gives up; then the line loads the bundle anew."""
    monkeypatch.setattr(bundles, "BACKOFF_S", (0.05, 0.05))
    here = bench(open_model=gated(gate, [2]))
    sent = 0
    while "OK" not in here.verdicts(sent):
        here.sources["top"].send(image())
        sent += 1
        here.records(sent)
        assert sent < 200
    verdicts = here.verdicts(sent)
    assert set(verdicts) == {"ERROR", "OK"}
    assert here.line.state()["ready"]


def test_a_model_that_hangs_is_given_up_and_loaded_again(bench: Start, tiny_bundle: Path) -> None:
    gates = [threading.Event(), threading.Event()]
    gates[1].set()
    opened = iter(gates)
    here = bench(open_model=lambda bundle: Moody(bundle, next(opened), []), stall_s=0.5)
    here.sources["top"].send(image())
    wait_for(lambda: (here.line.check() or here.verdicts(0)) == ["ERROR"])
    assert here.records(1)[0]["reason"] == "the model hangs"
    wait_for(lambda: here.line.state()["ready"])
    here.sources["top"].send(image(BAD))
    assert here.verdicts(2)[1] == "NG"
    gates[0].set()  # what the old one says now is not heard
    time.sleep(0.1)
    assert len(here.records(2)) == 2


def test_no_camera_starves_when_there_is_too_much_to_do(bench: Start) -> None:
    """One camera with short deadlines could keep the model busy by itself."""
    cameras = {
        "quick": {"deadline_ms": 25.0, "queue": 100},
        "slow": {"deadline_ms": 200.0, "queue": 100},
    }
    here = bench(cameras, model_ms=10)
    for _ in range(80):
        here.sources["quick"].send(image())
        here.sources["slow"].send(image())
        time.sleep(0.010)
    counts = {"quick": 0, "slow": 0}
    for record in here.records(160):
        counts[record["camera"]] += record["verdict"] == "OK"
    assert min(counts.values()) >= 8, counts


def test_a_sink_that_hangs_delays_nobody(bench: Start, gate: threading.Event) -> None:
    gate.clear()
    here = bench(
        {"top": {"deadline_ms": 1000.0}},
        sinks=(SinkConfig("stuck", "stuck", None),),
        sink=lambda c, controls: Stuck(gate) if c.kind == "stuck" else open_sink(c, controls),
    )
    for _ in range(50):
        here.sources["top"].send(image())
        time.sleep(0.004)
    assert here.verdicts(50) == ["OK"] * 50
    assert here.line.state()["sinks"]["stuck"]["waiting"] == 50


def test_a_device_that_hangs_when_it_is_given_an_image_stops_no_camera(
    bench: Start, gate: threading.Event
) -> None:
    """The first model hangs in the thread that brings the images."""
    gate.clear()
    opened = []

    def open_model(bundle: Bundle) -> Backend:
        model = StandIn(bundle, 0)
        if not opened:
            open_slot = model.open_slot

            def stuck_slot(batch: int = 1) -> Slot:
                slot = open_slot(batch)
                launch = slot.launch

                def stuck_launch(count: int = 1) -> None:
                    gate.wait()
                    launch(count)

                slot.launch = stuck_launch  # type: ignore[method-assign]
                return slot

            model.open_slot = stuck_slot  # type: ignore[method-assign]
        opened.append(model)
        return model

    here = bench({"top": {}, "side": {}}, open_model=open_model, stall_s=0.5)
    here.sources["top"].send(image())
    wait_for(lambda: (here.line.check() or here.verdicts(0)) == ["ERROR"])
    wait_for(lambda: here.line.state()["ready"])
    beats = list(here.line.beats)
    for _ in range(3):
        here.sources["top"].send(image())
        here.sources["side"].send(image(BAD))
    assert sorted(here.verdicts(7)) == ["ERROR", *["NG"] * 3, *["OK"] * 3]
    gate.set()  # the thread that hung ends, and takes nothing of the one that went on
    here.sources["top"].send(image(BAD))
    assert here.verdicts(8)[7] == "NG"
    wait_for(lambda: all(now > before for now, before in zip(here.line.beats, beats, strict=True)))


def test_stop_gives_every_part_a_verdict_and_is_quick(bench: Start, gate: threading.Event) -> None:
    gate.clear()
    here = bench(open_model=gated(gate))
    for _ in range(5):
        here.sources["top"].send(image())
    wait_for(lambda: camera_state(here, "open_parts") == 5)
    start_s = time.monotonic()
    assert here.line.stop(0.3) == {"results": 0}
    assert time.monotonic() - start_s < 10
    assert here.verdicts(5) == ["ERROR"] * 5
    assert here.line.stop() == {}


def test_stop_waits_for_slow_sources_at_the_same_time(
    bench: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bench({f"camera{number}": {} for number in range(5)})
    for source in here.sources.values():
        monkeypatch.setattr(source, "close", lambda close=source.close: (time.sleep(0.5), close()))
    start_s = time.monotonic()
    here.line.stop(1.0)
    assert 0.5 <= time.monotonic() - start_s < 2
