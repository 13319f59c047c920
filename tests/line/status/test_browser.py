"""The status page in a real browser, with a line that runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgead.line.interfaces import Picture
from edgead.line.sinks.status import Config, StatusPage, open_sink
from edgead.line.status import site
from edgead.line.verdicts import Verdict
from tests.line import conftest_status
from tests.line.conftest_status import StandIn, history, make_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in the path")


def dom(page: StatusPage, profile: Path, *, may_complain: bool = False) -> str:
    """The page's elements after four seconds of its own time; fails on errors of its script."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"]
    flags += [f"--user-data-dir={profile}", "--window-size=1400,1200", "--enable-logging=stderr"]
    flags += ["--virtual-time-budget=4000", "--dump-dom"]
    command = [str(CHROMIUM), *flags, f"http://127.0.0.1:{page.port}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "[DOM]" not in line]
    assert may_complain or not console, "errors, or what the content security policy forbids"
    return done.stdout


@pytest.fixture
def add_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Function that makes the next page run a script at its end: the hand of a person."""

    def add(script: str) -> None:
        folder = tmp_path / "files"
        shutil.copytree(Path(site.__file__).parent, folder)
        with (folder / "page.js").open("a") as file:
            file.write(script)
        monkeypatch.setattr(site, "files", lambda package: folder)

    return add


class Running:
    """Feeds the page with parts of two cameras, as a line would."""

    def __init__(self, controls: StandIn, page: StatusPage) -> None:
        self._controls, self._page = controls, page
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        part_id = 10_000
        image = np.random.default_rng(0).integers(90, 110, (300, 400, 3), dtype=np.uint8)
        anomaly_map = np.full((30, 40), 0.1, np.float32)
        anomaly_map[10:20, 10:20] = 0.9
        while not self._stop.wait(0.02):
            part_id += 1
            given = {"camera": "top", "verdict": Verdict.NG, "score": 0.87, "reject": True}
            if part_id % 2:
                given = {"camera": "side", "verdict": Verdict.LATE, "score": None, "reject": True}
                given |= {"reason": "no answer 40 ms after the trigger"}
            record = make_record(part_id, trigger_ns=time.time_ns(), **given)
            self._controls.statistics.add(record)
            self._page.write(record, Picture(image, None if part_id % 2 else anomaly_map))


def test_the_page_shows_a_running_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEAD_STATUS_PASSWORD", "a good password")
    monkeypatch.setattr(conftest_status, "START_NS", time.time_ns() - 1800 * 10**9)
    controls = StandIn(cameras=("top", "side"), baseline=300)
    history(controls, 1800, shift=0.15)
    controls.failures["side"] = "camera side: no answer for 5 s"
    page = open_sink(Config(port=0), controls=controls)
    try:
        with Running(controls, page):
            html = dom(page, tmp_path / "profile")
    finally:
        page.close()
    header = html[: html.index("<main")]
    assert "<title>press 4</title>" in html and ">READY<" in header
    assert "is-stale" not in html and "No connection" not in html
    assert "scores of OK parts have risen since" in header, "drift alarm"
    assert "camera side: no answer for 5 s" in header

    cards = html[html.index("<main") : html.index("</main>")].split('<div data-camera="')[1:]
    assert [card.split('"')[0] for card in cards] == ["top", "side"]
    top, side = cards
    assert (
        '<div class="verdict NG">' in top and 'href="#shape-NG"' in top and "<strong>NG</strong>" in top
    )
    assert '<div class="verdict LATE">' in side and "<strong>LATE</strong>" in side
    assert "no answer 40 ms after the trigger" in side
    assert re.search(r">score 0.870<", top) and re.search(r">threshold 0.500<", top)
    for card in cards:
        assert re.search(r'<img alt="latest picture" src="blob:', card), "live picture"
        assert re.search(r"<span>part 1\d{4} · (NG|LATE) · \d\d:\d\d:\d\d</span>", card)
        assert card.count('<rect class="column') >= 5, "latency histogram"
        assert ">deadline 40 ms<" in card and 'class="deadline"' in card
        assert '<polygon class="band"' in card and '<polyline class="median"' in card, "drift chart"
        assert re.search(r"p50 [\d.]+ ms · p99 [\d.]+ ms", card)
        assert card.count("<li class=") >= 20, "last verdicts"
        counts = [int(n.replace(",", "")) for n in re.findall(r"<b>([\d,]+)</b>", card)[:5]]
        assert sum(counts) > 900 and counts[0] > 700
        assert 'class="change" type="button" title="">' in card, "may be pressed"
    assert re.findall(r'src="ng/small.jpg\?part=(\d+)"', top), "NG pictures"
    assert re.search(r'href="ng/original.png\?part=\d+" download', top)
    assert "<td>results</td>" in html


def test_read_only_and_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEAD_STATUS_PASSWORD", raising=False)
    page = open_sink(Config(port=0), controls=StandIn(cameras=("<b>top</b>",)))
    try:
        html = dom(page, tmp_path / "profile")
    finally:
        page.close()
    assert '<p id="read-only" class="hint">This page is read-only' in html
    assert re.search(r'class="change" type="button" disabled=""', html)
    assert "<strong>No part yet</strong>" in html and ">no part yet</text>" in html
    assert '<h2 class="camera-name">&lt;b&gt;top&lt;/b&gt;</h2>' in html, "names are text"


def test_a_person_changes_the_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add_script: Callable[[str], None]
) -> None:
    monkeypatch.setenv("EDGEAD_STATUS_PASSWORD", "a good password")
    controls = StandIn(cameras=("top",))
    history(controls, 100)
    add_script("""
        setTimeout(() => {
          document.querySelector("button.change").click();
          const dialog = document.getElementById("change"), slider = dialog.querySelector(".slider");
          slider.value = 0.3;
          slider.dispatchEvent(new Event("input"));
          document.body.dataset.effect = dialog.querySelector(".effect").textContent;
          dialog.querySelector(".recipe").value = 1;
          dialog.querySelector(".password").value = "a good password";
          dialog.querySelector(".apply").click();
        }, 1500);
    """)
    page = open_sink(Config(port=0), controls=controls)
    try:
        html = dom(page, tmp_path / "profile")
    finally:
        page.close()
    assert controls.thresholds["top"] == pytest.approx(0.3, abs=0.005) and controls.recipes["top"] == 1
    scores = [
        record.score for record in controls.statistics.last("top")[-40:] if record.score is not None
    ]
    bad = sum(score >= 0.3 for score in scores)
    assert f'data-effect="Of the last {len(scores)} scored parts, {bad} would be NG' in html
    audit = html[html.index('<tbody id="audit">') :]
    assert re.search(r"<td[^>]*>threshold</td><td[^>]*>0.500</td><td[^>]*>0.3\d\d</td>", audit)
    assert re.search(r"<td[^>]*>recipe</td><td[^>]*>0</td><td[^>]*>1</td><td[^>]*>127.0.0.1</td>", audit)
    assert '<dialog id="change">' in html, "closed again"


def test_a_person_shows_the_token(tmp_path: Path, add_script: Callable[[str], None]) -> None:
    add_script("""
        setTimeout(() => {
          const dialog = document.getElementById("login");
          document.body.dataset.asked = dialog.open;
          dialog.querySelector(".token").value = "0123456789abcdef";
          dialog.querySelector(".apply").click();
        }, 1500);
    """)
    page = open_sink(Config(port=0, token="0123456789abcdef"), controls=StandIn())
    try:
        html = dom(page, tmp_path / "profile", may_complain=True)  # about the 401 before
    finally:
        page.close()
    assert 'data-asked="true"' in html and '<dialog id="login">' in html and ">READY<" in html
