"""The judge of the miniature world: facts count, not words."""

from typing import Any

import pytest

from moshivis.mini.grammar import answer, judge
from moshivis.mini.questions import Query
from moshivis.mini.scenes import Scene, SceneObject

SCENE = Scene((SceneObject("star", "blue", "small", "top"), SceneObject("circle", "red", "big", "left")), "white")


@pytest.mark.parametrize(
    ("fields", "text", "right"),
    [
        ({"family": "colour", "shape": "star"}, "It is blue.", True),
        ({"family": "colour", "shape": "star"}, "Blue", True),
        ({"family": "colour", "shape": "star"}, "The small star is blue.", True),
        ({"family": "colour", "shape": "star"}, "The star is not blue.", False),
        ({"family": "colour", "shape": "star"}, "The star is blue and red.", False),
        ({"family": "colour", "shape": "star"}, "There is no star.", False),
        ({"family": "colour", "shape": "star"}, "The star is not there.", False),
        ({"family": "colour", "shape": "heart"}, "I see no heart.", True),
        ({"family": "colour", "shape": "heart"}, "There is no heart.", True),
        ({"family": "colour", "shape": "heart"}, "The circle is not there.", False),
        ({"family": "shape", "place": "bottom"}, "There is nothing at the bottom.", True),
        ({"family": "shape", "place": "bottom"}, "On the left is nothing.", False),
        ({"family": "shape", "place": "left"}, "On the left is nothing.", False),
        ({"family": "shape", "colour": "blue"}, "The blue one is a star.", True),
        ({"family": "shape", "colour": "blue"}, "A blue star is not in the picture.", False),
        ({"family": "colour", "shape": "heart"}, "The heart is red.", False),
        ({"family": "place", "shape": "star"}, "It is at the top.", True),
        ({"family": "place", "shape": "star"}, "At the top left.", False),
        ({"family": "size", "shape": "star"}, "It is tiny.", True),
        ({"family": "count", "shape": "star"}, "1", True),
        ({"family": "count", "shape": "star"}, "I see a star.", True),
        ({"family": "count", "shape": "star"}, "There are two stars.", False),
        ({"family": "count", "shape": "star"}, "There are no stars.", False),
        ({"family": "count", "shape": "star"}, "The number of red things is one.", False),
        ({"family": "count", "shape": "star"}, "The number of small objects is one.", False),
        ({"family": "count", "shape": "star"}, "There is one blue star.", True),
        ({"family": "count", "shape": "star"}, "The number is one.", True),
        ({"family": "count", "shape": "star"}, "In the picture is one.", True),
        ({"family": "count", "shape": "heart"}, "I see the one.", False),
        ({"family": "count"}, "There are two things.", True),
        ({"family": "count"}, "The number of stars is two.", False),
        ({"family": "count"}, "I see two stars and circles.", True),
        ({"family": "count", "shape": "heart"}, "zero", True),
        ({"family": "count", "shape": "heart"}, "The number of hearts is zero.", True),
        ({"family": "count", "shape": "heart"}, "There are no hearts.", True),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "No.", True),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "No, it is blue.", True),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "No, it is red.", False),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "The star is not green, so no.", True),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "There is no star, so no.", False),
        ({"family": "yes_no", "shape": "heart", "colour": "green"}, "No.", True),
        ({"family": "yes_no", "shape": "heart", "colour": "green"}, "Yes.", False),
        ({"family": "yes_no", "shape": "star", "claim": "blue"}, "Yes, no.", False),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "Is the star green? No.", True),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "Red? The star is blue, so no.", False),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "Green? The star is green, so no.", False),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "Green?", False),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "Yes? The star is blue, so no.", False),
        ({"family": "yes_no", "shape": "star", "claim": "green"}, "The star is blue, so no. Anything else?", True),
        ({"family": "colour", "shape": "star"}, "Nothing? The star is blue.", False),
        ({"family": "yes_no", "shape": "star", "colour": "green"}, "The star is blue, so no.", True),
        ({"family": "yes_no", "shape": "star", "colour": "green"}, "A blue star is not there, so no.", False),
        ({"family": "yes_no", "shape": "star", "colour": "green"}, "A green star is there, so yes.", False),
        ({"family": "yes_no", "shape": "star", "colour": "blue"}, "There is one, so yes.", True),
        ({"family": "misleading", "shape": "star", "claim": "green"}, "It is blue.", True),
        ({"family": "misleading", "shape": "star", "claim": "green"}, "It is green.", False),
        ({"family": "misleading", "shape": "star", "claim": "green"}, "The star is green, not blue.", False),
        ({"family": "describe"}, "There is a blue star and a red circle.", True),
        ({"family": "describe"}, "A big red circle on the left, a small blue star at the top.", True),
        ({"family": "describe"}, "I see a blue circle and a red star.", False),
        ({"family": "describe"}, "I see a blue star.", False),
        ({"family": "describe"}, "I see a blue star, a red circle and a red circle.", False),
        ({"family": "knowledge", "item": "sum:2:3"}, "5", True),
        ({"family": "knowledge", "item": "sum:2:3"}, "Two plus three is six.", False),
        ({"family": "knowledge", "item": "sum:2:3"}, "The number of stars is five.", False),
        ({"family": "knowledge", "item": "sum:2:3"}, "Three plus two is five.", True),
        ({"family": "knowledge", "item": "sum:2:3"}, "Two plus two is five.", False),
        ({"family": "knowledge", "item": "minus:4:2"}, "Four minus two is two.", True),
        ({"family": "knowledge", "item": "minus:4:2"}, "Four minus two.", False),
        ({"family": "knowledge", "item": "capital:Italy"}, "The capital of Italy is Rome.", True),
        ({"family": "knowledge", "item": "capital:Italy"}, "The capital of Spain is Rome.", False),
        ({"family": "knowledge", "item": "capital:Italy"}, "It is Rome.", True),
        ({"family": "knowledge", "item": "capital:Italy"}, "Rome or Paris.", False),
        ({"family": "knowledge", "item": "bigger:ant:dog"}, "A dog is bigger than an ant.", True),
        ({"family": "knowledge", "item": "bigger:ant:dog"}, "An ant is bigger than a dog.", False),
        ({"family": "knowledge", "item": "after:Monday"}, "Tuesday is the day after Monday.", True),
        ({"family": "knowledge", "item": "after:Monday"}, "The day after Monday is Tuesday.", True),
        ({"family": "knowledge", "item": "after:Monday"}, "The day after Tuesday is Monday.", False),
        ({"family": "knowledge", "item": "after:Monday"}, "Monday comes before Tuesday.", True),
        ({"family": "knowledge", "item": "before:Monday"}, "The day before Monday is Sunday.", True),
        ({"family": "knowledge", "item": "before:Monday"}, "Monday comes before Sunday.", False),
        ({"family": "knowledge", "item": "next:5"}, "Six comes after five.", True),
        ({"family": "knowledge", "item": "next:5"}, "Five comes after six.", False),
        ({"family": "small_talk", "item": "goodbye"}, "Bye bye!", True),
        ({"family": "small_talk", "item": "goodbye"}, "You are welcome.", False),
    ],
)
def test_the_judge_minds_facts_not_words(fields: dict[str, Any], text: str, right: bool) -> None:
    turn = answer(Query(**fields), SCENE)
    assert turn is not None
    assert judge(turn, text) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The number of stars is two.", True),
        ("There are two.", True),
        ("The number of blue stars is two.", False),
        ("I see two big stars.", True),
        ("The number of stars is one.", False),
    ],
)
def test_a_number_is_that_of_the_things_named(text: str, right: bool) -> None:
    scene = Scene((SceneObject("star", "blue", "big", "top"), SceneObject("star", "red", "big", "left")), "white")
    turn = answer(Query(family="count", shape="star"), scene)
    assert turn is not None and judge(turn, text) is right
