from __future__ import annotations

import pytest

from edgead.errors import LineError
from edgead.line import grab
from tests.line.conftest import (
    BAD,
    Start,
    ToldSource,
    image,
    wait_for,
)


def test_a_source_that_fails_is_opened_again(bench: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after attempts that fail, in whatever way."""
    monkeypatch.setattr(grab, "REOPEN_BACKOFF_S", (0.01, 0.01))
    here = bench({"top": {"kind": "opencv"}})
    old, new = here.sources["top"], ToldSource()
    attempts: list[ToldSource | Exception] = [LineError("in use"), RuntimeError("a bug"), new]

    def reopen(config: object) -> ToldSource:
        attempt = attempts.pop(0)
        if isinstance(attempt, Exception):
            raise attempt
        return attempt

    monkeypatch.setattr(here, "reopen", reopen)
    old.send(image())
    old.fail(RuntimeError("a fault of the driver"))
    new.send(image(BAD))
    assert here.verdicts(2) == ["OK", "NG"]
    wait_for(lambda: not here.line.failures)
    assert not attempts


def test_a_camera_that_is_opened_again_brings_no_image_of_before(
    bench: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grab, "REOPEN_BACKOFF_S", (0.01, 0.01))
    here = bench({"top": {"trigger": "plc", "kind": "opencv"}})
    source = here.sources["top"]
    here.line.trigger("top", tag=1)
    source.fail(RuntimeError("a fault of the driver"))  # `close` then ends the one that is opened anew
    assert here.records(1)[0]["reason"] == "the camera was lost before its image came"
    assert here.verdicts(1) == ["NOT_INSPECTED"]
