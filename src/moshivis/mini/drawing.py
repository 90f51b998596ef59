"""Paints the scenes of the miniature world: anti-aliased shapes on plain, gradient or lightly textured grounds.

A picture is a 3 × 3 grid of places. What may vary without changing any word about the scene does vary: picture size and
aspect ratio, shade, position inside the place, size inside "small" or "big", a slight rotation, filled or outlined
shapes, JPEG noise; so that scenes drawn by other programs, or by hand, are not strange to the model.
"""

import colorsys
import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from moshivis.errors import InputError
from moshivis.mini.lettering import Box, write
from moshivis.mini.scenes import PLACES, Scene

Colour = tuple[float, float, float]  # red, green, blue, each 0 to 1

MIN_SIDE, MAX_SIDE = 64, 512
INKS = ("black", "white", "red", "blue", "green", "purple", "brown")
_MARGIN_DEGREES = 14.0  # of rotation to either side
_JPEG_SHARE = 0.4
# Radius as a share of a third of the shorter side; the two ranges stay far apart.
_RADII = {"small": (0.19, 0.26), "big": (0.40, 0.48), None: (0.30, 0.34)}
# Hue in degrees, saturation, value: every shade in the box is called by the name.
_SHADES = {
    "red": ((352, 366), (0.75, 1.0), (0.72, 1.0)),
    "orange": ((23, 36), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((49, 60), (0.72, 1.0), (0.92, 1.0)),
    "green": ((95, 148), (0.55, 1.0), (0.45, 0.85)),
    "blue": ((205, 240), (0.62, 1.0), (0.60, 1.0)),
    "purple": ((268, 292), (0.50, 0.95), (0.45, 0.80)),
    "pink": ((318, 346), (0.30, 0.60), (0.95, 1.0)),
    "brown": ((16, 32), (0.55, 0.80), (0.38, 0.58)),
    "black": ((0, 360), (0.0, 0.20), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
    "grey": ((0, 360), (0.0, 0.06), (0.42, 0.65)),
}


def draw_scene(
    scene: Scene, rng: random.Random, size: tuple[int, int] | None = None, *, held_out: bool = False
) -> Image.Image:
    """A picture of the scene, RGB; `size` is width and height in pixels (64 to 512), else they are drawn by lot.

    With `held_out` a digit by hand is one that training does not draw.
    Raises InputError if a side is out of range or an object has no place.
    """
    return draw_with_boxes(scene, rng, size, held_out=held_out).picture


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A picture, RGB, and what stands where: boxes (left, top, right, bottom) as shares of width and height."""

    picture: Image.Image
    boxes: list[Box]  # of the objects
    letters: list[tuple[str, Box]]  # of what is written


def draw_with_boxes(
    scene: Scene, rng: random.Random, size: tuple[int, int] | None = None, *, held_out: bool = False
) -> Drawing:
    """As `draw_scene`, telling what stands where."""
    width, height = size or _random_size(rng)
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise InputError(f"a scene is drawn on {MIN_SIDE} to {MAX_SIDE} pixels a side, not on {width} x {height}")
    ground = shade(scene.background, rng)
    picture = _ground(scene.background, ground, width, height, rng)
    boxes = []
    for thing in scene.objects:
        if thing.place is None:
            raise InputError(f"the {thing.colour} {thing.shape} has no place, so it cannot be drawn")
        third = min(width, height) / 3
        radius = rng.uniform(*_RADII[thing.size]) * third
        centre = _centre(thing.place, radius, width, height, rng)
        colour = _visible_shade(thing.colour, ground, rng)
        points = outline(thing.shape, rng.uniform(-_MARGIN_DEGREES, _MARGIN_DEGREES))
        boxes.append(_paint(picture, points * radius + centre, radius, colour, rng))
    letters = []
    if scene.writing:
        taken = {scene.background, *(thing.colour for thing in scene.objects)}
        ink = _visible_shade(rng.choice([name for name in INKS if name not in taken]), ground, rng)
        letters = write(picture, scene.writing, _bytes(ink), rng, held_out=held_out)
    if rng.random() < _JPEG_SHARE:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=rng.randint(40, 92))
        picture = Image.open(buffer).convert("RGB")
    return Drawing(picture=picture, boxes=boxes, letters=letters)


def shade(name: str, rng: random.Random) -> Colour:
    """A random shade that is still called by the name."""
    hue, saturation, value = (rng.uniform(*limits) for limits in _SHADES[name])
    return colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)


def outline(shape: str, degrees: float = 0.0) -> np.ndarray:
    """Corner points `[N, 2]` (x, y; y grows downwards) of a shape of radius 1 around the origin, rotated.

    Raises KeyError for an unknown shape.
    """
    points = _OUTLINES[shape]
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return points @ turn


# ----------------------------------------------------------------------------------------------------------------------
# Shapes


def _polar(radii: list[float], start_degrees: float) -> np.ndarray:
    angles = np.radians(start_degrees + np.arange(len(radii)) * 360 / len(radii))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array(radii)[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 15.5


def _cross() -> np.ndarray:
    a, b = 0.34, 1.0
    arm = np.array([(-a, -a), (-a, -b), (a, -b)])  # the upper arm, then three quarter turns of it
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([arm @ np.linalg.matrix_power(turn, quarter) for quarter in range(4)])


_OUTLINES = {
    "circle": _polar([1.0] * 48, 0),
    "square": _polar([1.22] * 4, 45),
    "triangle": _polar([1.2] * 3, -90) + np.array([0.0, 0.22]),
    "star": _polar([1.15, 0.47] * 5, -90) + np.array([0.0, 0.06]),
    "heart": _heart(),
    "cross": _cross(),
}


# ----------------------------------------------------------------------------------------------------------------------
# Painting


def _random_size(rng: random.Random) -> tuple[int, int]:
    """Mostly about square and 96 to 300 pixels, now and then up to the limits, or to 3:1."""
    long_side = math.exp(rng.uniform(math.log(96), math.log(300 if rng.random() < 0.9 else MAX_SIDE)))
    limits = rng.choices(((1.0, 1.0), (0.75, 1.0), (0.5, 1.0), (1 / 3, 0.5)), (5, 2, 2, 1))[0]
    sides = [max(MIN_SIDE, min(MAX_SIDE, round(side))) for side in (long_side, long_side * rng.uniform(*limits))]
    rng.shuffle(sides)
    return sides[0], sides[1]


def _centre(place: str, radius: float, width: int, height: int, rng: random.Random) -> np.ndarray:
    """Somewhere near the middle of the place's cell, the shape inside the picture."""
    row, column = divmod(PLACES.index(place), 3)
    centre = []
    for cell, length in ((column, width), (row, height)):
        room = min(max(length / 6 - radius, length * 0.02), length * 0.09)
        centre.append((cell + 0.5) * length / 3 + rng.uniform(-room, room))
    return np.array(centre)


def _visible_shade(name: str, ground: Colour, rng: random.Random) -> Colour:
    """A shade that stands out from the ground: the most distant of a few if none is far enough."""
    shades = [shade(name, rng) for _ in range(4)]
    return max(shades, key=lambda colour: min(math.dist(colour, ground), 0.35))


def _ground(name: str, colour: Colour, width: int, height: int, rng: random.Random) -> Image.Image:
    """Plain in half of the pictures, else a gradient between two shades, noise, or faint stripes."""
    style = rng.choice(("plain", "plain", "plain", "gradient", "gradient", "noise", "stripes"))
    pixels = np.empty((height, width, 3), np.float32)
    pixels[:] = colour
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    angle = rng.uniform(0, 2 * math.pi)
    along = (math.cos(angle) * (x - 0.5) + math.sin(angle) * (y - 0.5)) * 0.7 + 0.5
    if style == "gradient":
        pixels += along * (np.array(shade(name, rng), np.float32) - pixels) * 0.7
    elif style == "stripes":
        pixels += rng.uniform(0.01, 0.035) * np.sin(along * rng.uniform(20, 90))
    elif style == "noise":
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((height, width, 1), dtype=np.float32)
        pixels += rng.uniform(0.01, 0.04) * noise
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def _paint(picture: Image.Image, points: np.ndarray, radius: float, colour: Colour, rng: random.Random) -> Box:
    """Draw a polygon `[N, 2]` (pixels) filled, filled with an edge, or as an outline; returns its box as shares."""
    style = rng.choices(("filled", "edged", "outlined"), (7, 1, 2))[0]
    stroke = 0.0 if style == "filled" else max(1.0, radius * rng.uniform(0.05, 0.09))
    if style == "outlined":
        stroke = max(2.0, radius * rng.uniform(0.2, 0.32))
    reach = stroke / 2 + 1
    left, top = np.floor(points.min(axis=0) - reach).astype(int)
    right, bottom = np.ceil(points.max(axis=0) + reach).astype(int)
    scale = 4 if right - left < 100 else 2  # the mask is drawn larger, then reduced: smooth edges
    corners = [(float(x), float(y)) for x, y in (points - (left, top)) * scale]
    area = (int(right - left), int(bottom - top))
    fill = _bytes(colour)
    if style != "outlined":
        picture.paste(fill, (int(left), int(top)), _mask(area, scale, corners, None))
    if style != "filled":
        edge = fill if style == "outlined" else tuple(round(channel * 120) for channel in colour)
        picture.paste(edge, (int(left), int(top)), _mask(area, scale, corners, stroke * scale))
    half = stroke / 2
    low = (points.min(axis=0) - half) / picture.size
    high = (points.max(axis=0) + half) / picture.size
    x0, y0, x1, y1 = np.clip([*low, *high], 0, 1).tolist()
    return x0, y0, x1, y1


def _bytes(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (round(channel * 255) for channel in colour)
    return red, green, blue


def _mask(area: tuple[int, int], scale: int, corners: list[tuple[float, float]], stroke: float | None) -> Image.Image:
    mask = Image.new("L", (area[0] * scale, area[1] * scale))
    painter = ImageDraw.Draw(mask)
    if stroke is None:
        painter.polygon(corners, fill=255)
    else:
        painter.line([*corners, corners[0], corners[1]], fill=255, width=round(stroke), joint="curve")
    return mask.reduce(scale)
