"""The even pace of the assistant's words: when a word comes tells nothing of what it is."""

from hypothesis import given
from hypothesis import strategies as st

from moshivis.mini.pace import usual_frames, word_starts
from moshivis.mini.voices import Word

PAUSES = st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0.02, 0.9)), min_size=2, max_size=8)


def _sentence(pauses: list[tuple[str, float]]) -> list[Word]:
    words, clock = [], 0.03
    for text, pause in pauses:
        words.append(Word(text, clock, clock + pause))
        clock += pause
    return words


def test_a_word_takes_the_median_of_its_times_and_at_least_a_frame() -> None:
    sentences = [_sentence([("is", pause), ("it", 0.2), ("a", 0.01), ("b", 0.1)]) for pause in (0.1, 0.17, 0.6)]
    assert usual_frames(sentences) == {"is": 2, "it": 2, "a": 1}
    assert word_starts(sentences[2], usual_frames(sentences)) == [0, 2, 4, 5]


@given(st.lists(PAUSES, min_size=1, max_size=5), PAUSES, PAUSES, PAUSES)
def test_after_the_same_words_the_next_one_comes_in_the_same_frame(
    others: list[list[tuple[str, float]]],
    begun: list[tuple[str, float]],
    one: list[tuple[str, float]],
    another: list[tuple[str, float]],
) -> None:
    first, second = _sentence(begun + one), _sentence([(text, 0.3) for text, _ in begun] + another)
    frames = usual_frames([first, second, *map(_sentence, others)])
    starts, same = word_starts(first, frames), word_starts(second, frames)
    assert starts[: len(begun) + 1] == same[: len(begun) + 1]
    assert all(later > earlier for earlier, later in zip(starts, starts[1:], strict=False))
