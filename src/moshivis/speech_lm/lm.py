"""The speech language model: embedding, backbone, text head and depth transformer put together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moshivis.config import SpeechLMConfig
from moshivis.speech_lm.backbone import Backbone, BackboneState, Fusion
from moshivis.speech_lm.depth import Choose, DepthTransformer
from moshivis.speech_lm.embedding import StreamEmbedding
from moshivis.speech_lm.streams import stream_delays


class LMOutput(NamedTuple):
    hidden: Tensor  # [B, T, D] after the last norm: what the depth transformer reads
    text_logits: Tensor  # [B, T, text_card]


class SpeechLM(nn.Module):
    """Streams in, text and audio logits out. `forward` takes whole sequences, `step` the next steps of a stream.

    Raises ValueError if the delays of the config do not fit its streams.
    """

    def __init__(self, config: SpeechLMConfig):
        super().__init__()
        stream_delays(config)
        self.config = config
        num_audio = config.own_codebooks + config.user_codebooks
        self.embedding = StreamEmbedding(config.text_card, config.audio_card, num_audio, config.backbone.dim)
        self.backbone = Backbone(config.backbone)
        self.text_head = nn.Linear(config.backbone.dim, config.text_card, bias=False)
        self.depth = DepthTransformer(config)

    def forward(self, tokens: Tensor, fusion: Fusion | None = None, mask: Tensor | None = None) -> LMOutput:
        """Tokens [B, K, T] as `streams.model_inputs` arranges them; `fusion` and `mask` as in `Backbone.forward`."""
        hidden = self.backbone(self.embedding(tokens), fusion, mask)
        return LMOutput(hidden, self.text_head(hidden))

    def depth_logits(self, hidden: Tensor, text: Tensor, audio: Tensor) -> Tensor:
        """Teacher-forced audio logits [N, k, audio_card] of N frames, any choice of them: their hidden [N, D], text
        token [N] and audio tokens [N, k] of the first k own codebooks as delayed, that is as generated at the same
        step."""
        return self.depth(hidden, text, audio)

    def new_state(self, batch: int) -> BackboneState:
        return self.backbone.new_state(batch)

    def step(
        self,
        state: BackboneState,
        tokens: Tensor,
        fusion: Fusion | None = None,
        active: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> LMOutput:
        """The next steps [B, K, T], normally one; arguments as in `Backbone.step`."""
        hidden = self.backbone.step(state, self.embedding(tokens), fusion, active, causal=causal)
        return LMOutput(hidden, self.text_head(hidden))

    def sample_audio(self, hidden: Tensor, text: Tensor, choose: Choose) -> Tensor:
        """Own audio tokens [B, own] of one step from hidden [B, D] and the text token [B] chosen at it."""
        return self.depth.sample(hidden, text, choose)
