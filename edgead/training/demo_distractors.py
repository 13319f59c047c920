"""Pictures of anything but trays: textures, shapes, collages and writing, drawn from formulas.

They play the part of natural images in the penalty of EfficientAD's training, so what counts is
variety: colours, spectra from blurred to grainy, edges from none to many. The dead leaves model
(`_leaves`: opaque things that hide each other, with sizes after a power law) is a simple formula
that shares statistics of photographs (Lee, Mumford, Huang, "Occlusion models for natural images",
IJCV 2001). Inside this module a picture is [H, W, 3] float32, 0..1.
"""

from __future__ import annotations

import cv2
import numpy as np

from edgead.training.demo_parts import frequencies, normals, shaped_noise

_LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:;-+/()&%?!")


def distractor(rng: np.random.Generator) -> np.ndarray:
    """One picture, [256..512, 256..512, 3] uint8 RGB."""
    height, width = (int(side) for side in rng.integers(256, 513, 2))
    picture = _MOTIFS[rng.integers(len(_MOTIFS))](rng, height, width)
    if rng.random() < 0.35:
        picture = _bent(rng, picture)
    grey = picture.mean(axis=2, keepdims=True)
    picture = grey + rng.choice([0, 0.2, 0.4, 0.6, 1]).astype(np.float32) * (picture - grey)
    return _photographed(rng, picture)


def _photographed(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Exposure, colour cast, focus and noise; to uint8."""
    height, width = picture.shape[:2]
    low, high = np.quantile(picture[::8, ::8], [0.01, 0.99])
    dark, light = rng.uniform(0, 0.25), rng.uniform(0.6, 1.05)
    picture = dark + (light - dark) * (picture - low) / max(high - low, 0.05)
    picture = picture * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    across, down = (
        np.linspace(rng.uniform(0.75, 1.2), rng.uniform(0.75, 1.2), n, dtype=np.float32)
        for n in (width, height)
    )
    picture = np.clip(picture * (across[None, :, None] * down[:, None, None]), 0, 1).astype(np.float32)
    if rng.random() < 0.4:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 2.5))
    picture = 255 * picture ** np.float32(rng.uniform(0.7, 1.5))
    picture += np.float32(rng.uniform(0, 6)) * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)


# Textures: fill a whole picture and also the shapes of other motifs.


def _palette(rng: np.random.Generator, value: np.ndarray) -> np.ndarray:
    """Colour a field 0..1 by a random ramp of 2 to 6 colours."""
    stops = int(rng.integers(2, 7))
    ramp = rng.uniform(0, 1, (stops, 3)) * rng.uniform(0.4, 1) + rng.uniform(0, 0.3)
    at = np.linspace(0, stops - 1, 256)
    table = np.stack([np.interp(at, np.arange(stops), ramp[:, c]) for c in range(3)], axis=1)
    return table.astype(np.float32)[np.clip(value * 255, 0, 255).astype(np.uint8)]


def _field(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise 0..1 with a random fractal, band-pass or stretched spectrum; drawn at half size."""
    shape = ((height + 1) // 2, (width + 1) // 2)
    fy, fx = frequencies(shape)
    lie, stretch = rng.uniform(0, np.pi), rng.choice([1, 1, 1, 2, 4, 10])
    along, across = fx * np.cos(lie) + fy * np.sin(lie), fy * np.cos(lie) - fx * np.sin(lie)
    frequency = np.hypot(along * stretch, across)
    if rng.random() < 0.3:
        middle = np.exp(rng.uniform(np.log(0.02), np.log(0.3)))
        spectrum = np.exp(-(((frequency - middle) / (middle * rng.uniform(0.1, 0.6))) ** 2))
    else:
        spectrum = 1 / (frequency + 1.5 / max(shape)) ** rng.uniform(0.7, 2.3)
    spectrum[0, 0] = 0
    noise = shaped_noise(rng, shape, spectrum)
    kind = rng.integers(5)
    if kind == 0:  # veins
        noise = 1 - np.abs(noise)
    elif kind == 1:  # marble
        noise = np.sin(noise * rng.uniform(1, 6))
    elif kind == 2:  # spots with edges
        noise = np.tanh(noise * rng.uniform(2, 20))
    noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(0.5 + noise * 0.25, 0, 1)


def _clouds(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    if rng.random() < 0.5:
        return _palette(rng, _field(rng, height, width))
    planes = [_field(rng, height, width) for _ in range(2)]
    return np.dstack([*planes, rng.uniform(0, 1) * planes[0] + rng.uniform(0, 1) * (1 - planes[1])])


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Stripes, checks, plaids or rings, sharp or soft, in perspective."""
    x, y = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in (width, height)))
    depth = 1 + rng.uniform(-0.5, 0.5) * x + rng.uniform(-0.4, 0.4) * y
    lie, rate = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(6), np.log(110)))
    u, v = (x * np.cos(lie) + y * np.sin(lie)) / depth, (y * np.cos(lie) - x * np.sin(lie)) / depth
    first = np.sin(rate * u + rng.uniform(0, 3) * np.sin(3 * v))
    second = np.sin(rate * rng.uniform(0.5, 2) * v)
    kind = rng.integers(4)
    rings = np.sin(rate * np.hypot(u - rng.uniform(-1, 1), v))
    wave = np.tanh((first, first * second, first + second, rings)[kind] * rng.choice([0.7, 2, 8]))
    return _palette(rng, 0.5 + 0.5 * wave + 0.15 * (_field(rng, height, width) - 0.5))


def _gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    corners = rng.uniform(0, 1, (2, 2, 3)).astype(np.float32)
    return cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)


def _relief(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A bumpy surface in slanting light."""
    bumps = _field(rng, height, width)
    normal = normals(bumps * rng.uniform(5, 40), 1)
    light = rng.uniform(-1, 1, 3) + [0, 0, 1.2]
    shaded = np.clip(np.tensordot(np.float32(light / np.linalg.norm(light)), normal, 1), 0, None)
    return shaded[..., None] * _palette(rng, 0.5 * bumps + 0.5 * _field(rng, height, width))


_TEXTURES = (_clouds, _clouds, _stripes, _gradient, _relief)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return _TEXTURES[rng.integers(len(_TEXTURES))](rng, height, width)


# Motifs: whole pictures.


def _outline(rng: np.random.Generator, radius: float) -> np.ndarray:
    """A closed shape [N, 2] around the origin: polygon, star, ellipse or pebble."""
    kind, corners = rng.integers(4), int(rng.integers(3, 9))
    count = {0: corners, 1: 2 * corners}.get(int(kind), 40)
    turn, reach = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(0, 6.3), np.ones(count)
    if kind == 0:
        reach = rng.uniform(0.6, 1.2, count)
    elif kind == 1:
        reach[::2] = rng.uniform(0.3, 0.8)
    elif kind == 3:
        reach += sum(
            rng.uniform(0, 0.5) / k * np.cos(k * turn + rng.uniform(0, 6.3)) for k in range(2, 6)
        )
    stretch, lie = rng.uniform(0.6, 1.8), rng.uniform(0, np.pi)
    shape = radius * np.column_stack([reach * np.cos(turn) * stretch, reach * np.sin(turn) / stretch])
    return shape @ np.array([[np.cos(lie), np.sin(lie)], [-np.sin(lie), np.cos(lie)]])


def _leaves(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Dead leaves: shapes over shapes, flat or textured, some with a shaded side."""
    picture = _texture(rng, height, width).copy()
    sheets = [_texture(rng, height, width) for _ in range(3)]
    smallest = rng.uniform(3, 15)
    for _ in range(int(rng.integers(15, 160))):
        radius = min(smallest / (1 - rng.random()) ** 0.7, 0.45 * max(height, width))
        centre = rng.uniform((0, 0), (width, height))
        points = np.round((centre + _outline(rng, radius)) * 16).astype(np.int32)
        colour = rng.uniform(0, 1, 3)
        if radius < 12 or rng.random() < 0.4:
            cv2.fillPoly(picture, [points], colour.tolist(), cv2.LINE_AA, shift=4)
            continue
        x, y, w, h = cv2.boundingRect(points // 16)
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if right <= left or bottom <= top:
            continue
        mask = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(mask, [points - 16 * np.array((left, top), np.int32)], 1, shift=4)
        sheet = sheets[rng.integers(3)][top:bottom, left:right]
        first, last = rng.uniform(0.4, 1.2, 2).tolist()
        shade = np.linspace(first, last, right - left, dtype=np.float32)[None, :, None]
        fill = (0.5 * sheet + 0.5 * np.float32(colour)) * shade
        np.copyto(picture[top:bottom, left:right], fill, where=mask[..., None].astype(bool))
    return picture


def _cells(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A Voronoi mosaic with joints, as stone, scales or crazed glaze."""
    count = int(np.exp(rng.uniform(np.log(12), np.log(700))))
    seeds = np.full((height, width), 255, np.uint8)
    seeds[rng.integers(0, height, count), rng.integers(0, width, count)] = 0
    distance, label = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    tones = _palette(rng, rng.uniform(0, 1, label.max() + 1))
    picture = tones[label] * (1 - rng.uniform(-0.6, 0.6) * (distance / distance.max())[..., None])
    if rng.random() < 0.6:
        picture *= 0.6 + 0.8 * _field(rng, height, width)[..., None]
    if rng.random() < 0.5:
        joint = cv2.morphologyEx(label.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
        picture[joint] = rng.uniform(0, 1, 3)
    return picture.astype(np.float32)


def _writing(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Lines of letters in many sizes and lies over a texture."""
    picture = np.uint8(255 * np.clip(0.35 * _texture(rng, height, width) + rng.uniform(0, 0.6), 0, 1))
    for _ in range(int(rng.integers(3, 28))):
        text = "".join(rng.choice(_LETTERS, int(rng.integers(2, 16))))
        size, colour = (
            float(np.exp(rng.uniform(np.log(0.4), np.log(4)))),
            rng.uniform(0, 255, 3).tolist(),
        )
        at = (int(rng.integers(-60, width)), int(rng.integers(0, height + 20)))
        font = int(rng.integers(0, 8))
        thick = max(1, int(size * rng.uniform(0.8, 2.5)))
        cv2.putText(picture, text, at, font, size, colour, thick, cv2.LINE_AA)
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.normal(0, 25), rng.uniform(1, 1.5))
    return cv2.warpAffine(picture, turn, (width, height), borderMode=cv2.BORDER_REFLECT) / np.float32(
        255
    )


def _strokes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Hair, grass, wires: many curved lines that share a direction more or less."""
    picture = _texture(rng, height, width).copy()
    heading, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 3)
    reach, thick, base = rng.uniform(2, 14), int(rng.integers(1, 7)), rng.uniform(0, 1, 3)
    for _ in range(int(rng.integers(20, 350))):
        turn = heading + spread * rng.standard_normal() + np.cumsum(0.15 * rng.standard_normal(14))
        steps = reach * np.column_stack([np.cos(turn), np.sin(turn)])
        line = np.round((rng.uniform((0, 0), (width, height)) + np.cumsum(steps, axis=0)) * 16).astype(
            np.int32
        )
        colour = np.clip(base + 0.25 * rng.standard_normal(3), 0, 1).tolist()
        cv2.polylines(
            picture, [line], False, colour, int(rng.integers(1, thick + 1)), cv2.LINE_AA, shift=4
        )
    return picture


def _scenery(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Ground, hills and sky: a few textured layers with ragged borders, and things in front of them."""
    picture, x = _gradient(rng, height, width).copy(), np.arange(width)
    for layer in np.sort(rng.uniform(0.15, 0.95, int(rng.integers(1, 5)))):
        ragged = np.interp(
            x, np.linspace(0, width, 40), np.cumsum(rng.normal(0, rng.uniform(0.5, 8), 40))
        )
        below = np.arange(height)[:, None] > layer * height + ragged[None, :]
        np.copyto(picture, _texture(rng, height, width), where=below[..., None])
    for _ in range(int(rng.integers(0, 12))):
        centre, colour = rng.uniform((0, 0), (width, height)), rng.uniform(0, 1, 3).tolist()
        points = np.round((centre + _outline(rng, rng.uniform(5, 70))) * 16).astype(np.int32)
        cv2.fillPoly(picture, [points], colour, cv2.LINE_AA, shift=4)
    return picture


def _collage(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two other motifs, side by side or blended by a ragged mask."""
    first, second = (_MOTIFS[rng.integers(len(_MOTIFS) - 1)](rng, height, width) for _ in range(2))
    weight = np.clip((_field(rng, height, width) - 0.5) * rng.choice([2, 8, 60]) + 0.5, 0, 1)
    if rng.random() < 0.4:
        weight = (np.arange(width)[None, :] > rng.uniform(0.2, 0.8) * width) * np.ones(
            (height, 1), np.float32
        )
    return (first + weight[..., None] * (second - first)).astype(np.float32)


def _bent(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """The picture seen through uneven glass."""
    height, width = picture.shape[:2]
    coarse = rng.normal(0, rng.uniform(2, 14), (2, *rng.integers(3, 12, 2))).astype(np.float32)
    dx, dy = (cv2.resize(plane, (width, height), interpolation=cv2.INTER_CUBIC) for plane in coarse)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        np.float32(picture), x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )


_MOTIFS = (
    *(_clouds, _stripes, _relief, _cells, _writing, _strokes),
    *(_leaves, _leaves, _leaves, _scenery, _scenery),
    _collage,  # last, so that it does not call itself
)
