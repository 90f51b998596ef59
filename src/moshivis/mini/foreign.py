"""Scenes of the miniature world painted by another program, or on a photo.

`render_svg` writes a scene as SVG with the plain colours that the web knows by name and lets librsvg's `rsvg-convert`
paint it. `photograph` takes a picture of a printed picture: perspective, a table around it, uneven light, a lens that
is not quite in focus, sensor noise, JPEG.
"""

from __future__ import annotations

import io
import math
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from moshivis.errors import InputError
from moshivis.mini.lettering import Box
from moshivis.mini.scenes import PLACES, Scene, SceneObject

SIDE = 300  # of the drawing, in user units
_NAMES = {"brown": "saddlebrown"}  # what the web calls brown is a red
_RADII = {"small": 22, "big": 44}
_STAR = [(math.pi * (i / 5 - 0.5), 1.1 if i % 2 == 0 else 0.45) for i in range(10)]
_HEART = "M0 {0:g} C{1:g} {2:g} {3:g} {4:g} 0 {5:g} C{6:g} {4:g} {7:g} {2:g} 0 {0:g} Z"


def render_svg(scene: Scene, pixels: int = 256) -> Image.Image:
    """The scene painted by librsvg, RGB, `pixels` a side.

    Raises InputError if rsvg-convert is not installed or an object has no place or size.
    """
    command = [painter(), "--width", str(pixels), "--height", str(pixels), "--format", "png"]
    painted = subprocess.run(command, input=svg(scene).encode(), capture_output=True, check=True)
    return Image.open(io.BytesIO(painted.stdout)).convert("RGB")


def painter() -> str:
    """Path of the program that paints. Raises InputError if it is not installed."""
    program = shutil.which("rsvg-convert")
    if program is None:
        raise InputError("the program 'rsvg-convert' is not installed: apt-get install librsvg2-bin")
    return program


def svg(scene: Scene) -> str:
    """The scene as an SVG document of SIDE x SIDE user units. Raises InputError as `render_svg` does."""
    parts = [
        f'<rect width="{SIDE}" height="{SIDE}" fill="{_colour(scene.background)}"/>',
        *map(_element, scene.objects),
    ]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}">{"".join(parts)}</svg>'


def _colour(name: str) -> str:
    return _NAMES.get(name, name)


def _element(thing: SceneObject) -> str:
    if thing.place is None or thing.size is None:
        raise InputError(f"the {thing.colour} {thing.shape} has no place or no size, so it cannot be drawn")
    row, column = divmod(PLACES.index(thing.place), 3)
    x, y, r = (column + 0.5) * SIDE / 3, (row + 0.5) * SIDE / 3, _RADII[thing.size]
    drawn = {
        "circle": f'<circle r="{r}"/>',
        "square": f'<rect x="{-0.88 * r:g}" y="{-0.88 * r:g}" width="{1.76 * r:g}" height="{1.76 * r:g}"/>',
        "triangle": f'<polygon points="0,{-r} {r},{0.8 * r:g} {-r},{0.8 * r:g}"/>',
        "star": f'<polygon points="{" ".join(f"{r * s * math.cos(a):g},{r * s * math.sin(a):g}" for a, s in _STAR)}"/>',
        "heart": f'<path d="{_HEART.format(*(r * k for k in (-0.45, -0.3, -1.2, -1.5, -0.2, 0.95, 1.5, 0.3)))}"/>',
        "cross": f'<path d="M{-r} 0H{r}M0 {-r}V{r}" stroke="{_colour(thing.colour)}" stroke-width="{0.64 * r:g}"/>',
    }[thing.shape]
    return f'<g transform="translate({x:g} {y:g})" fill="{_colour(thing.colour)}">{drawn}</g>'


@dataclass(frozen=True)
class Photo:
    """A photo of a printed picture, RGB, and where in it the picture lies."""

    picture: Image.Image
    _perspective: list[float]  # from shares of the print to shares of the photo

    def box(self, box: Box) -> Box:
        """The upright box around what `box` (left, top, right, bottom as shares) of the print has become."""
        a, b, c, d, e, f, g, h = self._perspective
        left, top, right, bottom = box
        corners = [(x, y) for x in (left, right) for y in (top, bottom)]
        points = [((a * x + b * y + c) / (k := g * x + h * y + 1), (d * x + e * y + f) / k) for x, y in corners]
        xs, ys = zip(*points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


def photograph(picture: Image.Image, rng: random.Random) -> Photo:
    """A hand-held photo of the printed picture, 320 x 320 pixels."""
    side, border = 320, 0.09
    noise = np.random.default_rng(rng.getrandbits(32))
    table = Image.new("RGB", (side, side), tuple(rng.randint(90, 200) for _ in range(3)))
    printed = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    sheet = [(0, 0), (side, 0), (side, side), (0, side)]
    seen = [
        (abs(x - side * rng.uniform(0.02, border)), abs(y - side * rng.uniform(0.02, border))) for x, y in sheet
    ]  # the corners of the sheet, each somewhere near a corner of the photo
    coefficients = _perspective(seen, sheet)

    def warp(flat: Image.Image) -> Image.Image:
        return flat.transform(flat.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)

    table.paste(warp(printed), (0, 0), warp(Image.new("L", printed.size, 255)))
    focus = table.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 2.2)))
    pixels = np.asarray(focus, np.float32)
    y, x = np.mgrid[0:side, 0:side] / side - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0.1, 0.25) * (math.cos(angle) * x + math.sin(angle) * y)
    balance = np.array([rng.uniform(0.94, 1.06) for _ in range(3)])
    pixels = (pixels * light[..., None] * balance) * rng.uniform(0.85, 1.05)
    pixels += noise.normal(0, rng.uniform(3, 9), pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=rng.randint(45, 85))
    unit = [(x / side, y / side) for x, y in sheet], [(x / side, y / side) for x, y in seen]
    return Photo(Image.open(buffer).convert("RGB"), _perspective(*unit))


def _perspective(seen: Sequence[tuple[float, float]], sheet: Sequence[tuple[float, float]]) -> list[float]:
    """Coefficients a to h of the mapping that takes each point (x, y) of `seen` to one (u, v) of `sheet`:
    u = (ax + by + c) / (gx + hy + 1), v = (dx + ey + f) / (gx + hy + 1)."""
    rows, values = [], []
    for (x, y), (u, v) in zip(seen, sheet, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows, float), np.array(values, float)).tolist()
