"""MoshiVis: the parts put together, and which of their parameters are trained.

Codec, speech LM and vision encoder are frozen; the adapters and the image projection learn (paper section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from moshivis.adapters.gated_cross_attention import GatedCrossAttention, ImageContext, ImageKV
from moshivis.codec.mimi import Mimi
from moshivis.config import ModelConfig
from moshivis.errors import InputError
from moshivis.speech_lm.lm import SpeechLM
from moshivis.vision.projection import Vision

TRAINED = ("adapters.", "vision.projection.")  # names of the parameters that the paper trains begin with one of these


class ModelOutput(NamedTuple):
    hidden: Tensor  # [B, T, D] what the depth transformer reads
    text_logits: Tensor  # [B, T, text_card]
    context: ImageContext | None  # holds the gates; None without image


class MoshiVis(nn.Module):
    """The whole model. With `config.adapters` None it is a speech LM with its codec, and sees nothing.

    Under `torch.device("meta")` it is built without memory for weights. Generation, step by step, is
    `moshivis.inference.generation`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.codec = Mimi(config.codec)
        self.speech_lm = SpeechLM(config.speech_lm)
        self.adapters: GatedCrossAttention | None = None
        self.vision: Vision | None = None
        if config.adapters is not None:
            backbone = config.speech_lm.backbone
            self.adapters = GatedCrossAttention(config.adapters, backbone.dim, backbone.num_heads, backbone.num_layers)
            self.vision = Vision(config.vision, config.adapters.source_dim or backbone.dim)

    def forward(self, tokens: Tensor, image: ImageKV | None = None, mask: Tensor | None = None) -> ModelOutput:
        """Whole sequences: tokens [B, K, T] as `streams.model_inputs` arranges them, image from `adapters.encode`,
        `mask` as in `Backbone.forward`.

        Raises InputError if an image is given to a model without adapters.
        """
        context = None
        if image is not None:
            if self.adapters is None:
                raise InputError("this model has no adapters, it cannot look at an image")
            context = self.adapters.context(image, tokens.shape[-1])
        hidden, text_logits = self.speech_lm(tokens, context, mask)
        return ModelOutput(hidden, text_logits, context)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the adapters and the image projection."""
        for name, parameter in self.named_parameters():
            if name.startswith(TRAINED):
                yield name, parameter
