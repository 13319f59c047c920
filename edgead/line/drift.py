"""Score drift: do the scores of good parts slowly rise or fall, as they do under an ageing lamp?

The first scores are the baseline. Each later score becomes the normal score of its rank among them
(van der Waerden), so that the skew of a model's scores does not matter, and goes into a two-sided CUSUM
(Page, "Continuous inspection schemes", 1954) with reference value 0.5 and limit 20 standard deviations.

By simulation on independent normal scores, each run with a baseline of its own
(`tests/line/test_drift.py` repeats smaller ones):

    stationary scores           15 of 2872 runs of 10^6 scores had an alarm: one in about 2 * 10^8 scores
    shift of 0.6 deviations     found in 996 of 1000 runs of 2000 parts, half of them within 139
    shift of 0.75               half within 74 parts, 99 % within 244
    shift of 1                  half within 40 parts, 99 % within 83, all of 1000 within 128
    shift of 2                  half within 15 parts, all of 1000 within 26
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass
from statistics import NormalDist

BASELINE = 500  # scores
REFERENCE = 0.5  # standard deviations: shifts up to this one are let pass
LIMIT = 20.0

_MAX_WINDOWS = 200
_FIRST_WINDOW_S = 10.0
_RECENT = 100
_MAX_SAMPLES = 512  # scores of a window that its quantiles come from


class Cusum:
    """Two-sided CUSUM against the first `baseline` scores.

    Attributes:
        direction: "up" or "down" while there is an alarm, else "". An alarm ends when the scores have
            come back for long enough.
        since_ns: Time of the first score of the drift (the last time the sum was zero), while there is
            an alarm.
        median: Of the baseline; None until it is complete.
    """

    def __init__(self, baseline: int = BASELINE) -> None:
        self._size = baseline
        self.reset()

    def reset(self) -> None:
        """Forgets all: the next scores are a new baseline."""
        self.direction = ""
        self.since_ns = 0
        self.median: float | None = None
        self._baseline: list[float] = []
        self._normal: list[float] = []
        self._up = self._down = 0.0
        self._up_since_ns = self._down_since_ns = 0

    @property
    def baseline_scores(self) -> tuple[int, int]:
        """How many scores the baseline has and will have."""
        return len(self._baseline), self._size

    @property
    def sums(self) -> tuple[float, float]:
        """Evidence for a rise and for a fall, each 0..2 * LIMIT; above LIMIT there is an alarm."""
        return self._up, self._down

    def add(self, score: float, time_ns: int) -> None:
        """Takes the next score; about 1 us."""
        if self.median is None:
            self._baseline.append(score)
            if len(self._baseline) == self._size:
                self._complete()
            return
        # Twice the mean rank among the baseline's scores, so that equal ones count half each.
        rank = bisect_left(self._baseline, score) + bisect_right(self._baseline, score)
        value = self._normal[rank]
        # Beyond twice the limit nothing is learnt, and the way back would get long.
        self._up = min(max(self._up + value - REFERENCE, 0.0), 2 * LIMIT)
        self._down = min(max(self._down - value - REFERENCE, 0.0), 2 * LIMIT)
        if self._up == 0.0:
            self._up_since_ns = time_ns
        if self._down == 0.0:
            self._down_since_ns = time_ns
        if self._up > LIMIT:
            self.direction, self.since_ns = "up", self._up_since_ns
        elif self._down > LIMIT:
            self.direction, self.since_ns = "down", self._down_since_ns
        elif self.direction and (self._up if self.direction == "up" else self._down) == 0.0:
            self.direction, self.since_ns = "", 0

    def _complete(self) -> None:
        self._baseline.sort()
        self.median = quantile(self._baseline, 0.5)
        normal, places = NormalDist(), 2 * self._size
        self._normal = [normal.inv_cdf((rank + 1) / (places + 2)) for rank in range(places + 1)]


@dataclass(frozen=True, slots=True)
class Window:
    """Scores of a stretch of time: their number and quantiles 5 %, 50 % and 95 %."""

    start_ns: int
    count: int
    low: float
    middle: float
    high: float


class Windows:
    """Quantiles of scores over all the time since the start, in at most 200 windows of equal length.

    Windows begin with 10 s; whenever there are 200, neighbours are merged (their quantiles are averaged)
    and windows get twice as long. Stretches without a score have no window. When a merge falls in the
    middle of a window of the new length, its two halves stay apart until the next merge.
    """

    def __init__(self) -> None:
        self.closed: list[Window] = []
        self.length_ns = int(_FIRST_WINDOW_S * 1e9)
        self._start_ns = 0
        self._count = 0
        self._samples: list[float] = []
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._random = random.Random(0)

    def add(self, score: float, time_ns: int) -> None:
        """Takes the next score; a late one counts for the window that is open."""
        start_ns = time_ns - time_ns % self.length_ns
        if start_ns > self._start_ns:
            if window := self.open_window():
                self.closed.append(window)
                if len(self.closed) >= _MAX_WINDOWS:
                    self._merge()
            self._start_ns, self._count = start_ns, 0
            self._samples.clear()
        self._count += 1
        self._recent.append(score)
        if len(self._samples) < _MAX_SAMPLES:
            self._samples.append(score)
        elif (place := int(self._random.random() * self._count)) < _MAX_SAMPLES:
            self._samples[place] = score  # so that all scores of the window are kept equally likely

    @property
    def recent(self) -> tuple[float, float, float] | None:
        """Quantiles 5 %, 50 % and 95 % of the last 100 scores; None before the first."""
        return _quantiles(sorted(self._recent)) if self._recent else None

    def all(self) -> list[Window]:
        """The closed ones and the open one."""
        window = self.open_window()
        return [*self.closed, window] if window else list(self.closed)

    def copy(self) -> Windows:
        """For another thread to read at leisure."""
        other = Windows()
        other.closed, other.length_ns = self.closed.copy(), self.length_ns
        other._start_ns, other._count = self._start_ns, self._count
        other._samples, other._recent = self._samples.copy(), self._recent.copy()
        return other

    def open_window(self) -> Window | None:
        """The one that is not over yet; None before the first score."""
        if not self._count:
            return None
        return Window(self._start_ns, self._count, *_quantiles(sorted(self._samples)))

    def _merge(self) -> None:
        self.length_ns *= 2
        merged: list[Window] = []
        for window in self.closed:
            start_ns = window.start_ns - window.start_ns % self.length_ns
            if merged and merged[-1].start_ns == start_ns:
                merged[-1] = _joined(merged[-1], window)
            else:
                merged.append(Window(start_ns, window.count, window.low, window.middle, window.high))
        self.closed = merged


def _joined(first: Window, second: Window) -> Window:
    count = first.count + second.count
    share = second.count / count
    return Window(
        first.start_ns,
        count,
        first.low + share * (second.low - first.low),
        first.middle + share * (second.middle - first.middle),
        first.high + share * (second.high - first.high),
    )


def _quantiles(ordered: list[float]) -> tuple[float, float, float]:
    return quantile(ordered, 0.05), quantile(ordered, 0.5), quantile(ordered, 0.95)


def quantile(ordered: list[float], q: float) -> float:
    """Quantile `q`, 0..1, of sorted values, linear between neighbours."""
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
