"""Is an answer right? Reads the facts out of a produced sentence and compares them with the facts of the turn.

Phrasing is free, facts are not: whatever colour, shape, size, place, number or verdict the text states must be true
of the scene, and what the question asked for must be stated. Words after a negation ("no", "not", "nothing") up to
the end of their clause count as denied. An answer may open by repeating what was asked: "Green? No, it is blue."
"""

import re
from dataclasses import dataclass, field
from typing import Any

from moshivis.mini.answers import named_attributes
from moshivis.mini.knowledge import CAPITALS
from moshivis.mini.language import NUMBERS, normalise, plural, writing_phrase
from moshivis.mini.questions import Query, Turn, kind_of
from moshivis.mini.scenes import COLOURS, SHAPES, SIZES
from moshivis.mini.writing import Writing

_SYNONYMS = {
    "large": "big",
    "huge": "big",
    "little": "small",
    "tiny": "small",
    "center": "middle",
    "centre": "middle",
    "upper": "top",
    "lower": "bottom",
    "above": "top",
    "below": "bottom",
    "cannot": "not",
    "none": "no",
    "yeah": "yes",
    "nope": "no",
} | {plural(shape): shape for shape in SHAPES}
_NEGATIONS = ("no", "not", "nothing")
_ABSENCE = {"not", "nothing", "there", "here", "in", "the", "picture", "image"}
_READING = ("it", "says", "the", "word", "number", "is", "i", "read", "see", "there")
_WRITTEN = re.compile(r"\bthe (?:word|number) \w+(?: (?:one|two|three|four|five|six|seven|eight|nine)\b)?")
_ROWS, _SIDES = ("top", "bottom"), ("left", "right")


@dataclass(kw_only=True)
class Claims:
    """What a text states and what it denies, an entry for each of shape, colour, size, place and number."""

    stated: dict[str, set[str]] = field(default_factory=dict)
    denied: dict[str, set[str]] = field(default_factory=dict)
    absent: list[dict[str, set[str]]] = field(default_factory=list)  # "no green star", "nothing blue"
    verdict: str | None = None
    negated: bool = False


def judge(turn: Turn, text: str) -> bool:
    """Whether `text` answers the turn's question rightly."""
    facts = turn.facts
    words = normalise(text)
    if turn.family == "repeat":
        return words == facts["exact"]
    if turn.family == "small_talk":
        return any(f" {sign} " in f" {words} " for sign in facts["signs"])
    if turn.family == "knowledge":
        return _judge_fact(turn, words.split())
    if turn.family == "describe":
        return _judge_description(facts["present"], facts["writing"], text)
    if turn.family == "read":
        return _judge_reading(facts["text"], words.split())
    repeated = re.match(r"[^.!?]*\?", text)
    if repeated is not None:
        if not _was_asked(turn.query, read_claims(repeated[0])):
            return False
        text = text[repeated.end() :]
    claims = read_claims(text)
    if turn.family == "count":
        return _judge_count(turn.query, facts, claims)
    if turn.family == "yes_no":
        if claims.verdict != facts["verdict"]:
            return False
    elif claims.verdict == "yes":
        return False
    return _judge_claims(facts, claims)


def _was_asked(query: Query, repeated: Claims) -> bool:
    asked = named_attributes(query)
    if query.claim:
        asked.setdefault(kind_of(query.claim), []).append(query.claim)
    if repeated.verdict is not None or repeated.negated:
        return False
    return all(values <= set(asked.get(kind, ())) for kind, values in repeated.stated.items())


def read_claims(text: str) -> Claims:
    """The facts that a text states and denies."""
    claims = Claims()
    for clause in re.split(r"[,.;:!?]|\b(?:but|so)\b", text.lower().replace("’", "'")):
        words = [_SYNONYMS.get(word, word) for word in normalise(clause).split()]
        verdicts = [word for word in words if word == "yes"]
        if words and words in (["no"], ["no", "sorry"], ["no", "it", "is", "not"]):
            verdicts.append("no")
        for verdict in verdicts:
            claims.verdict = verdict if claims.verdict in (None, verdict) else "both"
        if verdicts:
            continue
        negation = next((index for index, word in enumerate(words) if word in _NEGATIONS), len(words))
        claims.negated |= negation < len(words)
        denial = words[negation:]
        if denial == ["nothing"] or (len(denial) > 1 and set(denial) <= _ABSENCE):
            negation = 0  # "The star is not there" denies the star
            claims.absent.append(_collect(words, {}))
        _collect(words[:negation], claims.stated)
        _collect(words[negation:], claims.denied)
        if words[negation : negation + 1] in (["no"], ["nothing"]) or {"there", "see"} & set(words[:negation]):
            claims.absent.append(_collect(words[negation:], {}))
    return claims


def _collect(words: list[str], found: dict[str, set[str]]) -> dict[str, set[str]]:
    sides = [word for word in words if word in (*_SIDES, *_ROWS, "middle")]
    index = 0
    while index < len(sides):
        pair = sides[index : index + 2]
        corner = len(pair) == 2 and {pair[0] in _ROWS, pair[1] in _ROWS} == {True, False} and "middle" not in pair
        if corner and "and" not in words:
            found.setdefault("place", set()).add(" ".join(sorted(pair, key=lambda word: word in _SIDES)))
            index += 2
        else:
            found.setdefault("place", set()).add(pair[0])
            index += 1
    for position, word in enumerate(words):
        if word in SHAPES:
            found.setdefault("shape", set()).add(word)
        elif word in COLOURS:
            found.setdefault("colour", set()).add(word)
        elif word in SIZES:
            found.setdefault("size", set()).add(word)
        elif word in NUMBERS and not (word == "one" and _is_pronoun(words, position)):
            found.setdefault("number", set()).add(word)
    return found


def _is_pronoun(words: list[str], position: int) -> bool:
    """'the blue one', 'the one on the left' name an object, 'there is one star' counts."""
    named = (*COLOURS, *SIZES, *_SIDES, *_ROWS, "middle")
    before = next((word for word in reversed(words[:position]) if word not in named), None)
    return before == "the"


def _judge_claims(facts: dict[str, Any], claims: Claims) -> bool:
    if any(_is_there(absent, facts["present"]) for absent in claims.absent):
        return False
    for kind in ("shape", "colour", "size", "place"):
        stated = claims.stated.get(kind, set())
        if stated - set(facts["allowed"].get(kind, ())):
            return False
        if kind in facts["required"] and stated != {facts["required"][kind]}:
            return False
        true_values = {facts["required"][kind]} if kind in facts["required"] else set()
        allowed = set(facts["allowed"].get(kind, ()))
        if facts["denied"]:
            if claims.denied.get(kind, set()) & true_values:
                return False
            if claims.denied.get(kind, set()) - set(facts["denied"].get(kind, ())) - _denied_with_noun(facts, kind):
                return False
        elif claims.denied.get(kind, set()) & allowed:
            return False
    if facts["missing"]:
        return claims.negated or claims.verdict == "no"
    if "count_allowed" in facts:
        return claims.stated.get("number", set()) <= {NUMBERS[facts["count_allowed"]]}
    states_nothing = not any(claims.stated.values())
    return not (claims.negated and states_nothing and facts["required"])


def _is_there(absent: dict[str, set[str]], present: list[dict[str, str | None]]) -> bool:
    """Whether something that a text says is not there does stand in the scene."""
    named = {kind: values for kind, values in absent.items() if kind != "number"}
    return bool(named) and any(all(thing[kind] in values for kind, values in named.items()) for thing in present)


def _denied_with_noun(facts: dict[str, Any], kind: str) -> set[str]:
    """'The star is not a green star' denies the colour by naming the shape again."""
    return set(facts["allowed"].get(kind, ())) if kind == "shape" and "colour" in facts["denied"] else set()


def _judge_count(query: Query, facts: dict[str, Any], claims: Claims) -> bool:
    """The number, alone or of what was asked for: as many of something else is another answer."""
    number = facts["count"]
    stated = {NUMBERS.index(word) for word in claims.stated.get("number", set())}
    if not stated and claims.negated:
        stated = {0}
    elif not stated and any(claims.stated.get(kind) for kind in ("shape", "colour")):
        stated = {1}  # "There is a star."
    elif claims.negated:
        return False
    said = claims.denied if number == 0 and claims.negated else claims.stated
    named = {kind: said[kind] for kind in ("shape", "colour", "size") if said.get(kind)}
    fits = all(values <= set(facts["allowed"][kind]) for kind, values in named.items())
    if named:
        fits &= all(set(values) <= named.get(kind, set()) for kind, values in named_attributes(query).items())
        fits &= number == sum(all(thing[kind] in named[kind] for kind in named) for thing in facts["present"])
    return stated == {number} and fits


def _judge_fact(turn: Turn, words: list[str]) -> bool:
    facts = turn.facts
    asked = set(normalise(turn.question.split(":")[0]).split())
    spoken = [word for word in words if word in facts["rivals"]]
    if not spoken or facts["key"] not in spoken:
        return False
    kind = (turn.query.item or "").split(":")[0]
    if kind in ("bigger", "smaller"):
        return set(spoken) <= asked and _judge_comparison(facts["key"], kind, words, spoken)
    if kind in ("sum", "minus"):
        of_things = {_SYNONYMS.get(word, word) for word in words} & {*SHAPES, "thing", "things", "object", "objects"}
        operands = [NUMBERS[int(number)] for number in (turn.query.item or "").split(":")[1:]]
        repeated = not spoken[:-1] or sorted(spoken[:-1]) == sorted(operands)
        return spoken[-1] == facts["key"] and repeated and not of_things
    if kind == "capital" and not {country.lower() for country in CAPITALS} & set(words) <= asked:
        return False
    if kind in ("next", "after", "before") and not _judge_order(facts["key"], kind, words, spoken):
        return False
    if kind == "opposite" and "opposite" not in words and len(words) > 3:
        return False  # the rivals are everyday words, which occur in any sentence
    return set(spoken) - asked <= {facts["key"]}


def _judge_order(key: str, kind: str, words: list[str], spoken: list[str]) -> bool:
    """'Tuesday comes after Monday' or 'the day after Monday is Tuesday': Tuesday does not follow the word."""
    for relation in {"after", "before"} & set(words):
        following = [word for word in words[words.index(relation) :] if word in spoken]
        same = (relation == "before") == (kind == "before")
        if following and (following[0] == key) == same:
            return False
    return True


def _judge_comparison(key: str, kind: str, words: list[str], spoken: list[str]) -> bool:
    opposite = "smaller" if kind == "bigger" else "bigger"
    return (spoken[-1] if opposite in words else spoken[0]) == key


def _judge_reading(text: str, words: list[str]) -> bool:
    """What is written must be said, and nothing else be read out."""
    if not text:
        return "nothing" in words or words[:3] == ["there", "is", "no"]
    said = [word for word in words if word not in _READING]
    return said == text.split()


def _judge_description(present: list[dict[str, str | None]], writing: dict[str, Any] | None, text: str) -> bool:
    """Every object must be named by shape and colour, none invented; sizes and places may be left out, not wrong.

    What is written must be said, and is not taken for a thing: "the word star".
    """
    text = text.lower()
    read = [" ".join(match.split()) for match in _WRITTEN.findall(text)]
    if read != ([writing_phrase(Writing(**writing))] if writing else []):
        return False
    text = _WRITTEN.sub("", text)
    spoken = [_read_object(part) for part in re.split(r"\b(?:an?|one|the(?= \w+ \w+ (?:on|at|in)\b))\s", text)]
    things = [thing for thing in spoken if thing["shape"] or thing["colour"]]
    remaining = list(present)
    if len(things) != len(remaining):
        return False
    for thing in things:
        fitting = [
            truth
            for truth in remaining
            if thing["shape"] == truth["shape"]
            and thing["colour"] == truth["colour"]
            and all(thing[kind] is None or thing[kind] == truth[kind] for kind in ("size", "place"))
        ]
        if not fitting:
            return False
        remaining.remove(fitting[0])
    return True


def _read_object(part: str) -> dict[str, str | None]:
    found: dict[str, set[str]] = {}
    _collect([_SYNONYMS.get(word, word) for word in normalise(re.sub(r"\band\b", "", part)).split()], found)
    kinds = ("shape", "colour", "size", "place")
    return {kind: " / ".join(sorted(found[kind])) if kind in found else None for kind in kinds}
