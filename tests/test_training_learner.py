"""What a forward pass of training keeps and counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moshivis.adapters.gated_cross_attention import ImageContext
from moshivis.data.sample import Speaker
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import PADDING, TextTokenizer
from moshivis.training.batch import collate
from moshivis.training.learner import Features, Learner
from moshivis.training.recipe import LossRecipe
from training_support import speechless_sample


def test_gates_are_kept_only_if_they_are_measured(
    tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would keep alive what recomputed activations are meant to free."""
    learner = Learner(tiny_model, LossRecipe())
    look, contexts = learner._look, []

    def watched(features: Features | None, steps: int) -> ImageContext | None:
        context = look(features, steps)
        contexts.append(context)
        return context

    monkeypatch.setattr(learner, "_look", watched)
    part = collate([speechless_sample(tiny_tokenizer, 0)], learner.config, learner.loss, limit=32, bucket=8)
    values = torch.randn(1, 4, tiny_model.config.vision.hidden_size)
    seen = Features(values, torch.ones(1, 4).bool(), torch.ones(1).bool())
    for gates in (False, True):
        learner(part, seen, gates=gates)
    assert [len(context.gates) for context in contexts if context is not None] == [
        0,
        tiny_model.config.speech_lm.backbone.num_layers,
    ]


def test_only_the_assistants_words_are_counted_as_right(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    blind = MoshiVis(dataclasses.replace(tiny_model.config, adapters=None))
    sample = speechless_sample(tiny_tokenizer, 0)
    words = int(((sample.speaker == Speaker.ASSISTANT) & (sample.text > PADDING)).sum())
    for user in (0.0, 1.0):
        learner = Learner(blind, LossRecipe(user=user))
        part = collate([sample], learner.config, learner.loss, limit=32, bucket=8)
        assert int(learner(part, None).words) == words
