"""Spoken clips: the raw speech of the miniature, synthesised once in shards that resume.

Clips are phrases and questions, not dialogues: training puts scenes together from them, so a few hours of speech give
endless conversations. A shard is two files, `shard-00000.pcm` (int16, 24 kHz, mono, clips end to end) and
`shard-00000.jsonl` (one line a clip), written atomically; a shard is there when its jsonl is. The plan is a pure
function of the seed, so an interrupted run continues where it stopped.

    python -m moshivis.mini.clips --out DIR --workers 2
"""

import argparse
import json
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from moshivis.errors import InputError
from moshivis.files import atomic_write
from moshivis.mini import grammar, voices
from moshivis.mini.answers import named_attributes
from moshivis.mini.language import object_phrase, writing_phrase
from moshivis.mini.questions import SCENELESS_FAMILIES, Query
from moshivis.mini.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    said_scene,
    sample_object,
    sample_scene,
    sample_written_scene,
)
from moshivis.mini.voices import ASSISTANT_VOICE, SAMPLE_RATE, TRAINING_VOICES, Voice, Word
from moshivis.mini.writing import TEXTS, Writing

SHARD_CLIPS = 200
_NUM_THERE, _NUM_AND, _NUM_QUESTIONS, _NUM_WHOLE = 220, 220, 750, 40  # a voice
_NUM_MORE_QUESTIONS = 800  # a voice
_NUM_ASKED = 3500  # a voice, questions as pictures give rise to them, and facts, in the plan's last shards
_ASKED = ("colour", "shape", *["size", "count"] * 2, "place", *["yes_no"] * 3, "misleading", *["knowledge"] * 3)
_NUM_LISTENER = 4000


@dataclass(frozen=True, kw_only=True)
class PlannedClip:
    """A text to speak.

    `meta` holds the `object` or `writing` of a phrase, the `query` of a question, and of a whole scene the `objects`,
    the `writing` and the `query`.
    """

    text: str
    kind: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlannedShard:
    """Clips of one voice that are synthesised and written together."""

    index: int
    voice: Voice
    seed: int
    clips: tuple[PlannedClip, ...]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A spoken clip: where its samples lie, what is said when (seconds), by whom, and what it means.

    `kind` is there, and, there_text, and_text, question or whole (user); answer, repeated_claim, greeting,
    describe_first, describe_middle, describe_last or listener (assistant).
    """

    shard: int
    offset: int
    samples: int
    text: str
    words: tuple[Word, ...]
    voice: str
    role: str
    kind: str
    meta: dict[str, Any]

    @property
    def query(self) -> Query:
        """The query of a question or whole clip."""
        return Query.from_dict(self.meta["query"])

    @property
    def object(self) -> SceneObject:
        """The object of a there, and, or describe clip."""
        return SceneObject(**self.meta["object"])

    @property
    def scene(self) -> Scene:
        """The scene told by a whole clip."""
        return Scene(tuple(SceneObject(**thing) for thing in self.meta["objects"]), writing=self.writing)

    @property
    def writing(self) -> Writing | None:
        """What is written, of a there_text or and_text clip, or in the scene of a whole clip."""
        writing = self.meta.get("writing")
        return writing and Writing(**writing)


class ClipStore:
    """The clips of a folder, as many shards as are written so far.

    Raises InputError if the folder has no clips or a shard's files do not fit each other.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.clips: list[Clip] = []
        self._shards: dict[int, np.ndarray] = {}
        for path in sorted(self.folder.glob("shard-*.jsonl")):
            self._open_shard(path)
        if not self.clips:
            raise InputError(f"{self.folder} holds no clips; make them with: python -m moshivis.mini.clips --out DIR")

    def __len__(self) -> int:
        return len(self.clips)

    def audio(self, index: int) -> np.ndarray:
        """The samples `[samples]` of clip `index`, float32 at 24 kHz."""
        clip = self.clips[index]
        part = self._shards[clip.shard][clip.offset : clip.offset + clip.samples]
        return part.astype(np.float32) / 32768.0

    def _open_shard(self, path: Path) -> None:
        shard = int(path.stem.split("-")[1])
        pcm = np.memmap(path.with_suffix(".pcm"), dtype="<i2", mode="r")
        for line in path.read_text().splitlines():
            fields = json.loads(line)
            words = tuple(Word(*word) for word in fields.pop("words"))
            clip = Clip(shard=shard, words=words, **fields)
            if clip.offset + clip.samples > len(pcm):
                raise InputError(f"{path.with_suffix('.pcm')} is cut short; delete the shard's two files and run again")
            self.clips.append(clip)
        self._shards[shard] = pcm


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def plan(seed: int = 0) -> list[PlannedShard]:
    """All shards of the training voices, in an order in which an unfinished folder already holds every voice.

    First some of the assistant's answers, then a shard of every user voice, then the other answers, then the rest of
    the user voices with the assistant's descriptions between them, then more questions, then more of everything in the
    flite voices (they are few, and the voice kept out of training is one of theirs), and at last questions as pictures
    give rise to them: sentences that no voice has said are understood less well, however well known their words are.
    """
    rng = random.Random(seed)
    users = [list(_chunks(voice, _user_clips(voice, seed))) for voice in TRAINING_VOICES]
    spoken = [chunk for turn in zip_longest(*users) for chunk in turn if chunk]
    answers = list(_chunks(ASSISTANT_VOICE, _shuffled(_answer_clips(), rng)))
    described = list(_chunks(ASSISTANT_VOICE, _shuffled(_describe_clips(), rng)))
    first_round, rest = spoken[: len(TRAINING_VOICES)], spoken[len(TRAINING_VOICES) :]
    ordered = [*answers[:4], *first_round, *answers[4:]]
    for number in range(max(len(described), (len(rest) + 2) // 3)):
        ordered += [*rest[3 * number : 3 * number + 3], *described[number : number + 1]]
    more = [list(_chunks(voice, _more_questions(voice, seed))) for voice in TRAINING_VOICES]
    rare = [list(_chunks(v, _user_clips(v, seed, "-rare"))) for v in TRAINING_VOICES if v.engine == "flite"]
    asked = [list(_chunks(voice, _asked_questions(voice, seed))) for voice in TRAINING_VOICES]
    ordered += [chunk for kind in (more, rare, asked) for turn in zip_longest(*kind) for chunk in turn if chunk]
    return [
        PlannedShard(index=index, voice=voice, seed=seed * 100_003 + index, clips=clips)
        for index, (voice, clips) in enumerate(ordered)
    ]


def listener_plan(seed: int = 0, count: int = _NUM_LISTENER) -> list[PlannedShard]:
    """More of the assistant's original voice, for the listener alone: many of its words stand in one answer only.

    Every other sentence is two answers, the rest is words in any order; each takes up the words in turn.
    """
    rng = random.Random(f"{seed}-listener")
    answers = [*grammar.all_answers(), *grammar.GREETINGS]
    using: dict[str, list[str]] = {}
    for answer in answers:
        for word in grammar.normalise(answer).split():
            using.setdefault(word, []).append(answer)
    texts: list[str] = []
    while len(texts) < count:
        for number, word in enumerate(rng.sample(sorted(using), len(using))):
            if number % 2:
                texts.append(" ".join(rng.sample([rng.choice(using[word]), rng.choice(answers)], 2)))
            else:
                words = [word, *rng.choices(sorted(using), k=rng.randint(2, 5))]
                texts.append(" ".join(rng.sample(words, len(words))).capitalize() + ".")
    clips = [PlannedClip(text=text, kind="listener") for text in texts[:count]]
    return [
        PlannedShard(index=index, voice=voice, seed=seed * 100_003 + 70_000 + index, clips=chunk)
        for index, (voice, chunk) in enumerate(_chunks(ASSISTANT_VOICE, clips))
    ]


def _user_clips(voice: Voice, seed: int, round_: str = "") -> list[PlannedClip]:
    rng = random.Random(f"{seed}-{voice.name}{round_}")
    clips = _phrase_clips(rng)
    clips += _writing_clips(rng)
    clips += [_question_clip(query) for query in grammar.all_questions(rng, _NUM_QUESTIONS)]
    clips += [_whole_clip(rng) for _ in range(_NUM_WHOLE)]
    return _shuffled(clips, rng)


def _more_questions(voice: Voice, seed: int) -> list[PlannedClip]:
    rng = random.Random(f"{seed}-{voice.name}-more")
    return _shuffled([_question_clip(query) for query in grammar.all_questions(rng, _NUM_MORE_QUESTIONS)], rng)


def _asked_questions(voice: Voice, seed: int) -> list[PlannedClip]:
    rng = random.Random(f"{seed}-{voice.name}-asked")
    asked: dict[str, Query] = {}
    while len(asked) < _NUM_ASKED:
        turn = grammar.ask(sample_scene(rng), rng.choice(_ASKED), rng)
        if turn is None:
            continue
        # Claims about a thing named by two words are the most different ones: else a voice would lack nearly all.
        named = len(named_attributes(turn.query))
        if turn.query.family != "yes_no" or (turn.query.claim and named > 1) or rng.random() < 0.5:
            asked[turn.question] = turn.query
    return [_question_clip(query) for query in asked.values()]


def _phrase_clips(rng: random.Random) -> list[PlannedClip]:
    clips = []
    for kind, count, phrase in (("there", _NUM_THERE, grammar.there_phrase), ("and", _NUM_AND, grammar.and_phrase)):
        for number in range(count):
            thing = sample_object(rng, forget=True)
            # Each shape, colour and pair of them in turn: every voice says them all.
            shape, colour = SHAPES[number % len(SHAPES)], COLOURS[number % len(COLOURS)]
            thing = replace(thing, shape=shape, colour=colour)
            clips.append(PlannedClip(text=phrase(thing, rng.randrange(30)), kind=kind, meta={"object": asdict(thing)}))
    return clips


def _writing_clips(rng: random.Random) -> list[PlannedClip]:
    """Every word and number once, as the first or as a later phrase of a told scene."""
    clips = []
    for text in TEXTS:
        kind, phrase = rng.choice((("there_text", grammar.there_phrase), ("and_text", grammar.and_phrase)))
        writing = Writing(text)
        clips.append(PlannedClip(text=phrase(writing, rng.randrange(30)), kind=kind, meta={"writing": asdict(writing)}))
    return clips


def _question_clip(query: Query) -> PlannedClip:
    return PlannedClip(text=query.text, kind="question", meta={"query": query.to_dict()})


def _whole_clip(rng: random.Random) -> PlannedClip:
    """A told scene and a question about it in one breath."""
    families = [name for name in grammar.FAMILIES if name not in SCENELESS_FAMILIES]
    turn = None
    while turn is None:
        count = rng.choice((1, 2, 2, 3))
        scene = said_scene(sample_scene(rng, count) if rng.random() < 0.8 else sample_written_scene(rng), rng)
        turn = grammar.ask(scene, rng.choice(families), rng)
    text = f"{', '.join(grammar.scene_phrases(scene, rng))}. {turn.question}"
    meta: dict[str, Any] = {"objects": [asdict(thing) for thing in scene.objects], "query": turn.query.to_dict()}
    meta["writing"] = scene.writing and asdict(scene.writing)
    return PlannedClip(text=text, kind="whole", meta=meta)


def _answer_clips() -> list[PlannedClip]:
    clips = [PlannedClip(text=text, kind="greeting") for text in grammar.GREETINGS]
    clips += [PlannedClip(text=text, kind="repeated_claim") for text in grammar.repeated_claims()]
    return clips + [PlannedClip(text=text, kind="answer") for text in grammar.all_answers()]


def _describe_clips() -> list[PlannedClip]:
    things = [SceneObject(*values) for values in product(SHAPES, COLOURS, (*SIZES, None), (*PLACES, None))]
    clips = [
        PlannedClip(
            text=grammar.describe_part(object_phrase(thing), part),
            kind=f"describe_{part}",
            meta={"object": asdict(thing)},
        )
        for thing in things
        for part in ("first", "middle", "last")
    ]
    for text in TEXTS:
        writing = Writing(text)
        for part in ("first", "last"):
            said = grammar.describe_part(writing_phrase(writing), part)
            clips.append(PlannedClip(text=said, kind=f"describe_{part}", meta={"writing": asdict(writing)}))
    return clips


def _shuffled(clips: list[PlannedClip], rng: random.Random) -> list[PlannedClip]:
    return rng.sample(clips, len(clips))


def _chunks(voice: Voice, clips: list[PlannedClip]) -> Iterator[tuple[Voice, tuple[PlannedClip, ...]]]:
    for first in range(0, len(clips), SHARD_CLIPS):
        yield voice, tuple(clips[first : first + SHARD_CLIPS])


# ----------------------------------------------------------------------------------------------------------------------
# The work


def write_shard(shard: PlannedShard, folder: Path) -> int:
    """Synthesise a shard and write its files; returns the samples written, 0 if it was there already."""
    index_path = folder / f"shard-{shard.index:05d}.jsonl"
    if index_path.exists():
        return 0
    lines, parts, offset = [], [], 0
    spoken = voices.synthesise(shard.voice, [clip.text for clip in shard.clips], random.Random(shard.seed))
    for clip, utterance in zip(shard.clips, spoken, strict=True):
        pcm = np.clip(np.round(utterance.audio * 32768.0), -32768, 32767).astype("<i2")
        record = {
            "offset": offset,
            "samples": len(pcm),
            "text": clip.text,
            "words": [[word.text, word.start, word.end] for word in utterance.words],
            "voice": shard.voice.name,
            "role": shard.voice.role,
            "kind": clip.kind,
            "meta": clip.meta,
        }
        lines.append(json.dumps(record))
        parts.append(pcm)
        offset += len(pcm)
    with atomic_write(index_path.with_suffix(".pcm")) as path:
        Path(path).write_bytes(np.concatenate(parts).tobytes())
    with atomic_write(index_path) as path:
        Path(path).write_text("\n".join(lines) + "\n")
    return offset


def build_clips(shards: list[PlannedShard], folder: Path, workers: int = 2) -> float:
    """Write all shards that are missing, in the plan's order; returns the seconds of speech written.

    Raises InputError before any work if a speech program is missing.
    """
    for engine in sorted({shard.voice.engine for shard in shards}):
        voices.require(engine)
    folder.mkdir(parents=True, exist_ok=True)
    samples = 0
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with ProcessPoolExecutor(workers) as pool, Progress(*columns) as progress:
        task = progress.add_task("speaking clips", total=len(shards))
        jobs = [pool.submit(write_shard, shard, folder) for shard in shards]
        try:
            for job in as_completed(jobs):
                samples += job.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return samples / SAMPLE_RATE


def main() -> None:
    """Command line: write training clips to --out."""
    parser = argparse.ArgumentParser(description="Synthesise the miniature's spoken clips.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--workers", type=int, default=2, help="processes that speak at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the plan")
    arguments = parser.parse_args()
    seconds = build_clips(plan(arguments.seed), arguments.out, arguments.workers)
    store = ClipStore(arguments.out)
    print(f"{len(store)} clips, {seconds / 3600:.2f} h newly spoken, in {arguments.out}")


if __name__ == "__main__":
    main()
