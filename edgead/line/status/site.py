"""What the status page answers: its files, the state of the line as JSON, pictures, and changes."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from edgead.errors import LineError
from edgead.line.interfaces import Controls
from edgead.line.statistics import EDGES_MS, Histogram
from edgead.line.status.access import Access
from edgead.line.status.pictures import NG_KINDS, Pictures
from edgead.line.status.server import Answer, Request
from edgead.line.verdicts import Record, Verdict

logger = logging.getLogger(__name__)

_FILES = {  # path -> name in this package, content type
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
}
_AUDIT_ENTRIES = 50
_SHOWN_RECORDS = 40  # of each camera


class Site:
    """Answers requests; any thread."""

    def __init__(self, controls: Controls, pictures: Pictures, access: Access) -> None:
        self._controls, self._pictures, self._access = controls, pictures, access
        self._changing = threading.Lock()
        self._audit: deque[dict[str, Any]] = deque(maxlen=_AUDIT_ENTRIES)
        folder = files(__package__)
        self._files = {
            path: Answer(kind=kind, body=folder.joinpath(name).read_bytes())
            for path, (name, kind) in _FILES.items()
        }
        self._pages: dict[str, Callable[[Request], Answer]] = {
            "/api/state": lambda request: Answer.json(self._state()),
            "/api/charts": self._charts,
            "/live.jpg": self._live,
            **{f"/ng/{name}": self._ng for name in NG_KINDS},
        }
        self._changes: dict[str, Callable[[str, dict[str, Any]], tuple[Any, Any]]] = {
            "/api/threshold": self._set_threshold,
            "/api/recipe": self._select_recipe,
            "/api/baseline": self._reset_baseline,
        }

    def answer(self, request: Request) -> Answer:
        """All requests come in here."""
        refusal = self._access.check_host(request)
        if refusal is not None:
            return refusal
        if request.method == "GET" and request.path in self._files:  # hold no secret, ask for the token
            return self._files[request.path]
        if request.method == "POST" and (request.path == "/api/login" or request.path in self._changes):
            return self._access.check_origin(request) or self._post(request)
        if request.method == "GET" and request.path in self._pages:
            return self._access.check_token(request) or self._pages[request.path](request)
        return Answer.text(HTTPStatus.NOT_FOUND, "no such page")

    def _state(self) -> dict[str, Any]:
        state = self._controls.state()
        counts, latencies = self._controls.statistics.counts(), self._controls.statistics.latencies()
        cameras = [
            self._camera(name, values, counts.get(name), latencies.get(name, {}).get("total"))
            for name, values in state["cameras"].items()
        ]
        return {
            "name": state["name"],
            "ready": state["ready"],
            "uptime_s": state["uptime_s"],
            "time_ms": time.time() * 1000,
            "can_change": self._access.can_change,
            "journal_failures": state.get("journal_failures", 0),
            "cameras": cameras,
            "sinks": {name: _numbers(values) for name, values in state["sinks"].items()},
            "ng": [_row(record) | {"camera": record.camera} for record in self._pictures.ng()],
            "audit": list(self._audit)[::-1],
        }

    def _camera(
        self, name: str, values: Any, counts: dict[str, int] | None, total: Histogram | None
    ) -> dict[str, Any]:
        drift = self._controls.statistics.drift(name, with_windows=False)
        return {
            "name": name,
            **{key: values.get(key) for key in ("recipe", "recipes", "threshold", "deadline_ms")},
            **{key: values.get(key) for key in ("queue", "open_parts", "failure")},
            "source": _numbers(values.get("source", {})),
            "counts": counts or {verdict.value: 0 for verdict in Verdict},
            "latency_ms": (total or Histogram()).to_dict(),
            "drift": drift,
            "last": [_row(record) for record in self._controls.statistics.last(name)[-_SHOWN_RECORDS:]],
        }

    def _charts(self, request: Request) -> Answer:
        name = request.query.get("camera", "")
        if name not in self._controls.cameras:
            return Answer.text(HTTPStatus.NOT_FOUND, "no such camera")
        total = self._controls.statistics.latencies().get(name, {}).get("total", Histogram())
        histogram = {"edges_ms": EDGES_MS, "counts": total.counts, "max_ms": total.max_ms}
        drift = self._controls.statistics.drift(name)
        return Answer.json({"histogram": histogram, "drift": drift})

    def _live(self, request: Request) -> Answer:
        name, after = request.query.get("camera", ""), request.query.get("after", "0")
        if name not in self._controls.cameras:
            return Answer.text(HTTPStatus.NOT_FOUND, "no such camera")
        if not re.fullmatch("[0-9]{1,15}", after):
            return Answer.text(HTTPStatus.BAD_REQUEST, "after is no number")
        with_heat = request.query.get("heat", "1") == "1"
        found = self._pictures.live(name, after=int(after), with_heat=with_heat)
        if found is None:
            return Answer(status=HTTPStatus.NO_CONTENT, kind="image/jpeg", body=b"")
        number, record, jpeg = found
        row = json.dumps(_row(record), ensure_ascii=True)
        return Answer(kind="image/jpeg", body=jpeg, headers={"X-Number": str(number), "X-Part": row})

    def _ng(self, request: Request) -> Answer:
        kind, part = request.path.removeprefix("/ng/"), request.query.get("part", "")
        try:
            if not re.fullmatch("[0-9]{1,18}", part):
                raise KeyError(part)
            record, body = NG_KINDS[kind](self._pictures, int(part))
        except KeyError:
            return Answer.text(HTTPStatus.NOT_FOUND, "this picture is not kept any more")
        camera = re.sub("[^A-Za-z0-9_-]", "_", record.camera)
        name = f"part-{record.part_id}-{camera}-{kind}"
        disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
        content = "image/png" if kind.endswith(".png") else "image/jpeg"
        return Answer(kind=content, body=body, headers={} if kind == "small.jpg" else disposition)

    def _post(self, request: Request) -> Answer:
        try:
            given = json.loads(request.body)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            return Answer.text(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        if request.path == "/api/login":
            return self._access.log_in(request, given.get("token"))
        refusal = self._access.check_token(request)
        refusal = refusal or self._access.check_password(request, given.get("password"))
        if refusal is not None:
            reason = refusal.body.decode()
            logger.warning("%s from %s was refused: %s", request.path, request.address, reason)
            return refusal
        camera = given.get("camera")
        if camera not in self._controls.cameras:
            return Answer.text(HTTPStatus.NOT_FOUND, "no such camera")
        what = request.path.removeprefix("/api/")
        try:
            with self._changing:  # so that old values are right
                old, new = self._changes[request.path](camera, given)
                entry = {"time_ms": time.time() * 1000, "address": request.address, "camera": camera}
                self._audit.append(entry | {"what": what, "old": old, "new": new})
        except LineError as error:
            return Answer.text(HTTPStatus.BAD_REQUEST, str(error))
        logger.warning("camera %s: %s from %s to %s by %s", camera, what, old, new, request.address)
        return Answer.json(self._state())

    def _set_threshold(self, camera: str, given: dict[str, Any]) -> tuple[Any, Any]:
        value = given.get("value")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e300:
            raise LineError("value must be a finite number")
        old = self._controls.state()["cameras"][camera]["threshold"]
        self._controls.set_threshold(camera, float(value))
        return old, float(value)

    def _select_recipe(self, camera: str, given: dict[str, Any]) -> tuple[Any, Any]:
        index = given.get("index")
        if isinstance(index, bool) or not isinstance(index, int):
            raise LineError("index must be an integer")
        old = self._controls.state()["cameras"][camera]["recipe"]
        self._controls.select_recipe(camera, index)
        return old, index

    def _reset_baseline(self, camera: str, given: dict[str, Any]) -> tuple[Any, Any]:
        drift = self._controls.statistics.drift(camera, with_windows=False)
        self._controls.statistics.reset_baseline(camera)
        return None if drift is None else drift["baseline"]["median"], None


def _row(record: Record) -> dict[str, Any]:
    """What the page shows of a record; JSON has no NaN."""
    score = record.score if record.score is not None and math.isfinite(record.score) else None
    return {
        "part_id": record.part_id,
        "verdict": record.verdict.value,
        "reject": record.reject,
        "score": score,
        "threshold": record.threshold,
        "reason": record.reason,
        "total_ms": round(record.total_ms, 3),
        "time_ms": record.trigger_ns / 1e6,
    }


def _numbers(values: Any) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
