"""Conversations of the miniature world as training samples, composed from spoken clips.

A sample has two channels. The user's side is put together at code level from clips of one voice (a told scene, then a
question, or a question alone); the assistant answers, its first word 80 to 640 ms later, with the clip of the right
answer, and falls silent when the user falls in. Its words stand in the text stream at the frames where they are spoken
(padding elsewhere, end-of-padding before a word).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from moshivis.mini import grammar
from moshivis.mini.clips import Clip
from moshivis.mini.codes import ClipCodes
from moshivis.mini.pace import usual_frames
from moshivis.mini.questions import SCENELESS_FAMILIES, Query, Turn
from moshivis.mini.scenes import Scene, sample_picture
from moshivis.mini.timeline import TELLING, Reply, Sample, Timeline
from moshivis.speech_lm.tokenizer import TextTokenizer

SCENE_FAMILIES = tuple(family for family in grammar.FAMILIES if family not in SCENELESS_FAMILIES)
HARD = (*["yes_no"] * 3, *["count"] * 2, *["place"] * 2)  # asked so many times more often: they teach least
SPOKEN_SCENELESS = (
    *SCENELESS_FAMILIES,
    *["knowledge"] * 2,
)  # as often as they stand here: facts have the most rare words
# Conversations of pretraining: the user tells what there is and asks about it, or only asks. A scene told once is asked
# about several times: finding the right one of two objects is what takes longest to learn.
TOLD_SHARE, RETOLD_SHARE, SCENELESS_SHARE = 0.75, 0.3, 0.3
WRITING_SHARE = 0.25  # of told scenes
READ_SHARE = 0.35  # of the questions about a scene with a writing
READ_NOTHING_SHARE = 0.3  # of the questions what is written that are left where nothing is
INTERRUPTED_SHARE = 0.1  # of the assistant's turns
HESITATION_SHARE = 0.12  # of the user's turns
# flite's and festival's voices are harder to understand than espeak's, and of the kind that training never hears
VOICE_TURNS = {"flite-kal": 2, "flite-kal16": 2, "flite-awb": 5, "festival-slt-lowered": 7}
# Synthetic speech tells from its first sounds which recording it is, so a model that hears its own recorded answer
# reads the rest of the answer from it, and in a conversation finds none. Therefore a turn of the assistant teaches
# either how to say an answer, or which one: then its own channel holds a recording of another answer. (When its words
# come must tell as little, hence the even pace.)
SPEAKING_TURNS, SPEAKING_TURNS_WITH_PICTURE = 0.4, 0.2  # adapters do not learn to speak, only not to disturb it
# A recital is a told scene, or a picture, and facts about it, one after the other without being asked for and faster
# than anybody speaks: looking things up and comparing is learnt from many times as many examples. The first words of a
# fact, most of what only a question could tell, are no targets: little is learnt of when to speak, or about what.
RECITAL_SHARE, RECITAL_SHARE_WITH_PICTURE = 0.45, 0.4
RECITED = 10
DESCRIBED_FIRST_SHARE = 0.35  # of the pictures of three or more things: later, a description would not be heard out
RECITED_WITH_PICTURE = ("colour", "shape", "size", *["place", "count", "yes_no", "describe"] * 2)  # looking, foremost
ATTEMPTS = 20  # at a question that a voice has a clip of

_Turn = tuple[list[int], Reply]  # clips that ask, and the reply
_Ask = Callable[[Scene, str, random.Random], Turn | None]


class Spoken:
    """Composes spoken samples of `frames` frames."""

    def __init__(
        self, codes: ClipCodes, tokenizer: TextTokenizer, frames: int, num_codebooks: int, padding_weight: float
    ):
        self.codes, self.tokenizer = codes, tokenizer
        self.frames, self.levels, self.padding_weight = frames, num_codebooks, padding_weight
        self.answers: dict[str, int] = {}
        self.said: list[int] = []  # all of the assistant's clips
        self.similar: dict[str, list[int]] = defaultdict(list)  # the same by their opening
        self.greetings: list[int] = []
        self.phrases: dict[tuple[str, str], list[int]] = defaultdict(list)  # (voice, kind)
        self.questions: dict[tuple[str, Query], list[int]] = defaultdict(list)  # (voice, what is asked)
        self.pace = usual_frames(clip.words for clip in codes.clips.clips if clip.role == "assistant")
        self.whole: dict[str, list[int]] = defaultdict(list)
        for i, clip in enumerate(codes.clips.clips):
            if clip.role == "assistant":
                self.said.append(i)
                self.similar[_opening(clip)].append(i)
            if clip.kind == "greeting":
                self.greetings.append(i)
            elif clip.role == "assistant":
                self.answers[clip.text] = i
            elif clip.kind in TELLING:
                self.phrases[clip.voice, clip.kind].append(i)
            else:
                if clip.kind == "whole":
                    self.whole[clip.voice].append(i)
                else:
                    self.questions[clip.voice, _content(clip.query)].append(i)
        voices = sorted({voice for voice, _ in self.questions})
        self.voices = [voice for voice in voices for _ in range(VOICE_TURNS.get(voice, 1))]

    def without_picture(self, rng: random.Random) -> Sample:
        """Pretraining: scenes that the user tells and asks about, scenes that nobody told, knowledge, small talk."""
        if rng.random() < RECITAL_SHARE:
            return self._recital(None, rng)
        told = rng.random() < TOLD_SHARE
        scene = None if told else sample_picture(rng)

        def next_turn(voice: str) -> _Turn | None:
            nonlocal scene
            if rng.random() < SCENELESS_SHARE:
                return self._question(voice, rng.choice(SPOKEN_SCENELESS), Scene(()), rng, ask)
            if told and self.whole[voice] and rng.random() < 0.08:
                index = rng.choice(self.whole[voice])
                clip = self.codes.clips.clips[index]
                reply = self._reply(grammar.answer(clip.query, clip.scene))
                if reply is None:
                    return None
                scene = clip.scene
                return [index], reply
            telling: list[int] = []
            about = scene
            if told and (scene is None or rng.random() < RETOLD_SHARE):
                telling, about = self._told(voice, rng)
            found = None
            if about is not None:
                found = self._question(voice, choose_family(about, rng, (*SCENE_FAMILIES, *HARD)), about, rng, ask)
            if found is None:
                return None
            scene = about
            return telling + found[0], found[1]

        return self._conversation(rng, next_turn)

    def with_picture(self, scene: Scene, rng: random.Random, families: tuple[str, ...]) -> Sample:
        """Every question is about `scene`, or of a family that needs none."""
        if scene.objects and rng.random() < RECITAL_SHARE_WITH_PICTURE:
            return self._recital(scene, rng)
        first = len(scene.objects) > 2 and "describe" in families and rng.random() < DESCRIBED_FIRST_SHARE

        def next_turn(voice: str) -> _Turn | None:
            nonlocal first
            family = "describe" if first else choose_family(scene, rng, families)
            first = False
            return self._question(voice, family, scene, rng, grammar.ask)

        return self._conversation(rng, next_turn, SPEAKING_TURNS_WITH_PICTURE)

    def _conversation(
        self, rng: random.Random, next_turn: Callable[[str], _Turn | None], speaking: float = SPEAKING_TURNS
    ) -> Sample:
        line, voice = self._opened(rng, speaking)
        while line.end < self.frames - 20:
            found = next_turn(voice)
            if found is None:
                continue
            clips, reply = found
            falls_in = line.interrupt() if rng.random() < INTERRUPTED_SHARE else None
            silent = rng.randint(2, 14) + (rng.randint(10, 60) if rng.random() < HESITATION_SHARE else 0)
            line.user(clips, falls_in or line.end + silent)
            line.assistant(reply, line.user_end + rng.randint(1, 4))
        return line.sample()

    def _recital(self, scene: Scene | None, rng: random.Random) -> Sample:
        """Facts about the scene; without one, about scenes that the user tells."""
        line, voice = self._opened(rng, speaking=0.0)
        while line.end < self.frames - 20:
            about = scene
            if scene is None:
                clips, about = self._told(voice, rng)
                if about is None:
                    continue
                line.user(clips, line.end + rng.randint(2, 14))
            assert about is not None
            families = grammar.RECITED if scene is None else RECITED_WITH_PICTURE
            line.recite(grammar.scene_facts(about, rng, RECITED, families), line.end + rng.randint(1, 8))
        return line.sample()

    def _opened(self, rng: random.Random, speaking: float) -> tuple[Timeline, str]:
        """A conversation that the assistant's greeting opens, and the user's voice."""
        line = Timeline(self, rng, speaking)
        greeting = rng.choice(self.greetings)
        line.assistant(Reply(self.codes.clips.clips[greeting].text, [greeting]), rng.randint(1, 5))
        return line, rng.choice(self.voices)

    def _told(self, voice: str, rng: random.Random) -> tuple[list[int], Scene | None]:
        """Phrase clips that tell a scene of one to three objects, and that scene; None if they contradict."""
        kinds = ["", *["and"] * (rng.choice((1, 2, 2, 2, 3)) - 1)]
        if rng.random() < WRITING_SHARE:
            kinds[rng.randrange(len(kinds))] += "_text"
        kinds[0] = "there" + kinds[0]
        clips = [rng.choice(self.phrases[voice, kind]) for kind in kinds]
        told = [self.codes.clips.clips[i] for i in clips]
        writing = next((clip.writing for clip in told if clip.writing), None)
        objects = tuple(clip.object for clip in told if not clip.writing)
        places = [thing.place for thing in objects if thing.place]
        if len(set(places)) < len(places) or len({(t.shape, t.colour) for t in objects}) < len(objects):
            return [], None
        return clips, Scene(objects, writing=writing)

    def _question(self, voice: str, family: str, scene: Scene, rng: random.Random, asking: _Ask) -> _Turn | None:
        """A clip that asks what `asking` asks about the scene, in whatever words, and the clips of the answer.

        Whether something is claimed stays as it was drawn at first: of claims a voice has the fewest clips.
        """
        claims: bool | None = None
        for _ in range(ATTEMPTS):
            turn = asking(scene, family, rng)
            if turn is None:
                continue
            claims = bool(turn.query.claim) if claims is None else claims
            if bool(turn.query.claim) != claims:
                continue
            clips, reply = self.questions.get((voice, _content(turn.query))), self._reply(turn)
            if clips and reply:
                return [rng.choice(clips)], reply
        return None

    def _reply(self, turn: Turn | None) -> Reply | None:
        if turn is None:
            return None
        clips = [self.answers.get(text) for text in grammar.spoken_parts(turn)]
        return None if None in clips else Reply(turn.answer, [clip for clip in clips if clip is not None])

    def other(self, index: int, rng: random.Random) -> int:
        """Another of the assistant's clips: one that begins like clip `index`, if there is one."""
        alike = self.similar[_opening(self.codes.clips.clips[index])]
        while (other := rng.choice(alike if len(alike) > 1 else self.said)) == index:
            pass
        return other


def ask(scene: Scene, family: str, rng: random.Random) -> Turn | None:
    """As `grammar.ask`, but None in half of the cases in which something is asked for that is not there."""
    turn = grammar.ask(scene, family, rng)
    return None if turn is None or (turn.facts["missing"] and rng.random() < 0.5) else turn


def _content(query: Query) -> Query:
    """What a query asks, however it is put: the answer does not depend on more."""
    return replace(query, phrasing=0, choices=())


def _opening(clip: Clip) -> str:
    return clip.kind if clip.kind == "repeated_claim" else " ".join([clip.kind, *clip.text.split()[:2]])


def choose_family(scene: Scene, rng: random.Random, families: tuple[str, ...]) -> str:
    """One of the families, by lot; what is written is asked for more often than what is not."""
    if scene.writing and "read" in families and rng.random() < READ_SHARE:
        return "read"
    family = rng.choice(families)
    return family if scene.writing or family != "read" or rng.random() < READ_NOTHING_SHARE else rng.choice(families)
