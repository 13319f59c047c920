"""The six parts of the demo tray, drawn from formulas: no assets, numpy and OpenCV only.

A part is described once, in its own frame and at `SCALE` samples per image pixel: coverage, surface
normal, reflectance and finish. `shade` lights it for one picture; `demo_scene` turns and places the
result. Axes: x right, y down, z towards the camera. Lengths are image pixels, colours linear RGB.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np

SCALE = 2  # samples per image pixel
HALF_PX = 82  # half the side of the square that holds a part
SIDE = 2 * HALF_PX * SCALE

STEEL = (0.55, 0.56, 0.58)
ZINC = (0.62, 0.64, 0.68)
BRASS = (0.74, 0.52, 0.22)
TIN = (0.68, 0.68, 0.66)
RUBBER = (0.020, 0.020, 0.022)
EPOXY = (0.030, 0.031, 0.034)
INK = (0.34, 0.34, 0.33)


@dataclass(frozen=True)
class Part:
    """Geometry and finish of one part; arrays are [SIDE, SIDE] float32 unless said otherwise."""

    name: str
    coverage: np.ndarray  # 0 outside, 1 inside, antialiased
    normal: np.ndarray  # [3, SIDE, SIDE] float32, unit vectors
    albedo: np.ndarray  # [SIDE, SIDE, 3] float32
    metal: np.ndarray  # 0 paint or plastic, 1 bare metal
    gloss: float  # strength of the small highlight
    finish: str  # "brushed" (along x), "turned" (around the centre) or "grain"
    height_px: float  # for the length of the shadow
    rest_deg: float  # how the part lies in its pocket
    play_deg: float  # how far it may turn either way


@dataclass(frozen=True)
class Light:
    """One softbox: where it stands (azimuth clockwise from x, elevation above the tray), how strong."""

    azimuth_rad: float
    elevation_rad: float
    key: float
    ambient: float

    def direction(self, turned_rad: float = 0.0) -> tuple[float, float, float]:
        """Unit vector towards the light, as seen from something that is turned by `turned_rad`."""
        azimuth, flat = self.azimuth_rad - turned_rad, np.cos(self.elevation_rad)
        return (
            float(flat * np.cos(azimuth)),
            float(flat * np.sin(azimuth)),
            float(np.sin(self.elevation_rad)),
        )


@dataclass(frozen=True)
class Fields:
    """Periodic noise, [1024, 1024] float32, mean 0 and deviation 1, that pictures take windows of."""

    brushed: np.ndarray  # streaks along x
    grain: np.ndarray  # fine, as moulded plastic
    cloud: np.ndarray  # broad, as mottled surfaces

    @staticmethod
    def window(field: np.ndarray, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        y, x = rng.integers(field.shape[0] - height + 1), rng.integers(field.shape[1] - width + 1)
        return field[y : y + height, x : x + width]


def shaped_noise(rng: np.random.Generator, shape: tuple[int, int], spectrum: np.ndarray) -> np.ndarray:
    """Periodic noise [H, W] float32 of an amplitude spectrum [H, W // 2 + 1], mean 0, deviation 1."""
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * spectrum, s=shape)
    return ((noise - noise.mean()) / (noise.std() + 1e-12)).astype(np.float32)


def frequencies(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (fy, fx) in cycles per pixel that fit `shaped_noise`."""
    return np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None, :]


@functools.lru_cache(maxsize=2)
def noise_fields(seed: int) -> Fields:
    rng, shape = np.random.default_rng([seed, 7001]), (1024, 1024)
    fy, fx = frequencies(shape)
    brushed = np.exp(-((fx * 90) ** 2)) * np.exp(-((fy * 2.2) ** 2)) + 0.02 * np.exp(-((fx * 8) ** 2))
    grain = np.exp(-((fx**2 + fy**2) * 12)) - 0.8 * np.exp(-((fx**2 + fy**2) * 200))
    cloud = 1 / (0.004 + np.hypot(fx, fy)) ** 1.6 * np.exp(-((fx**2 + fy**2) * 400))
    return Fields(*(shaped_noise(rng, shape, spectrum) for spectrum in (brushed, grain, cloud)))


def shade(
    part: Part, light: Light, *, turned_rad: float, tilt: tuple[float, float], finish: np.ndarray
) -> np.ndarray:
    """Lit colours of a part, [SIDE, SIDE, 3] float32, linear and not clipped.

    Args:
        turned_rad: how far the part is turned in the picture; the light stays where it is.
        tilt: relative change of brightness per `HALF_PX` along x and y: the part does not lie flat.
        finish: surface noise, [SIDE, SIDE] float32, mean 0 and deviation 1.
    """
    lx, ly, lz = light.direction(turned_rad)
    nx, ny, nz = part.normal
    facing = nx * lx + ny * ly + nz * lz
    mirrored = 2 * nz * facing - lz  # cosine between the mirrored line of sight and the light
    upward = 2 * nz * nz - 1
    x, y = grid()
    softbox = smoothstep((mirrored - 0.25) / 0.7)
    seen = 0.20 + 0.26 * upward + 0.80 * light.key * softbox
    if part.finish == "turned":  # concentric tool marks fan out towards and away from the light
        even, odd = _double_angle()
        twice = 2 * (light.azimuth_rad - turned_rad)
        seen *= 1 + 0.34 * (float(np.cos(twice)) * even + float(np.sin(twice)) * odd) * nz
    seen *= 1 + tilt[0] / HALF_PX * x + tilt[1] / HALF_PX * y + 0.05 * finish
    painted = light.ambient + light.key * np.clip(facing, 0, None) * (1 + 0.05 * finish)
    level = part.metal * (seen - painted) + painted
    spark = part.gloss * light.key * np.clip(mirrored, 0, 1) ** 14
    return part.albedo * level[..., None] + spark[..., None]


def finish_noise(part: Part, fields: Fields, rng: np.random.Generator) -> np.ndarray:
    """Surface noise of one specimen of the part, [SIDE, SIDE] float32."""
    if part.finish == "grain":
        return fields.window(fields.grain, rng, SIDE, SIDE)
    if part.finish == "brushed":
        return fields.window(fields.brushed, rng, SIDE, SIDE)
    # All 1024 columns are one turn, and the field is periodic: there is no seam. Rows become radii.
    rings = np.ascontiguousarray(fields.window(fields.brushed, rng, SIDE // 2, 1024).T)
    centre = (SIDE / 2 - 0.5, SIDE / 2 - 0.5)
    flags = cv2.WARP_INVERSE_MAP | cv2.WARP_FILL_OUTLIERS | cv2.INTER_LINEAR
    return cv2.warpPolar(rings, (SIDE, SIDE), centre, SIDE / 2, flags)


# Shapes: signed distances (negative inside) in image pixels.


@functools.cache
def grid() -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (x, y) of a part's frame, [SIDE, SIDE] float32, in image pixels from its centre."""
    axis = ((np.arange(SIDE) + 0.5) / SCALE - HALF_PX).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


@functools.cache
def _double_angle() -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of twice the direction from the centre, [SIDE, SIDE] float32."""
    x, y = grid()
    turn = 2 * np.arctan2(y, x)
    return np.cos(turn), np.sin(turn)


def smoothstep(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def box(x: np.ndarray, y: np.ndarray, half_x: float, half_y: float, corner: float) -> np.ndarray:
    """Distance to a rectangle with rounded corners."""
    qx, qy = np.abs(x) - half_x + corner, np.abs(y) - half_y + corner
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    return outside + np.minimum(np.maximum(qx, qy), 0) - corner


def bevel(distance: np.ndarray, width: float, height: float) -> np.ndarray:
    """Height of a plateau whose edge is rounded over `width`."""
    t = np.clip(-distance / width, 0, 1)
    return height * np.sqrt(t * (2 - t))


def cover(distance: np.ndarray, scale: int = SCALE) -> np.ndarray:
    """Antialiased coverage 0..1 of the inside."""
    dy, dx = np.gradient(distance, 1 / scale)
    return np.clip(0.5 - distance * scale / np.maximum(np.hypot(dx, dy), 1), 0, 1).astype(np.float32)


def normals(height: np.ndarray, scale: int = SCALE) -> np.ndarray:
    """Unit normals [3, H, W] float32 of a height map in pixels."""
    smooth = cv2.GaussianBlur(height.astype(np.float32), (0, 0), 0.45 * scale)
    dy, dx = np.gradient(smooth, 1 / scale)
    normal = np.stack([-np.clip(dx, -1.7, 1.7), -np.clip(dy, -1.7, 1.7), np.ones_like(dx)])
    return (normal / np.linalg.norm(normal, axis=0)).astype(np.float32)


def paint(*layers: tuple[np.ndarray | None, tuple[float, float, float]]) -> np.ndarray:
    """Reflectance [SIDE, SIDE, 3] float32: colours in layers, each with its coverage (None: all)."""
    albedo = np.zeros((SIDE, SIDE, 3), np.float32)
    for where, colour in layers:
        weight = 1.0 if where is None else where[..., None]
        albedo += weight * (np.array(colour, np.float32) - albedo)
    return albedo


def hex_nut() -> Part:
    x, y = grid()
    r = np.hypot(x, y)
    sides = np.deg2rad([30, 90, 150])
    apothem = np.maximum.reduce([np.abs(x * np.cos(side) + y * np.sin(side)) for side in sides])
    outline, hole = apothem - 50, r - 27
    height = bevel(np.maximum(outline, -hole), 2.5, 2) - 0.42 * np.clip(r - 46, 0, None)
    thread = np.clip(27 - r, 0, 5.5)
    height += np.where(hole < 0, 1.0 * np.cos(thread * 2.6) - 1.6 * thread, 0)
    albedo = paint((None, STEEL)) * (1 - 0.75 * np.clip(thread / 5.5, 0, 1)[..., None])
    return Part(
        name="hex_nut",
        coverage=cover(np.maximum(outline, 21.5 - r)),
        normal=normals(height),
        albedo=albedo,
        metal=np.ones_like(r),
        gloss=0.10,
        finish="brushed",
        height_px=16,
        rest_deg=8,
        play_deg=7,
    )


def gear() -> Part:
    x, y = grid()
    r, turn = np.hypot(x, y), np.arctan2(y, x)
    tooth = smoothstep(0.5 + 1.25 * np.cos(18 * turn) - 0.35 * (r - 57) / 7)
    outline = r - (51.5 + 11.5 * tooth)
    bore = np.minimum(r - 11, box(x - 12, y, 4, 3.2, 0.5))
    spoke = np.deg2rad(72)
    nearest = np.mod(turn + spoke / 2, spoke) - spoke / 2
    window = np.hypot(r * np.cos(nearest) - 31, r * np.sin(nearest)) - 7.5
    solid = np.maximum.reduce([outline, -bore, -window])
    web = np.maximum(20 - r, r - 43)
    height = bevel(solid, 1.8, 4) - bevel(web, 2.5, 3)
    albedo = paint((None, BRASS)) * (1 - 0.18 * cover(web)[..., None])
    return Part(
        name="gear",
        coverage=cover(solid),
        normal=normals(height),
        albedo=albedo,
        metal=np.ones_like(r),
        gloss=0.12,
        finish="turned",
        height_px=11,
        rest_deg=0,
        play_deg=10,
    )


def washer() -> Part:
    x, y = grid()
    r = np.hypot(x, y)
    solid = np.maximum(r - 56, 25 - r)
    return Part(
        name="washer",
        coverage=cover(solid),
        normal=normals(bevel(solid, 2.5, 2.5)),
        albedo=paint((None, ZINC)),
        metal=np.ones_like(r),
        gloss=0.10,
        finish="turned",
        height_px=4,
        rest_deg=0,
        play_deg=180,
    )


def o_ring() -> Part:
    x, y = grid()
    around = np.abs(np.hypot(x, y) - 44)
    return Part(
        name="o_ring",
        coverage=cover(around - 9.5),
        normal=normals(np.sqrt(np.clip(9.5**2 - around**2, 0, None))),
        albedo=paint((None, RUBBER)),
        metal=np.zeros_like(around),
        gloss=0.10,
        finish="grain",
        height_px=9,
        rest_deg=0,
        play_deg=180,
    )


def screw() -> Part:
    x, y = grid()
    ramp = (x + 0.10 * y) / 5.2
    thread = np.where((x > -28) & (x < 65), np.abs(2 * (ramp - np.floor(ramp)) - 1) * 2 - 1, 0)
    shank = np.where(x > 65, -1, 11.4 + 1.3 * thread - np.clip(x - 60, 0, None))
    head = 21 - np.clip(-60 - x, 0, None) * 1.3
    is_head = (x > -63.5) & (x < -34)
    radius = np.where(is_head, head, np.where(x <= -63.5, -1, shank))
    smooth = np.where(is_head, radius, radius - 0.75 * thread)
    height = np.sqrt(np.clip(smooth**2 - y**2, 0, None))
    knurl = np.cos(34 * np.arcsin(np.clip(y / np.maximum(radius, 1), -1, 1)))
    height += np.where(is_head & (x < -37) & (x > -59), 0.45 * knurl, 0)
    return Part(
        name="screw",
        coverage=cv2.GaussianBlur((np.abs(y) < radius).astype(np.float32), (0, 0), 0.6),
        normal=normals(height),
        albedo=paint((None, STEEL)) * np.where(is_head, 0.72, 1.0)[..., None].astype(np.float32),
        metal=np.ones_like(x),
        gloss=0.12,
        finish="grain",
        height_px=14,
        rest_deg=38,
        play_deg=5,
    )


def chip_package() -> Part:
    x, y = grid()
    body, ay = box(x, y, 53, 25, 2), np.abs(y)
    column = np.abs(np.mod(x, 13) - 6.5)
    pins = np.maximum.reduce([column - np.where(ay < 31, 3.9, 2.4), ay - 43, 24 - ay, np.abs(x) - 51])
    notch, dot = np.hypot(x + 53, y) - 7, np.hypot(x + 43, y - 16) - 3.2
    height = bevel(body, 4, 9) - bevel(notch, 1.5, 2) - bevel(dot, 1.5, 1)
    bent = 6 - 0.03 * np.clip(ay - 27, 0, None) ** 2 + bevel(pins, 1.6, 1.5)
    height = np.where(body < 0, height, bent)
    print_px = np.zeros((SIDE, SIDE), np.uint8)
    for text, row, size in (("EAD7406", -4, 0.95), ("2418 K3", 15, 0.80)):
        at = (int((HALF_PX - 33) * SCALE), int((HALF_PX + row) * SCALE))
        cv2.putText(print_px, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, 255, 2, cv2.LINE_AA)
    in_body = cover(body)
    return Part(
        name="chip_package",
        coverage=np.maximum(in_body, cover(pins)),
        normal=normals(height),
        albedo=paint((None, TIN), (in_body, EPOXY), (print_px / np.float32(255), INK)),
        metal=1 - in_body,
        gloss=0.05,
        finish="grain",
        height_px=12,
        rest_deg=0,
        play_deg=3,
    )


@functools.cache
def all_parts() -> tuple[Part, ...]:
    """The parts in the order of their pockets: left to right, upper row first."""
    return hex_nut(), gear(), washer(), o_ring(), screw(), chip_package()
