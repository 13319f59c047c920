"""One picture of the demo tray: sample a scene, light it, photograph it.

Everything random about a picture is drawn into a `Scene` first, so that the same scene can be
rendered with and without a defect. Composition is in linear light, [H, W, 3] float32; only
`photograph` makes 8-bit pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from edgead.training.demo_parts import (
    HALF_PX,
    SCALE,
    SIDE,
    Fields,
    Light,
    all_parts,
    bevel,
    box,
    cover,
    finish_noise,
    normals,
    shade,
)

SIZE_PX = 640
# Middles (x, y) of the pockets, and how far from the middle of the tray an extra part may lie.
POCKETS = ((-202, -170), (0, -170), (202, -170), (-202, 170), (0, 170), (202, 170))
FREE_HALF_X, FREE_HALF_Y = 205, 14
TRAY = -1  # as the target of a damage: the tray instead of a part

_MARGIN = 40  # the tray is drawn this much larger than the picture on each side
_PATCH = 2 * HALF_PX + 4  # side of the square that a placed part is drawn into
_PLASTIC = np.array((0.105, 0.150, 0.190), np.float32)
_BENCH = np.array((0.030, 0.030, 0.031), np.float32)


@dataclass(frozen=True)
class Placement:
    """One part in the picture; `x_px`, `y_px` from the middle of the tray, angles clockwise."""

    part: int
    x_px: float
    y_px: float
    turned_rad: float
    tilt: tuple[float, float]
    finish_seed: int


@dataclass(frozen=True)
class Scene:
    """All that is random about a picture, except its defect and the sensor noise."""

    light: Light
    tray_turned_rad: float
    tray_shift_px: tuple[float, float]
    placements: tuple[Placement, ...]
    lean: tuple[float, float]  # relative change of brightness, middle to right and to lower border
    vignette: float  # relative loss in the corners
    tint: tuple[float, float, float]
    blur_px: float
    noise: float  # standard deviation, grey values of 255
    quality: int  # of the JPEG file
    seed: int  # of the surface of the tray and of dust


@dataclass
class Surface:
    """What a damage changes: a part, or the tray around the parts, as it lies in the picture."""

    rgb: np.ndarray  # [H, W, 3] float32, linear
    alpha: np.ndarray  # [H, W] float32, 0..1: where `rgb` covers what lies beneath
    beneath: np.ndarray  # as `rgb`

    def seen(self) -> np.ndarray:
        return self.beneath + self.alpha[..., None] * (self.rgb - self.beneath)


# Gives the damaged surface, and how far each pixel belongs to the damage: [H, W] float32, 0..1.
Damage = Callable[[Surface], tuple[Surface, np.ndarray]]


def sample_scene(rng: np.random.Generator) -> Scene:
    azimuth, elevation = np.deg2rad(rng.uniform(-160, -80)), np.deg2rad(rng.uniform(42, 62))
    light = Light(azimuth, elevation, key=rng.uniform(0.85, 1.15), ambient=rng.uniform(0.30, 0.42))
    warmth = rng.uniform(-0.05, 0.05)
    return Scene(
        light=light,
        tray_turned_rad=np.deg2rad(rng.uniform(-1.2, 1.2)),
        tray_shift_px=(rng.uniform(-5, 5), rng.uniform(-5, 5)),
        placements=tuple(place(part, part, rng) for part in range(len(POCKETS))),
        lean=(rng.uniform(-0.14, 0.14), rng.uniform(-0.14, 0.14)),
        vignette=rng.uniform(0.05, 0.14),
        tint=(1 + warmth, 1.0, 1 - warmth),
        blur_px=rng.uniform(0.5, 0.85),
        noise=rng.uniform(1.2, 2.6),
        quality=int(rng.integers(86, 95)),
        seed=int(rng.integers(2**31)),
    )


def place(part: int, pocket: int | None, rng: np.random.Generator) -> Placement:
    """Put a part into a pocket, with a little play, or (None) anywhere on the bar between the rows."""
    spec = all_parts()[part]
    if pocket is None:
        x, y = rng.uniform(-FREE_HALF_X, FREE_HALF_X), rng.uniform(-FREE_HALF_Y, FREE_HALF_Y)
        turned = rng.uniform(-180, 180) if spec.play_deg > 90 else rng.uniform(-25, 25)
    else:
        x, y = POCKETS[pocket] + rng.uniform(-5, 5, 2)
        turned = spec.rest_deg + rng.uniform(-spec.play_deg, spec.play_deg)
    tilt = (rng.uniform(-0.13, 0.13), rng.uniform(-0.13, 0.13))
    return Placement(part, float(x), float(y), float(np.deg2rad(turned)), tilt, int(rng.integers(2**31)))


def compose(
    scene: Scene, fields: Fields, *, damage: Damage | None = None, target: int = TRAY
) -> tuple[np.ndarray, np.ndarray]:
    """Light the scene.

    Args:
        damage: what to do to the target, if anything.
        target: index into `scene.placements`, or TRAY.

    Returns:
        Linear picture [640, 640, 3] float32; coverage of the damage, [640, 640] float32, 0..1.
    """
    patches = [_patch(scene, placement, fields) for placement in scene.placements]
    picture, free = _tray(scene, fields)
    changed = np.zeros((SIZE_PX, SIZE_PX), np.float32)
    for (y, x), _, alpha in patches:
        free[y : y + _PATCH, x : x + _PATCH] *= 1 - alpha
    if damage is not None and target == TRAY:
        whole, changed = damage(Surface(picture, free, picture.copy()))
        picture = whole.seen()
    for index, ((y, x), rgb, alpha) in enumerate(patches):
        under = picture[y : y + _PATCH, x : x + _PATCH]
        surface = Surface(rgb, alpha, under.copy())
        if damage is not None and target == index:
            surface, changed[y : y + _PATCH, x : x + _PATCH] = damage(surface)
        under[...] = surface.seen()
    return picture, changed


def photograph(picture: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Uneven light, lens and sensor: linear [H, W, 3] float32 (not changed) to RGB [H, W, 3] uint8."""
    height, width = picture.shape[:2]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    level = 1 + scene.lean[0] * x + scene.lean[1] * y - scene.vignette / 2 * (x * x + y * y)
    seen = picture * (level[..., None] * np.array(scene.tint, np.float32))
    seen = cv2.GaussianBlur(seen, (0, 0), scene.blur_px)
    np.clip(seen, 0, 1, out=seen)
    # A square root for the tone curve: photon noise then has the same strength at every brightness.
    np.sqrt(seen, out=seen)
    seen *= 255
    seen += np.float32(scene.noise) * rng.standard_normal(seen.shape, dtype=np.float32) + np.float32(0.5)
    return np.clip(seen, 0, 255, out=seen).astype(np.uint8)


def silhouette(scene: Scene, placements: tuple[Placement, ...]) -> np.ndarray:
    """Outlines of parts where they lie, filled (holes count as the part), [SIZE_PX, SIZE_PX] bool."""
    region = np.zeros((SIZE_PX, SIZE_PX), np.uint8)
    for placement in placements:
        coverage = all_parts()[placement.part].coverage
        alpha = cv2.warpAffine(coverage, _pose(scene, placement), (SIZE_PX, SIZE_PX))
        outlines, _ = cv2.findContours(np.uint8(alpha > 0.2), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(region, outlines, -1, 1, cv2.FILLED)
    return region.astype(bool)


def _pose(scene: Scene, placement: Placement) -> np.ndarray:
    """Matrix [2, 3] from samples of the part's frame to pixels of the picture."""
    c, s = np.cos(scene.tray_turned_rad), np.sin(scene.tray_turned_rad)
    x = SIZE_PX / 2 + scene.tray_shift_px[0] + c * placement.x_px - s * placement.y_px
    y = SIZE_PX / 2 + scene.tray_shift_px[1] + s * placement.x_px + c * placement.y_px
    turned = scene.tray_turned_rad + placement.turned_rad
    linear = np.array([[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]]) / SCALE
    middle = np.array([x - 0.5, y - 0.5]) - linear @ np.full(2, SIDE / 2 - 0.5)
    return np.column_stack([linear, middle])


def _patch(
    scene: Scene, placement: Placement, fields: Fields
) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """A lit part: corner (y, x) in the picture; colours [_PATCH, _PATCH, 3] and coverage, float32."""
    part = all_parts()[placement.part]
    finish = finish_noise(part, fields, np.random.default_rng(placement.finish_seed))
    turned = scene.tray_turned_rad + placement.turned_rad
    rgb = shade(part, scene.light, turned_rad=turned, tilt=placement.tilt, finish=finish)
    sprite = cv2.GaussianBlur(np.dstack([rgb, part.coverage]), (0, 0), 0.35 * SCALE)
    pose = _pose(scene, placement)
    corner = np.floor(pose @ [SIDE / 2, SIDE / 2, 1]).astype(int) - _PATCH // 2
    pose[:, 2] -= corner
    laid = cv2.warpAffine(sprite, pose, (_PATCH, _PATCH), flags=cv2.INTER_LINEAR)
    rgb, alpha = np.ascontiguousarray(laid[..., :3]), np.ascontiguousarray(laid[..., 3])
    return (int(corner[1]), int(corner[0])), rgb, alpha


@functools.cache
def _tray_shape() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The empty tray: normals [3, H, W]; openness to light, pockets and inside, [H, W]; float32."""
    side = SIZE_PX + 2 * _MARGIN
    axis = (np.arange(side) + 0.5 - side / 2).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    outline = box(x, y, 306, 306, 24)
    pocket = np.minimum.reduce([box(x - px, y - py, 86, 100, 20) for px, py in POCKETS])
    height = bevel(outline, 8, 16) - bevel(outline + 13, 4, 3) - bevel(pocket, 11, 13)
    relief, middle, font = np.zeros((side, side), np.uint8), side // 2, cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(relief, "PP-GF30  KT-0640/6", (middle - 275, middle + 7), font, 0.6, 255, 2)
    for number, (px, py) in enumerate(POCKETS, 1):
        cv2.putText(relief, str(number), (middle + px - 76, middle + py - 70), font, 0.7, 255, 2)
    for rib in range(middle + 176, middle + 270, 12):
        cv2.line(relief, (rib, middle - 34), (rib, middle + 34), 255, 3)
    height += relief / np.float32(255) * 1.3
    around = cv2.GaussianBlur(height.astype(np.float32), (0, 0), 13) - height
    open_sky = 1 - np.clip(0.055 * around, 0, 0.5).astype(np.float32)
    return normals(height, 1), open_sky, cover(pocket, 1), cover(outline, 1)


def _tray(scene: Scene, fields: Fields) -> tuple[np.ndarray, np.ndarray]:
    """The lit tray with the shadows of the parts [640, 640, 3]; its inside [640, 640]; float32."""
    (nx, ny, nz), open_sky, pocket, inside = _tray_shape()
    rng, side = np.random.default_rng(scene.seed), SIZE_PX + 2 * _MARGIN
    lx, ly, lz = scene.light.direction(scene.tray_turned_rad)
    grain = fields.window(fields.grain, rng, side, side)
    mottle = fields.window(fields.cloud, rng, side, side)
    facing = np.clip(lx * nx + ly * ny + lz * nz, 0, None) * (1 + 0.055 * grain)
    wall = _shifted(1 - pocket, 12 * lx / lz, 12 * ly / lz) * pocket
    level = open_sky * (scene.light.ambient + scene.light.key * facing * (1 - 0.6 * wall))
    level *= 1 + 0.035 * mottle
    c, s = np.cos(scene.tray_turned_rad), np.sin(scene.tray_turned_rad)
    turn = np.array([[c, -s], [s, c]])
    middle = SIZE_PX / 2 - 0.5 + np.array(scene.tray_shift_px) - turn @ np.full(2, side / 2 - 0.5)
    pose = np.column_stack([turn, middle])
    level, inside = (cv2.warpAffine(plane, pose, (SIZE_PX, SIZE_PX)) for plane in (level, inside))
    level = level * (1 - _shadow(scene)) + _dust(rng)
    rgb = level[..., None] * (_BENCH + inside[..., None] * (_PLASTIC - _BENCH))
    return rgb, cv2.erode(inside, np.ones((9, 9)))


def _shifted(mask: np.ndarray, x_px: float, y_px: float) -> np.ndarray:
    """The mask's shadow: moved away from the light and softened."""
    height, width = mask.shape
    move = np.array([[1, 0, -x_px], [0, 1, -y_px]])
    moved = cv2.warpAffine(mask, move, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return cv2.GaussianBlur(moved, (0, 0), 3)


def _shadow(scene: Scene) -> np.ndarray:
    """Share of the light that the parts take from the tray, [SIZE_PX, SIZE_PX] float32."""
    half = SIZE_PX // 2  # soft shadows need no more resolution than that
    cast, close = np.zeros((half, half), np.float32), np.zeros((half, half), np.float32)
    lx, ly, lz = scene.light.direction()
    for placement in scene.placements:
        part, pose = all_parts()[placement.part], _pose(scene, placement) / 2
        coverage = part.coverage
        close = np.maximum(close, cv2.warpAffine(coverage, pose, (half, half)))
        pose[:, 2] -= np.array([lx, ly]) / lz * part.height_px / 2
        cast = np.maximum(cast, cv2.warpAffine(coverage, pose, (half, half)))
    soft = 0.50 * cv2.GaussianBlur(cast, (0, 0), 2.2) + 0.28 * cv2.GaussianBlur(close, (0, 0), 4.5)
    return cv2.resize(soft, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_LINEAR)


def _dust(rng: np.random.Generator) -> np.ndarray:
    """A few faint specks that every tray has, as added brightness, [SIZE_PX, SIZE_PX] float32."""
    specks = np.zeros((SIZE_PX, SIZE_PX), np.float32)
    for _ in range(rng.integers(2, 12)):
        x, y = rng.integers(20, SIZE_PX - 20, 2)
        specks[y, x] = rng.uniform(-0.6, 0.9)
    return cv2.GaussianBlur(specks, (0, 0), 0.8)
