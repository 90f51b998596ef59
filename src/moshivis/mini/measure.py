"""Measures a model of the miniature world on freshly drawn scenes and freshly spoken questions.

    python -m moshivis.mini measure

Each scene is asked one question, in writing, by a voice that training has heard, and by one that it has not. Answers
are judged by the facts they state in the text stream; the speech that comes with them is transcribed by a recogniser
that was trained on recordings of the assistant's original voice, and compared with the text stream. Descriptions are
judged by CIDEr-D against five of the grammar's own, and related to what a sixth of these scores. Some descriptions are
interrupted by another question. The same scenes are shown once more as librsvg paints them, and as photos of a print.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.checkpoints.load import Checkpoint
from moshivis.errors import InputError
from moshivis.evaluation.answers import Answer, ask_spoken, ask_written, image_rows
from moshivis.evaluation.cider import cider
from moshivis.evaluation.recogniser import Recogniser, word_error_rate
from moshivis.inference.conversation import sampling_from
from moshivis.inference.sampling import Sampling
from moshivis.mini import grammar, voices
from moshivis.mini.drawing import draw_scene
from moshivis.mini.foreign import painter, photograph, render_svg
from moshivis.mini.judge import judge
from moshivis.mini.questions import SCENELESS_FAMILIES, Turn
from moshivis.mini.recipe import SAMPLING
from moshivis.mini.scenes import Scene, sample_scene, sample_written_scene
from moshivis.vision.image import to_pixels

FAMILIES = tuple(family for family in grammar.FAMILIES if family not in ("describe", "read"))
ROWS = 50  # conversations at once
FRAME_MS = 80
PROMPT_MS = (200, 800)  # a reaction between these is neither an interruption nor a pause
REFERENCES = 5  # descriptions that a description is compared with
FALLS_IN_S = 1.8  # after a question: by then a description is under way
STOP_FRAMES = 10  # within so many frames an interrupted assistant is silent


@dataclass(frozen=True)
class Case:
    scene: Scene
    turn: Turn


def fresh_cases(count: int, seed: int, families: Sequence[str] = FAMILIES) -> list[Case]:
    """`count` scenes with one question each, the families in turn."""
    rng = random.Random(f"measure {seed}")
    cases: list[Case] = []
    while len(cases) < count:
        family = families[len(cases) % len(families)]
        scene = sample_written_scene(rng) if family == "read" else sample_scene(rng)
        turn = grammar.ask(scene, family, rng)
        if turn is not None:
            cases.append(Case(scene, turn))
    return cases


def measure(
    checkpoint: Checkpoint,
    listener: Recogniser | None,
    *,
    count: int = 300,
    seed: int = 1,
    sampling: Sampling | None = None,
) -> dict:
    """All figures as one plain dict; besides, a third as many scenes are described, and half as many read.

    `accuracy` is of all families in turn, `visual` of those that ask about the picture, which VQAv2 is like.

    `sampling` None is the model's own way, if it has one. Raises InputError, at once, if a speech program or
    rsvg-convert is missing, and for a model that lacks a tokenizer or cannot see.
    """
    model = checkpoint.model
    if checkpoint.tokenizer is None or model.vision is None or model.adapters is None:
        raise InputError(f"the model {model.config.name} has no tokenizer, or cannot see: there is nothing to measure")
    if sampling is None:
        own = checkpoint.sampling
        sampling = SAMPLING if own is None else sampling_from(own, Path("sampling.json"))
    for voice in (*voices.USER_VOICES, voices.HELD_OUT_VOICE):
        voices.require(voice.engine)
    painter()
    asker = _Asker(checkpoint, sampling, seed)
    cases = fresh_cases(count, seed)
    described = fresh_cases(max(2, count // 3), seed + 1, ("describe",))
    written_on = fresh_cases(max(2, count // 2), seed + 2, ("read",))
    rng = random.Random(f"drawing {seed}")
    drawn = {id(case): draw_scene(case.scene, rng, held_out=True) for case in (*cases, *described, *written_on)}

    def pictures(asked: list[Case]) -> list[Image.Image]:
        return [drawn[id(case)] for case in asked]

    result: dict = {"scenes": count, "seed": seed}
    written = asker.written(cases, pictures(cases))
    result["text"] = _accuracy(cases, written)
    result["text"]["describe"] = _descriptions(described, asker.written(described, pictures(described)), seed)
    result["text"]["read"] = _accuracy(written_on, asker.written(written_on, pictures(written_on)))["accuracy"]
    for name, speakers in (("spoken", voices.USER_VOICES), ("spoken_unheard_voice", (voices.HELD_OUT_VOICE,))):
        answers = asker.spoken(cases, pictures(cases), _speak(cases, speakers, rng))
        told = asker.spoken(described, pictures(described), _speak(described, speakers, rng))
        read = asker.spoken(written_on, pictures(written_on), _speak(written_on, speakers, rng))
        every = [*answers, *told, *read]
        result[name] = _accuracy(cases, answers) | _manners(every)
        if listener is not None:
            result[name]["speech_word_error"] = _speech_error(listener, every)
        result[name]["describe"] = _descriptions(described, told, seed)
        result[name]["read"] = _accuracy(written_on, read)["accuracy"]
        result[name]["interrupted"] = asker.interrupted(described, cases, pictures(cases), speakers, rng)
    visual = [case for case in cases if case.turn.family not in SCENELESS_FAMILIES]
    by_hand = {"as_drawn": lambda case: drawn[id(case)], "svg": lambda case: render_svg(case.scene)}
    by_hand["photo"] = lambda case: photograph(drawn[id(case)], rng).picture
    result["pictures"] = {
        name: _accuracy(visual, asker.written(visual, [show(case) for case in visual]))
        for name, show in by_hand.items()
    }
    return result


class _Asker:
    """Asks many cases, some at once."""

    def __init__(self, checkpoint: Checkpoint, sampling: Sampling, seed: int):
        assert checkpoint.tokenizer is not None
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.sampling, self.seed = sampling, seed

    def written(self, cases: list[Case], pictures: list[Image.Image]) -> list[Answer]:
        return self._ask(ask_written, pictures, [case.turn.question for case in cases])

    def spoken(self, cases: list[Case], pictures: list[Image.Image], waves: list[np.ndarray]) -> list[Answer]:
        return self._ask(ask_spoken, pictures, waves)

    def interrupted(
        self,
        describing: list[Case],
        cases: list[Case],
        pictures: list[Image.Image],
        speakers: Sequence[voices.Voice],
        rng: random.Random,
    ) -> dict:
        """As many `cases` as there are `describing`, asked while the assistant describes a picture of several things.

        Of those that it was interrupted in: the share that it fell silent in, by its words, and that it then answered
        rightly. A question that is over before it need be silent does not count.
        """
        several = [pair for pair in zip(cases, pictures, strict=True) if len(pair[0].scene.objects) > 1]
        several = several[: len(describing)]
        cases, pictures = [case for case, _ in several], [picture for _, picture in several]
        describing = describing[: len(cases)]
        rate = self.model.config.codec.sample_rate
        pause = np.zeros(int(FALLS_IN_S * rate), np.float32)
        first, second = _speak(describing, speakers, rng), _speak(cases, speakers, rng)
        waves = [np.concatenate([a, pause, b]) for a, b in zip(first, second, strict=True)]
        silent, right = [], []
        for case, question, answer in zip(cases, second, self.spoken(cases, pictures, waves), strict=True):
            begin = -(len(question) // self.model.config.codec.frame_size)  # frames before the question's end
            was_talking = any(begin - STOP_FRAMES <= frame < begin for frame, _ in answer.tokens)
            if was_talking and -begin >= STOP_FRAMES + 5:
                silent.append(not any(begin + STOP_FRAMES <= frame < 0 for frame, _ in answer.tokens))
                late = [token for frame, token in answer.tokens if frame >= 0]
                right.append(judge(case.turn, self.tokenizer.decode(late)))
        if not silent:
            return {"cases": 0, "fell_silent": None, "right": None}
        return {"cases": len(silent), "fell_silent": sum(silent) / len(silent), "right": sum(right) / len(right)}

    def _ask(self, ask: Callable[..., list[Answer]], pictures: list[Image.Image], questions: list) -> list[Answer]:
        answers: list[Answer] = []
        for start in track(range(0, len(questions), ROWS), "asking"):
            rows = slice(start, start + ROWS)
            pixels = torch.stack([to_pixels(picture, self.model.config.vision) for picture in pictures[rows]])
            image: ImageKV = image_rows(self.model, pixels)
            generators = [torch.Generator().manual_seed(self.seed + start + i) for i in range(len(pixels))]
            chosen = Sampling(**{**vars(self.sampling), "generators": generators})
            answers += ask(self.model, self.tokenizer, image, questions[rows], chosen)
        return answers


def _speak(cases: list[Case], speakers: Sequence[voices.Voice], rng: random.Random) -> list[np.ndarray]:
    """Every question spoken by one of `speakers`, in turn."""
    waves: list[np.ndarray | None] = [None] * len(cases)
    for number, speaker in enumerate(speakers):
        indices = list(range(number, len(cases), len(speakers)))
        texts = [cases[i].turn.question for i in indices]
        for i, spoken in zip(indices, voices.synthesise(speaker, texts, rng), strict=True):
            waves[i] = spoken.audio
    return [wave for wave in waves if wave is not None]


def _accuracy(cases: list[Case], answers: list[Answer]) -> dict:
    right = [judge(case.turn, answer.text) for case, answer in zip(cases, answers, strict=True)]
    visual = [hit for case, hit in zip(cases, right, strict=True) if case.turn.family not in SCENELESS_FAMILIES]
    families = defaultdict(list)
    for case, hit in zip(cases, right, strict=True):
        families[case.turn.family].append(hit)
    examples = [
        {"question": c.turn.question, "expected": c.turn.answer, "answer": a.text}
        for c, a, hit in zip(cases, answers, right, strict=True)
        if not hit
    ]
    return {
        "accuracy": sum(right) / len(right),
        "visual": sum(visual) / len(visual),
        "families": {family: sum(hits) / len(hits) for family, hits in families.items()},
        "wrong": examples[:12],
    }


def _descriptions(cases: list[Case], answers: list[Answer], seed: int) -> dict:
    """CIDEr-D against the grammar's descriptions, absolute and relative to one more of these; and truth."""
    rng = random.Random(f"descriptions {seed}")
    told = [[_words(grammar.paraphrase(case.scene, rng)) for _ in range(REFERENCES + 1)] for case in cases]
    references = [texts[1:] for texts in told]
    score = cider([_words(answer.text) for answer in answers], references)
    right = [judge(case.turn, answer.text) for case, answer in zip(cases, answers, strict=True)]
    relative = score / cider([texts[0] for texts in told], references)
    return {"cider": score, "relative_cider": relative, "right": sum(right) / len(right)}


def _words(text: str) -> list[str]:
    return grammar.normalise(text).split()


def _manners(answers: list[Answer]) -> dict:
    """When answers start, the share of those that never start or do not end, and how many conversations it opened."""
    # A frame is there when its time is over.
    reactions = [(answer.reaction_frames + 1) * FRAME_MS for answer in answers if answer.reaction_frames is not None]
    bad = sum(answer.reaction_frames is None or not answer.ended for answer in answers)
    prompt = sum(PROMPT_MS[0] <= reaction <= PROMPT_MS[1] for reaction in reactions)
    return {
        "reaction_ms_median": median(reactions) if reactions else None,
        "prompt_reactions": prompt / len(answers),
        "silent_or_runaway": bad / len(answers),
        "greeted": sum(answer.greeted for answer in answers) / len(answers),
    }


def _speech_error(listener: Recogniser, answers: list[Answer]) -> float:
    """Word error of the produced speech against its own text stream, of answers that began after the question."""
    spoken = [
        answer
        for answer in answers
        if answer.audio is not None and _words(answer.text) and (answer.reaction_frames or 0) >= 0
    ]
    references = [_words(answer.text) for answer in spoken]
    heard = [listener.transcribe(torch.from_numpy(answer.audio)) for answer in spoken]
    return word_error_rate(references, heard)


def report(result: dict, console: Console | None = None) -> None:
    """A table, then one line of JSON."""
    table = Table(title=f"{result['scenes']} fresh scenes, one question each")
    names = [name for name in ("text", "spoken", "spoken_unheard_voice") if name in result]
    for heading in ("right", *names):
        table.add_column(heading)
    for family in result["text"]["families"]:
        table.add_row(family, *(f"{result[name]['families'][family]:.0%}" for name in names))
    table.add_row("about the picture", *(f"{result[name]['visual']:.1%}" for name in names))
    table.add_row("all", *(f"{result[name]['accuracy']:.1%}" for name in names))
    table.add_row("read", *(f"{result[name]['read']:.0%}" for name in names))
    for key in ("relative_cider", "right"):
        table.add_row(f"describe: {key}", *(f"{result[name]['describe'][key]:.2f}" for name in names))
    for key in ("speech_word_error", "reaction_ms_median", "prompt_reactions", "silent_or_runaway", "greeted"):
        values = [result[name].get(key) for name in names]
        table.add_row(key, *("" if value is None else f"{value:.3g}" for value in values))
    for key, form in (("cases", "d"), ("fell_silent", ".0%"), ("right", ".0%")):
        values = [result[name].get("interrupted", {}).get(key) for name in names]
        table.add_row(f"interrupted: {key}", *("" if value is None else format(value, form) for value in values))
    for name, measured in result["pictures"].items():
        table.add_row(f"questions about a picture, {name}", f"{measured['accuracy']:.1%}")
    (console or Console()).print(table)
    print(json.dumps(result))
