"""The words of the miniature world: noun phrases, number words, and the plain form in which the model reads text."""

import re

from moshivis.mini.scenes import PLACES, SceneObject
from moshivis.mini.writing import Writing

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_TENS = dict(zip(range(20, 100, 10), "twenty thirty forty fifty sixty seventy eighty ninety".split(), strict=True))
_PLURALS = {"cross": "crosses"}
_SPELLINGS = {
    "color": "colour",
    "colors": "colours",
    "gray": "grey",
    "what's": "what is",
    "where's": "where is",
    "there's": "there is",
    "who's": "who is",
    "i'm": "i am",
    "it's": "it is",
    "isn't": "is not",
    "aren't": "are not",
    "don't": "do not",
    "doesn't": "does not",
    "can't": "cannot",
    "+": "plus",
    "-": "minus",
}


def plural(noun: str) -> str:
    """The plural of a shape or of 'object'."""
    return _PLURALS.get(noun, noun + "s")


def article(words: str) -> str:
    """'a orange star' as people say it: 'an orange star'."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def place_phrase(place: str) -> str:
    """'left' becomes 'on the left', 'top left' 'at the top left', 'middle' 'in the middle'."""
    preposition = {"left": "on", "right": "on", "middle": "in"}.get(place, "at")
    return f"{preposition} the {place}"


PLACE_PHRASES = {place: place_phrase(place) for place in PLACES}


def object_phrase(thing: SceneObject) -> str:
    """'a big red circle on the left', with what is unsaid left out."""
    words = article(" ".join(word for word in (thing.size, thing.colour, thing.shape) if word))
    return f"{words} {PLACE_PHRASES[thing.place]}" if thing.place else words


def spoken_text(writing: Writing) -> str:
    """What is written, as one reads it out: 'cat', 'forty two'."""
    return number_word(int(writing.text)) if writing.kind == "number" else writing.text


def writing_phrase(writing: Writing) -> str:
    """'the word cat', 'the number forty two'."""
    return f"the {writing.kind} {spoken_text(writing)}"


def capitalise(sentence: str) -> str:
    """First letter in upper case, the others as they are."""
    return sentence[:1].upper() + sentence[1:]


def number_word(number: int) -> str:
    """0 to 99 in words, as `normalise` writes digits."""
    if number <= 20:
        return NUMBERS[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens * 10] + (f" {NUMBERS[ones]}" if ones else "")


def normalise(text: str) -> str:
    """Lower case, no punctuation, British spelling, numbers up to 99 in words: how the model reads a user's text."""
    text = text.lower().replace("’", "'")
    text = re.sub(r"(?<=[0-9])\s*([+-])\s*(?=[0-9])", r" \1 ", text)
    tokens = re.findall(r"[0-9]+|[^\W\d_]+(?:'[^\W\d_]+)*|(?<= )[+-](?= )", text)
    words = []
    for token in tokens:
        if token.isdecimal():
            words.append(number_word(int(token)) if len(token) <= 2 else token)
        else:
            words.append(_SPELLINGS.get(token, token))
    return " ".join(words)
