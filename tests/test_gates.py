"""The picture of the gates: its colours, its scales, and that it holds whatever was said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageColor

from moshivis.config import AdapterConfig
from moshivis.evaluation.gates import WIDTH, draw_gates
from moshivis.inference.colour import PALETTE, RELEASED_SCALE, GateScale
from moshivis.inference.conversation import TextPiece
from moshivis.inference.talk import TalkResult, Turn

PICTURE = Image.new("RGB", (120, 80), "#123456")
SCALE = GateScale(low=0.005, width=0.295)


def conversation(answer: str, gates: list[float], *, model: str = "mini", form: str = "spoken") -> TalkResult:
    """A greeting without a word, a question at frame 10, and the words of `answer` every second frame after it."""
    words = answer.split()
    pieces = tuple(
        TextPiece(frame=12 + 2 * i, token=5, text=f" {word}", gate=gate)
        for i, (word, gate) in enumerate(zip(words, gates, strict=True))
    )
    frames = 20 + 2 * len(words)
    return TalkResult(
        model=model,
        form="spoken" if form == "spoken" else "written",
        pieces=pieces,
        turns=(
            Turn(question=None, text="", frame=0, reaction_ms=None),
            Turn(question="what.wav", text=answer, frame=10, reaction_ms=300.0),
        ),
        gates=tuple(np.interp(range(frames), range(frames), [0.01] * frames)) if form == "spoken" else (),
        frames=frames,
        frame_seconds=0.08,
        wall_seconds=1.0,
        user=None,
        assistant=None,
    )


def area(picture: Image.Image, colour: str) -> int:
    """Pixels of exactly that colour."""
    return int((np.asarray(picture) == ImageColor.getrgb(colour)).all(-1).sum())


@pytest.mark.parametrize(
    ("gate", "index"), [(-1.0, 0), (0.0, 0), (0.005, 0), (0.0066, 1), (0.013, 5), (0.0209, 10), (0.021, 10), (0.5, 10)]
)
def test_the_released_scale(gate: float, index: int) -> None:
    assert RELEASED_SCALE.index(gate) == index
    assert RELEASED_SCALE.colour(gate) == PALETTE[index]


def test_every_model_has_its_own_scale() -> None:
    scale = GateScale.of(AdapterConfig(gate_scale=(0.3, 0.2)))
    assert [scale.index(gate) for gate in (0.3, 0.5, 0.4)] == [0, 10, 5]
    assert GateScale.of(None) == GateScale.of(AdapterConfig()) == RELEASED_SCALE


def test_words_are_painted_in_the_colour_of_their_gate() -> None:
    green, orange = PALETTE[0], PALETTE[10]
    small = draw_gates(conversation("I I see", [0.005, 0.013, 0.021], model="moshika-vis"), PICTURE, RELEASED_SCALE)
    large = draw_gates(
        conversation("watermelon I I", [0.005, 0.013, 0.021], model="moshika-vis"), PICTURE, RELEASED_SCALE
    )
    assert area(large, green) > area(small, green) > 1000  # the legend, and a longer word
    assert area(large, orange) < area(small, orange)
    assert small.width == WIDTH
    assert area(small, "#123456") > 50_000  # the picture stands beside it


def test_a_long_transcript_makes_a_taller_picture_and_stays_inside() -> None:
    words = " ".join(["watermelon"] * 200)
    gates = list(np.linspace(0.1, 0.2, 200))
    short = draw_gates(conversation("watermelon", [0.1]), PICTURE, SCALE)
    long = draw_gates(conversation(words, gates), PICTURE, SCALE)
    assert long.height > short.height + 500
    one_word = draw_gates(conversation("watermelon " * 200, [0.1] * 200), None, SCALE)
    assert one_word.height < long.height  # without a picture the lines are longer
    margin = np.asarray(long.crop((WIDTH - 20, 0, WIDTH, 600)))
    wrapped = np.asarray(one_word.crop((WIDTH - 20, 0, WIDTH, 400)))
    assert (wrapped == wrapped[0, 0]).all() and (margin == margin[0, 0]).all()


@pytest.mark.parametrize("form", ["spoken", "written"])
def test_nothing_said_and_no_picture_can_be_drawn_too(form: str) -> None:
    silent = draw_gates(conversation("", [], form=form), None, SCALE)
    assert silent.width == WIDTH and silent.height > 300
    asked = conversation("yes it is", [0.1, 0.3, 0.2], form=form)
    drawn = draw_gates(asked, None, SCALE)
    assert area(drawn, PALETTE[10]) > area(silent, PALETTE[10])
    flat = dataclasses.replace(asked, gates=(0.0,) * asked.frames)
    assert draw_gates(flat, None, SCALE).size == drawn.size
