"""Names of the image encoder's weights: ours and those of the released files (reference facts, model.md section 7).

| ours (`moshivis.vision.Vision`)  | released                                |
| encoder.model.*                  | image_prefix.enc.model.*                |
| projection.linear.{weight,bias}  | image_prefix.proj_xa.{weight,bias}      |
| projection.norm.weight [D]       | image_prefix.norm_xa.alpha [1, 1, D]    | RMS norms
| projection.norm.{weight,bias}    | image_prefix.norm_xa.{weight,bias}      | layer norms
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

PREFIX = "image_prefix."

_ENCODER = ("encoder.", f"{PREFIX}enc.")


def from_released(state_dict: Mapping[str, Tensor], *, head: str = "xa") -> dict[str, Tensor]:
    """The weights of a `Vision` among those of a released file; all other names are left out.

    `head` names the projection: "xa" feeds the cross-attention; a file may hold an unused "extra" one beside it.
    """
    projection, norm = f"{PREFIX}proj_{head}.", f"{PREFIX}norm_{head}."
    ours: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.startswith(_ENCODER[1]):
            ours[_ENCODER[0] + name.removeprefix(_ENCODER[1])] = tensor
        elif name.startswith(projection):
            ours["projection.linear." + name.removeprefix(projection)] = tensor
        elif name == norm + "alpha":
            ours["projection.norm.weight"] = tensor.flatten()
        elif name.startswith(norm):
            ours["projection.norm." + name.removeprefix(norm)] = tensor
    return ours


def to_released(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `from_released`. Raises KeyError for a name that is not one of `Vision`'s."""
    is_layer_norm = "projection.norm.bias" in state_dict
    released: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.startswith(_ENCODER[0]):
            released[_ENCODER[1] + name.removeprefix(_ENCODER[0])] = tensor
        elif name.startswith("projection.linear."):
            released[f"{PREFIX}proj_xa." + name.removeprefix("projection.linear.")] = tensor
        elif name == "projection.norm.weight" and not is_layer_norm:
            released[f"{PREFIX}norm_xa.alpha"] = tensor.view(1, 1, -1)
        elif name.startswith("projection.norm."):
            released[f"{PREFIX}norm_xa." + name.removeprefix("projection.norm.")] = tensor
        else:
            raise KeyError(f"{name} is not a weight of the image encoder or its projection")
    return released
