"""Questions of the miniature world: a `Query` is what is asked, apart from any scene; it renders to English.

The same query can be answered for many scenes (`moshivis.mini.grammar.answer`), so a spoken question needs to be
synthesised only once. Every family has at least twelve phrasings; `phrasing` picks one, modulo their number.
"""

from dataclasses import asdict, dataclass
from typing import Any

from moshivis.mini import knowledge
from moshivis.mini.language import PLACE_PHRASES, article, capitalise, object_phrase, plural
from moshivis.mini.scenes import COLOURS, PLACES, SHAPES, SIZES, SceneObject

FAMILIES = (
    "describe",
    "colour",
    "shape",
    "size",
    "count",
    "place",
    "yes_no",
    "misleading",
    "read",
    "knowledge",
    "small_talk",
)
PRETRAINING_FAMILIES = (*FAMILIES, "repeat")
SCENELESS_FAMILIES = ("knowledge", "small_talk", "repeat")
MAX_PHRASINGS = 24

TEMPLATES: dict[str, tuple[str, ...]] = {
    "describe": (
        "What do you see?",
        "What do you see in the picture?",
        "What can you see?",
        "What can you see in the image?",
        "What is in the picture?",
        "What is in the image?",
        "What is there?",
        "Describe the picture.",
        "Describe what you see.",
        "Can you describe the image?",
        "Tell me what you see.",
        "Tell me what is in the picture.",
        "What does the picture show?",
        "What is this a picture of?",
    ),
    "colour": (
        "What colour is {it}?",
        "What colour is {it}?",
        "Which colour is {it}?",
        "What is the colour of {it}?",
        "Tell me the colour of {it}.",
        "Tell me what colour {it} is.",
        "Can you tell me the colour of {it}?",
        "Do you know what colour {it} is?",
        "Can you see what colour {it} is?",
        "What colour does {it} have?",
        "Which colour does {it} have?",
        "Name the colour of {it}.",
        "And what colour is {it}?",
        "What is the colour {it} has?",
    ),
    "shape": (
        "What shape is {it}?",
        "What shape is {it}?",
        "Which shape is {it}?",
        "What is {it}?",
        "What is the shape of {it}?",
        "Which shape does {it} have?",
        "What shape does {it} have?",
        "Tell me what shape {it} is.",
        "Tell me the shape of {it}.",
        "Can you tell me what {it} is?",
        "Do you know what shape {it} is?",
        "Can you see what shape {it} is?",
        "Name the shape of {it}.",
        "And what shape is {it}?",
    ),
    "shape/place": (
        "What is {place}?",
        "What is there {place}?",
        "What do you see {place}?",
        "What can you see {place}?",
        "Which shape is {place}?",
        "What shape is {place}?",
        "Tell me what is {place}.",
        "Which shape do you see {place}?",
    ),
    "size": (
        "What size is {it}?",
        "Which size is {it}?",
        "What is the size of {it}?",
        "How big is {it}?",
        "How big is {it}?",
        "How large is {it}?",
        "Tell me the size of {it}.",
        "Tell me how big {it} is.",
        "Can you tell me how big {it} is?",
        "Do you know what size {it} is?",
        "Can you see how big {it} is?",
        "Which size does {it} have?",
        "And how big is {it}?",
        "What size does {it} have?",
    ),
    "count": (
        "How many {them} are there?",
        "How many {them} are there?",
        "How many {them} do you see?",
        "How many {them} can you see?",
        "How many {them} are in the picture?",
        "How many {them} does the picture have?",
        "How many {them} does the picture show?",
        "Count the {them}.",
        "Can you count the {them}?",
        "Please count the {them}.",
        "Tell me how many {them} there are.",
        "Tell me how many {them} you see.",
        "What is the number of {them}?",
        "And how many {them} are there?",
    ),
    "place": (
        "Where is {it}?",
        "Where is {it}?",
        "Where do you see {it}?",
        "Where can you see {it}?",
        "Where can I find {it}?",
        "In which place is {it}?",
        "What is the place of {it}?",
        "Tell me where {it} is.",
        "Tell me the place of {it}.",
        "Can you tell me where {it} is?",
        "Do you know where {it} is?",
        "Can you see where {it} is?",
        "Where in the picture is {it}?",
        "And where is {it}?",
    ),
    "yes_no/exists": (
        "Is there {a}?",
        "Is there {a}?",
        "Do you see {a}?",
        "Can you see {a}?",
        "Is there {a} in the picture?",
        "Do you see {a} in the image?",
        "Does the picture show {a}?",
        "Tell me if there is {a}.",
    ),
    "yes_no/claim": (
        "Is {it} {claim}?",
        "Is {it} {claim}?",
        "Tell me if {it} is {claim}.",
        "Can you tell me if {it} is {claim}?",
        "Do you know if {it} is {claim}?",
        "And is {it} {claim}?",
    ),
    "misleading": (
        "Why is {it} {claim}?",
        "Why is {it} {claim}?",
        "Why is {it} {claim} in the picture?",
        "Why do you see that {it} is {claim}?",
        "Tell me why {it} is {claim}.",
        "Can you tell me why {it} is {claim}?",
        "Do you know why {it} is {claim}?",
        "How come {it} is {claim}?",
        "Explain why {it} is {claim}.",
        "What is the reason that {it} is {claim}?",
        "And why is {it} {claim}?",
        "Please tell me why {it} is {claim}.",
        "Do you like that {it} is {claim}?",
    ),
    "read": (
        "What does it say?",
        "What does the picture say?",
        "What is written there?",
        "What is written in the picture?",
        "What does it say in the picture?",
        "Read it.",
        "Can you read it?",
        "Please read what it says.",
        "Tell me what it says.",
        "Do you know what it says?",
        "Read the text.",
        "Can you tell me what is written there?",
    ),
    "read/word": (
        "Which word is written there?",
        "Which word do you see?",
        "Read the word.",
        "What is the word?",
        "Tell me the word in the picture.",
        "Can you read the word?",
        "What word does it say?",
        "Which word is in the picture?",
        "What word is written there?",
        "Please read the word.",
        "Tell me which word you see.",
        "Do you know which word it is?",
    ),
    "read/number": (
        "Which number is written there?",
        "Which number do you see?",
        "Read the number.",
        "What is the number?",
        "Tell me the number in the picture.",
        "Can you read the number?",
        "What number does it say?",
        "Which number is in the picture?",
        "What number is written there?",
        "Please read the number.",
        "Tell me which number you see.",
        "Do you know which number it is?",
    ),
    "repeat": (
        "Say: {text}.",
        "Repeat: {text}.",
        "Please say: {text}.",
        "Please repeat: {text}.",
        "Say after me: {text}.",
        "Repeat after me: {text}.",
        "Can you say: {text}?",
        "Can you repeat: {text}?",
        "Now say: {text}.",
        "Now repeat: {text}.",
        "Tell me: {text}.",
        "Say the words: {text}.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is asked, apart from any scene.

    `shape`, `colour`, `size`, `place` refer to the object (or objects) asked about. `claim` is the attribute value
    that a yes_no or misleading question asserts. `item` names the knowledge, small talk or text to repeat, and what
    is to be read (word, number, or None for either), and
    `choices` are the options of a multiple choice question.
    """

    family: str
    phrasing: int = 0
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    claim: str | None = None
    item: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The question in English, with punctuation."""
        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict without the empty fields, for json."""
        fields = {key: value for key, value in asdict(self).items() if value}
        return fields | ({"choices": list(self.choices)} if self.choices else {})

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "Query":
        """The query that `to_dict` wrote."""
        return Query(**{**fields, "choices": tuple(fields.get("choices", ()))})


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question about one scene and its answer.

    `facts` says what a right answer must state and may state, for `moshivis.mini.judge`; `facts["missing"]` is true
    where the question asks for something that is not there.
    """

    family: str
    question: str
    answer: str
    facts: dict[str, Any]
    query: Query


def render(query: Query) -> str:
    """A query in English."""
    if query.family == "knowledge":
        return knowledge.question(query.item or "", query.phrasing, query.choices)
    if query.family == "small_talk":
        return knowledge.small_talk_question(query.item or "", query.phrasing)
    forms = TEMPLATES[template_name(query)]
    form = forms[query.phrasing % len(forms)]
    slots = {
        "it": definite(query),
        "them": group(query),
        "a": indefinite(query),
        "place": PLACE_PHRASES.get(query.place or "", ""),
        "claim": claim_phrase(query.claim) if query.claim else "",
        "text": query.item or "",
    }
    return capitalise(form.format(**slots))


def template_name(query: Query) -> str:
    """Which list of `TEMPLATES` renders the query."""
    if query.family == "read" and query.item:
        return f"read/{query.item}"
    if query.family == "yes_no":
        return "yes_no/claim" if query.claim else "yes_no/exists"
    if query.family == "shape" and query.place and not (query.colour or query.size):
        return "shape/place" if query.phrasing % 3 else "shape"
    return query.family


def definite(query: Query) -> str:
    """'the blue star', 'the thing on the left', 'the big one': the object that a query refers to."""
    noun = query.shape or ("thing", "one", "object", "shape")[query.phrasing % 4]
    if noun == "shape" and query.family == "shape":
        noun = "thing"
    if noun == "one" and not (query.colour or query.size):
        noun = "thing"
    words = ["the", query.size, query.colour, noun, PLACE_PHRASES.get(query.place or "")]
    return " ".join(word for word in words if word)


def indefinite(query: Query) -> str:
    """'a blue star', 'anything blue', 'anything on the left': what an existence question asks for."""
    if query.shape:
        return object_phrase(SceneObject(query.shape, query.colour or "", query.size, query.place))
    words = [query.size, query.colour, PLACE_PHRASES.get(query.place or "")]
    return " ".join(["anything", *(word for word in words if word)])


def group(query: Query) -> str:
    """'stars', 'blue things', 'objects': what a count question counts."""
    noun = plural(query.shape or ("object", "thing")[query.phrasing % 2])
    return " ".join(word for word in (query.size, query.colour, noun) if word)


def claim_phrase(claim: str) -> str:
    """An attribute value after 'is': 'green', 'on the left', 'a heart', 'big'."""
    return PLACE_PHRASES.get(claim) or (article(claim) if claim in SHAPES else claim)


def kind_of(value: str) -> str:
    """Which attribute a value belongs to; values of the world belong to one only."""
    for kind, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("place", PLACES)):
        if value in values:
            return kind
    raise KeyError(value)
