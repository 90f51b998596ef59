"""Builds the miniature from nothing: a chain of resumable stages, each a folder of the output.

clips -> recogniser -> codec -+> codes -> language -+
             tokenizer -------|------------^        |
                              +> voice -------------+
             pictures -> vision --------------------+> adapters -> model
clips -> listener ---------------------------------------------------^
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moshivis.checkpoints.adapters import load_adapters
from moshivis.checkpoints.folder import read_json, save_folder
from moshivis.checkpoints.load import load_model
from moshivis.codec import Mimi
from moshivis.config import ModelConfig
from moshivis.errors import InputError
from moshivis.evaluation.recogniser import WIDTH as TEACHER_WIDTH
from moshivis.evaluation.recogniser import Recogniser
from moshivis.files import atomic_write
from moshivis.mini.adapter_training import STEPS, train_adapters
from moshivis.mini.card import CARD
from moshivis.mini.clips import ClipStore, build_clips, listener_plan, plan
from moshivis.mini.codec_training import train_codec, train_voice
from moshivis.mini.codes import encode_clips
from moshivis.mini.language_training import Schedule, Sources, train_language
from moshivis.mini.listener import FILE as LISTENER
from moshivis.mini.listener import save_listener
from moshivis.mini.pictures import Pictures, draw_pictures
from moshivis.mini.recipe import CODEBOOKS, CODEC, SAMPLING, VISION, mini
from moshivis.mini.recogniser_training import train_recogniser
from moshivis.mini.stage import Stage
from moshivis.mini.tokenizer_training import train_tokenizer
from moshivis.mini.vision_training import train_vision
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.vision import VisionEncoder

BEGUN = "begun.json"
SAMPLED = ("text_temperature", "audio_temperature", "audio_top_k")  # what the saved folder says of SAMPLING
TRAINERS = (1, 2, 4)  # processes that share the rows of every training evenly
RECOGNISER_STEPS, LISTENER_STEPS, LISTENER_WIDTH = 1500, 5000, 160


class Build:
    """The stages of one output folder. A stage that needs an earlier one runs it first, or loads its result.

    Whoever removes a result, to make it anew, removes all that is made of it, too: nothing looks at what changed.
    Raises InputError for a folder that was begun with something else.
    """

    num_pictures = 40000
    adapter_steps = STEPS
    adapter_changes: tuple[str, ...] = ()  # of the recipe `mini`
    card = CARD

    def __init__(self, out: Path, device: torch.device, workers: int = 2, seed: int = 0):
        self.out, self.device, self.workers, self.seed = out, device, workers, seed
        self._claim()
        fitting = max(count for count in TRAINERS if count <= workers)
        self.trainers = fitting if device.type == "cpu" else 1  # one process drives a GPU, one a CPU core

    def _claim(self) -> None:
        """Write down what the folder is begun with, or see that it was the same."""
        path, now = self.out / BEGUN, self.begins_with()
        known = path.exists()
        if known:
            before = read_json(path)
        else:  # an older version's has no such file
            before = {"verb": "build", "seed": 0} if (self.out / "clips").exists() else now
        if before != now:
            said = [f"{name} {before.get(name)!r} became {x!r}" for name, x in now.items() if before.get(name) != x]
            raise InputError(f"{self.out} was begun with something else ({', '.join(said)}); choose another --out")
        if not known:
            self.out.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(now) + "\n")

    def begins_with(self) -> dict[str, Any]:
        """What the results depend on."""
        return {"verb": "build", "seed": self.seed}

    def sampling(self) -> Mapping[str, Any]:
        return {name: getattr(SAMPLING, name) for name in SAMPLED}

    def stage(self, name: str) -> Stage:
        return Stage(self.out / name, self.device)

    def clips(self) -> ClipStore:
        folder = self.out / "clips"
        stage = self.stage("clips")
        if not stage.done:
            begun = time.monotonic()
            build_clips(plan(self.seed), folder, self.workers)
            store = ClipStore(folder)
            hours = sum(clip.samples for clip in store.clips) / 24000 / 3600
            stage.finish({"clips": len(store), "hours": hours, "seconds": time.monotonic() - begun})
        return ClipStore(folder)

    def tokenizer(self) -> TextTokenizer:
        return train_tokenizer(self.stage("tokenizer"))

    def recogniser(self) -> Recogniser:
        return train_recogniser(
            self.stage("recogniser"), [self.clips()], ("assistant", "user"), TEACHER_WIDTH, RECOGNISER_STEPS
        )

    def listener(self) -> Recogniser | None:
        stage, folder = self.stage("listener"), self.out / "clips" / "listener"
        if not stage.done:
            build_clips(listener_plan(self.seed), folder, self.workers)
        stores = [self.clips(), ClipStore(folder)]
        return train_recogniser(stage, stores, ("assistant",), LISTENER_WIDTH, LISTENER_STEPS)

    def codec(self) -> Mimi:
        return train_codec(self.stage("codec"), CODEC, self.clips(), self.recogniser)

    def voice(self) -> Mimi:
        return train_voice(self.stage("voice"), self.codec(), self.clips(), self.recogniser, CODEBOOKS)

    def codes(self) -> Path:
        folder = self.out / "codes"
        stage = self.stage("codes")
        if not stage.done:
            encode_clips(self.codec(), self.clips(), folder, self.workers)
            stage.finish({"clips": len(self.clips())})
        return folder

    def pictures(self) -> Pictures:
        stage, size = self.stage("pictures"), (VISION.image_size, VISION.patch_size)
        return draw_pictures(stage, self.num_pictures, *size, self.workers, self.seed)

    def vision(self) -> VisionEncoder:
        return train_vision(self.stage("vision"), VISION, self.pictures())

    def sources(self) -> Sources:
        self.tokenizer()
        return Sources(self.out / "clips", self.codes(), self.out / "tokenizer" / "tokenizer.model")

    def config(self) -> ModelConfig:
        return mini(len(self.tokenizer()))

    def language(self) -> Path:
        schedule = Schedule(seed=self.seed)
        train_language(self.stage("language"), self.config(), self.sources(), self.trainers, schedule)
        return self.out / "language" / "language.safetensors"

    def base(self) -> Path:
        """All that is frozen when the adapters learn, as a checkpoint folder in half precision."""
        folder = self.out / "base"
        if not folder.exists():
            model = MoshiVis(self.config())
            model.codec.load_state_dict(self.voice().state_dict())
            model.speech_lm.load_state_dict(load_file(self.language()))
            assert model.vision is not None
            model.vision.encoder.load_state_dict(self.vision().state_dict())
            save_folder(folder, model, self.tokenizer().model, self.card, dtype=torch.float16)
        return folder

    def adapters(self) -> Path:
        base, sources = self.base(), self.sources()
        self.pictures()
        stage, pictures = self.stage("adapters"), self.out / "pictures"
        steps, changes = self.adapter_steps, self.adapter_changes
        return train_adapters(stage, base, sources, pictures, self.trainers, steps, changes, self.seed)

    def model(self) -> Path:
        """The finished model as a checkpoint folder in half precision, with the listener beside its weights."""
        folder = self.out / "model"
        if not folder.exists():
            base, adapters = self.base(), self.adapters()
            model = load_model(base).model
            load_adapters(adapters, model)
            tokenizer, sampling = self.tokenizer().model, self.sampling()
            save_folder(folder, model, tokenizer, self.card, sampling=sampling, dtype=torch.float16)
        if not (folder / LISTENER).exists() and (listener := self.listener()) is not None:
            save_listener(listener, folder)
        return folder
