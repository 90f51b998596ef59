"""A picture of a conversation's gates: which words looked at the image (the paper's Figure 7).

The transcript is coloured by the gate of every piece, green where general knowledge speaks and orange where the image
does; below stands the gate over time. Drawn with Pillow alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from moshivis.inference.colour import PALETTE, GateScale
from moshivis.inference.conversation import TextPiece
from moshivis.inference.talk import TalkResult

WIDTH, MARGIN, PICTURE = 1400, 44, 380  # pixels
LETTERS, SMALL = 28, 19  # sizes of type
LINE, CURVE = 50, 250
PAPER, INK, PALE, RULE = "#fcfcfb", "#22262b", "#6d747c", "#d5d8dc"


def draw_gates(result: TalkResult, picture: Image.Image | None, scale: GateScale) -> Image.Image:
    """The transcript coloured by its gates beside the picture, a legend, and the gate over time."""
    left = MARGIN + (PICTURE + MARGIN if picture is not None else 0)
    words = list(_lay_out(result, left, WIDTH - MARGIN))
    text_end = max((mark.y for mark in words), default=MARGIN) + LINE
    thumbnail = None
    if picture is not None:
        thumbnail = picture.convert("RGB")
        thumbnail.thumbnail((PICTURE, 3 * PICTURE), Image.Resampling.LANCZOS)
        if max(thumbnail.size) < PICTURE:
            grown = PICTURE / max(thumbnail.size)
            size = (round(thumbnail.width * grown), round(thumbnail.height * grown))
            thumbnail = thumbnail.resize(size, Image.Resampling.BICUBIC)
        text_end = max(text_end, MARGIN + thumbnail.height)
    legend = text_end + 34
    curve = legend + 86
    canvas = Image.new("RGB", (WIDTH, curve + CURVE + 74), PAPER)
    pen = ImageDraw.Draw(canvas)
    if thumbnail is not None:
        canvas.paste(thumbnail, (MARGIN, MARGIN))
    for mark in words:
        mark.draw(pen, scale)
    _draw_legend(pen, scale, legend)
    _draw_curve(pen, result, scale, curve)
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


# transcript -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mark:
    """A bit of text at a place; without gate it is a heading."""

    x: float
    y: int
    text: str
    width: float
    gate: float | None

    def draw(self, pen: ImageDraw.ImageDraw, scale: GateScale) -> None:
        if self.gate is None:
            pen.text((self.x, self.y), self.text, fill=PALE, font=_font(SMALL))
            return
        box = (self.x, self.y - 3, self.x + self.width, self.y + LETTERS + 9)
        pen.rounded_rectangle(box, radius=6, fill=scale.colour(self.gate))
        pen.text((self.x, self.y), self.text, fill=INK, font=_font(LETTERS))


def _lay_out(result: TalkResult, left: int, right: int) -> Iterator[_Mark]:
    """Every turn a heading and a paragraph, wrapped at words between `left` and `right`."""
    letters, small = _font(LETTERS), _font(SMALL)
    y = MARGIN
    firsts = [turn.frame for turn in result.turns[1:]] + [math.inf]
    begin: float = -1
    for turn, end in zip(result.turns, firsts, strict=True):
        heading = "Greeting" if turn.question is None else f"Asked: {turn.question}"
        for line in _wrap(heading, small, right - left):
            yield _Mark(left, y, line, 0, None)
            y += SMALL + 8
        x: float = left
        said = [piece for piece in result.pieces if begin <= piece.frame < end]
        for word in _words(said):
            total = sum(letters.getlength(piece.text.strip()) for piece in word)
            if x > left and x + total > right:
                x, y = left, y + LINE
            for piece in word:
                text = piece.text.strip()
                width = letters.getlength(text)
                if x > left and x + width > right:  # a word that is longer than a line
                    x, y = left, y + LINE
                yield _Mark(x, y, text, width, piece.gate)
                x += width
            x += letters.getlength(" ")
        begin = end
        y += LINE + 6


def _words(pieces: Sequence[TextPiece]) -> Iterator[list[TextPiece]]:
    """Pieces that make up a word together; a leading space begins the next one."""
    word: list[TextPiece] = []
    for piece in pieces:
        if word and piece.text.startswith(" "):
            yield word
            word = []
        word.append(piece)
    if word:
        yield word


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            yield line
            line = word
        else:
            line = longer
    yield line


# legend and curve -----------------------------------------------------------------------------------------------------


def _draw_legend(pen: ImageDraw.ImageDraw, scale: GateScale, top: int) -> None:
    small, side, gap = _font(SMALL), 34, 12
    x: float = MARGIN
    pen.text((x, top + 4), "general knowledge", fill=INK, font=small)
    x += small.getlength("general knowledge") + gap
    for index, colour in enumerate(PALETTE):
        pen.rectangle((x + index * side, top, x + (index + 1) * side - 3, top + 30), fill=colour)
    end = x + len(PALETTE) * side
    pen.text((end + gap - 3, top + 4), "image", fill=INK, font=small)
    pen.text((x, top + 36), f"{scale.low:.4f}", fill=PALE, font=small)
    high = f"{scale.low + scale.width:.4f}"
    pen.text((end - 3 - small.getlength(high), top + 36), high, fill=PALE, font=small)
    pen.text((end + gap + small.getlength("image") + 40, top + 4), "gate", fill=PALE, font=small)


def _draw_curve(pen: ImageDraw.ImageDraw, result: TalkResult, scale: GateScale, top: int) -> None:
    """The gate of every frame over seconds; of a written conversation, that of every piece over tokens."""
    small = _font(SMALL)
    left, right, bottom = MARGIN + 84, WIDTH - MARGIN, top + CURVE
    unit, axis = (result.frame_seconds, "seconds") if result.gates else (1.0, "tokens")
    reported = [(frame, gate) for frame, gate in enumerate(result.gates) if gate != 0]  # 0 = no adapter spoke
    points = reported or [(piece.frame, piece.gate) for piece in result.pieces]
    if not points:
        return
    span = max(result.frames * unit, unit)
    low, high = min(gate for _, gate in points), max(gate for _, gate in points)
    low, high = (low, high) if high - low > 1e-9 else (low - 0.001, high + 0.001)

    def place(frame: float, gate: float) -> tuple[float, float]:
        return left + frame * unit / span * (right - left), bottom - (gate - low) / (high - low) * CURVE

    for gate in (low, (low + high) / 2, high):
        y = place(0, gate)[1]
        pen.line((left, y, right, y), fill=RULE)
        pen.text((MARGIN, y - SMALL * 0.6), f"{gate:.4f}", fill=PALE, font=small)
    tick = _tick(span)
    for number in range(int(span / tick) + 1):
        x = place(number * tick / unit, low)[0]
        pen.line((x, bottom, x, bottom + 7), fill=PALE)
        label = f"{number * tick:g}"
        pen.text((x - small.getlength(label) / 2, bottom + 10), label, fill=PALE, font=small)
    pen.text((right - small.getlength(axis), bottom + 36), axis, fill=PALE, font=small)
    for turn in result.turns[1:]:
        x = place(turn.frame, low)[0]
        pen.line((x, top - 8, x, bottom), fill=PALE)
    pen.line([place(frame, gate) for frame, gate in points], fill=PALE, width=2, joint="curve")
    for piece in result.pieces:
        x, y = place(piece.frame, piece.gate)
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=scale.colour(piece.gate), outline=INK)


def _tick(span: float) -> float:
    """A round number that divides `span` into at most a dozen parts."""
    power = 10.0 ** math.floor(math.log10(span / 12))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / 12)
