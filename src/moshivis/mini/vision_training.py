"""Stage `vision`: pretrain the image encoder to name, on every patch, the object that covers it."""

from __future__ import annotations

import random

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.config import VisionConfig
from moshivis.mini.pictures import ATTRIBUTES, Pictures
from moshivis.mini.stage import Stage, cosine, set_learning_rate
from moshivis.training.speed import half_precision
from moshivis.vision import VisionEncoder

STEPS, BATCH, HELD_OUT, RATE = 2200, 20, 500, 2e-3


def train_vision(stage: Stage, config: VisionConfig, pictures: Pictures) -> VisionEncoder:
    """Train (or resume, or just load) the encoder in `stage`; the last pictures measure it."""
    torch.manual_seed(0)
    encoder = VisionEncoder(config)
    look_around(encoder)
    encoder.to(stage.device)
    heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, 1 + len(v)) for name, v in ATTRIBUTES.items()})
    heads.to(stage.device)
    muon, adamw = _optimisers(encoder, heads)
    parts = {"encoder": encoder, "heads": heads, "muon": muon, "adamw": adamw}
    if stage.done:
        stage.restore(parts)
        return encoder.cpu().eval()
    training = len(pictures.scenes) - HELD_OUT

    def one_step(step: int) -> dict[str, float]:
        encoder.train()
        for optimiser in (muon, adamw):
            set_learning_rate(optimiser, cosine(step, STEPS, RATE, 100))
        rng = random.Random(step)
        rows = rng.sample(range(training), BATCH)
        labels = torch.from_numpy(pictures.labels[rows]).long().flatten(2).to(stage.device)
        with half_precision(stage.device):
            features = encoder(pixels_of(pictures, rows, rng).to(stage.device))
            logits = {name: head(features) for name, head in heads.items()}
        # background is most of a picture: it weighs little
        losses = {name: _loss(logits[name].float(), labels[:, i]) for i, name in enumerate(ATTRIBUTES)}
        loss = torch.stack(list(losses.values())).sum()
        for optimiser in (muon, adamw):
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        for optimiser in (muon, adamw):
            optimiser.step()
        return {name: value.item() for name, value in losses.items()}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        encoder.eval()
        rows = list(range(training, training + HELD_OUT))
        parts = [pixels_of(pictures, rows[i : i + 50]).to(stage.device) for i in range(0, HELD_OUT, 50)]
        features = torch.cat([encoder(part) for part in parts])
        labels = torch.from_numpy(pictures.labels[rows]).flatten(2).to(stage.device)
        covered = labels[:, 0] > 0
        right = {name: head(features).argmax(-1) == labels[:, i] for i, (name, head) in enumerate(heads.items())}
        accuracy = {name: hit[covered].float().mean().item() for name, hit in right.items()}
        return {**accuracy, "background": right["shape"][~covered].float().mean().item()}

    stage.train(STEPS, parts, one_step, evaluate, evaluate_every=1000)
    measured = evaluate()
    encoder.cpu().eval()
    save_file(encoder.state_dict(), stage.folder / "vision.safetensors")
    stage.finish(measured)
    return encoder


def _optimisers(encoder: VisionEncoder, heads: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the encoder's blocks, AdamW for everything else."""
    named = [*encoder.named_parameters(), *heads.named_parameters()]
    matrices = [parameter for name, parameter in named if ".layers." in name and parameter.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for _, parameter in named if id(parameter) not in chosen]
    return (
        torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.02),
    )


@torch.no_grad()
def look_around(encoder: VisionEncoder) -> None:
    """Start with smooth positions, and attention that looks at neighbours.

    A transformer that starts from random positions spends most of a short training on finding out what is near what;
    shapes come after that.
    """
    config = encoder.config
    table = encoder.get_parameter("model.embeddings.position_embedding.weight")
    side, quarter = config.image_size // config.patch_size, config.hidden_size // 4
    frequencies = torch.logspace(-1, 0.3, quarter)  # radians a patch
    angles = torch.arange(side)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, hidden / 2]
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    table.copy_(torch.cat([rows, columns], dim=-1).flatten(0, 1))
    for name, parameter in encoder.named_parameters():
        if name.endswith("q_proj.weight"):
            nn.init.orthogonal_(parameter, gain=1.5)
            encoder.get_parameter(name.replace("q_proj", "k_proj")).copy_(parameter)


def pixels_of(pictures: Pictures, rows: list[int], rng: random.Random | None = None) -> Tensor:
    """Pixels [B, 3, S, S] as the encoder expects them; with `rng`, brightness and noise vary a little."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures.pixels[rows])).float() / 127.5 - 1
    if rng is not None:
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        gain = 1 + 0.08 * torch.randn(len(rows), 3, 1, 1, generator=generator)
        pixels = pixels * gain + 0.03 * torch.randn(pixels.shape, generator=generator)
    return pixels


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = 0.2
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)
