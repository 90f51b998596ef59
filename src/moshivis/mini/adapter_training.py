"""Stage `adapters`: the frozen speech LM learns to see, in the paper's one stage.

It is a run of `moshivis.training` like anybody's, by the recipe `mini`: a quarter of the samples spoken, the rest
written, all generated. Some talk about the picture stands between pieces of other talk (`p_concat`).
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moshivis.data.concat import Concatenated
from moshivis.data.cut import cut, cut_points
from moshivis.data.sample import Dataset, Kind, Sample, Speaker
from moshivis.mini import parallel
from moshivis.mini.dialogues import HARD, SCENE_FAMILIES, Spoken
from moshivis.mini.grammar import FAMILIES
from moshivis.mini.language_training import Sources
from moshivis.mini.pictures import Pictures, open_pictures
from moshivis.mini.questions import SCENELESS_FAMILIES
from moshivis.mini.recipe import FRAMES, TOKENS
from moshivis.mini.scenes import Scene
from moshivis.mini.stage import Stage
from moshivis.mini.timeline import Sample as MiniSample
from moshivis.mini.written_dialogues import Written
from moshivis.speech_lm.tokenizer import PADDING
from moshivis.training.checkpoint import ADAPTERS
from moshivis.training.recipe_file import read_recipe
from moshivis.training.run import train

STEPS, P_CONCAT = 2000, 0.2
HELD_OUT_PICTURES = 500
WEIGHT_BY_OBJECTS = (0.2, 0.5, 1.0, 1.5, 2.2)  # of a picture: the more there is on it, the more must be looked for
ASKED = (*SCENE_FAMILIES, *SCENE_FAMILIES, *FAMILIES)  # families, as often as they stand here
ASKED_BY_KIND: dict[Kind, tuple[str, ...]] = {"speechless": ASKED, "speech": (*ASKED, *HARD, *["describe"] * 3)}


Source = Spoken | Written


class General:
    """A `Dataset`: generated conversations without picture, of one kind."""

    def __init__(self, kind: Kind, source: Source, seed: int = 0):
        self.name, self.kind, self.source, self.seed = f"mini general {kind}", kind, source, seed

    def __getitem__(self, position: int) -> Sample:
        rng = random.Random(f"{self.seed} {self.name} {position}")
        return as_training(self.kind, self.source.with_picture(Scene(()), rng, SCENELESS_FAMILIES), None)

    def picture(self, key: str) -> bytes:
        raise KeyError(key)


class AboutPictures:
    """A `Dataset`: generated conversations of one kind about `rows` of the pictures.

    Those of many things are talked about more often. `short` of them, a share, end where they may be cut, before two
    thirds of their length, if there is such a place.
    """

    def __init__(self, kind: Kind, source: Source, pictures: Pictures, rows: range, short: float = 0.0, seed: int = 0):
        self.name, self.kind, self.seed = f"mini {kind} about {rows}", kind, seed
        self.source, self.pictures, self.rows, self.short = source, pictures, rows, short
        self._weights = list(accumulate(WEIGHT_BY_OBJECTS[len(pictures.scenes[row].objects)] for row in rows))

    def __getitem__(self, position: int) -> Sample:
        rng = random.Random(f"{self.seed} {self.name} {position}")
        index = rng.choices(self.rows, cum_weights=self._weights)[0]
        made = self.source.with_picture(self.pictures.scenes[index], rng, ASKED_BY_KIND[self.kind])
        sample = as_training(self.kind, made, str(index))
        if rng.random() < self.short:
            points = cut_points(sample)
            early = points[(points > 0) & (points <= rng.uniform(1 / 3, 2 / 3) * len(sample))]
            sample = cut(sample, 0, int(early.max(initial=0)) or len(sample))
        return sample

    def picture(self, key: str) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.pictures.pixels[int(key)].transpose(1, 2, 0)).save(file, "PNG")
        return file.getvalue()


def as_training(kind: Kind, made: MiniSample, image: str | None) -> Sample:
    """A sample of the miniature as the trainer takes it."""
    if kind == "speech":
        return Sample(
            text=made.text.astype(np.int32),
            speaker=np.where(made.text == PADDING, Speaker.NOBODY, Speaker.ASSISTANT).astype(np.uint8),
            audio=np.concatenate([made.own, made.user]).astype(np.int16),
            image=image,
            text_graded=made.weight > 0,
            audio_graded=made.audible,
        )
    kept = made.weight > 0  # what follows the last answer is no part of it
    speaker = np.where(made.weight[kept] >= 1, Speaker.ASSISTANT, Speaker.USER)
    return Sample(text=made.text[kept].astype(np.int32), speaker=speaker.astype(np.uint8), image=image)


def train_adapters(
    stage: Stage,
    base: Path,
    sources: Sources,
    pictures: Path,
    workers: int,
    steps: int = STEPS,
    changes: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Train projection and adapters on the frozen model in the folder `base`; returns the file with them.

    `pictures` is the folder of the stage that drew them; `changes` are words that change the recipe `mini`; `seed`
    draws the conversations.
    """
    path = stage.folder / ADAPTERS
    if not stage.done:
        parallel.run(workers, _worker, stage.folder, stage.device, base, sources, pictures, steps, changes, seed)
        stage.finish({"file": path.name})
    return path


def _worker(
    rank: int,
    workers: int,
    folder: Path,
    device: torch.device,
    base: Path,
    sources: Sources,
    pictures: Path,
    steps: int,
    changes: Sequence[str],
    seed: int,
) -> None:
    words = [f"out={folder}", f"base={base}", f"device={device}", f"steps={steps}"]
    words += [f"features.folder={folder / 'features'}"]
    words += [f"data.max_frames={FRAMES}", f"data.max_tokens={TOKENS}", "data.workers=0"]
    words += ["optimiser.matrices=muon", "validation.every=250"]
    words += [f"compile={str(parallel.worth_compiling(steps, device)).lower()}", *changes]
    spoken, written = sources.open()
    drawn = open_pictures(pictures)
    count = len(drawn.scenes)
    seen = range(count - min(HELD_OUT_PICTURES, count // 4))
    unseen = range(len(seen), count)
    train(
        read_recipe("mini", words),
        (
            _wrapped("speech", spoken, drawn, seen, FRAMES, seed),
            _wrapped("speechless", written, drawn, seen, TOKENS, seed),
        ),
        (AboutPictures("speech", spoken, drawn, unseen), AboutPictures("speechless", written, drawn, unseen)),
    )


def _wrapped(kind: Kind, source: Source, pictures: Pictures, rows: range, longest: int, seed: int = 0) -> Dataset:
    visual = AboutPictures(kind, source, pictures, rows, P_CONCAT, seed)
    return Concatenated(visual, General(kind, source, seed), probability=1.0, longest=longest)  # those that leave room
