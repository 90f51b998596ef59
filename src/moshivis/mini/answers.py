"""Answers of the miniature world: what a query's answer is for a given scene, and the facts that make it right.

Answers are short sentences of one form each that name the looked-up fact before the verdict ("The star is blue, so
no."): a small model that speaks while it thinks finds the verdict from its own words. An answer never needs what was
left unsaid of a scene, and a question that could mean two objects has no answer.
"""

from dataclasses import asdict
from typing import Any

from moshivis.mini import knowledge
from moshivis.mini.language import (
    NUMBERS,
    PLACE_PHRASES,
    capitalise,
    normalise,
    object_phrase,
    plural,
    spoken_text,
    writing_phrase,
)
from moshivis.mini.questions import SCENELESS_FAMILIES, Query, Turn, claim_phrase, kind_of, render
from moshivis.mini.scenes import Scene, SceneObject

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
        objects = [[getattr(thing, kind) for kind in ATTRIBUTES] for thing in scene.objects]
        return _turn(query, description(scene), {"objects": objects})
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
        return missing(query)
    if len(found) > 1:
        return None
    thing = found[0]
    if query.family == "misleading":
        return _answer_misleading(query, thing)
    value = getattr(thing, query.family)
    if value is None:
        return None
    if query.family == "shape":
        return _turn(query, f"The {thing.colour} one is {claim_phrase(value)}.", _about(thing, shape=value))
    return _turn(query, f"The {thing.shape} is {claim_phrase(value)}.", _about(thing, **{query.family: value}))


def description(scene: Scene) -> str:
    """'I see a big red circle on the left and a small blue star at the top.'"""
    *parts, last = description_parts(scene)
    text = ", ".join(parts)
    return f"{text} {last}" if parts else f"{last}."


def description_parts(scene: Scene) -> list[str]:
    """A description as it is put together from spoken clips: 'I see a red circle', 'a pink cross', 'and a blue star.'

    Their words, one after the other, are those of `description`, which has a comma more before a middle part.
    """
    phrases = [object_phrase(thing) for thing in scene.objects]
    if scene.writing:
        phrases.append(writing_phrase(scene.writing))
    positions = ["first", *["middle"] * (len(phrases) - 2), *["last"] * (len(phrases) > 1)]
    return [describe_part(phrase, position) for phrase, position in zip(phrases, positions, strict=True)]


def describe_part(phrase: str, position: str) -> str:
    """One thing's part of a description; `position` is first, middle or last."""
    return {"first": f"I see {phrase}", "middle": phrase, "last": f"and {phrase}."}[position]


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
    noun = query.shape or "object"
    words = " ".join(word for word in (query.size, query.colour, noun if number == 1 else plural(noun)) if word)
    facts: dict[str, Any] = {"count": number, **_allowed(*found), "missing": number == 0}
    _allow(facts, query)
    if number == 0:
        return _turn(query, f"There are no {words}.", facts)
    return _turn(query, f"There {'is' if number == 1 else 'are'} {NUMBERS[number]} {words}.", facts)


def _answer_existence(query: Query, scene: Scene) -> Turn | None:
    found = _find(query, scene)
    if found is None:
        return None
    if len(found) == 1:
        thing = found[0]
        text = f"There is {object_phrase(SceneObject(thing.shape, thing.colour))}, so yes."
        return _turn(query, text, {"verdict": "yes", "count_allowed": 1, **_allowed(thing)})
    if found:
        noun = " ".join(word for word in (query.colour, plural(query.shape or "object")) if word)
        facts = {"verdict": "yes", "count_allowed": len(found), **_allowed(*found)}
        return _turn(query, f"There are {NUMBERS[len(found)]} {noun}, so yes.", facts)
    if query.shape and query.colour:
        alike = [thing for thing in scene.objects if thing.shape == query.shape]
        if len(alike) == 1:
            text = f"The {query.shape} is {alike[0].colour}, so no."
            return _turn(query, text, {"verdict": "no", "denied": named_attributes(query), **_allowed(*alike)})
        query_words = f"{query.colour} {query.shape}" if alike else query.shape
        return missing(query, f"There is no {query_words}, so no.", verdict="no")
    return missing(query, verdict="no")


def _answer_claim(query: Query, scene: Scene) -> Turn | None:
    found = _find(query, scene)
    if found is None or len(found) > 1:
        return None
    if not found:
        return missing(query, verdict="no")
    thing, claim = found[0], query.claim or ""
    kind = kind_of(claim)
    value = getattr(thing, kind)
    if value is None:
        return None
    subject = f"The {thing.colour} one" if kind == "shape" else f"The {thing.shape}"
    verdict = "yes" if value == claim else "no"
    facts: dict[str, Any] = {"verdict": verdict, **_allowed(thing)}
    if verdict == "no":
        facts["denied"] = {kind: [claim]}
    return _turn(query, f"{subject} is {claim_phrase(value)}, so {verdict}.", facts)


def _answer_misleading(query: Query, thing: SceneObject) -> Turn | None:
    claim = query.claim or ""
    kind = kind_of(claim)
    value = getattr(thing, kind)
    if value is None or value == claim:
        return None
    text = f"The {thing.shape} is {claim_phrase(value)}, not {claim_phrase(claim)}."
    return _turn(query, text, _about(thing, **{kind: value}) | {"denied": {kind: [claim]}})


def missing(query: Query, text: str | None = None, verdict: str | None = None) -> Turn:
    """What is asked about is not there: 'There is no blue star.', 'There is nothing on the left, so no.'"""
    if text is None:
        place = f" {PLACE_PHRASES[query.place]}" if query.place else ""
        if query.shape or query.size:
            words = " ".join(word for word in (query.size, query.colour, query.shape or "object") if word)
            text = f"There is no {words}{place}"
        else:
            text = " ".join(word for word in ("There is nothing", query.colour) if word) + place
        text += ", so no." if verdict else "."
    facts: dict[str, Any] = {"missing": True, "denied": named_attributes(query)}
    return _turn(query, text, facts | ({"verdict": verdict} if verdict else {}))


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
    return found


def _turn(query: Query, text: str, facts: dict[str, Any]) -> Turn:
    full = {"missing": False, "required": {}, "allowed": {}, "denied": {}} | facts
    return Turn(family=query.family, question=render(query), answer=text, facts=full, query=query)


def _about(thing: SceneObject, **required: str) -> dict[str, Any]:
    return {"required": required, **_allowed(thing)}


def _allowed(*things: SceneObject) -> dict[str, Any]:
    return {"allowed": {kind: sorted({getattr(t, kind) for t in things} - {None}) for kind in ATTRIBUTES}}


def _allow(facts: dict[str, Any], query: Query) -> None:
    for kind, values in named_attributes(query).items():
        facts["allowed"][kind] = sorted({*facts["allowed"].get(kind, ()), *values})


def named_attributes(query: Query) -> dict[str, list[str]]:
    """The attributes by which a query refers to its object, each with its value in a list."""
    return {kind: [getattr(query, kind)] for kind in ATTRIBUTES if getattr(query, kind)}
