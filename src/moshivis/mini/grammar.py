"""The grammar of the miniature world: asks about a scene, answers, and tells a scene in a user's words.

This is the door to the world's language: `ask` finds a question that a scene can answer, `answer` (of
`moshivis.mini.answers`) answers a query for a scene, `scene_phrases` describes a scene as a user does, and
`moshivis.mini.judge` says whether an answer is right.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from moshivis.mini import knowledge
from moshivis.mini.answers import (
    ATTRIBUTES,
    answer,
    describe_part,
    description_parts,
    repeated_claim,
    spoken_parts,
)
from moshivis.mini.judge import judge
from moshivis.mini.language import (
    PLACE_PHRASES,
    capitalise,
    normalise,
    object_phrase,
    spoken_text,
    writing_phrase,
)
from moshivis.mini.questions import (
    FAMILIES,
    MAX_PHRASINGS,
    PRETRAINING_FAMILIES,
    TEMPLATES,
    Query,
    Turn,
)
from moshivis.mini.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    said_scene,
    sample_object,
    sample_picture,
)
from moshivis.mini.writing import TEXTS, Writing

__all__ = [
    "ATTRIBUTES",
    "FAMILIES",
    "GREETINGS",
    "PRETRAINING_FAMILIES",
    "Query",
    "SceneObject",
    "Turn",
    "all_answers",
    "all_questions",
    "and_phrase",
    "answer",
    "ask",
    "capitalise",
    "describe_part",
    "description_parts",
    "judge",
    "normalise",
    "paraphrase",
    "repeated_claims",
    "sample_query",
    "scene_facts",
    "scene_phrases",
    "spoken_parts",
    "there_phrase",
    "vocabulary",
    "world_text",
]

GREETINGS = (
    "Hello, how can I help you?",
    "Hi, what would you like to know?",
    "Hello, what can I do for you?",
    "Hello there, ask me about the picture.",
    "Hi, I am listening.",
    "Good day, what do you want to know?",
    "Hello, I can see your picture.",
    "Hi there, how are you?",
)
THERE_FORMS = ("There is {}", "There is {}", "I see {}", "The picture shows {}", "Here is {}", "I can see {}")
AND_FORMS = ("and {}", "and {}", "and there is {}", "and also {}", "and then {}")

# How a question refers to its object: the attributes named, and how often.
_REFERENCES: dict[str, tuple[tuple[tuple[str, ...], int], ...]] = {
    "colour": ((("shape",), 9), (("place",), 4), (("size", "shape"), 2), (("shape", "place"), 1), (("size",), 1)),
    "shape": ((("colour",), 9), (("place",), 5), (("size", "colour"), 1), (("size",), 2)),
    "size": ((("shape",), 8), (("colour",), 4), (("colour", "shape"), 3), (("place",), 2)),
    "place": ((("shape",), 8), (("colour",), 4), (("colour", "shape"), 3), (("size", "shape"), 1), (("size",), 1)),
}
_EXISTENCE = (("shape", "colour"), ("shape", "colour"), ("shape",), ("colour",))
_COUNTED = (("shape",), ("shape",), ("shape",), ("colour",), ("colour",), ("size",), ())
_VALUES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES}
RECITED = ("colour", "shape", "size", "place", "count", *["yes_no"] * 6, "describe")
_ATTEMPTS = 40


# ----------------------------------------------------------------------------------------------------------------------
# Asking


def ask(scene: Scene, family: str, rng: random.Random) -> Turn | None:
    """A question of the family about the scene, with its answer; None if the scene admits none.

    Of most families one question in ten asks about something that is not there, of misleading two, of yes_no three, of
    count one in twenty; half of the yes_no questions are answered by yes.
    """
    for _ in range(_ATTEMPTS):
        query = sample_query(family, rng, scene)
        if family == "yes_no" and not query.shape and query.colour == scene.background:
            continue  # is the ground "anything white"?
        if family == "yes_no" and not query.shape and scene.writing and _lacks(scene, query.colour):
            continue  # or what is written, in a colour that nobody has named
        turn = answer(query, scene)
        if turn is not None:
            return turn
    return None


def _lacks(scene: Scene, colour: str | None) -> bool:
    return not any(thing.colour == colour for thing in scene.objects)


def sample_query(family: str, rng: random.Random, scene: Scene | None = None) -> Query:
    """A random query of the family, mostly about what is in the scene if one is given."""
    phrasing = rng.randrange(MAX_PHRASINGS)
    if family == "describe":
        return Query(family=family, phrasing=phrasing)
    if family == "knowledge":
        item = knowledge.sample_fact(rng)
        choices = knowledge.sample_choices(item, rng) if rng.random() < 0.25 else ()
        return Query(family=family, phrasing=phrasing, item=item, choices=choices)
    if family == "small_talk":
        return Query(family=family, phrasing=phrasing, item=rng.choice(list(knowledge.SMALL_TALK)))
    if family == "repeat":
        return Query(family=family, phrasing=phrasing, item=rng.choice(knowledge.REPEATABLE))
    if family == "read":
        kind = rng.choice(("word", "number")) if scene is None or not scene.writing else scene.writing.kind
        return Query(family=family, phrasing=phrasing, item=kind if rng.random() < 0.4 else None)
    target = sample_object(rng)
    if scene is not None and scene.objects and rng.random() < 0.9:
        target = rng.choice(scene.objects)
    if family == "count":
        return Query(family=family, phrasing=phrasing, **_named_by(target, rng.choice(_COUNTED)))
    if family in _REFERENCES:
        return Query(family=family, phrasing=phrasing, **_named_by(target, _weighted(_REFERENCES[family], rng)))
    if family == "yes_no" and rng.random() < 0.5:
        return _existence_query(target, phrasing, rng, scene)
    return _claim_query(family, target, phrasing, rng, scene)


def _existence_query(target: SceneObject, phrasing: int, rng: random.Random, scene: Scene | None) -> Query:
    kinds = rng.choice(_EXISTENCE)
    if rng.random() < 0.5:  # another colour or shape than the target's: mostly not there
        other = rng.choice(("shape", "colour")) if len(kinds) == 2 else kinds[0]
        values = SHAPES if other == "shape" else COLOURS
        elsewhere = _values_elsewhere(other, target, scene) if len(kinds) == 2 else []
        if not elsewhere or rng.random() < 0.5:
            shown = {getattr(thing, other) for thing in scene.objects} if scene else set()
            elsewhere = [value for value in values if value not in shown]
        target = replace(target, **{other: rng.choice(elsewhere)})
    return Query(family="yes_no", phrasing=phrasing, **_named_by(target, kinds))


def _values_elsewhere(kind: str, target: SceneObject, scene: Scene | None) -> list[str]:
    """Other values than the target's that something in the scene has: they are seen, but not there."""
    shown = {getattr(thing, kind) for thing in scene.objects} if scene else set()
    return sorted(shown - {None, getattr(target, kind)})


def _claim_query(
    family: str, target: SceneObject, phrasing: int, rng: random.Random, scene: Scene | None = None
) -> Query:
    if family == "yes_no":
        kind = rng.choice(("colour", "colour", "place", "size", "shape"))
    else:
        kind = rng.choice(("colour", "colour", "colour", "place", "size"))
    named = _named_by(target, _weighted(_claim_references(family, kind), rng))
    actual = getattr(target, kind)
    if family == "yes_no" and actual and rng.random() < 0.5:
        claim = actual
    else:
        elsewhere = _values_elsewhere(kind, target, scene)
        if not elsewhere or rng.random() < 0.5:
            elsewhere = [value for value in _VALUES[kind] if value != actual]
        claim = rng.choice(elsewhere)
    return Query(family=family, phrasing=phrasing, claim=claim, **named)


def _claim_references(family: str, kind: str) -> tuple[tuple[tuple[str, ...], int], ...]:
    """How a yes_no or misleading question refers to the object of which it claims something of this kind."""
    if family == "misleading":
        return () if kind == "shape" else _REFERENCES[kind][:1]
    return _REFERENCES[kind][: 2 if kind == "shape" else 3]


def _weighted(options: tuple[tuple[tuple[str, ...], int], ...], rng: random.Random) -> tuple[str, ...]:
    return rng.choices([kinds for kinds, _ in options], [weight for _, weight in options])[0]


def _named_by(target: SceneObject, kinds: tuple[str, ...]) -> dict[str, Any]:
    return {kind: getattr(target, kind) for kind in kinds}


# ----------------------------------------------------------------------------------------------------------------------
# Telling a scene


def there_phrase(thing: SceneObject | Writing, form: int = 0) -> str:
    """The first phrase of a told scene: 'There is a big red circle on the left', 'I see the word cat'."""
    return THERE_FORMS[form % len(THERE_FORMS)].format(_phrase(thing))


def and_phrase(thing: SceneObject | Writing, form: int = 0) -> str:
    """A later phrase of a told scene: 'and a small blue star at the top'."""
    return AND_FORMS[form % len(AND_FORMS)].format(_phrase(thing))


def _phrase(thing: SceneObject | Writing) -> str:
    return writing_phrase(thing) if isinstance(thing, Writing) else object_phrase(thing)


def scene_phrases(scene: Scene, rng: random.Random) -> list[str]:
    """A user's words for a scene, one phrase an object; use `said_scene` first to leave something out."""
    things: list[SceneObject | Writing] = [*scene.objects]
    if scene.writing:
        things.insert(rng.randint(0, len(things)), scene.writing)
    first, *others = things
    return [there_phrase(first, rng.randrange(30)), *(and_phrase(thing, rng.randrange(30)) for thing in others)]


def paraphrase(scene: Scene, rng: random.Random) -> str:
    """One of many descriptions of the whole scene, its things in any order: what a description is compared with."""
    things = list(scene.objects)
    rng.shuffle(things)
    return ", ".join(scene_phrases(Scene(tuple(things), scene.background, scene.writing), rng)) + "."


def scene_facts(scene: Scene, rng: random.Random, count: int, families: Sequence[str] = RECITED) -> list[str]:
    """Up to `count` facts of a scene in any order, as answers to questions of these families tell them.

    'on the left is a blue star', 'green? The star is blue, so no'.
    """
    turns = (ask(scene, rng.choice(families), rng) for _ in range(count))
    facts = [re.sub(r"^(?!I )[A-Z]", lambda first: first[0].lower(), turn.answer)[:-1] for turn in turns if turn]
    if scene.writing:
        facts.insert(rng.randint(0, len(facts)), f"it says {spoken_text(scene.writing)}")
    return list(dict.fromkeys(facts))


# ----------------------------------------------------------------------------------------------------------------------
# The whole world at once


def all_queries() -> Iterator[Query]:
    """Every query of the families that no scene is needed for, one phrasing each."""
    for family, item in (
        *(("knowledge", item) for item in knowledge.FACT_ITEMS),
        *(("small_talk", item) for item in knowledge.SMALL_TALK),
        *(("repeat", item) for item in knowledge.REPEATABLE),
    ):
        yield Query(family=family, item=item)


def all_answers() -> list[str]:
    """Every distinct answer except descriptions, sorted, without the repeated claims that open some of them."""
    nowhere = Scene(())
    answers = {turn.answer for query in all_queries() if (turn := answer(query, nowhere))}
    answers.update(_scene_answers())
    answers.update(_read_answers())
    return sorted(answers)


def repeated_claims() -> list[str]:
    """What opens the answers to questions that claim something, one for every value."""
    return [repeated_claim(value) for kind in ATTRIBUTES for value in _VALUES[kind]]


def _scene_answers() -> Iterator[str]:
    for family, references in _REFERENCES.items():
        for kinds, _ in references:
            for thing in _things(*kinds, family):
                yield from _told(Query(family=family, **_named_by(thing, kinds)), thing)
        for asking in ("yes_no", "misleading"):
            for kinds, _ in _claim_references(asking, family):
                for thing in _things(*kinds, family):
                    for claim in _VALUES[family]:
                        yield from _told(Query(family=asking, claim=claim, **_named_by(thing, kinds)), thing)
    for kinds in _EXISTENCE:
        for thing in _things(*kinds):
            yield from _told(Query(family="yes_no", **_named_by(thing, kinds)), thing)
    for kinds in _COUNTED:
        for thing in _things(*kinds):
            for number in range(5):
                yield from _told(Query(family="count", **_named_by(thing, kinds)), *[thing] * number)


def _things(*kinds: str) -> Iterator[SceneObject]:
    """Things of every shape and colour, and of every size or place if it is one of `kinds`; else these are unsaid."""
    sizes, places = SIZES if "size" in kinds else (None,), PLACES if "place" in kinds else (None,)
    yield from (SceneObject(*values) for values in product(SHAPES, COLOURS, sizes, places))


def _told(query: Query, *things: SceneObject) -> Iterator[str]:
    """The answer to a query if there are these things, and if there is nothing."""
    turns = (answer(query, Scene(things)), answer(query, Scene(())))
    yield from (spoken_parts(turn)[-1] for turn in turns if turn is not None)


def _read_answers() -> Iterator[str]:
    yield "It says nothing."
    yield from (f"It says {spoken_text(Writing(text))}." for text in TEXTS)


def all_questions(rng: random.Random, count: int) -> list[Query]:
    """`count` queries over all families, for a voice to speak; only those of small families come more than once."""
    weights = Counter(colour=15, shape=13, size=8, count=12, place=12, yes_no=15, misleading=7, knowledge=14)
    weights.update(small_talk=3, repeat=5, describe=2, read=4)
    families = list(weights)
    seen: set[str] = set()
    queries: list[Query] = []
    while len(queries) < count:
        query = sample_query(rng.choices(families, [weights[name] for name in families])[0], rng)
        family_is_small = query.family in ("describe", "small_talk", "read")
        if query.text not in seen or family_is_small:
            seen.add(query.text)
            queries.append(query)
    return queries


def world_text(rng: random.Random, count: int) -> list[str]:
    """A sample of the world's sentences, both sides, written and plain: text to train a tokenizer on."""
    sentences: list[str] = list(GREETINGS)
    while len(sentences) < count:
        scene = sample_picture(rng)
        said = said_scene(scene, rng)
        told = ", ".join(scene_phrases(said, rng)) + "."
        turn = ask(said, rng.choice(PRETRAINING_FAMILIES), rng)
        sentences += [told, normalise(told)]
        if turn:
            sentences += [turn.question, normalise(turn.question), turn.answer, normalise(turn.answer)]
    return sentences[:count]


def vocabulary() -> set[str]:
    """Every word of the world in its plain form."""
    texts: list[str] = [*GREETINGS, *all_answers(), *(form.format("") for form in (*THERE_FORMS, *AND_FORMS))]
    texts += [re.sub(r"{\w+}", "", form) for forms in TEMPLATES.values() for form in forms]
    texts += [*PLACE_PHRASES.values(), "anything thing things one object objects shape a an"]
    for item in knowledge.FACT_ITEMS:
        texts += [knowledge.question(item, phrasing) for phrasing in range(6)]
    texts += [form for _, forms, _ in knowledge.SMALL_TALK.values() for form in forms]
    return {word for text in texts for word in normalise(text).split()}
