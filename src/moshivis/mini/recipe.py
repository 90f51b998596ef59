"""The numbers of the miniature: sizes of its parts, and how it is sampled."""

from __future__ import annotations

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
from moshivis.inference.sampling import Sampling

CODEBOOKS = 6  # of the codec's eight, as many as the speech LM speaks and hears
FRAMES = 192  # of a spoken training sample, and the context: no key is ever further away than in training
TOKENS = 80  # of a written training sample

CODEC = CodecConfig(
    dimension=128,
    seanet=SEANetConfig(channels=(16, 64, 128, 192, 192), ratios=(8, 6, 5, 4), residual_layers=(0, 1, 1, 1)),
    transformer=CodecTransformerConfig(num_layers=1, num_heads=4, feed_forward=512, context=32, layer_scale=0.3),
    quantizer=QuantizerConfig(dimension=32, bins=256, num_codebooks=8),
    decoder="istft",
    istft=ISTFTDecoderConfig(channels=256, num_blocks=5, n_fft=960, hop=240),
    latent_norm=True,
    num_codebooks=CODEBOOKS,
)
VISION = VisionConfig(
    image_size=128, patch_size=8, hidden_size=128, num_layers=4, num_heads=4, mlp_size=512, projection_norm="rms_norm"
)

SAMPLING = Sampling(text_temperature=0.0, audio_temperature=0.2, audio_top_k=50)


def mini(vocabulary: int) -> ModelConfig:
    """The whole model, for a tokenizer of `vocabulary` pieces."""
    delays = (0, *[1] * (CODEBOOKS - 1))
    return ModelConfig(
        name="mini",
        codec=CODEC,
        speech_lm=SpeechLMConfig(
            text_card=vocabulary,
            audio_card=CODEC.quantizer.bins,
            own_codebooks=CODEBOOKS,
            user_codebooks=CODEBOOKS,
            delays=(0, *delays, *delays),
            backbone=BackboneConfig(dim=256, num_heads=4, num_layers=7, feed_forward=1024, context=FRAMES),
            depth=DepthConfig(dim=128, num_heads=4, num_layers=2, feed_forward=512, context=CODEBOOKS),
        ),
        adapters=AdapterConfig(gate_scale=(0.002, 0.06)),
        vision=VISION,
    )
