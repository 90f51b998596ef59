"""Trains a finished miniature further, in another sitting: newly spoken clips, newly drawn pictures, its own weights.

What the speech LM has learnt then is averaged with what it was (after Wortsman et al., 2022, "Robust fine-tuning of
zero-shot models"): where it was tried, the mean understood more than either. Adapters go on learning on the mean.

clips -> codes -> language -> base -+
                       pictures ----+> adapters -> model
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moshivis.checkpoints.fingerprint import fingerprint
from moshivis.checkpoints.folder import TOKENIZER, save_folder
from moshivis.checkpoints.load import Checkpoint, load_config, load_model
from moshivis.codec import Mimi
from moshivis.errors import InputError
from moshivis.evaluation.recogniser import Recogniser
from moshivis.mini.build import Build
from moshivis.mini.card import CARD
from moshivis.mini.language_training import Schedule, Sources, train_language
from moshivis.mini.listener import FILE as LISTENER
from moshivis.mini.listener import load_listener
from moshivis.mini.recipe import CODEC, mini
from moshivis.speech_lm.tokenizer import TextTokenizer

NEW_SHARE = 0.5  # of the newly trained speech LM in the mean


class Sitting(Build):
    """The stages of `Build` that go on from the finished model in the folder `start`.

    `seed` draws clips, pictures and conversations: another sitting takes another. Raises InputError, beside as `Build`
    does, for a model that is no miniature, or one of other sizes than the recipe has now, and CheckpointError if there
    is none.
    """

    num_pictures = 14000
    schedule = Schedule(steps=2400, warmup=60, matrix_rate=1e-3, rate=8e-4, written_rows=16, ears=80)
    adapter_steps = 1400
    adapter_changes = ("adapters.fresh=false", "adapters.out_scale=1", "optimiser.rate=1.5e-3", "loss.speech=5")
    card = CARD + "\nIt was trained further by `python -m moshivis.mini improve`.\n"

    def __init__(self, start: Path, out: Path, device: torch.device, workers: int = 2, seed: int = 1):
        self.start, config = start, load_config(start)
        alike = mini(config.speech_lm.text_card).speech_lm == config.speech_lm and config.codec == CODEC
        if not alike or not (start / TOKENIZER).exists():
            raise InputError(f"{start} holds no miniature as `python -m moshivis.mini build` makes it now")
        super().__init__(out, device, workers, seed)

    def begins_with(self) -> dict[str, Any]:
        model = self._started.model
        return {
            "verb": "improve",
            "seed": self.seed,
            "model": fingerprint(model.config, dict(model.named_parameters())),
        }

    def sampling(self) -> Mapping[str, Any]:
        return self._started.sampling or super().sampling()

    @functools.cached_property
    def _started(self) -> Checkpoint:
        return load_model(self.start)

    def tokenizer(self) -> TextTokenizer:
        assert self._started.tokenizer is not None
        return self._started.tokenizer

    def codec(self) -> Mimi:
        return self._started.model.codec

    def listener(self) -> Recogniser | None:
        return load_listener(self.start) if (self.start / LISTENER).exists() else None

    def sources(self) -> Sources:
        return Sources(self.out / "clips", self.codes(), self.start / TOKENIZER)

    def language(self) -> Path:
        schedule = dataclasses.replace(self.schedule, start=self.start, seed=self.seed)
        train_language(self.stage("language"), self.config(), self.sources(), self.trainers, schedule)
        return self.out / "language" / "language.safetensors"

    def base(self) -> Path:
        """The model begun with, but the mean of its speech LM and the newly trained one, in half precision."""
        folder = self.out / "base"
        if not folder.exists():
            learnt, model = load_file(self.language()), load_model(self.start).model
            for name, tensor in model.speech_lm.state_dict().items():
                tensor.lerp_(learnt[name], NEW_SHARE)
            save_folder(folder, model, self.tokenizer().model, self.card, dtype=torch.float16)
        return folder
