"""Stages `language` and `adapters`: pretrain the speech LM without pictures; then freeze it and let it see.

Both train on a mix of spoken and written samples with one loss: weighted text cross-entropy, audio cross-entropy of
the depth transformer on a choice of frames, and, in pretraining only, an auxiliary loss on the user's words read
from the middle of the backbone, which teaches a small model to hear.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.adapters.gated_cross_attention import GatedCrossAttention
from moshivis.config import ModelConfig
from moshivis.mini import parallel
from moshivis.mini.batches import EXTRA_FRAMES, Batch, heard_weight, spoken_batch, written_batch
from moshivis.mini.clips import ClipStore
from moshivis.mini.codes import ClipCodes
from moshivis.mini.dialogues import IGNORE, SCENE_FAMILIES, Spoken, Written
from moshivis.mini.grammar import FAMILIES
from moshivis.mini.pictures import Pictures
from moshivis.mini.recipe import CODEBOOKS, FRAMES, TOKENS
from moshivis.mini.scenes import Scene
from moshivis.mini.stage import Stage, cosine, set_learning_rate
from moshivis.speech_lm.lm import SpeechLM
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, TextTokenizer
from moshivis.training.speed import half_precision
from moshivis.vision import ImageProjection

LANGUAGE_STEPS, LANGUAGE_WARMUP = 8000, 200
MATRIX_RATE, LANGUAGE_RATE = 1.5e-3, 1e-3  # of the backbone's matrices, by Muon; of everything else, by AdamW
SPOKEN_ROWS, WRITTEN_ROWS = 16, 48  # of a pretraining step, over all workers
ADAPTER_STEPS, ADAPTER_RATE, ADAPTER_WARMUP = 2000, 2e-3, 50
ADAPTER_SPOKEN_ROWS, ADAPTER_WRITTEN_ROWS = 12, 36  # p_audio = a quarter, as in the paper
PADDING_WEIGHT, USER_WEIGHT, AUDIO_WEIGHT, SEMANTIC_WEIGHT = 0.3, 0.1, 0.4, 3.0
HEARD_LAYER = 2  # block whose output is asked for the user's words
HELD_OUT_PICTURES = 500


class Learner(nn.Module):
    """The speech LM, with or without adapters, and its losses."""

    def __init__(self, config: ModelConfig, *, sees: bool):
        super().__init__()
        lm = config.speech_lm
        self.config = lm
        self.lm = SpeechLM(lm)
        self.heard = nn.Linear(lm.backbone.dim, lm.text_card)
        self._middle: Tensor | None = None
        self.lm.backbone.layers[HEARD_LAYER].register_forward_hook(self._remember)
        if sees:
            assert config.adapters is not None
            self.projection = ImageProjection(config.vision.hidden_size, lm.backbone.dim, config.vision.projection_norm)
            self.adapters = GatedCrossAttention(
                config.adapters, lm.backbone.dim, lm.backbone.num_heads, lm.backbone.num_layers
            )

    def _remember(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._middle = output

    def forward(self, batch: Batch, image: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Losses by name, and the text predictions [B, T]; `image` [B, S, enc] is the encoder's output."""
        fusion = None
        if image is not None:
            fusion = self.adapters.context(self.adapters.encode(self.projection(image)), batch.inputs.shape[-1])
        hidden, logits = self.lm(batch.inputs, fusion)
        losses = {"text": _weighted(logits, batch.text, batch.text_weight)}
        if bool(batch.depth.any()):
            losses["audio"] = self._audio_loss(hidden[batch.depth], batch)
        if image is None and bool((batch.heard != IGNORE).any()):
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
    """Cross-entropy over the targets' weights, normalised by the number of targets that are not padding."""
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


def train_language(stage: Stage, config: ModelConfig, sources: Sources, workers: int) -> None:
    """Pretrain the speech LM; its weights end in `stage`'s folder as language.safetensors."""
    if not stage.done:
        parallel.run(workers, _language_worker, stage.folder, stage.device, config, sources)


def _language_worker(
    rank: int, workers: int, folder: Path, device: torch.device, config: ModelConfig, sources: Sources
) -> None:
    stage = Stage(folder, device, leader=rank == 0)
    torch.manual_seed(0)
    learner = Learner(config, sees=False).to(device)
    parallel.compile_for_training(learner.lm.backbone, LANGUAGE_STEPS)
    muon, adamw = _optimisers(learner, learner.lm.backbone, weight_decay=0.05)
    spoken, written = sources.open()

    def batches(rng: random.Random, rows: tuple[int, int]) -> list[Batch]:
        return [
            spoken_batch([spoken.without_picture(rng) for _ in range(rows[0])], config.speech_lm, FRAMES, rng),
            written_batch([written.without_picture(rng) for _ in range(rows[1])], config.speech_lm),
        ]

    def one_step(step: int) -> dict[str, float]:
        set_learning_rate(muon, cosine(step, LANGUAGE_STEPS, MATRIX_RATE, LANGUAGE_WARMUP))
        set_learning_rate(adamw, cosine(step, LANGUAGE_STEPS, LANGUAGE_RATE, LANGUAGE_WARMUP))
        rng = random.Random(f"language {step} {rank}")
        pair = batches(rng, (SPOKEN_ROWS // workers, WRITTEN_ROWS // workers))
        return _learn(learner, [muon, adamw], pair, [None, None], workers)

    def evaluate() -> dict[str, float]:
        return _accuracies(learner, batches(random.Random("language held out"), (24, 48)), [None, None])

    parts = {"learner": learner, "muon": muon, "adamw": adamw}
    stage.train(LANGUAGE_STEPS, parts, one_step, evaluate, evaluate_every=250)
    if rank == 0:
        measured = evaluate()
        save_file(learner.cpu().lm.state_dict(), folder / "language.safetensors")
        stage.finish(measured)


def train_adapters(
    stage: Stage,
    config: ModelConfig,
    sources: Sources,
    pictures: Pictures,
    features: Path,
    language: Path,
    workers: int,
) -> None:
    """Train projection and adapters on the frozen speech LM in `language`; they end in adapters.safetensors.

    `features` is an array [N, S, enc] with the frozen encoder's output for every picture.
    """
    if not stage.done:
        arguments = (stage.folder, stage.device, config, sources, pictures.scenes, features, language)
        parallel.run(workers, _adapter_worker, *arguments)


def _adapter_worker(
    rank: int,
    workers: int,
    folder: Path,
    device: torch.device,
    config: ModelConfig,
    sources: Sources,
    scenes: list[Scene],
    features: Path,
    language: Path,
) -> None:
    stage = Stage(folder, device, leader=rank == 0)
    torch.manual_seed(0)
    learner = Learner(config, sees=True).to(device)
    learner.lm.load_state_dict(load_file(language))
    learner.requires_grad_(False)
    parallel.compile_for_training(learner.lm.backbone, ADAPTER_STEPS)
    trained = nn.ModuleDict({"projection": learner.projection, "adapters": learner.adapters}).requires_grad_(True)
    muon, adamw = _optimisers(trained, trained, weight_decay=0.02)
    spoken, written = sources.open()
    seen = load_file(features)["features"]
    training = len(scenes) - HELD_OUT_PICTURES
    families = (*SCENE_FAMILIES, *SCENE_FAMILIES, *FAMILIES)

    def batches(rng: random.Random, rows: tuple[int, int], choices: range) -> tuple[list[Batch], list[Tensor | None]]:
        chosen = [[rng.choice(choices) for _ in range(count)] for count in rows]
        heard = [spoken.with_picture(scenes[i], rng, families) for i in chosen[0]]
        read = [written.with_picture(scenes[i], rng, families) for i in chosen[1]]
        made = [spoken_batch(heard, config.speech_lm, FRAMES, rng), written_batch(read, config.speech_lm)]
        return made, [seen[picks].float() for picks in chosen]

    def one_step(step: int) -> dict[str, float]:
        for optimiser in (muon, adamw):
            set_learning_rate(optimiser, cosine(step, ADAPTER_STEPS, ADAPTER_RATE, ADAPTER_WARMUP))
        rng = random.Random(f"adapters {step} {rank}")
        pair, images = batches(rng, (ADAPTER_SPOKEN_ROWS // workers, ADAPTER_WRITTEN_ROWS // workers), range(training))
        return _learn(learner, [muon, adamw], pair, images, workers)

    def evaluate() -> dict[str, float]:
        held_out = range(training, len(scenes))
        return _accuracies(learner, *batches(random.Random("adapters held out"), (24, 48), held_out))

    parts = {"trained": trained, "muon": muon, "adamw": adamw}
    stage.train(ADAPTER_STEPS, parts, one_step, evaluate, evaluate_every=250)
    if rank == 0:
        measured = evaluate()
        save_file(trained.cpu().state_dict(), folder / "adapters.safetensors")
        stage.finish(measured)


# ----------------------------------------------------------------------------------------------------------------------


def _optimisers(
    learner: nn.Module, inner: nn.Module, weight_decay: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of `inner`, which learn two to three times as fast by it, AdamW for everything else."""
    matrices = [parameter for parameter in inner.parameters() if parameter.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in learner.parameters() if id(parameter) not in chosen]
    return (
        torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True),
    )


def _learn(
    learner: Learner,
    optimisers: list[torch.optim.Optimizer],
    batches: list[Batch],
    images: list[Tensor | None],
    workers: int,
) -> dict[str, float]:
    """One optimiser step on a spoken and a written batch."""
    device = learner.heard.weight.device
    learner.train()
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    values: dict[str, float] = {}
    for name, batch, image in zip(("spoken", "written"), batches, images, strict=True):
        with half_precision(device):
            losses, _ = learner(batch.to(device), None if image is None else image.to(device))
        total = losses["text"] + AUDIO_WEIGHT * losses.get("audio", 0.0) + losses.get("heard", 0.0)
        total.backward()
        values |= {f"{name}_{part}": loss.item() for part, loss in losses.items()}
    trained = [p for p in learner.parameters() if p.requires_grad]
    parallel.average_gradients(trained, workers)
    nn.utils.clip_grad_norm_(trained, 1.0)
    for optimiser in optimisers:
        optimiser.step()
    return values


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # shapes of its own
def _accuracies(learner: Learner, batches: list[Batch], images: list[Tensor | None]) -> dict[str, float]:
    """Share of the assistant's text tokens that are predicted, and of its sentences that are predicted throughout."""
    device = learner.heard.weight.device
    learner.eval()
    result = {}
    for name, batch, image in zip(("spoken", "written"), batches, images, strict=True):
        batch = batch.to(device)
        with half_precision(device):
            losses, predicted = learner(batch, None if image is None else image.to(device))
        said = (batch.text_weight == 1) & (batch.text != PADDING) & (batch.text != END_OF_PADDING)
        right = predicted == batch.text
        result[f"{name}_token_accuracy"] = right[said].float().mean().item()
        result |= {f"held_out_{name}_{part}": loss.item() for part, loss in losses.items()}
    return result
