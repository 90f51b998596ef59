"""Stage `language`: pretrain the speech LM without pictures.

It trains on a mix of spoken and written samples with one loss: weighted text cross-entropy, audio cross-entropy of
the depth transformer on a choice of frames, and an auxiliary loss on the user's words read from the middle of the
backbone, which teaches a small model to hear.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.checkpoints.load import load_model
from moshivis.config import ModelConfig
from moshivis.mini import parallel
from moshivis.mini.batches import EXTRA_FRAMES, Batch, heard_weight, spoken_batch, written_batch
from moshivis.mini.clips import ClipStore
from moshivis.mini.codes import ClipCodes
from moshivis.mini.dialogues import Spoken
from moshivis.mini.recipe import CODEBOOKS, FRAMES, TOKENS
from moshivis.mini.stage import Stage, cosine
from moshivis.mini.timeline import IGNORE
from moshivis.mini.written_dialogues import Written
from moshivis.speech_lm.lm import SpeechLM
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, TextTokenizer
from moshivis.training.precision import quick_precision
from moshivis.training.speed import shorten_vectors

PADDING_WEIGHT, USER_WEIGHT, AUDIO_WEIGHT, SEMANTIC_WEIGHT = 0.3, 0.1, 0.4, 3.0
HEARD_LAYER = 3  # block whose output is asked for the user's words
EARS_RATE = 4e-3  # of what reads them, while nothing else learns


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast the speech LM learns, and with what it begins."""

    steps: int = 8000
    warmup: int = 200
    matrix_rate: float = 1.5e-3  # of the backbone's matrices, by Muon
    rate: float = 1e-3  # of everything else, by AdamW
    spoken_rows: int = 24  # of a step, over all workers
    written_rows: int = 28
    start: Path | None = None  # a finished model; None = random weights
    ears: int = 0  # first steps, in which only what reads the user's words from the middle learns: no model has it
    seed: int = 0


class Learner(nn.Module):
    """The speech LM and its losses."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        lm = config.speech_lm
        self.config = lm
        self.lm = SpeechLM(lm)
        self.heard = nn.Linear(lm.backbone.dim, lm.text_card)
        self._middle: Tensor | None = None
        self.lm.backbone.layers[HEARD_LAYER].register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._middle = output

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Losses by name, and the text predictions [B, T]."""
        hidden, logits = self.lm(batch.inputs)
        losses = {"text": _weighted(logits, batch.text, batch.text_weight)}
        if bool(batch.depth.any()):
            losses["audio"] = self._audio_loss(hidden[batch.depth], batch)
        if bool((batch.heard != IGNORE).any()):
            assert self._middle is not None
            losses["heard"] = _weighted(self.heard(self._middle), batch.heard, heard_weight(batch.heard))
        return losses, logits.argmax(-1)

    def _audio_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        text, audio = batch.text[batch.depth], batch.audio.transpose(1, 2)[batch.depth]  # [N], [N, own]
        given = torch.where(audio == IGNORE, self.config.audio_card, audio)
        logits = self.lm.depth_logits(hidden, text, given)
        loss = F.cross_entropy(logits.float().flatten(0, 1), audio.flatten(), ignore_index=IGNORE, reduction="none")
        weight = torch.ones(audio.shape[1], device=audio.device)
        weight[0] = SEMANTIC_WEIGHT
        weights = weight * (audio != IGNORE)
        return (loss.view(audio.shape) * weights).sum() / weights.sum()


def _weighted(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross-entropy over the sum of the weights of targets that are not padding."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="none")
    return (loss * weight.flatten()).sum() / (weight * (target != PADDING)).sum().clamp(min=1)


@dataclass(frozen=True)
class Sources:
    """What the samples are made of; opened anew by every worker process."""

    clips: Path
    codes: Path
    tokenizer: Path

    def open(self) -> tuple[Spoken, Written]:
        tokenizer = TextTokenizer.load(self.tokenizer)
        codes = ClipCodes(self.codes, ClipStore(self.clips))
        spoken = Spoken(codes, tokenizer, FRAMES + EXTRA_FRAMES, CODEBOOKS, PADDING_WEIGHT)
        return spoken, Written(tokenizer, TOKENS, CODEBOOKS, USER_WEIGHT)


# ----------------------------------------------------------------------------------------------------------------------


def train_language(
    stage: Stage, config: ModelConfig, sources: Sources, workers: int, schedule: Schedule = Schedule()
) -> None:
    """Pretrain the speech LM; its weights end in `stage`'s folder as language.safetensors."""
    if not stage.done:
        parallel.run(workers, _language_worker, stage.folder, stage.device, config, sources, schedule)


def _language_worker(
    rank: int,
    workers: int,
    folder: Path,
    device: torch.device,
    config: ModelConfig,
    sources: Sources,
    schedule: Schedule,
) -> None:
    stage = Stage(folder, device, leader=rank == 0)
    torch.manual_seed(schedule.seed)
    learner = Learner(config)
    if schedule.start is not None:
        learner.lm.load_state_dict(load_model(schedule.start).model.speech_lm.state_dict())
    learner.to(device)
    if parallel.worth_compiling(schedule.steps, device):
        shorten_vectors()
        learner.lm.backbone.compile(dynamic=False)
    muon, adamw = _optimisers(learner)
    spoken, written = sources.open()

    def batches(rng: random.Random, rows: tuple[int, int]) -> list[Batch]:
        return [
            spoken_batch([spoken.without_picture(rng) for _ in range(rows[0])], config.speech_lm, FRAMES, rng),
            written_batch([written.without_picture(rng) for _ in range(rows[1])], config.speech_lm),
        ]

    def one_step(step: int) -> dict[str, float]:
        for optimiser, rates in zip((muon, adamw), _rates(step, schedule), strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate
        rng = random.Random(f"language {schedule.seed} {step} {rank}")
        pair = batches(rng, (schedule.spoken_rows // workers, schedule.written_rows // workers))
        return _learn(learner, [muon, adamw], pair, workers)

    def evaluate() -> dict[str, float]:
        return _accuracies(learner, batches(random.Random("language held out"), (24, 48)))

    parts = {"learner": learner, "muon": muon, "adamw": adamw}
    stage.train(schedule.steps, parts, one_step, evaluate, evaluate_every=250)
    if rank == 0:
        measured = evaluate()
        save_file(learner.cpu().lm.state_dict(), folder / "language.safetensors")
        stage.finish(measured)


# ----------------------------------------------------------------------------------------------------------------------


def _optimisers(learner: Learner) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the backbone's matrices, which learn two to three times as fast by it, AdamW for everything else."""
    matrices = [parameter for parameter in learner.lm.backbone.parameters() if parameter.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in learner.lm.parameters() if id(parameter) not in chosen]
    groups = [{"params": others}, {"params": list(learner.heard.parameters())}]
    return (
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.05, fused=True),
    )


def _rates(step: int, schedule: Schedule) -> tuple[list[float], list[float]]:
    """Learning rates of Muon's group and of AdamW's two."""
    if step < schedule.ears:
        return [0.0], [0.0, EARS_RATE]
    then, steps = step - schedule.ears, schedule.steps - schedule.ears
    rate = cosine(then, steps, schedule.rate, schedule.warmup)
    return [cosine(then, steps, schedule.matrix_rate, schedule.warmup)], [rate, rate]


def _learn(
    learner: Learner, optimisers: list[torch.optim.Optimizer], batches: list[Batch], workers: int
) -> dict[str, float]:
    """One optimiser step on a spoken and a written batch."""
    device = learner.heard.weight.device
    learner.train()
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    values: dict[str, float] = {}
    for name, batch in zip(("spoken", "written"), batches, strict=True):
        with quick_precision(device):
            losses, _ = learner(batch.to(device))
        total = losses["text"] + AUDIO_WEIGHT * losses.get("audio", 0.0) + losses.get("heard", 0.0)
        total.backward()
        values |= {f"{name}_{part}": loss.item() for part, loss in losses.items()}
    trained = list(learner.parameters())
    parallel.average_gradients(trained, workers)
    norm = nn.utils.clip_grad_norm_(trained, 1.0)
    for optimiser in optimisers:
        optimiser.step()
    return values | {"norm": norm.item()}  # of all workers: one that is not finite ends the training in each


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # shapes of its own
def _accuracies(learner: Learner, batches: list[Batch]) -> dict[str, float]:
    """Share of the assistant's text tokens that are predicted."""
    device = learner.heard.weight.device
    learner.eval()
    result = {}
    for name, batch in zip(("spoken", "written"), batches, strict=True):
        batch = batch.to(device)
        with quick_precision(device):
            losses, predicted = learner(batch)
        said = (batch.text_weight >= 1) & (batch.text != PADDING) & (batch.text != END_OF_PADDING)
        right = predicted == batch.text
        result[f"{name}_token_accuracy"] = right[said].float().mean().item()
        result |= {f"held_out_{name}_{part}": loss.item() for part, loss in losses.items()}
    return result
