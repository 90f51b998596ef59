"""Fixtures of the miniature's data: its tokenizer, and a few clips that are really spoken and encoded."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from moshivis.codec import Mimi
from moshivis.mini import grammar
from moshivis.mini.clips import ClipStore, PlannedClip, PlannedShard, write_shard
from moshivis.mini.codes import ClipCodes, encode_clips
from moshivis.mini.questions import Query
from moshivis.mini.recipe import CODEC
from moshivis.mini.scenes import Scene
from moshivis.mini.stage import Stage
from moshivis.mini.tokenizer_training import train_tokenizer
from moshivis.mini.voices import ASSISTANT_VOICE, USER_VOICES
from moshivis.speech_lm.tokenizer import TextTokenizer

FAMILIES = ("knowledge", "small_talk")  # their answers do not depend on a scene: a few clips are enough
needs_speech = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("espeak-ng", "festival")),
    reason="speech programs not installed: espeak-ng, festival",
)


@pytest.fixture(scope="session")
def world_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(Stage(tmp_path_factory.mktemp("tokenizer")))


def small_plan() -> list[PlannedShard]:
    """Two shards of a dozen clips: some questions of FAMILIES, and what the assistant answers."""
    rng = random.Random(0)
    queries = [grammar.sample_query(family, rng) for family in FAMILIES for _ in range(3)]
    queries.append(Query(family="yes_no", shape="star", claim="green"))
    turns = [grammar.answer(query, Scene(())) for query in queries]
    asked = [PlannedClip(text=q.text, kind="question", meta={"query": q.to_dict()}) for q in queries]
    said = [PlannedClip(text=grammar.GREETINGS[0], kind="greeting")]
    repeated = set(grammar.repeated_claims())
    answers = {part for turn in turns if turn for part in grammar.spoken_parts(turn)}
    said += [
        PlannedClip(text=text, kind="repeated_claim" if text in repeated else "answer") for text in sorted(answers)
    ]
    return [
        PlannedShard(index=index, voice=voice, seed=index, clips=tuple(clips))
        for index, (voice, clips) in enumerate(((USER_VOICES[0], asked), (ASSISTANT_VOICE, said)))
    ]


@pytest.fixture(scope="session")
def spoken_codes(tmp_path_factory: pytest.TempPathFactory) -> ClipCodes:
    """The clips of the small plan, spoken and encoded for real by a codec with random weights."""
    folder = tmp_path_factory.mktemp("clips")
    for shard in small_plan():
        write_shard(shard, folder)
    torch.manual_seed(0)
    codec = Mimi(CODEC).eval()
    for name, buffer in codec.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_()
    return encode_clips(codec, ClipStore(folder), folder / "codes", workers=1)
