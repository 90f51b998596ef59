"""Answers of the miniature world: what a query's answer is for a given scene, and the facts that make it right.

Answers are short sentences of one form each. They begin with the question's own words for what they are about, then
comes what was looked up, at last the verdict ("A blue star is not there, so no."; "Green? The star is blue, so no."): a
small model that speaks while it thinks looks up what it has just named, and finds the verdict from its own words; so it
repeats what the question claims. An answer never needs what was left unsaid of a scene, and a question that could mean
two objects has no answer.
"""

from dataclasses import asdict
from typing import Any

from moshivis.mini import knowledge
from moshivis.mini.language import (
    NUMBERS,
    PLACE_PHRASES,
    article,
    capitalise,
    normalise,
    object_phrase,
    plural,
    spoken_text,
    writing_phrase,
)
from moshivis.mini.questions import SCENELESS_FAMILIES, Query, Turn, claim_phrase, kind_of, render
from moshivis.mini.scenes import SHAPES, Scene, SceneObject
from moshivis.mini.writing import Writing

ATTRIBUTES = ("shape", "colour", "size", "place")


def answer(query: Query, scene: Scene) -> Turn | None:
    """The turn in which `query` is asked about `scene`; None if the scene gives it no single answer."""
    turn = _answer(query, scene)
    if turn is not None and query.family not in SCENELESS_FAMILIES:
        turn.facts["present"] = [asdict(thing) for thing in scene.objects]
        turn.facts["writing"] = scene.writing and asdict(scene.writing)
    return turn


def _answer(query: Query, scene: Scene) -> Turn | None:
    if query.family == "knowledge":
        known = knowledge.fact(query.item or "")
        facts = {"key": normalise(known.key), "rivals": [normalise(word) for word in known.rivals]}
        return _turn(query, known.answer, facts)
    if query.family == "small_talk":
        reply, _, signs = knowledge.SMALL_TALK[query.item or ""]
        return _turn(query, reply, {"signs": list(signs)})
    if query.family == "repeat":
        return _turn(query, capitalise(f"{query.item}."), {"exact": normalise(query.item or "")})
    if query.family == "describe":
        return _turn(query, description(scene), {})
    if query.family == "read":
        return _answer_read(query, scene)
    if query.family == "count":
        return _answer_count(query, scene)
    if query.family == "yes_no":
        return _answer_existence(query, scene) if query.claim is None else _answer_claim(query, scene)
    found = _find(query, scene)
    if found is None:
        return None
    if not found:
        return _missing(query)
    if len(found) > 1:
        return None
    thing = found[0]
    if query.family == "misleading":
        return _answer_misleading(query, thing)
    value = getattr(thing, query.family)
    if value is None:
        return None
    return _turn(query, f"{_fact(query, thing, query.family)}.", _about(thing, **{query.family: value}))


def _fact(query: Query, thing: SceneObject, kind: str) -> str:
    """The attribute `kind` of the thing that a query refers to: 'The orange heart is big', 'On the left is a red star'.

    To be asked for the shape of an orange thing is to be told 'An orange heart'.
    """
    value = getattr(thing, kind)
    if query.place and not query.shape:
        words = f"{value if kind == 'size' else thing.colour} {thing.shape}"
        return capitalise(f"{PLACE_PHRASES[query.place]} is {article(words)}")
    if kind == "shape":
        return capitalise(article(_named(query, value)))
    return f"The {_named(query, thing.shape)} is {claim_phrase(value)}"


def _named(query: Query, noun: str) -> str:
    """The noun with the words by which a query refers to it: 'big star', 'star on the left'."""
    words = (query.size, query.colour, noun, PLACE_PHRASES.get(query.place or ""))
    return " ".join(word for word in words if word)


def description(scene: Scene) -> str:
    """'I see a big red circle on the left and a small blue star at the top.'"""
    text = " ".join(description_parts(scene))
    return text if text.endswith(".") else f"{text}."


def description_parts(scene: Scene) -> list[str]:
    """A description as it is put together from spoken clips: 'I see a red circle', 'and a cross', 'and a blue star.'"""
    phrases = [object_phrase(thing) for thing in scene.objects]
    if scene.writing:
        phrases.append(writing_phrase(scene.writing))
    positions = ["first", *["middle"] * (len(phrases) - 2), *["last"] * (len(phrases) > 1)]
    return [describe_part(phrase, position) for phrase, position in zip(phrases, positions, strict=True)]


def describe_part(phrase: str, position: str) -> str:
    """One thing's part of a description; `position` is first, middle or last."""
    return {"first": f"I see {phrase}", "middle": f"and {phrase}", "last": f"and {phrase}."}[position]


def spoken_parts(turn: Turn) -> list[str]:
    """The turn's answer as it is put together from spoken clips, whose words make up those of the answer."""
    if turn.family == "describe":
        things = tuple(SceneObject(**fields) for fields in turn.facts["present"])
        writing = turn.facts["writing"]
        return description_parts(Scene(things, writing=writing and Writing(**writing)))
    if turn.family == "yes_no" and turn.query.claim:
        repeated = repeated_claim(turn.query.claim)
        return [repeated, turn.answer.removeprefix(f"{repeated} ")]
    return [turn.answer]


def repeated_claim(claim: str) -> str:
    """'Green?', 'On the left?', 'A heart?': what a question claims, said again before the answer."""
    return f"{capitalise(claim_phrase(claim))}?"


def _answer_read(query: Query, scene: Scene) -> Turn | None:
    if scene.writing is None:
        return _turn(query, "It says nothing.", {"missing": True, "text": ""})
    if query.item not in (None, scene.writing.kind):
        return None
    text = spoken_text(scene.writing)
    return _turn(query, f"It says {text}.", {"text": text})


def _answer_count(query: Query, scene: Scene) -> Turn | None:
    found = _find(query, scene)
    if found is None:
        return None
    number = len(found)
    facts: dict[str, Any] = {"count": number, **_allowed(*found), "missing": number == 0}
    for kind, values in named_attributes(query).items():
        facts["allowed"][kind] = sorted({*facts["allowed"].get(kind, ()), *values})
    things = _named(query, plural(query.shape or "object"))
    return _turn(query, f"The number of {things} is {NUMBERS[number]}.", facts)


def _answer_existence(query: Query, scene: Scene) -> Turn | None:
    found = _find(query, scene)
    if found is None:
        return None
    if found:
        text = capitalise(article(_named(query, found[0].shape)))
        facts = {"verdict": "yes", "count_allowed": len(found), **_allowed(*found)}
        return _turn(query, f"{text} is there, so yes.", facts)
    turn = _missing(query, verdict="no")
    alike = [thing for thing in scene.objects if thing.shape == query.shape]
    if query.colour and len(alike) == 1:  # "The star is blue, so no." is as right
        turn.facts.update(missing=False, **_allowed(*alike))
    return turn


def _answer_claim(query: Query, scene: Scene) -> Turn | None:
    found = _find(query, scene)
    if found is None or len(found) > 1:
        return None
    claim = query.claim or ""
    repeated = repeated_claim(claim)
    if not found:
        return _missing(query, verdict="no", opening=f"{repeated} ")
    thing, kind = found[0], kind_of(claim)
    value = getattr(thing, kind)
    if value is None:
        return None
    verdict = "yes" if value == claim else "no"
    facts: dict[str, Any] = {"verdict": verdict, **_allowed(thing)}
    if verdict == "no":
        facts["denied"] = {kind: [claim]}
    return _turn(query, f"{repeated} {_fact(query, thing, kind)}, so {verdict}.", facts)


def _answer_misleading(query: Query, thing: SceneObject) -> Turn | None:
    claim = query.claim or ""
    kind = kind_of(claim)
    value = getattr(thing, kind)
    if value is None or value == claim:
        return None
    text = f"{_fact(query, thing, kind)}, not {claim_phrase(claim)}."
    return _turn(query, text, _about(thing, **{kind: value}) | {"denied": {kind: [claim]}})


def _missing(query: Query, verdict: str | None = None, opening: str = "") -> Turn:
    """What is asked about is not there: 'The star is not there.', 'On the left is nothing, so no.'"""
    if query.place and not query.shape:
        text = f"{PLACE_PHRASES[query.place]} is nothing"
    else:
        named = _named(query, query.shape or "thing")
        any_such = query.family == "shape" or (verdict and query.claim in (None, *SHAPES))
        text = f"{article(named) if any_such else f'the {named}'} is not there"
    facts: dict[str, Any] = {"missing": True, "denied": named_attributes(query)}
    if verdict:
        text, facts["verdict"] = f"{text}, so no", verdict
    return _turn(query, f"{opening}{capitalise(text)}.", facts)


def _find(query: Query, scene: Scene) -> list[SceneObject] | None:
    """The objects a query refers to; None if that cannot be known because something was left unsaid."""
    found = []
    for thing in scene.objects:
        pairs = [(getattr(query, kind), getattr(thing, kind)) for kind in ATTRIBUTES if getattr(query, kind)]
        if any(value is not None and value != wanted for wanted, value in pairs):
            continue
        if any(value is None for _, value in pairs):
            return None
        found.append(thing)
    at_place = query.place and not query.shape
    if not found and at_place and scene.writing and scene.writing.row in (None, _row(query.place or "")):
        return None  # what is written is something, too
    return found


def _row(place: str) -> str:
    return next((row for row in ("top", "bottom") if place.startswith(row)), "middle")


def _turn(query: Query, text: str, facts: dict[str, Any]) -> Turn:
    full = {"missing": False, "required": {}, "allowed": {}, "denied": {}} | facts
    return Turn(family=query.family, question=render(query), answer=text, facts=full, query=query)


def _about(thing: SceneObject, **required: str) -> dict[str, Any]:
    return {"required": required, **_allowed(thing)}


def _allowed(*things: SceneObject) -> dict[str, Any]:
    return {"allowed": {kind: sorted({getattr(t, kind) for t in things} - {None}) for kind in ATTRIBUTES}}


def named_attributes(query: Query) -> dict[str, list[str]]:
    """The attributes by which a query refers to its object, each with its value in a list."""
    return {kind: [getattr(query, kind)] for kind in ATTRIBUTES if getattr(query, kind)}
