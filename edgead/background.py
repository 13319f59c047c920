"""Scores of background pixels in bounded memory, for the pixel figures of `edgead.metrics`."""

from __future__ import annotations

import numpy as np

from edgead.errors import DataError

BINS = 2**20


class Background:
    """Scores of background pixels: all, or the `keep` highest and what ties with the lowest of these.

    Stored are the scores above a cut; of those equal to it, which may be nearly all, only the number.

    Attributes:
        count: pixels added so far, whether their scores are kept or not.
    """

    def __init__(self, keep: int | None = None) -> None:
        self.count = 0
        self._keep = keep
        # Scores change their sign in here, so that a sort puts the highest first and room stays behind
        # them. A quarter more room than is kept: once per that many pixels the lowest are dropped.
        self._stored = np.empty(0 if keep is None else keep + keep // 4 + 1, dtype=np.float32)
        self._used = 0
        self._is_sorted = False
        self._cut, self._at_cut = np.float32(np.inf), 0

    def add(self, scores: np.ndarray) -> None:
        """Adds pixels: [n] float32, finite."""
        self.count += scores.size
        scores = -scores
        if self._keep is None and self._used + scores.size > self._stored.size:
            size = max(self._used + scores.size, self._stored.size * 5 // 4)
            self._stored.resize(size, refcheck=False)  # no view of it leaves this class
        while scores.size:
            if self._at_cut:
                self._at_cut += int(np.count_nonzero(scores == self._cut))
                scores = scores[scores < self._cut]
            part = scores[: self._stored.size - self._used]
            self._stored[self._used : self._used + part.size] = part
            self._used += part.size
            self._is_sorted = False
            scores = scores[part.size :]
            if self._keep is not None and self._used == self._stored.size:
                self._drop_below(self._keep)

    def shares(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of the background above, and at or above, each score, float64; 1 where not known."""
        stored, scores = self._sorted(), -scores
        above = np.searchsorted(stored, scores, side="left")
        at_least = np.searchsorted(stored, scores, side="right")
        at_least[scores == self._cut] += self._at_cut
        unknown = scores > self._cut
        above[unknown] = at_least[unknown] = self.count
        return above / self.count, at_least / self.count

    def highest(self, places: np.ndarray) -> np.ndarray:
        """Scores at these places of the descending order, from 0, float32.

        Raises:
            DataError: a place beyond what is kept.
        """
        self.require(int(places.max()) + 1)
        stored = self._sorted()
        found = np.full(places.shape, self._cut)
        found[places < stored.size] = stored[places[places < stored.size]]
        return -found

    def require(self, pixels: float) -> None:
        """Raises DataError where not all of the `pixels` highest scores are known."""
        if self._at_cut and pixels > self._used + self._at_cut:
            raise DataError(
                f"the {self._used + self._at_cut} highest of {self.count} background scores were kept,"
                f" {pixels:.0f} are needed: there were more pixels than expected"
            )

    def _drop_below(self, keep: int) -> None:
        """Makes room; called when all room is taken."""
        self._stored.sort()
        self._is_sorted = True
        self._cut = self._stored[keep - 1]
        self._used = int(np.searchsorted(self._stored, self._cut, side="left"))
        self._at_cut = int(np.searchsorted(self._stored, self._cut, side="right")) - self._used

    def _sorted(self) -> np.ndarray:
        stored = self._stored[: self._used]
        if not self._is_sorted:
            stored.sort()
            self._is_sorted = True
        return stored


class Histogram:
    """How many background and defect pixels score what, in 2**20 bins: AUROC without keeping scores.

    A bin holds the float32 numbers that have sign, exponent and the first 11 bits of the fraction in
    common: no range has to be known beforehand, and a bin is at most 1/2048 of its score wide. The
    pixels of a bin count as tied, which changes AUROC by at most half the chance that a background and a
    defect pixel meet in one.
    """

    def __init__(self) -> None:
        self._background = np.zeros(BINS, dtype=np.int64)
        self._defect = np.zeros(BINS, dtype=np.int64)

    def add(self, scores: np.ndarray, *, is_defect: bool) -> None:
        """Adds pixels: [n] float32, finite."""
        bits = (scores + np.float32(0)).view(np.int32)  # adding 0 turns -0.0 into 0.0
        ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits) >> 12
        counts = self._defect if is_defect else self._background
        counts += np.bincount(ordered + BINS // 2, minlength=BINS)

    def auroc(self) -> float:
        """Probability that a defect pixel scores above a background pixel; needs some of both."""
        background, defect = self._background.astype(np.float64), self._defect.astype(np.float64)
        below = np.cumsum(background) - background / 2
        return float((defect / defect.sum()) @ (below / background.sum()))
