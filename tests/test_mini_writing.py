"""Words, numbers and hand-written digits in pictures: drawn where they are said to be, asked about, judged."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshivis.errors import InputError
from moshivis.mini import grammar
from moshivis.mini.drawing import draw_scene, draw_with_boxes
from moshivis.mini.language import spoken_text
from moshivis.mini.lettering import _by_hand
from moshivis.mini.pictures import ATTRIBUTES, draw
from moshivis.mini.questions import Query
from moshivis.mini.scenes import Scene, SceneObject, sample_written_scene
from moshivis.mini.writing import ROWS, TEXTS, Writing, sample_writing

CAT, FORTY_TWO = Writing("cat", "top"), Writing("42", "bottom")
STAR = SceneObject("star", "blue", "small", "middle")


def ask(scene: Scene, item: str | None = None) -> grammar.Turn | None:
    return grammar.answer(Query(family="read", item=item), scene)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("text", ["bread", "7", "88"])
def test_a_writing_stands_in_its_row(text: str, row: str) -> None:
    drawing = draw_with_boxes(Scene((), "white", Writing(text, row)), random.Random(2), (240, 240))
    assert "".join(letter for letter, _ in drawing.letters) == text
    left, top, right, bottom = np.array([box for _, box in drawing.letters]).T
    assert (np.diff(left) > 0).all() and (right > left).all()
    third = ROWS.index(row) / 3
    assert third - 0.06 < top.min() and bottom.max() < third + 1 / 3 + 0.06
    ink = (np.asarray(drawing.picture.convert("L"), int) < 200).mean(1)
    inside = slice(int(third * 240), int((third + 1 / 3) * 240))
    assert ink[inside].sum() > 0.8 * ink.sum() > 0.5


def test_digits_by_hand_are_drawn() -> None:
    pytest.importorskip("sklearn")
    drawing = draw_with_boxes(Scene((), "white", Writing("4", "middle", hand=True)), random.Random(0), (120, 120))
    assert drawing.letters[0][0] == "4"
    assert np.ptp(np.asarray(drawing.picture.convert("L"))) > 60


def test_digits_by_hand_that_are_measured_are_none_that_training_draws() -> None:
    pytest.importorskip("sklearn")
    scene = Scene((), "white", Writing("4", "middle", hand=True))
    seen, unseen = (
        {_by_hand("4", (40.0, 40.0), random.Random(seed), held_out)[0].tobytes() for seed in range(400)}
        for held_out in (False, True)
    )
    assert len(seen) > 100 and 10 < len(unseen) < 25 and not seen & unseen
    drawn = [draw_scene(scene, random.Random(0), (120, 120), held_out=held_out) for held_out in (False, True)]
    assert drawn[0] != drawn[1]


@given(seed=st.integers(0, 2**32))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_place_that_holds_a_writing_is_not_called_empty(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_written_scene(rng)
    assert scene.writing is not None
    for family in ("shape", "colour", "size", "yes_no", "misleading"):
        turn = grammar.ask(scene, family, rng)
        if turn is None or not turn.facts["missing"]:
            continue
        place, row = turn.query.place or "", scene.writing.row or ""
        where = next((name for name in ("top", "bottom") if place.startswith(name)), "middle")
        assert turn.query.shape or not place or where != row, turn
        if family == "yes_no" and not turn.query.claim:
            assert turn.query.shape, "what is written has a colour, too"


def test_where_a_writing_is_is_unknown_until_it_is_said() -> None:
    for writing, known in ((None, True), (Writing("cat"), False), (CAT, True), (Writing("cat", "middle"), False)):
        turn = grammar.answer(Query(family="shape", place="left"), Scene((STAR,), writing=writing))
        assert (turn is not None) == known and (turn is None or "nothing" in turn.answer)


def test_patches_know_the_letter_and_the_whole_text() -> None:
    _, labels = draw(Scene((), "white", FORTY_TWO), random.Random(1), 128, 8)
    channels = dict(zip(ATTRIBUTES, labels, strict=True))
    assert set(np.unique(channels["text"])) == {0, 1 + TEXTS.index("42")}
    shown = [ATTRIBUTES["letter"][i - 1] for i in np.unique(channels["letter"]) if i]
    assert sorted(shown) == ["2", "4"]


def test_what_nobody_placed_cannot_be_drawn() -> None:
    with pytest.raises(InputError, match="nobody has said where"):
        draw_with_boxes(Scene((), "white", Writing("cat")), random.Random(0))


def test_reading() -> None:
    turn = ask(Scene((STAR,), "white", FORTY_TWO))
    assert turn is not None and turn.answer == "It says forty two."
    assert grammar.judge(turn, "It says 42.") and grammar.judge(turn, "The number is forty two.")
    for wrong in ("It says forty.", "It says forty three.", "It says nothing.", "Forty two or forty three.", ""):
        assert not grammar.judge(turn, wrong), wrong
    assert ask(Scene((STAR,), "white", FORTY_TWO), item="word") is None
    nothing = ask(Scene((STAR,), "white"))
    assert nothing is not None and nothing.facts["missing"]
    assert grammar.judge(nothing, "It says nothing.") and grammar.judge(nothing, "There is no word.")
    assert not grammar.judge(nothing, "It says cat.")


def test_a_description_names_what_is_written_and_a_word_is_no_thing() -> None:
    scene = Scene((STAR,), "white", Writing("star", "top"))
    turn = grammar.answer(Query(family="describe"), scene)
    assert turn is not None and turn.answer == "I see a small blue star in the middle and the word star."
    assert grammar.judge(turn, turn.answer)
    assert not grammar.judge(turn, "I see a small blue star in the middle.")
    assert not grammar.judge(turn, "I see the word star.")
    assert not grammar.judge(turn, "I see a small blue star in the middle and the word stop.")


def test_scenes_with_a_writing_keep_its_row_free() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_written_scene(rng)
        assert scene.writing is not None and scene.writing.row is not None
        for thing in scene.objects:
            assert thing.place is not None
            row = thing.place.split()[0]
            assert (row if row in ("top", "bottom") else "middle") != scene.writing.row


def test_every_answer_can_be_spoken() -> None:
    rng = random.Random(1)
    spoken = set(grammar.all_answers())
    for _ in range(200):
        writing = sample_writing(rng)
        turn = ask(Scene((), "white", writing))
        assert turn is not None and turn.answer in spoken
        assert grammar.normalise(turn.answer).endswith(spoken_text(writing))
