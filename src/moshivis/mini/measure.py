"""Measures a model of the miniature world on freshly drawn scenes and freshly spoken questions.

    python -m moshivis.mini measure

Each scene is asked one question, in writing, by a voice that training has heard, and by one that it has not. Answers
are judged by the facts they state in the text stream; the speech that comes with them is transcribed by a recogniser
that was trained on recordings of the assistant's original voice, and compared with the text stream.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.checkpoints.load import Checkpoint
from moshivis.evaluation.answers import Answer, ask_spoken, ask_written, image_rows
from moshivis.evaluation.recogniser import Recogniser, word_error_rate
from moshivis.inference.sampling import Sampling
from moshivis.mini import grammar, voices
from moshivis.mini.drawing import draw_scene
from moshivis.mini.judge import judge
from moshivis.mini.questions import Turn
from moshivis.mini.scenes import Scene, sample_scene
from moshivis.vision.image import to_pixels

FAMILIES = tuple(family for family in grammar.FAMILIES if family != "describe")
ROWS = 50  # conversations at once
FRAME_MS = 80
SAMPLING = Sampling(text_temperature=0.0, audio_temperature=0.6, audio_top_k=50)


@dataclass(frozen=True)
class Case:
    scene: Scene
    turn: Turn


def fresh_cases(count: int, seed: int, families: Sequence[str] = FAMILIES) -> list[Case]:
    """`count` scenes with one question each, the families in turn."""
    rng = random.Random(f"measure {seed}")
    cases: list[Case] = []
    while len(cases) < count:
        scene = sample_scene(rng)
        turn = grammar.ask(scene, families[len(cases) % len(families)], rng)
        if turn is not None:
            cases.append(Case(scene, turn))
    return cases


def measure(
    checkpoint: Checkpoint,
    listener: Recogniser | None,
    *,
    count: int = 300,
    seed: int = 1,
    sampling: Sampling = SAMPLING,
) -> dict:
    """All figures as one plain dict. Raises InputError if a speech program is missing."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    assert tokenizer is not None
    cases = fresh_cases(count, seed)
    rng = random.Random(f"drawing {seed}")
    config = model.config.vision
    pictures = [to_pixels(draw_scene(case.scene, rng), config) for case in cases]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(cases))]

    def run(ask: Callable[..., list[Answer]], questions: list) -> list[Answer]:
        answers: list[Answer] = []
        for start in track(range(0, len(cases), ROWS), "asking"):
            rows = slice(start, start + ROWS)
            image: ImageKV = image_rows(model, torch.stack(pictures[rows]))
            chosen = Sampling(**{**vars(sampling), "generators": generators[rows]})
            answers += ask(model, tokenizer, image, questions[rows], chosen)
        return answers

    result: dict = {"scenes": count, "seed": seed}
    written = run(ask_written, [case.turn.question for case in cases])
    result["text"] = _accuracy(cases, written)
    for name, speakers in (("spoken", voices.USER_VOICES), ("spoken_unheard_voice", (voices.HELD_OUT_VOICE,))):
        answers = run(ask_spoken, _speak(cases, speakers, rng))
        result[name] = _accuracy(cases, answers) | _manners(answers)
        if listener is not None:
            result[name]["speech_word_error"] = _speech_error(listener, answers)
    return result


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
        "families": {family: sum(hits) / len(hits) for family, hits in families.items()},
        "wrong": examples[:12],
    }


def _manners(answers: list[Answer]) -> dict:
    """When answers start, and the share of those that never start or do not end."""
    reactions = [answer.reaction_frames * FRAME_MS for answer in answers if answer.reaction_frames is not None]
    bad = sum(answer.reaction_frames is None or not answer.ended for answer in answers)
    return {"reaction_ms_median": median(reactions) if reactions else None, "silent_or_runaway": bad / len(answers)}


def _speech_error(listener: Recogniser, answers: list[Answer]) -> float:
    """Word error of the produced speech against its own text stream."""
    spoken = [answer for answer in answers if answer.audio is not None and answer.text]
    references = [grammar.normalise(answer.text).split() for answer in spoken]
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
    table.add_row("all", *(f"{result[name]['accuracy']:.1%}" for name in names))
    for key in ("speech_word_error", "reaction_ms_median", "silent_or_runaway"):
        values = [result[name].get(key) for name in names]
        table.add_row(key, *("" if value is None else f"{value:.3g}" for value in values))
    (console or Console()).print(table)
    print(json.dumps(result))
