"""Image encoders and projection against reference numbers, and the properties that the numbers do not show."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moshivis.config import VisionConfig
from moshivis.vision import ImageProjection, Vision, VisionEncoder, resize_bicubic, to_pixels
from moshivis.vision.released import from_released, to_released

ROOT = Path(os.environ.get("MOSHIVIS_GOLDEN", Path(__file__).parent / "golden")) / "lm"
CASES = sorted(ROOT.glob("img_*"))

SIGLIP = VisionConfig(image_size=28, patch_size=7, hidden_size=24, num_layers=2, num_heads=3, mlp_size=32)
PIXTRAL = VisionConfig(
    encoder="pixtral", image_size=96, patch_size=16, hidden_size=32, num_layers=2, num_heads=2, mlp_size=48
)


class Golden:
    """One folder: the config of its image path, the weights, inputs, expected outputs."""

    def __init__(self, folder: Path):
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        vision, model = meta["spec"]["vision"], meta["config"]
        self.config = VisionConfig(
            encoder=vision["kind"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_size=vision["hidden_size"],
            num_layers=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_size=vision["intermediate_size"],
            rope_theta=vision.get("rope_theta", 10000.0),
            longest_edge=vision.get("longest_edge"),
            projection_norm=model["norm_xa"],
        )
        self.out_dim = model["dim"] if model["align_img_and_speech_tokens_dim"] else vision["hidden_size"]
        self.dim = model["dim"]
        self.norm_extra = model["norm_extra"]
        self.server_size = meta["spec"].get("server_size")
        self.tolerance = meta["tolerance"]["float32"]
        self.weights = load_file(folder / "weights.safetensors")
        self.inputs = load_file(folder / "inputs.safetensors")
        self.outputs = load_file(folder / "outputs.safetensors")

    def vision(self) -> Vision:
        vision = Vision(self.config, self.out_dim)
        vision.load_state_dict(from_released(self.weights))
        return vision.eval()


def siglip_outputs(golden: Golden) -> dict[str, Tensor]:
    """Every output of a SigLIP case: names are f.<image>.s<size>.<tensor>."""
    vision, actual = golden.vision(), {}
    for name in golden.outputs:
        _, letter, size, tensor = name.split(".")
        image, side = golden.inputs[f"image.{letter}"], int(size[1:])
        pixels = to_pixels(image, golden.config, side)
        if tensor == "resized":
            actual[name] = resize_bicubic(image, side, side)
        elif tensor == "pixel_values":
            actual[name] = pixels
        elif tensor == "embeddings":
            actual[name] = vision.encoder.embed(pixels[None])
        elif tensor == "encoded":
            actual[name] = vision.encoder(pixels[None])
        elif tensor == "image_embeds":
            extra = ImageProjection(golden.config.hidden_size, golden.dim, golden.norm_extra)
            released = from_released(golden.weights, head="extra")
            prefix = "projection."
            extra.load_state_dict({k.removeprefix(prefix): v for k, v in released.items() if k.startswith(prefix)})
            actual[name] = extra(vision.encoder(pixels[None]))
        elif tensor == "cross_attention_src":
            actual[name] = vision(pixels[None])
    return actual


def pixtral_outputs(golden: Golden) -> dict[str, Tensor]:
    """Every output of a Pixtral case: f.<image>.<tensor> for one image alone, f.batch.<tensor> for all together."""
    vision, actual, batch = golden.vision(), {}, []
    for key, image in sorted(golden.inputs.items()):
        name = "f." + key.removeprefix("image.")
        if golden.server_size:
            actual[f"{name}.resized"] = resize_bicubic(image, golden.server_size, golden.server_size)
        pixels = to_pixels(image, golden.config, golden.server_size)
        batch.append(pixels)
        actual[f"{name}.pixel_values"] = pixels
        tokens, mask = vision.encode_many([pixels])
        actual[f"{name}.cross_attention_src"], actual[f"{name}.cross_attention_mask"] = tokens, mask
        torch.testing.assert_close(vision(pixels[None]), tokens)
    actual["f.batch.encoded"], mask = vision.encoder.encode_many(batch)
    actual["f.batch.cross_attention_src"], same_mask = vision.encode_many(batch)
    actual["f.batch.cross_attention_mask"] = mask
    assert torch.equal(mask, same_mask)
    return actual


@pytest.mark.parametrize("folder", CASES, ids=[folder.name for folder in CASES])
@torch.no_grad()
def test_reference_numbers(folder: Path) -> None:
    golden = Golden(folder)
    actual = siglip_outputs(golden) if golden.config.encoder == "siglip" else pixtral_outputs(golden)
    torch.testing.assert_close(actual, golden.outputs, **golden.tolerance)


def test_there_are_cases_of_both_encoders() -> None:
    assert {Golden(folder).config.encoder for folder in CASES} == {"siglip", "pixtral"}


@pytest.mark.parametrize("folder", CASES, ids=[folder.name for folder in CASES])
def test_names_go_to_the_released_ones_and_back(folder: Path) -> None:
    golden = Golden(folder)
    ours = golden.vision().state_dict()
    released = to_released(ours)
    unused = {name for name in golden.weights if "_extra." in name}
    assert released.keys() == golden.weights.keys() - unused
    assert all(torch.equal(released[name], golden.weights[name]) for name in released)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in from_released(released).items())


def test_a_foreign_name_is_refused() -> None:
    with pytest.raises(KeyError, match="speech_lm"):
        to_released({"speech_lm.weight": torch.zeros(1)})


@pytest.mark.parametrize("config", [SIGLIP, PIXTRAL], ids=["siglip", "pixtral"])
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(config: VisionConfig) -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(config).eval()
    pixels = torch.randn(3, 3, 32, 64)
    together = encoder(pixels)
    assert together.shape == (3, (32 // config.patch_size) * (64 // config.patch_size), config.hidden_size)
    for row in range(3):
        torch.testing.assert_close(together[row], encoder(pixels[row : row + 1])[0], rtol=1e-4, atol=1e-5)
    features, mask = encoder.encode_many([pixels[0], pixels[1, :, :, :32]])
    assert mask.sum(dim=1).tolist() == [together.shape[1], (32 // config.patch_size) ** 2]
    torch.testing.assert_close(features[0], together[0], rtol=1e-4, atol=1e-5)
    assert not features[1, mask[1].sum() :].any()


@pytest.mark.parametrize("config", [SIGLIP, PIXTRAL], ids=["siglip", "pixtral"])
@torch.no_grad()
def test_built_on_the_meta_device_it_computes_the_same(config: VisionConfig) -> None:
    torch.manual_seed(0)
    real = Vision(config, 40).eval()
    pixels = torch.randn(1, 3, 32, 48)
    with torch.device("meta"):
        assigned, emptied = Vision(config, 40).eval(), Vision(config, 40).eval()
    assigned.load_state_dict(real.state_dict(), assign=True)
    emptied.to_empty(device="cpu")
    for buffer in emptied.buffers():
        buffer.fill_(3)  # what was there before is not what we rely on
    emptied.encoder.restore_buffers()
    emptied.load_state_dict(real.state_dict())
    assert torch.equal(assigned(pixels), real(pixels))
    assert torch.equal(emptied(pixels), real(pixels))


@pytest.mark.parametrize("config", [SIGLIP, PIXTRAL], ids=["siglip", "pixtral"])
@torch.no_grad()
def test_bfloat16_stays_near_float32(config: VisionConfig) -> None:
    torch.manual_seed(0)
    vision = Vision(config, 40).eval()
    pixels = torch.randn(1, 3, 32, 48)
    expected = vision(pixels)
    actual = vision.bfloat16()(pixels)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("config", [SIGLIP, PIXTRAL], ids=["siglip", "pixtral"])
def test_less_than_a_patch_is_refused(config: VisionConfig) -> None:
    with pytest.raises(ValueError, match="smaller than a patch"):
        VisionEncoder(config)(torch.zeros(1, 3, 32, config.patch_size - 1))


def test_pixtral_notices_where_a_patch_is() -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(PIXTRAL).eval()
    left, below = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    left[..., :16, 16:32] = 1
    below[..., 16:32, :16] = 1
    with torch.no_grad():
        first_of_left, first_of_below = encoder(left)[0, 0], encoder(below)[0, 0]
    assert not torch.allclose(first_of_left, first_of_below)


PIXTRAL_12B = VisionConfig(
    encoder="pixtral", image_size=1024, patch_size=16, hidden_size=1024, num_layers=24, num_heads=16, mlp_size=4096
)


@pytest.mark.parametrize(
    ("config", "names", "numbers"),
    [(VisionConfig(), 437 + 3, 413_327_088 + 1154 * 4096), (PIXTRAL_12B, 218 + 3, 403_489_792 + 1026 * 4096)],
    ids=["siglip", "pixtral"],
)
def test_the_released_sizes(config: VisionConfig, names: int, numbers: int) -> None:
    with torch.device("meta"):
        released = to_released(Vision(config, 4096).state_dict())
    assert len(released) == names
    assert sum(tensor.numel() for tensor in released.values()) == numbers
    assert released["image_prefix.norm_xa.alpha"].shape == (1, 1, 4096)
