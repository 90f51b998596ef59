"""Image features to the width that the adapters read (reference facts, model.md 7.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moshivis.config import NormName, VisionConfig
from moshivis.layers.norm import make_norm
from moshivis.vision.encoders import VisionEncoder


class ImageProjection(nn.Module):
    """A linear map with bias, or nothing where the widths are equal; then a norm, or none."""

    def __init__(self, enc_dim: int, out_dim: int, norm: NormName | None):
        super().__init__()
        self.linear: nn.Module = nn.Identity() if enc_dim == out_dim else nn.Linear(enc_dim, out_dim)
        self.norm: nn.Module = nn.Identity() if norm is None else make_norm(norm, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """[B, S, enc_dim] -> image tokens [B, S, out_dim]."""
        return self.norm(self.linear(features))


class Vision(nn.Module):
    """Encoder and projection: from pixels to the image tokens that cross-attention takes as its source."""

    def __init__(self, config: VisionConfig, out_dim: int):
        super().__init__()
        self.encoder = VisionEncoder(config)
        self.projection = ImageProjection(config.hidden_size, out_dim, config.projection_norm)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> image tokens [B, S, out_dim]."""
        return self.projection(self.encoder(pixels))

    def encode_many(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images of any sizes, each [3, H, W] -> image tokens [B, S_max, out_dim], bool mask [B, S_max].

        Tokens where the mask is False are those of padding. They are not zero: the projection follows the padding.
        """
        features, mask = self.encoder.encode_many(images)
        return self.projection(features), mask
