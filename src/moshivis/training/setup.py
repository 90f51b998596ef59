"""From a recipe to the model that it trains: base, adapters, LoRA, what is frozen, on which device, in which dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moshivis.checkpoints.adapters import replace_adapters
from moshivis.checkpoints.fingerprint import base_fingerprint
from moshivis.checkpoints.folder import empty_model
from moshivis.checkpoints.load import Checkpoint, load_config, load_model
from moshivis.config import ModelConfig
from moshivis.errors import InputError
from moshivis.inference.conversation import EMBEDDED
from moshivis.model import TRAINED, MoshiVis
from moshivis.presets import PRESETS, random_model
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.training.distributed import Ranks, broadcast, shard
from moshivis.training.learner import Learner
from moshivis.training.lora import add_lora
from moshivis.training.precision import dtype_of, in_half
from moshivis.training.recipe import Recipe, adapter_config
from moshivis.training.speed import checkpoint_activations, compile_blocks, compiler


@dataclass(frozen=True)
class Ready:
    """A model ready to be trained."""

    model: MoshiVis  # sharded with parallel: fsdp
    tokenizer: TextTokenizer | None
    learner: Learner  # its forward pass
    base: str  # fingerprint of what is beneath the adapters, before any training; "" where another rank has loaded it
    sampling: Mapping[str, Any] | None  # how the base says to sample from it

    def trained(self) -> dict[str, nn.Parameter]:
        """What learns, by the model's names."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def prepare(recipe: Recipe, ranks: Ranks) -> Ready:
    """Load or draw the base, and set up everything that learns.

    Raises InputError or CheckpointError for a base that is not there or that the recipe cannot be applied to.
    """
    config = base_config(recipe)
    check_base(recipe, config)
    if recipe.compile and ranks.device.type == "cpu" and compiler() is None:
        raise InputError("compile: true needs a C++ compiler on a CPU: install g++, or set compile=false")
    sharded = recipe.parallel == "fsdp" and ranks.count > 1
    if sharded and not ranks.leads:
        found = Checkpoint(_hollow(config, dtype_of(recipe)), None)
    else:
        found = _base(recipe, config, torch.device("cpu") if sharded else ranks.device)
    model = found.model
    set_up(model, recipe)
    base = "" if next(model.parameters()).is_meta else base_fingerprint(model)
    learner = Learner(model, recipe.loss)
    if recipe.compile:
        compile_blocks(learner)
    if recipe.activation_checkpointing:
        checkpoint_activations(learner)
    if sharded:
        shard(learner, ranks, half=in_half(recipe))
        if model.vision is not None:
            encoder = model.vision.encoder
            encoder.to_empty(device=ranks.device) if not ranks.leads else encoder.to(ranks.device)
            encoder.restore_buffers()
            broadcast(encoder, ranks)
    return Ready(model, found.tokenizer, learner, base, found.sampling)


def base_config(recipe: Recipe) -> ModelConfig:
    """The base's config, without its weights."""
    if recipe.random_weights and recipe.base in PRESETS:
        return PRESETS[recipe.base]
    return load_config(EMBEDDED.get(recipe.base, recipe.base), allow_download=recipe.download)


def check_base(recipe: Recipe, config: ModelConfig) -> None:
    """Raise InputError if the recipe asks for something that the base cannot give."""
    if config.adapters is None and recipe.train != "all":  # what the others leave is a file of adapters
        raise InputError(
            f"the base {recipe.base} has no image encoder and no adapters; train: {recipe.train} needs both"
        )
    if config.adapters is None and (recipe.adapters.fresh or recipe.adapters.changes()):
        raise InputError(f"the base {recipe.base} has no adapters that the recipe's `adapters` could change")
    if recipe.adapters.out_scale != 1 and not adapter_config(config.adapters, recipe.adapters)[1]:
        raise InputError("adapters.out_scale is for adapters that start anew: set it to 1, or adapters.fresh=true")
    codebooks = config.speech_lm.own_codebooks
    if recipe.loss.codebooks > codebooks:
        raise InputError(f"loss.codebooks={recipe.loss.codebooks}, but the model speaks in {codebooks} codebooks")
    layers, blocks = recipe.adapters.layers, config.speech_lm.backbone.num_layers
    different = set(range(blocks)).intersection(layers or ())
    if layers is not None and not 0 < len(different) == len(layers):
        raise InputError(f"adapters.layers are different blocks from 0 to {blocks - 1}, not {list(layers)}")
    graded = recipe.data.p_audio and recipe.loss.audio
    if recipe.train == "all" and graded and recipe.loss.codebooks < codebooks:
        raise InputError(
            f"train: all trains the whole depth transformer, but loss.codebooks={recipe.loss.codebooks} would let the "
            f"codebooks without a target decay; set loss.codebooks={codebooks}"
        )
    weights = {"text": recipe.loss.text}
    if recipe.data.p_audio == 1:  # all text is that of speech samples
        weights |= {"speech": recipe.loss.speech}
    if graded:
        weights |= {"semantic": recipe.loss.semantic, "acoustic": recipe.loss.acoustic}
    for name, weight in weights.items():
        if recipe.train == "all" and not weight:
            raise InputError(f"train: all with loss.{name}=0 would let what has no target decay; set it above 0")


def set_up(model: MoshiVis, recipe: Recipe) -> None:
    """Adapters as the recipe has them, LoRA, gradients and dtypes. Works on the meta device too."""
    device = model.speech_lm.text_head.weight.device
    config, fresh = adapter_config(model.config.adapters, recipe.adapters)
    if fresh:
        assert config is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # on the CPU: the same on every device and rank
            where = "meta" if device.type == "meta" else "cpu"
            replace_adapters(model, config, model.config.vision.projection_norm, where)
        assert model.adapters is not None
        for out in model.adapters.out:
            out.get_parameter("weight").data.mul_(recipe.adapters.out_scale)
    if recipe.train == "lora":
        add_lora(model.speech_lm.backbone, recipe.lora, torch.Generator().manual_seed(recipe.seed))
    model.requires_grad_(False)
    for _, parameter in _learning(model, recipe):
        parameter.data = parameter.data.to(device, torch.float32)
        parameter.requires_grad_(True)
    model.eval()


def _learning(model: MoshiVis, recipe: Recipe) -> Iterator[tuple[str, nn.Parameter]]:
    also: tuple[str, ...] = ("speech_lm.",) if recipe.train == "all" else ()
    idle: tuple[str, ...] = ()  # what has no target would not stay as it is, but decay
    if not recipe.data.p_audio:
        idle = ("speech_lm.depth.", "speech_lm.embedding.audio.")
    elif not recipe.loss.audio:
        idle = ("speech_lm.depth.",)
    for name, parameter in model.named_parameters():
        if (name.startswith((*TRAINED, *also)) and not name.startswith(idle)) or ".lora_" in name:
            yield name, parameter


def _base(recipe: Recipe, config: ModelConfig, device: torch.device) -> Checkpoint:
    if recipe.random_weights:
        return Checkpoint(random_model(config, device, dtype_of(recipe), recipe.seed), None)
    source = EMBEDDED.get(recipe.base, recipe.base)
    return load_model(source, device, dtype_of(recipe), allow_download=recipe.download)


def _hollow(config: ModelConfig, dtype: torch.dtype) -> MoshiVis:
    """The model on the meta device, in the dtypes that the loaded one has."""
    model = empty_model(config)
    for name, parameter in model.named_parameters():
        if not name.startswith("codec."):
            parameter.data = parameter.data.to(dtype)
    return model
