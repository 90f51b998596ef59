"""What the miniature knows without any picture: small facts, small talk and words to repeat.

A fact is named by an item such as `sum:2:3` or `capital:France`; every item has one answer sentence and one key, the
word that makes the answer right.
"""

import random
from dataclasses import dataclass
from itertools import combinations

from moshivis.mini.language import NUMBERS, PLACE_PHRASES, article, capitalise
from moshivis.mini.scenes import COLOURS, SHAPES, SIZES

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "England": "London",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Cuba": "Havana",
}
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("left", "right"),
    ("up", "down"),
    ("open", "shut"),
    ("yes", "no"),
    ("black", "white"),
    ("day", "night"),
    ("fast", "slow"),
    ("old", "new"),
    ("wet", "dry"),
    ("top", "bottom"),
    ("long", "short"),
    ("happy", "sad"),
    ("light", "dark"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ANIMALS = ("ant", "mouse", "cat", "dog", "sheep", "horse", "elephant", "whale")  # from small to big

_FORMS = {
    "sum": (
        "What is {a} plus {b}?",
        "How much is {a} plus {b}?",
        "Tell me what {a} plus {b} is.",
        "What is the sum of {a} and {b}?",
        "Add {a} and {b}.",
    ),
    "minus": (
        "What is {a} minus {b}?",
        "How much is {a} minus {b}?",
        "Tell me what {a} minus {b} is.",
        "Take {b} from {a}.",
    ),
    "next": (
        "What comes after {a}?",
        "Which number comes after {a}?",
        "What number is after {a}?",
        "Tell me the number after {a}.",
    ),
    "opposite": (
        "What is the opposite of {a}?",
        "Tell me the opposite of {a}.",
        "Do you know the opposite of {a}?",
        "Which word is the opposite of {a}?",
    ),
    "after": (
        "What day comes after {a}?",
        "Which day is after {a}?",
        "What is the day after {a}?",
        "Tell me the day after {a}.",
    ),
    "before": (
        "What day comes before {a}?",
        "Which day is before {a}?",
        "What is the day before {a}?",
        "Tell me the day before {a}.",
    ),
    "capital": (
        "What is the capital of {a}?",
        "Which city is the capital of {a}?",
        "Tell me the capital of {a}.",
        "Do you know the capital of {a}?",
        "Name the capital of {a}.",
    ),
    "bigger": (
        "Which is bigger, {a} or {b}?",
        "What is bigger, {a} or {b}?",
        "Tell me which is bigger, {a} or {b}.",
    ),
    "smaller": (
        "Which is smaller, {a} or {b}?",
        "What is smaller, {a} or {b}?",
        "Tell me which is smaller, {a} or {b}.",
    ),
}

SMALL_TALK = {
    "greet": (
        "Hello! What can I do for you?",
        ("Hello.", "Hi.", "Hello there.", "Good morning.", "Good evening.", "Hi there.", "Hey."),
        ("hello", "hi", "good morning"),
    ),
    "thanks": (
        "You are welcome.",
        ("Thank you.", "Thanks.", "Thank you very much.", "Thanks a lot.", "Great, thank you."),
        ("welcome", "pleasure"),
    ),
    "how_are_you": (
        "I am fine, thank you.",
        ("How are you?", "How are you today?", "Hello, how are you?", "Are you well?", "How do you do?"),
        ("fine", "well", "good"),
    ),
    "what_can_you_do": (
        "I can talk about the picture.",
        (
            "What can you do?",
            "What can you do for me?",
            "How can you help me?",
            "What can I ask you?",
            "Can you help me?",
        ),
        ("picture", "pictures", "image"),
    ),
    "name": (
        "I am a small model that can see.",
        ("Who are you?", "What are you?", "What is your name?", "Tell me who you are."),
        ("model", "assistant"),
    ),
    "goodbye": (
        "Goodbye, see you soon.",
        ("Goodbye.", "Bye.", "See you soon.", "Bye bye.", "Goodbye, and thank you."),
        ("goodbye", "bye", "see you"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One known fact: its answer sentence, the word that makes it right, and the words it could be confused with."""

    answer: str
    key: str
    rivals: tuple[str, ...]


def fact(item: str) -> Fact:
    """The fact that an item such as `sum:2:3` names. Raises KeyError or ValueError for an unknown item."""
    kind, *names = item.split(":")
    a, b = names[0], names[-1]
    if kind in ("sum", "minus", "next"):
        key = NUMBERS[{"sum": int(a) + int(b), "minus": int(a) - int(b), "next": int(a) + 1}[kind]]
        answer = {
            "sum": f"{NUMBERS[int(a)]} plus {NUMBERS[int(b)]} is {key}.",
            "minus": f"{NUMBERS[int(a)]} minus {NUMBERS[int(b)]} is {key}.",
            "next": f"{key} comes after {NUMBERS[int(a)]}.",
        }[kind]
        return Fact(answer=capitalise(answer), key=key, rivals=tuple(NUMBERS))
    if kind == "opposite":
        pairs = dict(OPPOSITES) | {right: left for left, right in OPPOSITES}
        return Fact(answer=f"The opposite of {a} is {pairs[a]}.", key=pairs[a], rivals=tuple(pairs))
    if kind in ("after", "before"):
        key = DAYS[(DAYS.index(a) + (1 if kind == "after" else -1)) % 7]
        return Fact(answer=f"The day {kind} {a} is {key}.", key=key, rivals=DAYS)
    if kind == "capital":
        return Fact(answer=f"The capital of {a} is {CAPITALS[a]}.", key=CAPITALS[a], rivals=tuple(CAPITALS.values()))
    if kind not in ("bigger", "smaller"):
        raise KeyError(item)
    small, big = sorted((a, b), key=ANIMALS.index)
    winner, loser = (big, small) if kind == "bigger" else (small, big)
    answer = f"{article(winner)} is {kind} than {article(loser)}."
    return Fact(answer=capitalise(answer), key=winner, rivals=ANIMALS)


def question(item: str, phrasing: int, choices: tuple[str, ...] = ()) -> str:
    """The question after a fact; with choices, a multiple choice question."""
    kind, *names = item.split(":")
    if kind in ("sum", "minus", "next"):
        names = [NUMBERS[int(name)] for name in names]
    elif kind in ("bigger", "smaller"):
        names = [article(name) for name in names]
    text = _FORMS[kind][phrasing % len(_FORMS[kind])].format(a=names[0], b=names[-1])
    if not choices:
        return text
    return f"{text[:-1]}: {', '.join(choices[:-1])} or {choices[-1]}?"


def small_talk_question(item: str, phrasing: int) -> str:
    """One of the ways to say something of small talk."""
    forms = SMALL_TALK[item][1]
    return forms[phrasing % len(forms)]


def sample_choices(item: str, rng: random.Random) -> tuple[str, ...]:
    """Three options for a multiple choice question, the right one among them; () where the question names its own."""
    kind = item.split(":")[0]
    if kind in ("bigger", "smaller"):
        return ()
    known = fact(item)
    rivals = known.rivals
    if kind in ("sum", "minus", "next"):
        near = NUMBERS.index(known.key)
        rivals = tuple(NUMBERS[n] for n in range(max(0, near - 3), min(20, near + 3) + 1))
    wrong = rng.sample([word for word in rivals if word != known.key], 2)
    options = [known.key, *wrong]
    rng.shuffle(options)
    return tuple(options)


def _facts() -> tuple[str, ...]:
    items = [f"sum:{a}:{b}" for a in range(1, 10) for b in range(1, 10)]
    items += [f"minus:{a}:{b}" for a in range(2, 11) for b in range(1, a)]
    items += [f"next:{a}" for a in range(20)]
    items += [f"opposite:{word}" for pair in OPPOSITES for word in pair]
    items += [f"{kind}:{day}" for kind in ("after", "before") for day in DAYS]
    items += [f"capital:{country}" for country in CAPITALS]
    items += [f"{kind}:{a}:{b}" for kind in ("bigger", "smaller") for a, b in combinations(ANIMALS, 2)]
    return tuple(items)


def _repeatable() -> tuple[str, ...]:
    texts = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    texts += [f"{size} {colour} {shape}" for size in SIZES for colour in COLOURS for shape in SHAPES]
    texts += [*PLACE_PHRASES.values(), *NUMBERS, *DAYS, *CAPITALS, *CAPITALS.values(), *ANIMALS]
    texts += [word for pair in OPPOSITES for word in pair]
    texts += [f"{', '.join(NUMBERS[1:last])} and {NUMBERS[last]}" for last in range(2, 11)]
    return tuple(dict.fromkeys(texts))


FACT_ITEMS = _facts()
FACT_KINDS = tuple(_FORMS)
REPEATABLE = _repeatable()


def sample_fact(rng: random.Random) -> str:
    """A fact's item, its kind drawn first so that small kinds are asked as often as large ones."""
    kind = rng.choice(FACT_KINDS)
    item = rng.choice([item for item in FACT_ITEMS if item.startswith(kind + ":")])
    if kind in ("bigger", "smaller") and rng.random() < 0.5:
        _, a, b = item.split(":")
        return f"{kind}:{b}:{a}"
    return item
