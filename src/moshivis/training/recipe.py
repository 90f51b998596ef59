"""What a training run is: plain data, read from YAML and `key=value` words, checked before anything is loaded.

The sources of the numbers: paper sections 3.1 to 3.3 and 4, appendix E.2. What the paper leaves open is ours and says
so.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from moshivis.config import AdapterConfig
from moshivis.data.sample import Kind
from moshivis.errors import InputError

MATRICES = ("in_proj", "out_proj", "linear_in", "linear_out")  # of a backbone block: what LoRA can change


@dataclass(frozen=True, kw_only=True)
class AdapterRecipe:
    """How the adapters differ from those of the base: the ablations of Tables 4 and 6. None = as in the base.

    A value that is not the base's starts new adapters and a new projection, as `fresh` does by itself.
    """

    fresh: bool = False
    gate: Literal["layer", "shared", "none"] | None = None
    gate_input: Literal["conditional", "constant"] | None = None
    gate_activation: Literal["sigmoid", "tanh"] | None = None
    sharing: Literal["qkv", "kv", "none"] | None = None
    layers: tuple[int, ...] | None = None
    out_scale: float = 1.0  # of the output matrices that new adapters begin with; a sigmoid gate begins at 1/56

    def changes(self) -> dict[str, object]:
        """The fields of `AdapterConfig` that are to differ."""
        named = ("gate", "gate_input", "gate_activation", "sharing", "layers")
        return {name: getattr(self, name) for name in named if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Low-rank updates of the backbone's matrices, trained beside the adapters when `train` is "lora"."""

    rank: int = 16
    alpha: float = 32.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = MATRICES


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe:
    """A folder of packed shards."""

    path: str
    kind: Kind
    weight: float = 1.0  # share among the datasets of its kind, relative to the others
    name: str = ""  # "" = the folder's name


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    datasets: tuple[DatasetRecipe, ...] = ()
    general: tuple[DatasetRecipe, ...] = ()  # dialogues without picture: what p_concat cuts prefixes and suffixes from
    p_audio: float = 0.25  # exact share of speech samples in every batch
    p_concat: float = 0.0  # share of visual dialogues, of those that leave room, put between general ones
    max_frames: int = 1024  # of a longer speech sample a piece is taken
    max_tokens: int = 1024  # of a longer speechless one
    bucket: int = 64  # lengths are padded to multiples of this, so that shapes repeat
    workers: int = 2  # processes that read; 0 = in the training process
    on_corrupt: Literal["stop", "skip"] = "stop"  # at a damaged shard or picture
    verify: bool = True  # check each shard's sum when it is first read


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe:
    """The cache of the frozen image encoder's outputs."""

    memory_mib: int = 4096
    folder: str | None = None  # keep them on disk too; shared by ranks and runs
    batch: int = 8  # pictures encoded at once on an accelerator


@dataclass(frozen=True, kw_only=True)
class BatchRecipe:
    rows: int = 64  # samples of a step, over all ranks and both kinds
    accumulation: int = 1  # parts in which a rank takes its rows of each kind


@dataclass(frozen=True, kw_only=True)
class LossRecipe:
    """Weights of the formulas in `losses`."""

    text: float = 1.0
    audio: float = 1.0
    padding: float = 0.5  # of a padding token, where a word weighs 1 (ours)
    user: float = 1.0  # of the user's words in speechless samples; 0 leaves them out
    speech: float = 1.0  # of all text of speech samples, which have far fewer words than speechless ones (ours)
    codebooks: int = 2  # own codebooks that are targets, the first ones
    semantic: float = 100.0  # of the first codebook
    acoustic: float = 1.0  # of each other one


@dataclass(frozen=True, kw_only=True)
class OptimiserRecipe:
    """AdamW; linear warm-up, then half a cosine (the numbers are ours).

    With `matrices: muon` matrices are moved by Muon (Jordan et al. 2024), scaled to AdamW's step size, everything else
    by AdamW: the embedded speech LM, trained from nothing, needs a half to a third of the steps with it.
    """

    rate: float = 1e-4
    matrices: Literal["adamw", "muon"] = "adamw"
    warmup: int = 500  # steps
    final: float = 0.1  # share of the rate that is left at the last step
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.1  # of matrices
    clip: float = 1.0  # largest norm of the gradient; 0 = no limit
    # Decay of the averaged weights that are saved and validated in place of the last, smaller at first lest they be
    # mostly those of the beginning; 0 = off.
    ema: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    every: int = 500  # steps
    keep: int = 2  # newest ones that stay
    on_error: Literal["stop", "skip"] = "stop"  # when one cannot be written, as on a full disk


@dataclass(frozen=True, kw_only=True)
class ValidationRecipe:
    every: int = 0  # steps; 0 = never
    datasets: tuple[DatasetRecipe, ...] = ()  # held out
    rows: int = 64  # samples of each kind
    samples: int = 0  # answers that are generated, as audio and transcript


@dataclass(frozen=True, kw_only=True)
class ReportRecipe:
    every: int = 10  # steps between lines of log.jsonl
    tensorboard: bool = False
    wandb: str | None = None  # project
    trackio: str | None = None  # project


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. `recipe_file.read_recipe` makes one."""

    out: str  # folder of checkpoints, logs and results; the same command run again goes on from there
    base: str = "mini"  # embedded model, folder, Hub repository; with random_weights a preset
    random_weights: bool = False
    download: bool = False  # may fetch `base` from the Hub
    seed: int = 0
    steps: int = 50_000
    device: str = "auto"  # "auto" = CUDA if there is any, else the CPU
    train: Literal["adapters", "lora", "all"] = "adapters"  # "all": all but codec and image encoder
    adapters: AdapterRecipe = field(default_factory=AdapterRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    features: FeatureRecipe = field(default_factory=FeatureRecipe)
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    # Of frozen weights and of the arithmetic; trained weights are fp32. "auto" = bf16, but fp32 on a CPU that has no
    # instructions for it and would take dozens of times as long.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several processes: the model whole in each, or sharded
    on_nan: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is not finite
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    report: ReportRecipe = field(default_factory=ReportRecipe)

    def rows(self, ranks: int = 1) -> tuple[int, int]:
        """Speech and speechless rows of a step that each of `ranks` ranks takes.

        Raises InputError unless p_audio gives whole numbers that the ranks share evenly.
        """
        total, share = self.batch.rows, self.data.p_audio
        speech = round(total * share)
        if abs(speech - total * share) > 1e-6 or speech % ranks or (total - speech) % ranks:
            raise InputError(
                f"batch.rows={total} with data.p_audio={share:g} and {ranks} rank(s) gives {total * share / ranks:g} "
                f"speech and {total * (1 - share) / ranks:g} speechless samples a rank; choose rows so that both are "
                "whole numbers"
            )
        return speech // ranks, (total - speech) // ranks

    def kinds(self) -> set[Kind]:
        """Those of which a batch has samples."""
        named: tuple[Kind, Kind] = ("speech", "speechless")
        return {kind for kind, rows in zip(named, self.rows(), strict=True) if rows}

    @property
    def grades_text(self) -> bool:
        """Whether text is a target in any batch."""
        return bool(self.loss.text and (self.data.p_audio < 1 or self.loss.speech))

    @property
    def grades_audio(self) -> bool:
        """Whether the codes of a codebook are."""
        books = self.loss.semantic or (self.loss.codebooks > 1 and self.loss.acoustic)
        return bool(self.loss.audio and self.data.p_audio and books)

    def check(self) -> None:
        """Raise InputError for values that cannot be, or that contradict each other."""
        data, batch, optimiser, loss = self.data, self.batch, self.optimiser, self.loss
        _at_least(1, steps=self.steps)
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be from 0 to 2^63 - 1, not {self.seed}")
        _at_least(1, **{"batch.rows": batch.rows, "batch.accumulation": batch.accumulation})
        _at_least(1, **{"data.max_frames": data.max_frames, "data.max_tokens": data.max_tokens})
        _at_least(1, **{"data.bucket": data.bucket, "features.batch": self.features.batch, "lora.rank": self.lora.rank})
        _at_least(1, **{"checkpoint.every": self.checkpoint.every, "checkpoint.keep": self.checkpoint.keep})
        _at_least(1, **{"report.every": self.report.every, "loss.codebooks": loss.codebooks})
        _at_least(1, **{"validation.rows": self.validation.rows})
        _at_least(0, **{"validation.every": self.validation.every, "validation.samples": self.validation.samples})
        _at_least(0, **{"data.workers": data.workers, "features.memory_mib": self.features.memory_mib})
        _at_least(0, **{"optimiser.rate": optimiser.rate, "optimiser.warmup": optimiser.warmup})
        _at_least(0, **{"optimiser.weight_decay": optimiser.weight_decay, "optimiser.clip": optimiser.clip})
        weights = ("text", "audio", "padding", "user", "speech", "semantic", "acoustic")
        _at_least(0, **{f"loss.{name}": getattr(loss, name) for name in weights})
        shares = {"data.p_audio": data.p_audio, "data.p_concat": data.p_concat, "optimiser.final": optimiser.final}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise InputError(f"{name} is a share from 0 to 1, not {share:g}")
        if not self.adapters.out_scale > 0:
            raise InputError(f"adapters.out_scale must be above 0, not {self.adapters.out_scale:g}")
        if not 0 <= optimiser.ema < 1:
            raise InputError(f"optimiser.ema is a decay from 0 (off) to below 1, not {optimiser.ema:g}")
        if len(optimiser.betas) != 2 or not all(0 <= beta < 1 for beta in optimiser.betas):
            raise InputError(f"optimiser.betas are two numbers from 0 to below 1, not {list(optimiser.betas)}")
        if not 0 < self.lora.alpha < math.inf:
            raise InputError(f"lora.alpha must be above 0, not {self.lora.alpha:g}")
        if not self.lora.targets or not set(self.lora.targets) <= set(MATRICES):
            raise InputError(f"lora.targets are some of {', '.join(MATRICES)}, not {list(self.lora.targets)}")
        self._check_data()
        self._check_use()
        if not (self.grades_text or self.grades_audio):
            raise InputError(
                "with these weights in `loss` and this data.p_audio nothing has a target, so nothing is learnt; set "
                "loss.text, or with speech samples loss.audio, above 0"
            )
        if self.parallel == "fsdp" and optimiser.matrices == "muon":
            raise InputError("optimiser.matrices: muon needs whole matrices in each process: parallel: ddp")
        if self.parallel == "fsdp" and self.validation.samples:
            raise InputError("validation.samples needs the whole model in each process: parallel: ddp")

    def _check_use(self) -> None:
        """Nothing that is asked for may be left out without a word."""
        if self.lora != LoraRecipe() and self.train != "lora":
            raise InputError(f"the recipe sets `lora`, but train is {self.train}; set train=lora")
        if self.data.general and not self.data.p_concat:
            raise InputError("data.general is used by data.p_concat alone, which is 0")
        if (self.validation.datasets or self.validation.samples) and not self.validation.every:
            raise InputError(
                "validation.every=0 means never, but the recipe says what to validate; set it to some steps"
            )

    def _check_data(self) -> None:
        named = {"data": self.data.datasets, "data.general": self.data.general, "validation": self.validation.datasets}
        for where, datasets in named.items():
            for dataset in datasets:
                if not 0 < dataset.weight < math.inf:
                    raise InputError(f"{where}: dataset {dataset.path} needs a weight above 0, not {dataset.weight:g}")
        kinds = {dataset.kind for dataset in self.data.datasets}
        missing = self.kinds() - kinds
        for kind in sorted(missing) if kinds else ():
            share = 0 if kind == "speech" else 1
            raise InputError(
                f"data.p_audio={self.data.p_audio:g} asks for {kind} samples, but data.datasets has none; "
                f"add one, or set data.p_audio={share}"
            )
        lacking = (kinds & self.kinds()) - {dataset.kind for dataset in self.data.general}
        if self.data.p_concat and lacking:
            raise InputError(
                f"data.p_concat={self.data.p_concat:g} needs data.general dialogues of every kind that is trained; "
                f"missing: {', '.join(sorted(lacking))}"
            )
        if self.validation.every and kinds and not self.validation.datasets:
            raise InputError("validation.every is set, but validation.datasets names no held-out data")


def adapter_config(base: AdapterConfig | None, recipe: AdapterRecipe) -> tuple[AdapterConfig | None, bool]:
    """The adapters to train, and whether they start anew rather than from the base's."""
    changes = recipe.changes()
    if base is None:
        return None, False
    changed = dataclasses.replace(base, **changes)  # type: ignore[arg-type]
    if not recipe.fresh and changed == base:
        return base, False
    # Whatever the base does: training gives every layer its own keys and values, and generation has to do the same.
    return dataclasses.replace(changed, stream_keys="own"), True


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:
            raise InputError(f"{name} must be {least:g} or more, not {value:g}")
