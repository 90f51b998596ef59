"""CIDEr-D: worked examples, and the laws that a score of agreement must obey."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshivis.errors import InputError
from moshivis.evaluation.cider import cider

WORDS = st.lists(st.sampled_from("a red blue circle star left".split()), min_size=1, max_size=8)


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def test_one_word_by_hand() -> None:
    """Two pictures: only 1-grams exist, of which 'a' says nothing (both pictures have it)."""
    references = [words("a star"), words("a circle")]
    # 1-grams: cosine 1 for the right noun; 2-grams: likewise; 3- and 4-grams: none
    assert cider(words("a star", "a circle"), references) == pytest.approx(10 * 2 / 4)
    assert cider(words("a circle", "a star"), references) == 0
    # one word too few: 1-grams agree, 2-grams are gone, exp(-1/72) for the length
    assert cider(words("star", "circle"), references) == pytest.approx(10 * math.exp(-1 / 72) / 4)


def test_a_word_counts_no_more_often_than_in_the_reference() -> None:
    references = [words("red star"), words("blue circle")]
    once, thrice = (cider(words(text, "blue circle"), references) for text in ("red star", "red red red star"))
    assert thrice < once


def test_rare_words_weigh_more() -> None:
    references = [words("red heart"), words("red star"), words("blue star"), words("red circle")]
    others = ["red star", "blue star", "red circle"]
    common, rare = (cider(words(text, *others), references) for text in ("red thing", "some heart"))
    assert rare > common


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=5))
def test_the_reference_itself_is_best(references: list[list[list[str]]]) -> None:
    single = [texts[:1] for texts in references]
    own = [texts[0] for texts in single]
    best = cider(own, single)
    assert 0 <= best <= 10 + 1e-9
    assert cider([[*text, "left"] for text in own], single) <= best + 1e-9


@pytest.mark.parametrize(("candidates", "references"), [([], []), ([["a"]], []), ([["a"]], [[]])])
def test_what_cannot_be_scored_is_refused(candidates: list, references: list) -> None:
    with pytest.raises(InputError, match="CIDEr needs"):
        cider(candidates, references)
