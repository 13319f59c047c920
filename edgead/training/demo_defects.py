"""Surface defects of the demo tray: scratch, stain, chip, burr.

Each is drawn from its own geometry onto a `Surface`, in linear light. `size` and `contrast` are in
[0, 1]: from a few pixels to a large part of a part, from only just visible to obvious.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from edgead.training.demo_parts import HALF_PX, Fields
from edgead.training.demo_scene import Surface

SMALLEST_PX = 6  # length of the smallest defect

_FAINT, _CLEAR = 60.0, 140.0  # mean change of brightness over a defect, grey values of 255
_WINDOW_PX = 320  # a defect of the tray is drawn into a square of this size
_OVERSAMPLING = 4
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)

Change = tuple[Surface, np.ndarray]  # the damaged surface; coverage of the change, [H, W] float32, 0..1


def damage(
    kind: str,
    surface: Surface,
    rng: np.random.Generator,
    fields: Fields,
    *,
    size: float,
    contrast: float,
) -> Change:
    """Draw one defect at a random place where it can be seen.

    Args:
        kind: a key of `STRUCTURAL`.
        surface: what to damage; not changed.

    Returns:
        The damaged surface, and how far each pixel belongs to the defect (0..1).
    """
    y, x = (int(rng.integers(max(side - _WINDOW_PX, 0) + 1)) for side in surface.alpha.shape)
    here = np.s_[y : y + _WINDOW_PX, x : x + _WINDOW_PX]
    local = Surface(surface.rgb[here], surface.alpha[here], surface.beneath[here])
    changed_local, where = _best(kind, local, rng, fields, size, contrast)
    whole = Surface(surface.rgb.copy(), surface.alpha.copy(), surface.beneath)
    changed = np.zeros_like(surface.alpha)
    whole.rgb[here], whole.alpha[here], changed[here] = changed_local.rgb, changed_local.alpha, where
    return whole, changed


def _best(
    kind: str, surface: Surface, rng: np.random.Generator, fields: Fields, size: float, contrast: float
) -> Change:
    """The first of many tries that is large and visible enough, or else the most visible."""
    best: tuple[float, Change] | None = None
    for _ in range(60):
        change = STRUCTURAL[kind](surface, rng, fields, size, contrast)
        if change is None or not _large_enough(change[1]):
            continue
        visible = _visibility(surface, *change)
        if visible >= 0.9 * _FAINT:
            return change
        if best is None or visible > best[0]:
            best = visible, change
    assert best is not None, f"no place for a {kind}: the surface is smaller than the smallest defect"
    return best[1]


def _scratch(
    surface: Surface, rng: np.random.Generator, fields: Fields, size: float, contrast: float
) -> Change | None:
    """A groove: one flank catches the light, the other lies in the dark."""
    length, width = 9 + 210 * size**0.6, rng.uniform(4.5, 6.0) + 11.0 * size**0.6
    middle, heading = _somewhere(surface.alpha, rng), rng.uniform(0, 2 * np.pi)
    t = np.linspace(0, 1, 16)
    turn = heading + rng.uniform(-0.6, 0.6) * t + 0.05 * np.cumsum(rng.standard_normal(16))
    line = length / 15 * np.cumsum(np.column_stack([np.cos(turn), np.sin(turn)]), axis=0)
    line += middle - line[8]
    across = np.column_stack([-np.sin(turn), np.cos(turn)])
    taper = (width * np.minimum(1, 0.35 + 4 * np.minimum(t, 1 - t)))[:, None]
    left, right, far = line - across * taper / 2, line + across * taper / 2, line + across * taper * 1.3
    shape = surface.alpha.shape
    groove, ridge = (
        _fill(np.vstack([left, right[::-1]]), shape),
        _fill(np.vstack([right, far[::-1]]), shape),
    )
    sign = 1 if rng.random() < 0.6 else -1
    lift = np.clip(1 + sign * (1.3 * groove - 0.85 * ridge), 0.05, None)[..., None]
    drawn = surface.rgb * lift + np.float32(0.05) * groove[..., None]
    return _faded(surface, drawn, np.maximum(groove, ridge), contrast)


def _stain(
    surface: Surface, rng: np.random.Generator, fields: Fields, size: float, contrast: float
) -> Change | None:
    """Oil, rust or dried residue with a stronger rim, the large ones with droplets beside them."""
    radius, centre, shape = 3.0 + 64 * size**0.85, _somewhere(surface.alpha, rng), surface.alpha.shape
    blot = _fill(centre + _blob(rng, radius), shape)
    for _ in range(rng.integers(0, 4) if radius > 8 else 0):
        away, heading = rng.uniform(1.2, 1.7) * radius, rng.uniform(0, 2 * np.pi)
        drop = _blob(rng, rng.uniform(0.08, 0.2) * radius + 1)
        blot = np.maximum(blot, _fill(centre + away * _unit(heading) + drop, shape))
    inner = cv2.GaussianBlur(blot, (0, 0), 0.12 * radius + 0.8)
    weight = blot * (1 - 0.45 * inner**2) * (1 + 0.12 * fields.window(fields.cloud, rng, *shape))
    weight = cv2.GaussianBlur(weight, (0, 0), 0.5 + 0.015 * radius)
    oil, rust, residue = (0.05, 0.035, 0.015), (0.30, 0.11, 0.035), (0.50, 0.50, 0.46)
    colour, opacity = ((oil, 0.75), (rust, 0.85), (residue, 0.6))[rng.integers(3)]
    drawn = surface.rgb + np.clip(weight, 0, 1)[..., None] * opacity * (
        np.array(colour, np.float32) - surface.rgb
    )
    reach = np.minimum(1, cv2.GaussianBlur(blot, (0, 0), 0.5 + 0.015 * radius))
    return _faded(surface, drawn, reach, contrast)


def _chip(
    surface: Surface, rng: np.random.Generator, fields: Fields, size: float, contrast: float
) -> Change | None:
    """A piece broken off an edge, with a rough face of fracture."""
    at, outward = _edge(surface.alpha, rng)
    radius, shape = max(48 * size**0.95, SMALLEST_PX / 2), surface.alpha.shape
    corners = np.sort(rng.uniform(0, 2 * np.pi, 9))
    rough = (
        radius * rng.uniform(0.72, 1.12, (9, 1)) * np.column_stack([np.cos(corners), np.sin(corners)])
    )
    centre = at + (0.25 - 0.35 * contrast) * radius * outward
    gone = _fill(centre + rough, shape)
    face = np.clip(_fill(centre - outward * 0.8 + rough * (1 + 1.7 / radius), shape) - gone, 0, 1)
    colour = np.float32(rng.choice([0.35, 0.5, 1.5, 1.8])) * _mean_colour(surface) + np.float32(0.012)
    colour = colour * (1 + 0.25 * fields.window(fields.grain, rng, *shape))[..., None]
    rgb = surface.rgb + (0.85 * face)[..., None] * (colour - surface.rgb)
    changed = np.maximum(gone, face) * surface.alpha
    return Surface(rgb, surface.alpha * (1 - gone), surface.beneath), changed


def _burr(
    surface: Surface, rng: np.random.Generator, fields: Fields, size: float, contrast: float
) -> Change | None:
    """A sliver of material that stands out from an edge, bent, with a light and a dark side."""
    at, outward = _edge(surface.alpha, rng)
    length, base = max(4.0 + 80 * size**0.75, SMALLEST_PX), rng.uniform(3.2, 4.4) + 26 * size
    t, bend = np.linspace(0, 1, 12)[:, None], rng.uniform(-0.7, 0.7)
    across = np.array([-outward[1], outward[0]])
    spine = at - 1.5 * outward + length * (t * outward + bend * t**2 * across)
    half = base / 2 * (1 - t) ** 0.8 * (1 + 0.15 * rng.standard_normal((12, 1)))
    left, right, shape = spine - across * half, spine + across * half, surface.alpha.shape
    light, sliver = (
        _fill(np.vstack([left, spine[::-1]]), shape),
        _fill(np.vstack([left, right[::-1]]), shape),
    )
    if (sliver * (1 - surface.alpha)).sum() < 0.55 * sliver.sum():
        return None  # it would lie on the part instead of beside it
    bright, dark = 1.0 + 0.55 * contrast, 0.75 - 0.35 * contrast
    side = dark + (bright - dark) * light / np.maximum(sliver, 1e-3)
    colour = (_mean_colour(surface) + np.float32(0.02)) * np.clip(side, 0, 2)[..., None]
    whole = np.maximum(surface.alpha, sliver)
    rgb = surface.rgb + (sliver / np.maximum(whole, 1e-3))[..., None] * (colour - surface.rgb)
    return Surface(rgb.astype(np.float32), whole, surface.beneath), sliver


STRUCTURAL: dict[str, Callable[[Surface, np.random.Generator, Fields, float, float], Change | None]] = {
    "scratch": _scratch,
    "stain": _stain,
    "chip": _chip,
    "burr": _burr,
}


def _faded(surface: Surface, drawn: np.ndarray, coverage: np.ndarray, contrast: float) -> Change:
    """Lay `drawn` over the surface just as strongly as the asked contrast needs."""
    wanted, opacity = _FAINT * (_CLEAR / _FAINT) ** contrast, 1.0
    changed = coverage * surface.alpha
    for _ in range(3):  # the square root of the tone curve makes the relation only roughly linear
        rgb = surface.rgb + np.float32(opacity) * (drawn - surface.rgb)
        faded = Surface(rgb, surface.alpha, surface.beneath)
        opacity = min(1.0, opacity * wanted / max(_visibility(surface, faded, changed), 1e-3))
    return faded, changed


def _visibility(before: Surface, after: Surface, changed: np.ndarray) -> float:
    """Mean change of brightness over the defect, in grey values; it counts less on a busy surface."""
    inside = changed > 0.5
    if not inside.any():
        return 0.0
    old, new = (
        255 * np.sqrt(np.clip(s.beneath[inside] * (1 - a) + s.rgb[inside] * a, 0, 1)) @ _LUMA
        for s, a in ((s, s.alpha[inside][:, None]) for s in (before, after))
    )
    return float(np.abs(new - old).mean() / (1 + old.std() / 40))


def _large_enough(changed: np.ndarray) -> bool:
    ys, xs = np.nonzero(changed > 0.5)
    return len(xs) >= 10 and int(max(np.ptp(xs), np.ptp(ys))) + 1 >= SMALLEST_PX


def _somewhere(alpha: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random covered point (x, y), so far inside a window of the tray that no defect is cut off."""
    margin = max(0, min(alpha.shape) // 2 - HALF_PX - 2)
    ys, xs = np.nonzero(alpha[margin : alpha.shape[0] - margin, margin : alpha.shape[1] - margin] > 0.95)
    chosen = rng.integers(len(xs))
    return np.array([xs[chosen], ys[chosen]], float) + margin


def _edge(alpha: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random point (x, y) on an outline or the rim of a hole, and the unit vector out of the part."""
    solid = np.uint8(alpha > 0.5)
    ys, xs = np.nonzero(solid & ~cv2.erode(solid, np.ones((3, 3), np.uint8)))
    chosen = rng.integers(len(xs))
    y, x = int(ys[chosen]), int(xs[chosen])
    dy, dx = np.gradient(cv2.GaussianBlur(alpha, (0, 0), 2.0)[y - 1 : y + 2, x - 1 : x + 2])
    outward = -np.array([dx[1, 1], dy[1, 1]], float)
    return np.array([x, y], float), outward / max(float(np.hypot(*outward)), 1e-6)


def _mean_colour(surface: Surface) -> np.ndarray:
    return surface.rgb[surface.alpha > 0.9].mean(axis=0)


def _unit(angle_rad: float) -> np.ndarray:
    return np.array([np.cos(angle_rad), np.sin(angle_rad)])


def _blob(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Outline [48, 2] of a random roundish patch around the origin."""
    turn, reach = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.ones(48)
    for wave in range(2, 8):
        reach += rng.uniform(0, 0.42) / wave * np.cos(wave * turn + rng.uniform(0, 2 * np.pi))
    stretch, lie = rng.uniform(1, 1.6), rng.uniform(0, np.pi)
    outline = radius * np.column_stack([reach * np.cos(turn) * stretch, reach * np.sin(turn) / stretch])
    c, s = np.cos(lie), np.sin(lie)
    return outline @ np.array([[c, s], [-s, c]])


def _fill(outline: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Antialiased coverage [H, W] float32 of a polygon [N, 2] (x, y); integers are centres of pixels."""
    coverage = np.zeros(shape, np.float32)
    low = np.maximum(np.floor(outline.min(axis=0)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(outline.max(axis=0)).astype(int) + 2, shape[::-1])
    width, height = (int(side) for side in high - low)
    if width <= 0 or height <= 0:
        return coverage
    fine = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING), np.uint8)
    points = ((outline - low + 0.5) * _OVERSAMPLING - 0.5) * 16
    cv2.fillPoly(fine, [np.round(points).astype(np.int32)], 255, cv2.LINE_8, shift=4)
    area = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    coverage[low[1] : high[1], low[0] : high[0]] = area / np.float32(255)
    return coverage
