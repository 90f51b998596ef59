"""Names and layout of the released file, its flat configuration, and what is said when a file does not fit."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moshivis.checkpoints.released import check_released, from_released, to_released
from moshivis.checkpoints.released_config import RELEASED, config_from_released
from moshivis.config import (
    AdapterConfig,
    BackboneConfig,
    CodecConfig,
    CodecTransformerConfig,
    DepthConfig,
    ModelConfig,
    QuantizerConfig,
    SEANetConfig,
    SpeechLMConfig,
    VisionConfig,
    from_dict,
)
from moshivis.errors import CheckpointError
from moshivis.model import MoshiVis
from moshivis.presets import PRESETS, random_model

MANIFEST = Path(__file__).parent / "golden" / "manifests" / "pytorch_full.json.gz"
SMALL = ModelConfig(
    name="small",
    codec=CodecConfig(
        dimension=8,
        seanet=SEANetConfig(channels=(4, 4), ratios=(2,), residual_layers=(1,)),
        transformer=CodecTransformerConfig(num_layers=1, num_heads=2, feed_forward=8, context=8),
        quantizer=QuantizerConfig(dimension=4, bins=8, num_codebooks=2),
        frame_rate=6000.0,
        num_codebooks=2,
    ),
    speech_lm=SpeechLMConfig(
        text_card=9,
        audio_card=8,
        own_codebooks=2,
        user_codebooks=2,
        delays=(0, 0, 1, 0, 1),
        backbone=BackboneConfig(dim=16, num_heads=2, num_layers=3, feed_forward=40, context=8),
        depth=DepthConfig(dim=8, num_heads=2, num_layers=2, feed_forward=12),
    ),
    vision=VisionConfig(image_size=28, patch_size=14, hidden_size=12, num_layers=1, num_heads=2, mlp_size=16),
)
ADAPTERS = [
    from_dict(AdapterConfig, dict(zip(("sharing", "gate", "gate_input", "source_dim", "layers"), values, strict=True)))
    for values in itertools.product(
        ("qkv", "none"), ("layer", "shared", "none"), ("conditional", "constant"), (None, 10), (None, (1, 2))
    )
]


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    """All but the codec, which has a file of its own."""
    torch.manual_seed(0)
    state = MoshiVis(config).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items() if not name.startswith("codec.")}


# names and shapes ----------------------------------------------------------------------------------------------------


def test_the_full_size_model_has_the_released_names_shapes_and_count() -> None:
    manifest = json.loads(gzip.decompress(MANIFEST.read_bytes()))
    config = PRESETS["moshika-vis"]
    with torch.device("meta"):
        model = MoshiVis(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("codec.")}
    released = to_released(state, config)
    assert {name: list(tensor.shape) for name, tensor in released.items()} == manifest["stored"]
    assert len(released) == 893
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert round(sum(size for name, size in sizes.items() if not name.startswith("codec.")) / 1e9, 3) == 8.307
    assert round(sum(parameter.numel() for _, parameter in model.trainable_parameters()) / 1e6) == 206
    copies = {name: torch.empty(manifest["stored"][_first(name)], device="meta") for name in manifest["copies"]}
    check_released(released | copies, released, config, "file")
    assert from_released(released | copies, config).keys() == state.keys()


def test_what_the_released_names_have_no_place_for_is_refused() -> None:
    depth = dataclasses.replace(SMALL.speech_lm.depth, norm="layer_norm")
    config = dataclasses.replace(SMALL, speech_lm=dataclasses.replace(SMALL.speech_lm, depth=depth))
    with pytest.raises(CheckpointError, match=r"no place for speech_lm.depth.layers.0.norm1.bias"):
        to_released(random_state(config), config)


def _first(name: str) -> str:
    """layers.7. -> layers.0."""
    parts = name.split(".")
    parts[parts.index("layers") + 1] = "0"
    return ".".join(parts)


@pytest.mark.parametrize(
    "adapters", ADAPTERS, ids=lambda a: f"{a.sharing}-{a.gate}-{a.gate_input}-{a.source_dim}-{a.layers}"
)
def test_there_and_back(adapters: AdapterConfig) -> None:
    config = dataclasses.replace(SMALL, adapters=adapters)
    state = random_state(config)
    released = to_released(state, config)
    check_released(released, released, config, "file")
    back = from_released(released, config)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_there_and_back_without_adapters_and_with_one_input_for_all_codebooks() -> None:
    depth = dataclasses.replace(SMALL.speech_lm.depth, input_per_step=False)
    config = dataclasses.replace(SMALL, adapters=None, speech_lm=dataclasses.replace(SMALL.speech_lm, depth=depth))
    state = random_state(config)
    released = to_released(state, config)
    assert "depformer_in.0.weight" in released and "depformer_in.1.weight" not in released
    assert not any("cross_attention" in name or "norm_cross" in name for name in released)
    assert all(torch.equal(from_released(released, config)[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(("own", "user"), [(1, 2), (3, 1)])
def test_there_and_back_with_other_numbers_of_codebooks(own: int, user: int) -> None:
    delays = (0,) * (1 + own + user)
    lm = dataclasses.replace(SMALL.speech_lm, own_codebooks=own, user_codebooks=user, delays=delays)
    config = dataclasses.replace(SMALL, speech_lm=lm)
    state = random_state(config)
    released = to_released(state, config)
    assert sum(name.startswith("audio_emb.") for name in released) == own + user
    assert sum(name.startswith("depformer_emb.") for name in released) == own - 1
    back = from_released(released, config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_what_the_release_cannot_say_is_refused() -> None:
    config = dataclasses.replace(SMALL, adapters=AdapterConfig(sharing="kv"))
    with pytest.raises(CheckpointError, match="kv"):
        to_released(random_state(config), config)


# files that do not fit -----------------------------------------------------------------------------------------------


def test_missing_and_misshapen_tensors_are_named_and_others_ignored(caplog: pytest.LogCaptureFixture) -> None:
    released = to_released(random_state(SMALL), SMALL)
    broken = dict(released)
    del broken["depformer_emb.0.weight"], broken["image_prefix.proj_xa.bias"]
    broken["optimizer.step"] = torch.zeros(1)
    broken["llm.out_norm.alpha"] = torch.zeros(1, 1, 17)
    with pytest.raises(CheckpointError) as raised:
        check_released(broken, released, SMALL, "some.safetensors")
    message = str(raised.value)
    assert "some.safetensors" in message
    assert "missing: depformer_emb.0.weight [9, 8], image_prefix.proj_xa.bias [16]" in message
    assert "optimizer.step" not in message
    assert "some.safetensors holds tensors that this model has no use for: optimizer.step" in caplog.text
    more = released | {"optimizer.step": torch.zeros(1)}
    check_released(more, released, SMALL, "file")
    assert from_released(more, SMALL).keys() == from_released(released, SMALL).keys()
    assert "of the wrong shape: llm.out_norm.alpha [1, 1, 17] instead of [1, 1, 16]" in message


def test_many_faults_are_not_all_listed() -> None:
    released = to_released(random_state(SMALL), SMALL)
    with pytest.raises(CheckpointError, match=f"and {len(released) - 8} more"):
        check_released({}, released, SMALL, "file")


def test_copies_of_shared_projections_are_read_wherever_they_are() -> None:
    state = random_state(SMALL)
    released = to_released(state, SMALL)
    first = "llm.transformer.layers.0.cross_attention.mha."
    shared = [name for name in released if name.startswith(first)]
    copies = {name.replace("layers.0.", f"layers.{i}."): released[name] for i in (1, 2) for name in shared}
    without_first = {name: tensor for name, tensor in released.items() if name not in shared}
    for file in (released | copies, without_first | copies):
        check_released(file, released, SMALL, "file")
        assert torch.equal(from_released(file, SMALL)["adapters.query.0.weight"], state["adapters.query.0.weight"])


@pytest.mark.parametrize("what", ["mha.out_proj.weight", "gate.alpha.0.weight"])
def test_copies_that_differ_are_refused(what: str) -> None:
    config = dataclasses.replace(SMALL, adapters=AdapterConfig(gate="shared"))
    released = to_released(random_state(config), config)
    first, copy = (f"llm.transformer.layers.{i}.cross_attention.{what}" for i in (0, 2))
    released[copy] = released[first] + 1
    with pytest.raises(CheckpointError, match="differs from it"):
        from_released(released, config)


def test_an_unread_projection_is_tolerated() -> None:
    released = to_released(random_state(SMALL), SMALL)
    file = released | {
        "image_prefix.proj_extra.weight": torch.zeros(2, 2),
        "image_prefix.norm_extra.alpha": torch.ones(2),
    }
    check_released(file, released, SMALL, "file")
    assert from_released(file, SMALL).keys() == from_released(released, SMALL).keys()


# configuration -------------------------------------------------------------------------------------------------------


def test_the_released_configuration_is_the_default_preset() -> None:
    assert config_from_released(RELEASED) == PRESETS["moshika-vis"]


def test_nested_keys_are_flattened_by_one_level() -> None:
    nested = {"image": dict(list(RELEASED.items())[:5]), **dict(list(RELEASED.items())[5:])}
    assert config_from_released(nested) == PRESETS["moshika-vis"]


@pytest.mark.parametrize(
    ("keys", "path", "value"),
    [
        ({"norm": "real_rms_norm"}, "speech_lm.depth.norm", "real_rms_norm"),
        ({"norm": "real_rms_norm"}, "speech_lm.backbone.norm", "real_rms_norm_f32"),
        ({"activation": "gelu"}, "speech_lm.backbone.activation", "silu"),
        ({"activation": "gelu"}, "speech_lm.depth.activation", "gelu"),
        ({"activation": "gelu", "depformer_activation": "silu"}, "speech_lm.depth.activation", "silu"),
        ({"causal": False, "some_new_key": 3}, "speech_lm.backbone.context", 3000),
        ({"hidden_scale": 4.0}, "speech_lm.backbone.feed_forward", 16384),
        ({"depformer_multi_linear": False}, "speech_lm.depth.input_per_step", False),
        ({"delays": [0, 0, 2]}, "speech_lm.delays", (0, 0, *[2] * 15)),
        ({"dep_q": 6}, "speech_lm.user_codebooks", 10),
        ({"num_crossattended_tokens": 0}, "adapters", None),
        ({"num_crossattended_tokens": 0}, "vision.projection_norm", None),
        ({"norm_xa": None}, "vision.projection_norm", None),
        ({"xa_layers": [0, 2]}, "adapters.layers", (0, 2)),
        ({"xa_shared": False}, "adapters.sharing", "none"),
        ({"xa_shared": False}, "adapters.stream_keys", "first"),
        ({"xa_gate_shared": True}, "adapters.gate", "shared"),
        ({"xa_gating": "none"}, "adapters.gate", "none"),
        ({"xa_gating": "tanh"}, "adapters.gate_activation", "tanh"),
        ({"xa_conditional_gating": False}, "adapters.gate_input", "constant"),
        ({"xa_start": 3, "xa_end": "7"}, "adapters.start", 3),
        ({"xa_start": 3, "xa_end": "7"}, "adapters.end", 7),
        ({"xa_dim": 20}, "adapters.source_dim", 20),
        ({"align_img_and_speech_tokens_dim": False}, "adapters.source_dim", 1152),
        ({"encoder_name": "siglip_gemma2_896"}, "vision.image_size", 896),
        ({"encoder_name": "pixtral"}, "vision.patch_size", 16),
    ],
)
def test_keys_mean_what_they_do(keys: dict[str, Any], path: str, value: Any) -> None:
    found: Any = config_from_released({**RELEASED, **keys})
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"xa_step": 2}, "xa_step"),
        ({"xa_start": "boi"}, "xa_start must be 'start'"),
        ({"xa_end": "eoi"}, "xa_end must be 'end'"),
        ({"num_crossattended_tokens": 5}, "num_crossattended_tokens"),
        ({"encoder_name": "clip"}, "encoder_name must be one of siglip_gemma2_224"),
        ({"norm": "batch_norm"}, "unknown norm 'batch_norm'"),
        ({"depformer_activation": "swish"}, "unknown activation 'swish'"),
        ({"xa_gating": "relu"}, "xa_gating"),
        ({"delays": [0] * 18}, "17 streams"),
        ({"depformer_weights_per_step": False}, "weights per step"),
        ({"positional_embedding": "sin"}, "positional_embedding"),
        ({"encoder_name": ["clip"]}, "encoder_name must be one of"),
    ],
)
def test_impossible_values_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_from_released({**RELEASED, **keys})


# the model -----------------------------------------------------------------------------------------------------------


def test_only_adapters_and_projection_are_trained() -> None:
    names = [name for name, _ in MoshiVis(SMALL).trainable_parameters()]
    assert {name.split(".")[0] for name in names} == {"adapters", "vision"}
    assert not any(name.startswith("vision.encoder") for name in names)


def test_a_random_model_is_whole_and_runs() -> None:
    model = random_model(SMALL, dtype=torch.bfloat16)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert {p.dtype for p in model.speech_lm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.codec.parameters()} == {torch.float32}
    assert model.vision is not None and model.adapters is not None
    pixels = torch.randn(1, 3, 28, 28, dtype=torch.bfloat16)
    image = model.adapters.encode(model.vision(pixels))
    output = model(torch.zeros(1, 5, 4, dtype=torch.int64), image)
    assert output.text_logits.isfinite().all() and output.context is not None
    codes = model.codec.encode(torch.randn(1, 1, 64))
    assert model.codec.decode(codes).isfinite().all()
    again = random_model(SMALL, dtype=torch.bfloat16)
    assert torch.equal(again.speech_lm.text_head.weight, model.speech_lm.text_head.weight)
