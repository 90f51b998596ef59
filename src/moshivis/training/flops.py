"""How many operations a token takes: products with weights only, so that what is reported as MFU errs on the low side.

A weight costs 2 operations a token forward, 2 backward if anything before it is trained, and 2 more if itself is.
Scores of attention, norms, what activation checkpointing computes twice, and padding are left out.
"""

from __future__ import annotations

from moshivis.config import AdapterConfig, BackboneConfig, DepthConfig, ModelConfig
from moshivis.layers.feed_forward import gated_width
from moshivis.training.recipe import Recipe, adapter_config

FORWARD, FROZEN, TRAINED = 2, 4, 6  # operations a weight and token


def flops_per_token(config: ModelConfig, recipe: Recipe) -> float:
    """Mean over the tokens of a batch; each is taken to be graded."""
    lm = config.speech_lm
    language = TRAINED if recipe.train == "all" else FROZEN
    adapters, _ = adapter_config(config.adapters, recipe.adapters)
    below = 0  # blocks through which no gradient flows
    if recipe.train == "adapters" and adapters is not None:
        below = min(adapters.layers or (0,))
    total = float(language * (block_weights(lm.backbone) * lm.backbone.num_layers + lm.text_card * lm.backbone.dim))
    total -= (FROZEN - FORWARD) * block_weights(lm.backbone) * below
    codebooks = min(recipe.loss.codebooks, lm.own_codebooks)
    total += language * recipe.data.p_audio * codebooks * codebook_weights(lm.depth, lm.backbone.dim, lm.audio_card)
    if adapters is not None:
        count = lm.backbone.num_layers if adapters.layers is None else len(adapters.layers)
        total += TRAINED * count * adapter_weights(adapters, lm.backbone.dim)
    if recipe.train == "lora":
        total += TRAINED * lm.backbone.num_layers * lora_weights(lm.backbone, recipe)
    return total


def block_weights(config: BackboneConfig) -> int:
    """Matrices of one block of the backbone."""
    return 4 * config.dim**2 + 3 * config.dim * gated_width(config.dim, config.feed_forward)


def codebook_weights(config: DepthConfig, backbone_dim: int, audio_card: int) -> int:
    """What one codebook of one frame passes through in the depth transformer."""
    width = gated_width(config.dim, config.feed_forward)
    layer = 4 * config.dim**2 + 3 * config.dim * width
    return backbone_dim * config.dim + config.num_layers * layer + config.dim * audio_card


def adapter_weights(config: AdapterConfig, dim: int) -> int:
    """What one step passes through in the adapter of one block: query, output and gate, shared or not."""
    gate = 2 * dim * (dim // 8) if config.gate != "none" and config.gate_input == "conditional" else 0
    return 2 * dim**2 + gate


def lora_weights(config: BackboneConfig, recipe: Recipe) -> int:
    width = gated_width(config.dim, config.feed_forward)
    sizes = {
        "in_proj": 4 * config.dim,
        "out_proj": 2 * config.dim,
        "linear_in": config.dim + 2 * width,
        "linear_out": config.dim + width,
    }
    return recipe.lora.rank * sum(sizes[target] for target in set(recipe.lora.targets))
