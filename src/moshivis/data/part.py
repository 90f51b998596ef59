"""One part of a source file packed: some of its lines to one file of each kind, and a note that it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moshivis.data.alignment import FRAME_RATE
from moshivis.data.encode import Encoder, speech_sample
from moshivis.data.layout import Dialogue, Entry, Line, Recording, SpokenWords, parse_line, read_words
from moshivis.data.sample import Kind
from moshivis.data.shard_format import CONTENTS, ShardFile, picture_key, shard_file, shard_name
from moshivis.data.shard_writer import PartWriter, open_part
from moshivis.data.shards import check_size
from moshivis.data.written import Form, speechless_sample
from moshivis.errors import InputError, ShardError
from moshivis.files import atomic_write, read_limited
from moshivis.vision.image import MAX_BYTES, read_image


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process packs at a time."""

    number: int
    lines: tuple[Line, ...]
    pictures: frozenset[Path]  # those that this part stores; of the others an earlier part is to do so

    @property
    def digest(self) -> str:
        return lines_digest(self.lines)


def lines_digest(lines: Iterable[Line]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line.number} {line.text}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How conversations become samples.

    `kind` None keeps the kind of each: recordings speech, dialogues speechless. `form` None is what suits the
    vocabulary (`written.usual_form`).
    """

    kind: Kind | None = None
    form: Form | None = None
    skip_broken: bool = False


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A conversation that could not be packed."""

    where: str
    why: str


@dataclass(kw_only=True)
class Tally:
    """What became of some conversations; tallies can be added."""

    conversations: int = 0  # packed
    seconds: float = 0.0  # of recordings
    words: int = 0  # of the assistant, spoken
    late: int = 0  # words that begin after their frame (see alignment.Alignment)
    lost: int = 0  # pieces
    unspelt: int = 0  # words of samples, spoken or written, with signs that the vocabulary lacks
    mute: int = 0  # recordings with words, none of which is the assistant's
    lone: int = 0  # recordings written down in which the assistant speaks, and nobody else
    broken: list[Broken] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for item in dataclasses.fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Tally:
        return cls(**fields | {"broken": [Broken(**broken) for broken in fields["broken"]]})


@dataclass(frozen=True, kw_only=True)
class Done:
    """The note that a part leaves, `part-N.json`: it is written last."""

    lines: str  # their digest
    files: tuple[ShardFile, ...]
    tally: Tally
    named: tuple[str, ...]  # keys of the pictures of its samples
    stored: tuple[str, ...]  # keys of those that it stores

    def write(self, path: Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")


def note_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.json"


def read_done(folder: Path, part: Part) -> Done | None:
    """The note of a part that an earlier run has finished, of the same lines, whose files are all there; or None."""
    try:
        fields = json.loads(note_path(folder, part.number).read_text(encoding="utf-8"))
        if fields["lines"] != part.digest:
            return None
        files = tuple(shard_file(file) for file in fields["files"])
        for file in files:
            check_size(folder, file)
        tally = Tally.from_json(fields["tally"])
        named, stored = tuple(fields["named"]), tuple(fields["stored"])
        return Done(lines=part.digest, files=files, tally=tally, named=named, stored=stored)
    except (FileNotFoundError, ShardError, ValueError, KeyError, TypeError):
        return None  # the part is made again


def complete_part(part: Part, folder: Path, rules: Rules, encoder: Encoder, on_line: Callable[[], None]) -> Done:
    """Pack a part, or keep what an earlier run made of it if nothing that was left out then can be packed now.

    Raises InputError as `pack_part` does.
    """
    note = read_done(folder, part)
    if note is None or not rules.skip_broken or _any_mended(part, note, rules, encoder):
        return pack_part(part, folder, rules, encoder, on_line)
    for _ in part.lines:
        on_line()
    return note


def _any_mended(part: Part, note: Done, rules: Rules, encoder: Encoder) -> bool:
    """Whether a conversation that was left out can be packed now."""
    numbers = {broken.where.rpartition(":")[2] for broken in note.tally.broken}  # the path may be spelt otherwise now
    left_out = [line for line in part.lines if str(line.number) in numbers]
    with tempfile.TemporaryDirectory() as scratch, open_part(Path(scratch), part.number, encoder.codebooks) as writer:
        packer = _Packer(part, rules, encoder, writer, Tally())
        for line in left_out:
            try:
                packer.pack(line)
            except InputError:
                continue
            return True
    return False


def pack_part(part: Part, folder: Path, rules: Rules, encoder: Encoder, on_line: Callable[[], None]) -> Done:
    """Pack a part and leave its note. `on_line` is called after each line.

    Raises InputError for a broken conversation unless they are skipped.
    """
    tally = Tally()
    note_path(folder, part.number).unlink(missing_ok=True)  # an older one tells of files that are about to be replaced
    with open_part(folder, part.number, encoder.codebooks) as writer:
        packer = _Packer(part, rules, encoder, writer, tally)
        for line in part.lines:
            try:
                packer.pack(line)
            except InputError as error:
                why = str(error) if str(error).startswith(line.where) else f"{line.where}: {error}"
                if not rules.skip_broken:
                    raise InputError(why) from error
                tally.broken.append(Broken(where=line.where, why=why))
            on_line()
    for name in {shard_name(content, part.number) for content in CONTENTS} - {file.name for file in writer.files}:
        (folder / name).unlink(missing_ok=True)  # of other lines that had this number before
    named, stored = (tuple(sorted(keys)) for keys in (packer.named, packer.stored))
    done = Done(lines=part.digest, files=tuple(writer.files), tally=tally, named=named, stored=stored)
    done.write(note_path(folder, part.number))
    return done


class _Packer:
    """Packs the lines of a part. A picture that several lines name is read once."""

    def __init__(self, part: Part, rules: Rules, encoder: Encoder, writer: PartWriter, tally: Tally):
        self.part, self.rules, self.encoder = part, rules, encoder
        self.writer, self.tally = writer, tally
        self._keys: dict[Path, str] = {}
        self.named: set[str] = set()  # keys of the pictures of samples
        self.stored: set[str] = set()

    def pack(self, line: Line) -> None:
        entry = parse_line(line)
        image, file = self._picture(entry)
        match entry:
            case Recording():
                words = read_words(entry)
                if self.rules.kind == "speechless":
                    self._pack_written(Dialogue(where=entry.where, turns=words.turns(), image=None), image)
                    self.tally.lone += bool(words.assistant) and not words.user
                else:
                    self._pack_speech(entry, words, image)
                self.tally.mute += bool(words.user) and not words.assistant
            case Dialogue() if self.rules.kind != "speech":
                self._pack_written(entry, image)
            case _:
                raise InputError(f"{line.where}: a dialogue in writing has no sound; record or synthesise it first")
        self.tally.conversations += 1
        if image is not None:
            self.named.add(image)
        if file is not None:
            self.stored.add(self.writer.add_picture(file))

    def _pack_speech(self, recording: Recording, words: SpokenWords, image: str | None) -> None:
        made = speech_sample(recording, words, self.encoder, image=image)
        self.writer.add(made.sample, image)
        self.tally.seconds += recording.duration or len(made.sample) / FRAME_RATE
        self.tally.words += made.words
        self.tally.late += made.late
        self.tally.lost += made.lost
        self.tally.unspelt += made.unspelt

    def _pack_written(self, dialogue: Dialogue, image: str | None) -> None:
        if not dialogue.turns:
            raise InputError(f"{dialogue.where}: nobody says a word in this recording, so it cannot be written down")
        sample = speechless_sample(
            dialogue.turns, self.encoder.tokenizer, form=self.rules.form, image=image, origin=dialogue.where
        )
        self.writer.add(sample, image)
        words = (word for turn in dialogue.turns for word in turn.text.split())
        self.tally.unspelt += sum(not self.encoder.tokenizer.spells(word) for word in words)

    def _picture(self, entry: Entry) -> tuple[str | None, bytes | None]:
        """The key of the conversation's picture, and its file if that is still to be stored here."""
        path = entry.image
        if path is None:
            return None, None
        ours = path in self.part.pictures
        if (key := self._keys.get(path)) is not None and (key in self.stored or not ours):
            return key, None
        try:
            file = read_limited(path, max_bytes=MAX_BYTES, noun="picture")
            read_image(file)
        except InputError as error:
            raise InputError(f"{entry.where}: picture {path}: {error}") from error
        key = self._keys[path] = picture_key(file)
        return key, file if ours and key not in self.stored else None
