"""Data sets mixed by weight, wrapped in other talk, cut to size."""

from __future__ import annotations

import collections
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_support import Numbered, same, sample
from moshivis.data.concat import Concatenated
from moshivis.data.cut import WORD_FRAMES, cut, cut_points, join
from moshivis.data.excerpt import Excerpts
from moshivis.data.mixture import BLOCK, Mixture, shares
from moshivis.data.sample import Kind, Sample, Speaker
from moshivis.errors import InputError
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING


def mixture(*weights: float, seed: int = 0) -> Mixture:
    return Mixture([(Numbered(f"set {i}"), weight) for i, weight in enumerate(weights)], "speech", seed)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=11), st.integers(0, 9), st.integers(0, 10**6))
def test_every_block_has_exact_shares(weights: list[float], seed: int, block: int) -> None:
    mixed = mixture(*weights, seed=seed)
    found = [mixed.find(position) for position in range(block * BLOCK, (block + 1) * BLOCK)]
    counts = collections.Counter(part for part, _ in found)
    for part, weight in enumerate(weights):
        assert abs(counts[part] - BLOCK * weight / sum(weights)) < 1
        inner = [position for number, position in found if number == part]
        assert inner == list(range(block * counts[part], (block + 1) * counts[part]))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 2500), st.floats(0.05, 10)), min_size=1, max_size=4), st.integers(0, 9))
def test_a_mixture_knows_when_a_sample_comes_again(parts: list[tuple[int, float]], seed: int) -> None:
    sets = [(Numbered(f"set {i}"), weight) for i, (_, weight) in enumerate(parts)]
    mixed = Mixture(sets, "speech", seed)
    assert Mixture(sets, "speech", seed).rows is None
    for (dataset, _), (rows, _) in zip(sets, parts, strict=True):
        dataset.rows = rows  # type: ignore[attr-defined]
    found = mixed.rows
    assert found is not None
    part, inner = mixed.find(found)
    assert inner == parts[part][0]
    assert all(inner < parts[part][0] for part, inner in map(mixed.find, range(found)))


def test_the_order_in_a_block_is_shuffled_and_stays() -> None:
    mixed = mixture(2, 1)
    order = [mixed.find(position)[0] for position in range(BLOCK)]
    assert len({tuple(order[i : i + 6]) for i in range(0, 900, 6)}) > 20
    copy = pickle.loads(pickle.dumps(mixed))
    assert [copy.find(position)[0] for position in reversed(range(BLOCK))] == order[::-1]
    assert [mixed.find(BLOCK + position)[0] for position in range(BLOCK)] != order
    assert same(copy[12345], mixed[12345])


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.integers(0, 5000))
def test_shares_add_up(weights: list[float], total: int) -> None:
    counts = shares(weights, total)
    assert sum(counts) == total
    assert all(abs(count - total * weight / sum(weights)) <= 1 for count, weight in zip(counts, weights, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(("speech", "speechless")), st.integers(0, 9))
def test_of_long_samples_every_position_gives_a_piece(length: int, longest: int, kind: Kind, seed: int) -> None:
    whole = Numbered(kind=kind, length=length, image="a")
    excerpts = Excerpts(whole, longest=longest, seed=seed)
    for position in range(8):
        piece, full = excerpts[position], whole[position]
        assert 0 < len(piece) <= longest and piece.image == "a"
        points = cut_points(full)[:-1]
        far = [begin for begin in range(length) if begin - points[points <= begin].max() > longest // 2]
        pieces = [cut(full, begin, begin + longest) for begin in (*points, *far, max(0, length - longest))]
        assert any(same(piece, one) for one in pieces) and same(piece, excerpts[position])


def test_all_of_a_long_recording_is_learnt_from() -> None:
    """Epoch by epoch: its last frames come as well as its first."""
    text = np.arange(400, dtype=np.int32) % 7 + 4
    text[np.arange(400) % 20 > 7] = PADDING
    long = Sample(text=text, speaker=np.ones(400, np.uint8), audio=np.arange(400, dtype=np.int16)[None])

    class Long(Numbered):
        def __getitem__(self, position: int) -> Sample:
            return long

    excerpts = Excerpts(Long(), longest=100)
    seen = [audio[0] for position in range(60) if (audio := excerpts[position].audio) is not None]
    assert all(piece[0] % 20 == 19 for piece in seen if piece[0] not in (0, 300))
    assert set(np.concatenate(seen)) >= set(range(400))
    text[1:] = PADDING  # nowhere may it be cut but at its ends
    whole = [audio[0] for position in range(300) if (audio := excerpts[position].audio) is not None]
    assert set(np.concatenate(whole)) == set(range(400))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 119), max_size=5), st.integers(20, 60))
def test_wherever_it_may_be_cut_all_is_learnt_from_and_in_no_scraps(words: list[int], longest: int) -> None:
    text = np.full(120, PADDING, np.int32)
    text[words] = 9
    long = Sample(text=text, speaker=np.ones(120, np.uint8), audio=np.arange(120, dtype=np.int16)[None])

    class Long(Numbered):
        def __getitem__(self, position: int) -> Sample:
            return long

    excerpts = Excerpts(Long(), longest=longest)
    pieces = [audio[0] for position in range(400) if (audio := excerpts[position].audio) is not None]
    assert set(np.concatenate(pieces)) == set(range(120))
    assert min(map(len, pieces)) >= longest - longest // 2


def test_a_picture_is_found_in_its_data_set() -> None:
    mixed = Mixture([(Numbered(image="a"), 1), (Numbered(image="b"), 1)], "speech")
    assert mixed.picture("b") == b"b"
    with pytest.raises(KeyError, match="no data set of mixture holds the picture c"):
        mixed.picture("c")


def test_mixtures_that_cannot_be() -> None:
    with pytest.raises(InputError, match="at least one data set"):
        mixture()
    with pytest.raises(InputError, match="finite numbers above 0, not 1, 0"):
        mixture(1, 0)
    with pytest.raises(InputError, match="the weight of set 1 is less than one sample in 1000"):
        mixture(1, 1e-5)
    with pytest.raises(InputError, match="set x holds speechless samples; it cannot be mixed with speech ones"):
        Mixture([(Numbered("set x", kind="speechless"), 1)], "speech")


# p_concat -------------------------------------------------------------------------------------------------------------


class Cuttable(Numbered):
    """General dialogues that may be cut at these steps."""

    def __init__(self, *points: int):
        super().__init__("general", "speechless", points[-1])
        self.points = points

    def __getitem__(self, position: int) -> Sample:
        speaker = np.ones(self.length, np.uint8)
        speaker[list(self.points[1:-1])] = Speaker.USER
        return dataclasses.replace(super().__getitem__(position), speaker=speaker, text_graded=None)


def same_steps(one: Sample, other: Sample) -> bool:
    pairs = [(one.text, other.text), (one.speaker, other.speaker)]
    if one.audio is not None and other.audio is not None:
        pairs.append((one.audio, other.audio))
    return one.kind == other.kind and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["speech", "speechless"])
def test_a_dialogue_is_wrapped_and_keeps_its_picture(kind: Kind) -> None:
    visual, general = Numbered("visual", kind, length=30, image="p"), Numbered("general", kind, length=40)
    wrapped = Concatenated(visual, general, probability=1, longest=80)
    lengths = set()
    for position in range(60):
        found, inner = wrapped[position], visual[position]
        assert len(found) <= 80
        assert (found.image, found.kind) == ("p", kind)
        origins = found.origin.split(" + ")
        assert str(position) in origins
        begins = [i for i in range(len(found) - 29) if np.array_equal(found.text[i : i + 30], inner.text)]
        begins = [i for i in begins if np.array_equal(found.speaker[i : i + 30], inner.speaker)]
        if inner.audio is not None and found.audio is not None:  # the text may be padding all over
            begins = [i for i in begins if np.array_equal(found.audio[:, i : i + 30], inner.audio)]
        (at,) = begins
        first, second = general[2 * position], general[2 * position + 1]
        assert at in cut_points(first) and same_steps(cut(found, 0, at), cut(first, 0, at))
        rest = cut(found, at + 30, len(found))
        points = cut_points(second)
        between = [point for point in points if point + len(rest) in points]
        assert any(same_steps(rest, cut(second, point, point + len(rest))) for point in between)
        if inner.text_graded is not None:
            assert found.text_graded is not None
            assert np.array_equal(found.text_graded[at : at + 30], inner.text_graded)
        lengths.add((at, len(found) - at - 30))
        assert same(wrapped[position], found)
    assert len(lengths) > (10 if kind == "speech" else 2)
    assert any(before and after for before, after in lengths)


def test_how_often_it_is_wrapped() -> None:
    wrapped = Concatenated(Numbered(image="p"), Numbered(length=200), probability=0.3, longest=200)
    share = sum(len(wrapped[position]) > 20 for position in range(600)) / 600
    assert 0.24 < share < 0.36
    never = Concatenated(Numbered(image="p"), Numbered(), probability=0, longest=200)
    assert all(len(never[position]) == 20 for position in range(50))
    no_room = Concatenated(Numbered(image="p"), Numbered(), probability=1, longest=20)
    assert len(no_room[0]) == 20
    general = Concatenated(Numbered(), Numbered(), probability=1, longest=200)
    assert len(general[0]) == 20  # without a picture there is nothing to wrap


def test_no_dialogue_that_leaves_room_is_missed() -> None:
    visual = Numbered("visual", "speechless", length=150, image="p")

    def lengths(*points: int) -> set[tuple[int, int]]:
        """Of what stands before and after, in 100 samples of at most 256 steps."""
        wrapped = Concatenated(visual, Cuttable(*points), probability=1, longest=256)
        inner = [visual[position].text for position in range(100)]
        windows = [np.lib.stride_tricks.sliding_window_view(wrapped[i].text, 150) for i in range(100)]
        begins = [int(np.flatnonzero((windows[i] == inner[i]).all(axis=1))[0]) for i in range(100)]
        return {(begin, len(wrapped[i]) - 150 - begin) for i, begin in enumerate(begins)}

    assert lengths(0, 90, 400, 450, 800) == {(0, 50), (0, 90), (90, 0)}
    assert lengths(0, 90, 400) == {(0, 90), (90, 0)}
    assert lengths(0, 40, 400) == {(0, 40), (40, 40)}
    assert lengths(0, 200, 300) == {(0, 100)}
    assert lengths(0, 200, 400) == {(0, 0)}


def test_of_two_general_dialogues_one_may_have_no_piece_that_is_short_enough() -> None:
    visual = Numbered("visual", "speechless", length=150, image="p")

    class Both(Numbered):
        def __getitem__(self, position: int) -> Sample:
            return (Cuttable(0, 400) if position % 2 else Cuttable(0, 90, 400))[position]

    wrapped = Concatenated(visual, Both("general", "speechless"), probability=1, longest=256)
    assert {len(wrapped[position]) for position in range(50)} == {240}


def test_wrapping_that_cannot_be() -> None:
    with pytest.raises(InputError, match="p_concat must be between 0 and 1"):
        Concatenated(Numbered(), Numbered(), probability=2, longest=9)
    with pytest.raises(InputError, match="cannot be joined"):
        Concatenated(Numbered(), Numbered(kind="speechless"), probability=1, longest=9)
    pictures = Concatenated(Numbered(image="p"), Numbered("talk", image="q"), probability=1, longest=200)
    with pytest.raises(InputError, match="talk: 0 has a picture, .*as data.general give dialogues .* without pictures"):
        pictures[0]
    with pytest.raises(InputError, match="numbers of codebooks"):
        join([sample(1), sample(2, codebooks=4)], None)


# cutting --------------------------------------------------------------------------------------------------------------


def test_words_are_not_cut() -> None:
    made = sample(3, length=60)
    points = cut_points(made)
    assert (points[0], points[-1]) == (0, 60)
    before = [made.text[point - WORD_FRAMES : point + 1] for point in points[1:-1]]
    assert before
    assert all(text[0] != PADDING and (text[1:] == PADDING).all() for text in before)
    text = np.array([PADDING] * 3 + [END_OF_PADDING, 9, 8] + [PADDING] * 13 + [9], np.int32)
    spoken = dataclasses.replace(
        made, text=text, speaker=text, audio=None if made.audio is None else made.audio[:, :20]
    )
    assert cut_points(spoken).tolist() == [0, 17, 20]
    assert cut_points(sample(3, kind="speechless")).tolist() == [0, 10, 20]


def test_pieces_make_the_whole() -> None:
    made = sample(3, image="p")
    joined = join([cut(made, 0, 7), cut(made, 7, 7), cut(made, 7, 20)], "p")
    assert joined.origin == "3 + 3"
    assert same(cut(made, 0, 20), made)
    assert made.audio is not None
    assert joined.audio is not None
    assert np.array_equal(joined.text, made.text)
    assert np.array_equal(joined.audio, made.audio)
