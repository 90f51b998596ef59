"""Image encoders: the SigLIP and Pixtral vision models of `transformers`, behind one interface.

Reference facts: model.md 7.1 and 7.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from moshivis.config import VisionConfig


class VisionEncoder(nn.Module):
    """Pixels -> one feature a patch: SigLIP's last hidden state after its final norm, or Pixtral's last layer.

    Parameter names below `model.` are those of `transformers` and of the released files.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.model: nn.Module = _siglip(config) if config.encoder == "siglip" else _pixtral(config)
        self.restore_buffers()

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] of `moshivis.vision.to_pixels` -> [B, S, D_enc], S patches in row-major order.

        Rows and columns of pixels beyond whole patches are dropped. Raises ValueError if not even one patch is there.
        """
        if min(pixels.shape[-2:]) < self.config.patch_size:
            raise ValueError(f"pixels {list(pixels.shape)} are smaller than a patch of {self.config.patch_size}")
        if self.config.encoder == "siglip":
            return self.model(pixels, interpolate_pos_encoding=True).last_hidden_state
        # Pixtral packs the images of a call into one sequence whose attention mask grows with the square of their
        # number, although no image sees another one.
        return torch.cat([self.model(image[None]).last_hidden_state for image in pixels])

    def encode_many(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images of any sizes, each [3, H, W] -> zero-padded features [B, S_max, D_enc], bool mask [B, S_max].

        The mask is True where there is a patch.
        """
        alike = self.config.encoder == "siglip" and len({image.shape for image in images}) == 1
        if alike and images[0].device.type != "cpu":  # where it is no faster, and other company means other bits
            features = list(self(torch.stack(list(images))))
        else:
            features = [self(image[None])[0] for image in images]
        lengths = torch.tensor([len(feature) for feature in features], device=features[0].device)
        padded = pad_sequence(features, batch_first=True)
        return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]

    def embed(self, pixels: Tensor) -> Tensor:
        """SigLIP's first hidden state, patch embedding plus position: [B, 3, H, W] -> [B, S, D_enc]."""
        if self.config.encoder != "siglip":
            raise ValueError("only SigLIP adds positions to its patch embeddings")
        return self.model.get_submodule("embeddings")(pixels, interpolate_pos_encoding=True)

    def restore_buffers(self) -> None:
        """Compute the tables that no checkpoint holds. Call it after `to_empty`, which leaves them undefined."""
        device = next(self.parameters()).device
        if device.type == "meta":
            device = torch.device("cpu")  # so that loading with `assign=True` leaves nothing on the meta device
        if self.config.encoder == "siglip":
            positions = (self.config.image_size // self.config.patch_size) ** 2
            self.model.get_submodule("embeddings").position_ids = torch.arange(positions, device=device)[None]
            return
        head = self.config.hidden_size // self.config.num_heads
        exponents = torch.arange(0, head, 2, dtype=torch.float32, device=device) / head
        frequencies = 1.0 / self.config.rope_theta**exponents
        by_axis = torch.cat([frequencies[0::2], frequencies[1::2]])  # rows take the even ones, columns the odd ones
        rotary = self.model.get_submodule("patch_positional_embedding")
        rotary.inv_freq, rotary.original_inv_freq = by_axis, by_axis.clone()


def _siglip(config: VisionConfig) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel  # here, because it takes a second

    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            layer_norm_eps=config.norm_eps,
            hidden_act="gelu_pytorch_tanh",
            vision_use_head=False,
        )
    )


def _pixtral(config: VisionConfig) -> nn.Module:
    from transformers import PixtralVisionConfig, PixtralVisionModel

    return PixtralVisionModel(
        PixtralVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="silu",
            rope_parameters={"rope_type": "axial", "rope_theta": config.rope_theta},
        )
    )
