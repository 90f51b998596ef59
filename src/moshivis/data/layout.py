"""Conversations as people keep them in folders: a `.jsonl` file with a line for each, or recordings alone.

A recording, in the layout of moshi-finetune: `{"path": "a.wav", "duration": 12.5, "image": "a.png"}`. Of the stereo
file the left channel is the assistant, the right one the user. Beside it stands `a.json` with
`{"alignments": [["hello", [0.1, 0.4], "SPEAKER_MAIN"], …]}`; SPEAKER_MAIN is the assistant, anybody else the user.

A dialogue in writing: `{"turns": [{"role": "user", "text": "What is this?"}, …], "image": "a.png"}`.

`image` and `duration` may be left out. Paths are relative to the folder of the `.jsonl` file. Of a folder that is given
in place of such a file every recording is a conversation, about the picture that has its name, if there is one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

from moshivis.data.alignment import Word
from moshivis.errors import InputError

SPEAKER_MAIN = "SPEAKER_MAIN"
_PAUSE = 0.3  # seconds of silence that end a turn which the other side speaks into
_SOUNDS = (".wav", ".flac", ".ogg")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".PNG", ".JPG", ".JPEG")
_NOT_IMAGE = ("images", "picture", "pictures", "img", "image_path")
Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side says in writing until the other one begins."""

    role: Role
    text: str


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A stereo file and its words."""

    where: str  # file and line that name it, for messages
    audio: Path
    duration: float | None  # seconds; None = not said
    image: Path | None


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A conversation in writing."""

    where: str
    turns: tuple[Turn, ...]
    image: Path | None


Entry = Recording | Dialogue


@dataclass(frozen=True)
class Line:
    """A line of a `.jsonl` file that is not blank."""

    path: Path
    number: int  # from 1
    text: str

    @property
    def where(self) -> str:
        return _text(f"{self.path}:{self.number}")


def read_lines(path: Path) -> list[Line]:
    """All lines that are not blank, unparsed; of a folder, one for each recording in it and below, by name.

    Raises InputError if there is no such text file or folder, or nothing in it.
    """
    if path.is_dir():
        return _recordings(path)
    try:
        with path.open(encoding="utf-8") as file:
            numbered = enumerate(file, start=1)
            lines = [Line(path, number, text.rstrip("\n")) for number, text in numbered if text.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a .jsonl file: {error}") from error
    if not lines:
        raise InputError(f"{path} is empty: every line should describe a conversation")
    return lines


def _recordings(folder: Path) -> list[Line]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SOUNDS)
    if not found:
        raise InputError(f"{folder} holds no recordings ({', '.join(_SOUNDS)}), nor in folders below")
    lines = []
    for number, path in enumerate(found, start=1):
        fields = {"path": path.name}
        picture = next((path.with_suffix(end) for end in _PICTURES if path.with_suffix(end).exists()), None)
        if picture is not None:
            fields["image"] = picture.name
        lines.append(Line(path, number, json.dumps(fields)))
    return lines


def parse_line(line: Line) -> Entry:
    """The conversation that a line names; of its files nothing is read. Raises InputError with file and line."""
    where, folder = line.where, line.path.parent
    try:
        fields = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: this line is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where}: this line is no JSON object, as it should be")
    image = fields.get("image")
    for name in _NOT_IMAGE:
        if name in fields and image is None:
            raise InputError(
                f'{where}: there is "{name}", but the key of a picture is "image", a path; one a conversation'
            )
    if image is not None and not (isinstance(image, str) and image):
        raise InputError(f"{where}: image must be the path of a picture, not {image!r}; leave it out if there is none")
    picture = None if image is None else folder / image
    if "turns" in fields and "path" in fields:
        raise InputError(f'{where}: there are both "path" and "turns"; give the words of a recording in its .json file')
    if "turns" in fields:
        return Dialogue(where=where, turns=_parse_turns(fields["turns"], where), image=picture)
    path, duration = fields.get("path"), fields.get("duration")
    if not isinstance(path, str) or not path:
        raise InputError(f'{where}: there is neither "path" (a recording) nor "turns" (a dialogue in writing)')
    if not (folder / path).name:
        raise InputError(f"{where}: path must name a recording, not {path!r}")
    if duration is not None and not (_is_time(duration) and duration > 0):
        raise InputError(f"{where}: duration must be a number of seconds above 0, not {duration!r}")
    seconds = None if duration is None else float(duration)
    return Recording(where=where, audio=folder / path, duration=seconds, image=picture)


def _parse_turns(turns: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: turns must be a list with at least one turn")
    parsed = []
    for number, turn in enumerate(turns, start=1):
        role, text = (turn.get("role"), turn.get("text")) if isinstance(turn, dict) else (None, None)
        if role not in ("user", "assistant"):
            raise InputError(f"{where}: turn {number} has the role {role!r}; it must be user or assistant")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: turn {number} has no text")
        if "image" in turn:
            raise InputError(f'{where}: turn {number} has an "image"; a conversation has one, beside its "turns"')
        parsed.append(Turn(cast(Role, role), _text(text).strip()))
    return tuple(parsed)


# words of a recording -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpokenWords:
    """The words of both sides of a recording, in the order in which they begin."""

    assistant: tuple[Word, ...]
    user: tuple[Word, ...]

    def turns(self) -> tuple[Turn, ...]:
        """The conversation in writing, turns in the order in which they begin.

        A turn ends where the other side speaks, unless it goes on without a pause and the other one spoke into it.
        """
        marked: list[tuple[Role, Word]] = [("assistant", word) for word in self.assistant]
        marked += [("user", word) for word in self.user]
        marked.sort(key=lambda pair: pair[1].start)
        turns: list[tuple[Role, list[Word]]] = []
        newest: dict[Role, list[Word]] = {}  # turn of each side
        spoken_into = False  # the newest turn began before the other side's word had ended
        before = None
        for role, word in marked:
            goes_on = role in newest and spoken_into and word.start < newest[role][-1].end + _PAUSE
            if role == before or goes_on:
                newest[role].append(word)
            else:
                others = newest.get("user" if role == "assistant" else "assistant")
                spoken_into = others is not None and word.start < others[-1].end
                newest[role] = [word]
                turns.append((role, newest[role]))
            before = role
        return tuple(Turn(role, " ".join(word.text for word in words)) for role, words in turns)


def read_words(recording: Recording) -> SpokenWords:
    """The words in the `.json` file beside a recording. Raises InputError that names the file and the bad entry."""
    path = recording.audio.with_suffix(".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{recording.where}: the words of {recording.audio.name} are missing: there is no {path}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    alignments = content.get("alignments") if isinstance(content, dict) else None
    if not isinstance(alignments, list):
        raise InputError(f'{path} must hold {{"alignments": [["word", [start, end], "SPEAKER_MAIN"], …]}}')
    sides: dict[bool, list[Word]] = {True: [], False: []}
    for index, entry in enumerate(alignments):
        word, speaker = _parse_word(entry, f"{path}: alignment {index}")
        if word.text:
            sides[speaker == SPEAKER_MAIN].append(word)
    return SpokenWords(_in_order(sides[True]), _in_order(sides[False]))


def _parse_word(entry: Any, where: str) -> tuple[Word, str]:
    match entry:
        case [str(text), [start, end], str(speaker)] if _is_time(start) and _is_time(end):
            if not 0 <= start <= end:
                raise InputError(f"{where}: the word {text!r} goes from {start} to {end} s, which is no span of time")
            return Word(_text(text).strip(), float(start), float(end)), speaker
    raise InputError(f'{where} is {json.dumps(entry)[:80]}; it must be ["word", [start, end], "SPEAKER_MAIN"]')


def _is_time(value: Any) -> TypeGuard[int | float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _text(text: str) -> str:
    """Question marks for what JSON and file names may hold but no text: halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _in_order(words: Sequence[Word]) -> tuple[Word, ...]:
    return tuple(sorted(words, key=lambda word: word.start))
