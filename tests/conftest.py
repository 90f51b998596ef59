"""A model of a few ten thousand parameters with random weights, as an object and as a folder."""

from __future__ import annotations

import io
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the tests share the cores already; said before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import sentencepiece
import torch

from moshivis.checkpoints.folder import save_folder
from moshivis.config import (
    AdapterConfig,
    BackboneConfig,
    CodecConfig,
    CodecTransformerConfig,
    DepthConfig,
    ISTFTDecoderConfig,
    ModelConfig,
    QuantizerConfig,
    SEANetConfig,
    SpeechLMConfig,
    VisionConfig,
)
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer

hypothesis.settings.register_profile("busy", deadline=None)  # machines that run tests are
hypothesis.settings.load_profile("busy")

pytest_plugins = ["serve_support", "page_visitor", "mini_support"]  # fixtures


def make_tokenizer(sentences: list[str], size: int, *, byte_fallback: bool = False) -> TextTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 20),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=byte_fallback,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    return TextTokenizer(model.getvalue())


@pytest.fixture(scope="session")
def tiny_tokenizer() -> TextTokenizer:
    return make_tokenizer(["what colour is the star", "the star is blue and the heart is red", "hello there"], 48)


@pytest.fixture(scope="session")
def byte_tokenizer() -> TextTokenizer:
    """Spells what it does not know in bytes, as the released tokenizer does."""
    return make_tokenizer(["hello there"], 272, byte_fallback=True)


def tiny_config(vocabulary: int) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        codec=CodecConfig(
            dimension=32,
            seanet=SEANetConfig(channels=(8, 8, 16, 16, 32), ratios=(8, 6, 5, 4), residual_layers=(0, 1, 1, 1)),
            transformer=CodecTransformerConfig(num_layers=1, num_heads=2, feed_forward=64, context=16),
            quantizer=QuantizerConfig(dimension=16, bins=32, num_codebooks=4),
            decoder="istft",
            istft=ISTFTDecoderConfig(channels=32, num_blocks=1),
            latent_norm=True,
            num_codebooks=3,
        ),
        speech_lm=SpeechLMConfig(
            text_card=vocabulary,
            audio_card=32,
            own_codebooks=3,
            user_codebooks=3,
            delays=(0, 0, 1, 1, 0, 1, 1),
            backbone=BackboneConfig(dim=32, num_heads=2, num_layers=2, feed_forward=128, context=200),
            depth=DepthConfig(dim=16, num_heads=2, num_layers=1, feed_forward=64, context=3),
        ),
        adapters=AdapterConfig(),
        vision=VisionConfig(image_size=32, patch_size=16, hidden_size=32, num_layers=1, num_heads=2, mlp_size=64),
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: TextTokenizer) -> MoshiVis:
    """Its adapters open and matter, its codec's codebooks hold something: not so when freshly made."""
    torch.manual_seed(0)
    model = MoshiVis(tiny_config(len(tiny_tokenizer))).eval().requires_grad_(False)
    assert model.adapters is not None
    for name, parameter in model.adapters.named_parameters():
        if name.endswith("linear_out.weight") or name.startswith("out."):
            parameter.normal_()
    for name, buffer in model.codec.named_buffers():
        if name.endswith("embedding_sum"):
            buffer.normal_(std=0.02)
    return model


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(folder, tiny_model, tiny_tokenizer.model, "# A random model\n")
    return folder
