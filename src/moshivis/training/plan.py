"""`moshivis train --dry-run`: what a recipe would train, hold in memory and compute, without loading any weights.

Counts are exact: the model is built on the meta device. What autograd keeps of a backbone block is measured there too,
by running one block on tensors without memory. The rest of the memory is an estimate: what the logits and the depth
transformer take beside it, and no fragmentation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moshivis.checkpoints.folder import empty_model
from moshivis.config import BackboneConfig, ModelConfig
from moshivis.devices import device_type
from moshivis.errors import MoshivisError
from moshivis.model import MoshiVis
from moshivis.speech_lm.backbone import Backbone
from moshivis.training.flops import flops_per_token
from moshivis.training.precision import dtype_of, in_half
from moshivis.training.recipe import Recipe
from moshivis.training.setup import base_config, check_base, set_up
from moshivis.training.sources import check_pictures, held_out_sets, require_data, training_sets

GIB = 2**30
WHOLE = ("codec.", "vision.encoder.")  # what is never sharded


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step and one process need. Memory in bytes, of each process."""

    trained: int  # parameters
    frozen: int
    ranks: int
    rows: tuple[int, int]  # speech and speechless rows of one process and step
    tokens: int  # of a step over all processes, at most: every row as long as the recipe allows
    flops: float  # of such a step
    weights: int
    optimiser: int  # gradients, AdamW's state and, if asked for, the average
    activations: int  # of the larger kind of part, rows as long as the recipe allows
    adapter_file: int  # size of what the run leaves
    data: str | None  # why a run would not begin with the data as it is; None if it would

    @property
    def memory(self) -> int:
        return self.weights + self.optimiser + self.activations


def plan(recipe: Recipe, ranks: int = 1) -> Plan:
    """Raises InputError or CheckpointError as a run of the recipe would."""
    config = base_config(recipe)
    check_base(recipe, config)
    model = empty_model(config)
    set_up(model, recipe)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    rows = recipe.rows(ranks)
    tokens = ranks * (rows[0] * recipe.data.max_frames + rows[1] * recipe.data.max_tokens)
    shared = ranks if recipe.parallel == "fsdp" else 1
    learnt = _count(trained)
    states = (4 if recipe.optimiser.ema else 3) * learnt  # gradient, two moments, average; float32 each
    if recipe.optimiser.matrices == "muon":
        states -= _count(parameter for parameter in trained if parameter.ndim == 2)  # one moment
    return Plan(
        trained=learnt,
        frozen=_count(frozen),
        ranks=ranks,
        rows=rows,
        tokens=tokens,
        flops=tokens * flops_per_token(config, recipe),
        weights=_weights(model, recipe, shared),
        optimiser=4 * states // shared,
        activations=_activations(model, recipe, rows, shared),
        adapter_file=_model_file(model, recipe) if recipe.train == "all" else 2 * learnt,
        data=_data_problem(recipe),
    )


def _data_problem(recipe: Recipe) -> str | None:
    """One sentence: a plan is made before there are data, too."""
    try:
        require_data(recipe.data)
        training_sets(recipe.data, recipe.seed)
        held_out_sets(recipe.validation.datasets, recipe.data)
        check_pictures(recipe)
    except MoshivisError as error:
        return str(error)
    return None


def _model_file(model: MoshiVis, recipe: Recipe) -> int:
    """Bytes of the whole model as it is written; the codec is always in float32."""
    size = dtype_of(recipe).itemsize
    return sum((4 if name.startswith("codec.") else size) * x.numel() for name, x in model.named_parameters())


def print_plan(made: Plan, console: Console | None = None) -> None:
    """A table for people, then one line of JSON."""
    table = Table(show_header=False, box=None)
    table.add_row("trained parameters", f"{made.trained:,}")
    table.add_row("frozen parameters", f"{made.frozen:,}")
    table.add_row("processes", str(made.ranks))
    table.add_row("rows a process and step", f"{made.rows[0]} with speech, {made.rows[1]} speechless")
    table.add_row("tokens a step, at most", f"{made.tokens:,}")
    table.add_row("operations a step, at most", f"{made.flops / 1e12:.4g} TFLOP")
    table.add_row("memory a process: weights", f"{made.weights / GIB:.2f} GiB")
    table.add_row("  gradients and optimiser", f"{made.optimiser / GIB:.2f} GiB")
    table.add_row("  activations, estimated", f"{made.activations / GIB:.2f} GiB")
    table.add_row("  together", f"{made.memory / GIB:.2f} GiB")
    table.add_row("what is trained, as a file", f"{made.adapter_file / 1e6:.1f} MB")
    console = console or Console(highlight=False)
    console.print(table)
    if made.data is not None:
        console.print(f"With the data as it is a run would stop: {made.data}", style="bold", markup=False)
    print(json.dumps(dataclasses.asdict(made) | {"memory": made.memory}))


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _weights(model: MoshiVis, recipe: Recipe, shared: int) -> int:
    """Codec in float32, what learns in float32, the rest in the recipe's precision; speech LM and adapters sharded.

    In half precision what learns and is not sharded is held as cast, too, from its use to the end of the step. What is
    sharded is gathered to be used: of the blocks and the depth transformer the one in use and the next block, of the
    rest all.
    """
    half = 2 if in_half(recipe) else 4
    learns = 6 if in_half(recipe) and shared == 1 else 4
    total = 0
    for name, parameter in model.named_parameters():
        frozen = 4 if name.startswith("codec.") else half
        size = parameter.numel() * (learns if parameter.requires_grad else frozen)
        total += size if name.startswith(WHOLE) else size // shared
    return total + (half * _gathered(model) if shared > 1 else 0)


def _gathered(model: MoshiVis) -> int:
    """Numbers of the sharded groups, as `distributed.shard` makes them, that are whole at one time."""
    block, depth = (_count(part.parameters()) for part in (model.speech_lm.backbone.layers[0], model.speech_lm.depth))
    grouped = ("speech_lm.backbone.layers.", "speech_lm.depth.")
    rest = _count(x for name, x in model.named_parameters() if not name.startswith((*WHOLE, *grouped)))
    return rest + max(depth, 2 * block)


def _activations(model: MoshiVis, recipe: Recipe, rows: tuple[int, int], shared: int) -> int:
    lm = model.config.speech_lm
    number = 2 if in_half(recipe) else 4
    # Embeddings that are trained whole are looked up in float32, and so is the sum that runs through the blocks.
    of_stream = 4 if recipe.train == "all" and shared == 1 else number
    largest = 0
    for count, steps, speech in ((rows[0], recipe.data.max_frames, True), (rows[1], recipe.data.max_tokens, False)):
        part = -(-count // recipe.batch.accumulation)
        tokens = part * steps
        if not tokens:
            continue
        stream = tokens * lm.backbone.dim * of_stream
        block = _kept_by_block(lm.backbone, recipe, part, steps) + 2 * (of_stream - number) * tokens * lm.backbone.dim
        block += _kept_by_adapter(model.config, recipe, part, steps)
        layers = lm.backbone.num_layers
        held = layers * stream + block if recipe.activation_checkpointing else layers * block
        logits = 3 * 4 * tokens * lm.text_card  # float32: the logits, their softmax, its gradient
        codebooks = min(recipe.loss.codebooks, lm.own_codebooks) if speech else 0
        depth = codebooks * tokens * (12 * lm.depth.dim * lm.depth.num_layers * number + 3 * 4 * lm.audio_card)
        largest = max(largest, held + logits + depth)
    return largest


def _kept_by_block(config: BackboneConfig, recipe: Recipe, rows: int, steps: int) -> int:
    """Bytes that autograd keeps of one block without its adapter.

    The scores of attention, which the meta device keeps, are counted on a CPU only: an accelerator's kernels keep none.
    """
    dtype = dtype_of(recipe)
    with torch.device("meta"):
        one = Backbone(dataclasses.replace(config, num_layers=1)).to(dtype).requires_grad_(recipe.train == "all")
        x = torch.zeros(rows, steps, config.dim, dtype=dtype, requires_grad=True)
    weights = {parameter.untyped_storage()._cdata for parameter in one.parameters()}
    kept: dict[int, Tensor] = {}
    on_cpu = device_type(recipe.device) == "cpu"
    scores = rows * config.num_heads * steps**2

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights and (on_cpu or tensor.numel() != scores):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = one.layers[0](x, rope=None, mask=None, fusion=lambda layer, stream: stream)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _kept_by_adapter(config: ModelConfig, recipe: Recipe, rows: int, steps: int) -> int:
    """Bytes that autograd keeps of one block's adapter: on the meta device its attention would keep other tensors."""
    if config.adapters is None:
        return 0
    number = 2 if in_half(recipe) else 4
    stream = rows * steps * config.speech_lm.backbone.dim
    kept = 2 * 4 * stream  # the norm's input and what it scales, in float32
    kept += 4 * number * stream  # normed, query, what attention gives, update
    if config.adapters.gate != "none":
        hidden = stream // 8 if config.adapters.gate_input == "conditional" else 0
        kept += number * (stream + hidden)
    if device_type(recipe.device) == "cpu":
        patches = ((config.vision.longest_edge or config.vision.image_size) // config.vision.patch_size) ** 2
        kept += 4 * rows * config.speech_lm.backbone.num_heads * steps * patches
    return kept
