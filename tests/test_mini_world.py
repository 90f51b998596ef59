"""The miniature world without its voices: scenes, drawings, questions, answers, the judge."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moshivis.errors import InputError
from moshivis.mini import grammar, knowledge
from moshivis.mini.drawing import draw_scene, draw_with_boxes, outline, shade
from moshivis.mini.grammar import FAMILIES, PRETRAINING_FAMILIES, answer, ask, judge, normalise, spoken_parts
from moshivis.mini.questions import MAX_PHRASINGS, SCENELESS_FAMILIES, Query
from moshivis.mini.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    in_reading_order,
    said_scene,
    sample_scene,
)

seeds = st.integers(0, 2**32)
RED_CIRCLE = SceneObject("circle", "red", "big", "left")
BLUE_STAR = SceneObject("star", "blue", "small", "top")
GREEN_STAR = SceneObject("star", "green", "big", "bottom right")
SCENE = Scene((BLUE_STAR, RED_CIRCLE), "white")


def reply(scene: Scene, **fields: Any) -> str | None:
    turn = answer(Query(**fields), scene)
    return turn.answer if turn else None


# ----------------------------------------------------------------------------------------------------------------------
# Scenes and drawings


@given(seeds)
def test_scenes_keep_the_rules_of_the_world(seed: int) -> None:
    scene = sample_scene(random.Random(seed))
    things = scene.objects
    assert 1 <= len(things) <= 4
    assert len({thing.place for thing in things}) == len(things)
    assert len({(thing.shape, thing.colour) for thing in things}) == len(things)
    assert scene.background not in {thing.colour for thing in things}
    assert things == in_reading_order(things)
    assert all(thing.shape in SHAPES and thing.colour in COLOURS for thing in things)
    assert all(thing.size in SIZES and thing.place in PLACES for thing in things)


def test_scenes_are_balanced() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(4000)]
    repeats = sum(len({thing.shape for thing in scene.objects}) < len(scene.objects) for scene in scenes) / len(scenes)
    assert 0.2 < repeats < 0.45
    shapes = Counter(thing.shape for scene in scenes for thing in scene.objects)
    colours = Counter(thing.colour for scene in scenes for thing in scene.objects)
    for counts, values in ((shapes, SHAPES), (colours, COLOURS)):
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.7 * max(counts.values())


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_an_object_is_painted_inside_its_box_in_its_place(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng)
    drawing = draw_with_boxes(scene, rng)
    picture, boxes = drawing.picture, drawing.boxes
    assert picture.mode == "RGB" and all(64 <= side <= 512 for side in picture.size)
    assert len(boxes) == len(scene.objects)
    for thing, (left, top, right, bottom) in zip(scene.objects, boxes, strict=True):
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        row, column = divmod(PLACES.index(thing.place or ""), 3)
        assert column / 3 < (left + right) / 2 < (column + 1) / 3
        assert row / 3 < (top + bottom) / 2 < (row + 1) / 3


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_big_is_clearly_bigger_than_small(seed: int) -> None:
    rng = random.Random(seed)
    scene = Scene((SceneObject("circle", "red", "small", "left"), SceneObject("circle", "blue", "big", "right")))
    small, big = draw_with_boxes(scene, rng, (128, 128)).boxes
    assert (big[3] - big[1]) > 1.3 * (small[3] - small[1])


def test_a_filled_square_shows_its_colour_and_the_ground_its_own() -> None:
    scene = Scene((SceneObject("square", "red", "big", "middle"),), "green")
    reds = greens = 0
    for seed in range(20):
        pixels = np.asarray(draw_scene(scene, random.Random(seed), (120, 120))).astype(int)
        red, green = pixels[..., 0], pixels[..., 1]
        reds += red[50:70, 50:70].mean() > 2 * green[50:70, 50:70].mean()
        greens += green[:15].mean() > red[:15].mean()
    assert greens == 20
    assert reds >= 12  # the rest are outlines, green inside


def test_drawing_follows_size_and_seed() -> None:
    first = draw_scene(SCENE, random.Random(1), (300, 90))
    again = draw_scene(SCENE, random.Random(1), (300, 90))
    assert first.size == (300, 90)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert isinstance(first, Image.Image)


@pytest.mark.parametrize(
    ("scene", "size"), [(SCENE, (63, 100)), (SCENE, (100, 513)), (Scene((SceneObject("star", "red"),)), (100, 100))]
)
def test_what_cannot_be_drawn_is_refused(scene: Scene, size: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        draw_scene(scene, random.Random(0), size)


@given(seeds)
def test_shades_stay_apart(seed: int) -> None:
    rng = random.Random(seed)
    red, green, blue = (shade(name, rng) for name in ("red", "green", "blue"))
    assert red[0] == max(red) and green[1] == max(green) and blue[2] == max(blue)
    assert max(shade("black", rng)) < 0.2 < min(shade("grey", rng)) < 0.7 < min(shade("white", rng))


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_have_about_one_size(shape: str) -> None:
    extent = np.ptp(outline(shape), axis=0)
    assert np.all(extent > 1.6) and np.all(extent < 2.35)


# ----------------------------------------------------------------------------------------------------------------------
# Questions and answers


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"family": "colour", "shape": "star"}, "The star is blue."),
        ({"family": "colour", "place": "left"}, "On the left is a red circle."),
        ({"family": "colour", "shape": "heart"}, "The heart is not there."),
        ({"family": "colour", "shape": "star", "place": "top"}, "The star at the top is blue."),
        ({"family": "shape", "colour": "blue"}, "A blue star."),
        ({"family": "shape", "colour": "green"}, "A green thing is not there."),
        ({"family": "shape", "place": "top"}, "At the top is a blue star."),
        ({"family": "shape", "place": "bottom"}, "At the bottom is nothing."),
        ({"family": "size", "shape": "circle"}, "The circle is big."),
        ({"family": "size", "place": "left"}, "On the left is a big circle."),
        ({"family": "place", "colour": "red"}, "The red circle is on the left."),
        ({"family": "place", "colour": "green"}, "The green thing is not there."),
        ({"family": "count", "shape": "circle"}, "The number of circles is one."),
        ({"family": "count", "shape": "cross"}, "The number of crosses is zero."),
        ({"family": "count"}, "The number of objects is two."),
        ({"family": "yes_no", "shape": "star", "colour": "blue"}, "A blue star is there, so yes."),
        ({"family": "yes_no", "shape": "star", "colour": "green"}, "A green star is not there, so no."),
        ({"family": "yes_no", "shape": "heart", "colour": "green"}, "A green heart is not there, so no."),
        ({"family": "yes_no", "colour": "green"}, "A green thing is not there, so no."),
        ({"family": "yes_no", "shape": "star", "claim": "top"}, "At the top? The star is at the top, so yes."),
        ({"family": "yes_no", "colour": "red", "claim": "heart"}, "A heart? A red circle, so no."),
        ({"family": "yes_no", "shape": "heart", "claim": "green"}, "Green? The heart is not there, so no."),
        ({"family": "misleading", "shape": "star", "claim": "green"}, "The star is blue, not green."),
        ({"family": "misleading", "shape": "heart", "claim": "green"}, "The heart is not there."),
        ({"family": "misleading", "shape": "star", "claim": "blue"}, None),
        (
            {"family": "describe"},
            "I see a small blue star at the top and a big red circle on the left.",
        ),
        ({"family": "knowledge", "item": "sum:2:3"}, "Two plus three is five."),
        ({"family": "knowledge", "item": "bigger:ant:whale"}, "A whale is bigger than an ant."),
        ({"family": "knowledge", "item": "before:Monday"}, "The day before Monday is Sunday."),
        ({"family": "small_talk", "item": "thanks"}, "You are welcome."),
        ({"family": "repeat", "item": "big red circle"}, "Big red circle."),
    ],
)
def test_answers(fields: dict[str, Any], expected: str | None) -> None:
    assert reply(SCENE, **fields) == expected


def test_existence_cannot_be_told_from_single_words() -> None:
    """What is asked for may be seen in two things, but not in one; the ground's colour is not asked for by itself."""
    rng = random.Random(0)
    verdicts: Counter[str] = Counter()
    for _ in range(3000):
        scene = sample_scene(rng)
        turn = ask(scene, "yes_no", rng)
        assert turn is not None
        query = turn.query
        assert query.shape or query.colour != scene.background
        shapes, colours = {thing.shape for thing in scene.objects}, {thing.colour for thing in scene.objects}
        if not query.claim and query.shape in shapes and query.colour in colours:
            verdicts[turn.facts["verdict"]] += 1
    assert verdicts["no"] > 0.2 * verdicts["yes"] > 20


def test_a_question_that_could_mean_two_objects_has_no_answer() -> None:
    scene = Scene((BLUE_STAR, GREEN_STAR))
    assert reply(scene, family="colour", shape="star") is None
    assert reply(scene, family="colour", shape="star", size="big") == "The big star is green."
    assert reply(scene, family="count", shape="star") == "The number of stars is two."
    assert reply(scene, family="yes_no", shape="star", colour="red") == "A red star is not there, so no."


def test_nothing_is_answered_from_what_was_left_unsaid() -> None:
    said = Scene((SceneObject("star", "blue"), SceneObject("circle", "red", "big")))
    assert reply(said, family="size", shape="star") is None
    assert reply(said, family="place", shape="circle") is None
    assert reply(said, family="colour", place="left") is None
    assert reply(said, family="count", size="big") is None
    assert reply(said, family="size", shape="circle") == "The circle is big."
    assert reply(said, family="describe") == "I see a blue star and a big red circle."


def test_descriptions_are_the_spoken_parts() -> None:
    scene = Scene((BLUE_STAR, RED_CIRCLE, GREEN_STAR))
    text = reply(scene, family="describe")
    assert text == (
        "I see a small blue star at the top and a big red circle on the left and a big green star at the bottom right."
    )
    assert text == " ".join(grammar.description_parts(scene))


def test_a_told_scene_is_english() -> None:
    phrases = grammar.scene_phrases(
        Scene((SceneObject("star", "orange", None, "middle"), RED_CIRCLE)), random.Random(0)
    )
    assert len(phrases) == 2
    assert phrases[0].endswith("an orange star in the middle")
    assert phrases[1].startswith("and ") and phrases[1].endswith("a big red circle on the left")


@pytest.mark.parametrize("family", PRETRAINING_FAMILIES)
def test_every_family_has_twelve_phrasings(family: str) -> None:
    rng = random.Random(0)
    if family == "knowledge":
        kinds = {item.split(":")[0]: item for item in knowledge.FACT_ITEMS}
        texts = {knowledge.question(item, i) for item in kinds.values() for i in range(MAX_PHRASINGS)}
    elif family == "small_talk":
        texts = {knowledge.small_talk_question(item, i) for item in knowledge.SMALL_TALK for i in range(MAX_PHRASINGS)}
    else:
        query = grammar.sample_query(family, rng, SCENE)
        fields = query.to_dict() if family != "yes_no" else {"family": "yes_no", "shape": "star"}
        texts = {Query.from_dict({**fields, "phrasing": i}).text for i in range(MAX_PHRASINGS)}
        if family == "yes_no":
            texts |= {Query.from_dict({**fields, "claim": "red", "phrasing": i}).text for i in range(MAX_PHRASINGS)}
    assert len(texts) >= 12
    assert all(text[0].isupper() and text[-1] in "?.!" and "{" not in text for text in texts)


@given(seeds, st.sampled_from(PRETRAINING_FAMILIES), st.booleans())
def test_own_answers_are_right_and_spoken(seed: int, family: str, told: bool) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng)
    scene = said_scene(scene, rng) if told else scene
    turn = ask(scene, family, rng)
    if turn is None:
        return
    assert turn.question == turn.query.text
    assert Query.from_dict(turn.query.to_dict()) == turn.query
    for text in (turn.answer, turn.answer.lower(), turn.answer.rstrip("."), f"  {turn.answer} "):
        assert judge(turn, text)
    assert not judge(turn, "")
    assert not judge(turn, "I see a picture of a mountain.") or family == "small_talk"
    parts = spoken_parts(turn)
    assert normalise(turn.answer) == normalise(" ".join(parts))
    if family != "describe":
        assert parts[-1] in ALL_ANSWERS and set(parts[:-1]) <= set(grammar.repeated_claims())
    assert set(normalise(f"{turn.question} {turn.answer}").split()) <= VOCABULARY


ALL_ANSWERS = set(grammar.all_answers())
VOCABULARY = grammar.vocabulary()


@given(seeds, st.sampled_from([name for name in FAMILIES if name not in SCENELESS_FAMILIES]))
def test_an_answer_with_another_fact_is_wrong(seed: int, family: str) -> None:
    """Every colour, shape, size, place and number word of an answer is swapped, and every verdict turned round."""
    rng = random.Random(seed)
    turn = ask(sample_scene(rng), family, rng)
    if turn is None:
        return
    true, _, denied = turn.answer.partition(", not ")
    groups = [SHAPES, COLOURS, SIZES, ("left", "right", "middle"), ("one", "two", "three", "four")]
    if family == "yes_no":
        for verdict, other in (("yes", "no"), ("no", "yes")):
            if true.endswith(f"so {verdict}."):
                assert not judge(turn, true.replace(f"so {verdict}.", f"so {other}."))
        true = true.rpartition(", so")[0]
    if turn.facts["missing"]:
        return  # "The heart is not there": another shape may be missing as well
    words = true.rstrip(".").split()
    for index, word in enumerate(words):
        for group in groups:
            if word not in group:
                continue
            present = {thing[kind] for thing in turn.facts["present"] for kind in ("shape", "colour", "size", "place")}
            strangers = [value for value in group if value not in present and value != word]
            if not strangers:
                continue
            wrong = [*words[:index], rng.choice(strangers), *words[index + 1 :]]
            tail = f", so {turn.facts['verdict']}." if family == "yes_no" else "."
            assert not judge(turn, " ".join(wrong) + tail), wrong


def test_yes_and_no_are_balanced_and_missing_things_are_asked_about() -> None:
    rng = random.Random(0)
    turns = [ask(sample_scene(rng), "yes_no", rng) for _ in range(1500)]
    yes = sum(turn.facts["verdict"] == "yes" for turn in turns if turn) / len(turns)
    assert 0.35 < yes < 0.6
    colours = [ask(sample_scene(rng), "colour", rng) for _ in range(1000)]
    missing = sum(turn.facts["missing"] for turn in colours if turn) / len(colours)
    assert 0.03 < missing < 0.2


def test_the_world_can_be_spoken_and_written() -> None:
    assert len(ALL_ANSWERS) < 9000
    assert len(grammar.GREETINGS) >= 6
    assert len(VOCABULARY) < 400
    queries = grammar.all_questions(random.Random(0), 400)
    assert {query.family for query in queries} == set(PRETRAINING_FAMILIES)
    sentences = grammar.world_text(random.Random(0), 3000)
    assert len(sentences) == 3000
    assert {word for text in sentences for word in normalise(text).split()} <= VOCABULARY


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("What colour is the star?", "what colour is the star"),
        ("What’s the color of the GRAY heart?!", "what is the colour of the grey heart"),
        ("2+3", "two plus three"),
        ("What is 17 - 4?", "what is seventeen minus four"),
        ("Say: twenty-one, 42.", "say twenty one forty two"),
        ("  ", ""),
    ],
)
def test_normalise(text: str, plain: str) -> None:
    assert normalise(text) == plain


@given(st.text(max_size=60))
def test_normalise_is_stable_and_the_judge_never_fails(text: str) -> None:
    plain = normalise(text)
    assert normalise(plain) == plain
    for family in PRETRAINING_FAMILIES:
        turn = ask(SCENE, family, random.Random(0))
        assert turn is not None
        assert judge(turn, text) in (True, False)
