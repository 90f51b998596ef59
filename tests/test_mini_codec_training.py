"""The codec's training of the miniature, in steps that a test can wait for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mini_support import needs_speech, spoken_codes
from moshivis.codec import Mimi
from moshivis.evaluation.recogniser import Recogniser, RecogniserConfig
from moshivis.mini import codec_training
from moshivis.mini.codec_training import train_codec
from moshivis.mini.codes import ClipCodes
from moshivis.mini.recipe import CODEC
from moshivis.mini.stage import Stage

__all__ = ["spoken_codes"]  # a fixture
SMALL = dataclasses.replace(
    CODEC,
    dimension=32,
    seanet=dataclasses.replace(CODEC.seanet, channels=(4, 8, 8, 16, 16)),
    transformer=dataclasses.replace(CODEC.transformer, feed_forward=64),
    quantizer=dataclasses.replace(CODEC.quantizer, bins=16, dimension=8),
    istft=dataclasses.replace(CODEC.istft, channels=32, num_blocks=1),
)


@needs_speech
def test_a_killed_training_ends_with_the_same_codec(
    spoken_codes: ClipCodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in what codebooks draw by lot: where k-means begins, and what takes the place of dead entries."""
    monkeypatch.setattr(codec_training, "AUTOENCODER_STEPS", 2)
    monkeypatch.setattr(codec_training, "QUANTISED_STEPS", 14)
    monkeypatch.setattr("moshivis.mini.stage.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("moshivis.codec.quantizer.DEAD_CODE_SHARE", 0.9)  # many are replaced
    usual = codec_training._Trainer.step

    def train(folder: Path, ends_at: tuple[int, ...] = ()) -> Mimi:
        """A training that ends, as if killed, when it comes to one of these steps, and is begun again."""

        def step(trainer: codec_training._Trainer, number: int) -> dict[str, float]:
            if number == ends:
                raise KeyboardInterrupt
            return usual(trainer, number)

        monkeypatch.setattr(codec_training._Trainer, "step", step)
        for number in ends_at:
            ends = number
            with pytest.raises(KeyboardInterrupt):
                train_codec(Stage(folder), SMALL, spoken_codes.clips, teacher)
        ends = -1
        return train_codec(Stage(folder), SMALL, spoken_codes.clips, teacher)

    def teacher() -> Recogniser:
        torch.manual_seed(1)
        return Recogniser(RecogniserConfig(words=("a", "b"))).eval()

    whole, cut = train(tmp_path / "whole").state_dict(), train(tmp_path / "cut", (2, 9)).state_dict()
    assert all(tensor.equal(cut[name]) for name, tensor in whole.items())
