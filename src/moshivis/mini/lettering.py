"""Paints words, numbers and hand-written digits into pictures of the miniature world.

Printed texts have one of the fonts that Debian's fonts-dejavu-core and fonts-liberation bring, or Pillow's own; digits
by hand are those of scikit-learn, 1,797 of them by 13 people, of which a tenth of each is kept out of training.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moshivis.errors import InputError
from moshivis.mini.writing import ROWS, Writing

FONTS = Path("/usr/share/fonts/truetype")
Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of width and height
_MEASURE = 100.0  # size of type at which a text is measured
_ROTATION = 7.0  # degrees to either side
KEPT_OUT = 10  # one of so many


def write(
    picture: Image.Image, writing: Writing, colour: tuple[int, int, int], rng: random.Random, *, held_out: bool = False
) -> list[tuple[str, Box]]:
    """Paint the writing into its row; returns its letters, each with the box that it fills.

    A digit by hand is one of those that training draws from, or, with `held_out`, one of the others.

    Raises InputError if the writing has no row, or is by hand and scikit-learn is not installed.
    """
    if writing.row is None:
        raise InputError(f"nobody has said where {writing.text!r} is written, so it cannot be drawn")
    width, height = picture.size
    room = (rng.uniform(0.6, 0.96) * width, rng.uniform(0.6, 0.98) * height / 3)
    mask, ends = _by_hand(writing.text, room, rng, held_out) if writing.hand else _printed(writing.text, room, rng)
    left = rng.uniform(0.02 * width, max(0.02 * width, 0.98 * width - mask.width))
    middle = (ROWS.index(writing.row) + 0.5) * height / 3
    top = min(max(0.0, middle - mask.height / 2 + rng.uniform(-0.03, 0.03) * height), height - mask.height)
    degrees = rng.uniform(-_ROTATION, _ROTATION) if mask.height * 1.3 < height / 3 else 0.0
    turned = mask.rotate(degrees, Image.Resampling.BICUBIC, expand=False)
    picture.paste(colour, (round(left), round(top)), turned)
    letters = []
    for letter, begin, end in zip(writing.text, [0.0, *ends], ends, strict=False):
        box = (left + begin, top, left + end, top + mask.height)
        x0, y0, x1, y1 = np.clip(np.array(box) / [width, height, width, height], 0, 1).tolist()
        letters.append((letter, (x0, y0, x1, y1)))
    return letters


def _printed(text: str, room: tuple[float, float], rng: random.Random) -> tuple[Image.Image, list[float]]:
    """The text as a mask no larger than `room` in pixels, and where each letter ends."""
    shown = rng.choice((text, text, text.upper(), text.capitalize()))
    font = rng.choice(_fonts())
    measure = _font(font, _MEASURE)
    x0, y0, x1, y1 = measure.getbbox(shown)
    size = max(9.0, _MEASURE * min(room[0] / (x1 - x0), room[1] / (y1 - y0)))
    type_ = _font(font, size)
    x0, y0, x1, y1 = type_.getbbox(shown)
    pad = round(0.1 * (y1 - y0)) + 1  # room to turn in
    mask = Image.new("L", (round(x1 - x0) + 2 * pad, round(y1 - y0) + 2 * pad))
    ImageDraw.Draw(mask).text((pad - x0, pad - y0), shown, fill=255, font=type_)
    return mask, [pad - x0 + type_.getlength(shown[: i + 1]) for i in range(len(shown))]


def _by_hand(
    text: str, room: tuple[float, float], rng: random.Random, held_out: bool
) -> tuple[Image.Image, list[float]]:
    digits, labels = _handwritten()
    such = np.flatnonzero(labels == int(text))
    kept_out = such[::KEPT_OUT]
    drawn = digits[rng.choice((kept_out if held_out else np.setdiff1d(such, kept_out)).tolist())]
    side = max(16, round(min(room)))
    mask = Image.fromarray((drawn / 16 * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    # what was scanned at 8 x 8 is a grey cloud: make strokes of it
    return mask.point(lambda level: round(min(max((level - 70) * 2.4, 0), 255))), [float(side)]


@functools.cache
def _fonts() -> tuple[str | None, ...]:
    """Files of fonts that have letters; None is Pillow's own."""
    found = [path for family in ("dejavu", "liberation*") for path in sorted(FONTS.glob(f"{family}/*.ttf"))]
    return (None, *map(str, found))


@functools.lru_cache(maxsize=512)
def _font(path: str | None, size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@functools.cache
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    """[N, 8, 8] levels 0 to 16, [N] digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("hand-written digits come with scikit-learn: pip install 'moshivis[mini]'") from None
    digits = load_digits()
    return digits.images, digits.target
