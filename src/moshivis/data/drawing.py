"""A picture of a sample: what was said when, by whom, and as which tokens. Drawn with Pillow alone.

A spoken sample is drawn in strips of eight seconds. Each has, for the assistant and then for the user, the waveform,
the words where they are said and the codes, one row of squares a codebook; between them runs the text stream.
A written sample is its tokens, coloured by who says them.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moshivis.data.alignment import FRAME_RATE, Word
from moshivis.data.sample import Sample, Speaker
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, TextTokenizer

WIDTH, MARGIN, PICTURE = 1400, 44, 300  # pixels
FRAMES = 100  # of a strip
SQUARE = (WIDTH - 2 * MARGIN) // FRAMES  # pixels a frame
WAVE, WORDS, CODE, LETTERS, SMALL = 70, 24, 5, 18, 14
PAPER, INK, PALE, RULE = "#fcfcfb", "#22262b", "#6d747c", "#d5d8dc"
TINTS = {Speaker.NOBODY: RULE, Speaker.ASSISTANT: "#38876f", Speaker.USER: "#b06a1f"}


def draw_spoken(
    sample: Sample,
    own_codebooks: int,
    waves: np.ndarray,
    words: tuple[Sequence[Word], Sequence[Word]],
    picture: Image.Image | None,
) -> Image.Image:
    """`waves` [2, L], L samples for the T frames of the sample, and `words`: of the assistant, then of the user."""
    assert sample.audio is not None
    codes = sample.audio[:own_codebooks], sample.audio[own_codebooks:]
    heights = [WAVE + WORDS + CODE * len(rows) + 10 for rows in codes]
    strip = sum(heights) + CODE * 2 + 40
    top = MARGIN + 28 + (PICTURE + 20 if picture is not None else 0)
    strips = -(-len(sample) // FRAMES)
    canvas = Image.new("RGB", (WIDTH, top + strips * strip + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    _draw_head(canvas, pen, sample, picture)
    samples_a_frame = waves.shape[1] // len(sample)
    for number in range(strips):
        frames = range(number * FRAMES, min((number + 1) * FRAMES, len(sample)))
        y = top + number * strip
        pen.text((MARGIN, y), f"{frames.start / FRAME_RATE:.1f} s", fill=PALE, font=_font(SMALL))
        y += 20
        for side, speaker in enumerate((Speaker.ASSISTANT, Speaker.USER)):
            heard = waves[side, frames.start * samples_a_frame : frames.stop * samples_a_frame]
            _draw_wave(pen, heard, len(frames), y, TINTS[speaker])
            _draw_words(pen, words[side], frames, y + WAVE)
            _draw_codes(canvas, codes[side][:, frames.start : frames.stop], y + WAVE + WORDS)
            y += heights[side]
            if speaker == Speaker.ASSISTANT:
                _draw_text_stream(pen, sample.text[frames.start : frames.stop], y)
                y += CODE * 2 + 8
    return canvas


def draw_written(sample: Sample, tokenizer: TextTokenizer, picture: Image.Image | None) -> Image.Image:
    """Every token in a box; boxes are wrapped into lines."""
    top = MARGIN + 28 + (PICTURE + 20 if picture is not None else 0)
    boxes = list(_lay_out(sample, tokenizer, top))
    bottom = max((y for _, y, _, _, _ in boxes), default=top)
    canvas = Image.new("RGB", (WIDTH, bottom + 40 + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    _draw_head(canvas, pen, sample, picture)
    for x, y, width, text, speaker in boxes:
        pen.rounded_rectangle((x, y, x + width, y + 28), radius=5, fill=TINTS[speaker])
        pen.text((x + 4, y + 4), text, fill="white", font=_font(LETTERS))
    return canvas


def _lay_out(sample: Sample, tokenizer: TextTokenizer, top: int) -> Iterator[tuple[float, int, float, str, Speaker]]:
    x, y = float(MARGIN), top
    for token, speaker in zip(sample.text.tolist(), sample.speaker.tolist(), strict=True):
        text = {PADDING: "pad", END_OF_PADDING: "begin"}.get(token, tokenizer.piece(token) or "·")
        width = _font(LETTERS).getlength(text) + 8
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 36
        yield x, y, width, text, Speaker(speaker)
        x += width + 3


# parts of a strip -----------------------------------------------------------------------------------------------------


def _draw_head(canvas: Image.Image, pen: ImageDraw.ImageDraw, sample: Sample, picture: Image.Image | None) -> None:
    steps = f"{len(sample)} frames" if sample.kind == "speech" else f"{len(sample)} tokens"
    pen.text((MARGIN, MARGIN), f"{sample.origin}   {sample.kind}, {steps}", fill=INK, font=_font(LETTERS))
    x = WIDTH - MARGIN
    for speaker in (Speaker.USER, Speaker.ASSISTANT):
        x -= 110
        pen.text((x, MARGIN), speaker.name.lower(), fill=TINTS[speaker], font=_font(LETTERS))
    if picture is not None:
        thumbnail = picture.copy()
        thumbnail.thumbnail((WIDTH - 2 * MARGIN, PICTURE))
        canvas.paste(thumbnail, (MARGIN, MARGIN + 28))


def _draw_wave(pen: ImageDraw.ImageDraw, wave: np.ndarray, frames: int, top: int, tint: str) -> None:
    """The loudest sample of every column, up and down."""
    middle, width = top + WAVE // 2, frames * SQUARE
    pen.line((MARGIN, middle, MARGIN + width, middle), fill=RULE)
    for column, part in enumerate(np.array_split(np.abs(wave), width)):
        height = min(float(part.max(initial=0.0)), 1.0) * (WAVE // 2 - 2)
        pen.line((MARGIN + column, middle - height, MARGIN + column, middle + height), fill=tint)


def _draw_words(pen: ImageDraw.ImageDraw, words: Sequence[Word], frames: range, top: int) -> None:
    free = 0.0
    for word in words:
        frame = word.start * FRAME_RATE
        if frames.start <= frame < frames.stop:
            x = MARGIN + (frame - frames.start) * SQUARE
            pen.line((x, top - 6, x, top + 3), fill=INK)
            x = max(x, free)
            pen.text((x, top), word.text, fill=INK, font=_font(LETTERS))
            free = x + _font(LETTERS).getlength(word.text + " ")


def _draw_codes(canvas: Image.Image, codes: np.ndarray, top: int) -> None:
    """[K, n] Every code has a colour of its own; unknown ones are white."""
    hues = (codes.astype(np.int64) * 2654435761 % 2**32) / 2**32  # spreads neighbouring codes over the circle
    pixels = np.full((*codes.shape, 3), 255, np.uint8)
    for index in np.ndindex(codes.shape):
        if codes[index] >= 0:
            pixels[index] = [round(255 * part) for part in colorsys.hsv_to_rgb(float(hues[index]), 0.45, 0.9)]
    size = (codes.shape[1] * SQUARE, codes.shape[0] * CODE)
    canvas.paste(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), (MARGIN, top))


def _draw_text_stream(pen: ImageDraw.ImageDraw, text: np.ndarray, top: int) -> None:
    """Padding pale, end-of-padding dark, pieces of words in the assistant's colour."""
    tints = {PADDING: RULE, END_OF_PADDING: INK}
    for frame, token in enumerate(text.tolist()):
        x = MARGIN + frame * SQUARE
        pen.rectangle((x, top, x + SQUARE - 2, top + 2 * CODE), fill=tints.get(token, TINTS[Speaker.ASSISTANT]))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
