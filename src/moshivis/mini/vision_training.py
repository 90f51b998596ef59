"""Stage `vision`: pretrain the image encoder to name, on every patch, what is there and in the whole picture.

A patch names the object that covers it, how many are like it, or the letter and the whole text that it is a part of;
and every patch, background too, names all that occurs in the picture.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.config import VisionConfig
from moshivis.mini import parallel
from moshivis.mini.pictures import ATTRIBUTES, OBJECT_ATTRIBUTES, Pictures
from moshivis.mini.scenes import Scene
from moshivis.mini.stage import Stage, cosine, set_learning_rate
from moshivis.training.precision import quick_precision
from moshivis.training.speed import shorten_vectors
from moshivis.vision import VisionEncoder

STEPS, BATCH, HELD_OUT, RATE = 9000, 24, 500, 2e-3
WRITTEN_SHARE = 0.5  # of a batch, pictures with a writing: reading is what takes longest to learn
PRESENT = [(name, value) for name, values in OBJECT_ATTRIBUTES.items() for value in values]


def train_vision(stage: Stage, config: VisionConfig, pictures: Pictures) -> VisionEncoder:
    """Train (or resume, or just load) the encoder in `stage`; the last pictures measure it."""
    torch.manual_seed(0)
    encoder = VisionEncoder(config)
    look_around(encoder)
    encoder.to(stage.device)
    heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, 1 + len(v)) for name, v in ATTRIBUTES.items()})
    heads["present"] = nn.Linear(config.hidden_size, len(PRESENT))
    heads.to(stage.device)
    muon, adamw = _optimisers(encoder, heads)
    parts = {"encoder": encoder, "heads": heads, "muon": muon, "adamw": adamw}
    if stage.done:
        stage.restore(parts)
        return encoder.cpu().eval()
    training = len(pictures.scenes) - HELD_OUT
    written = [i for i in range(training) if pictures.scenes[i].writing]
    others = [i for i in range(training) if not pictures.scenes[i].writing]
    present = torch.tensor([presence(scene) for scene in pictures.scenes])
    if parallel.worth_compiling(STEPS, stage.device):
        shorten_vectors()
        encoder.compile(dynamic=False)

    def one_step(step: int) -> dict[str, float]:
        encoder.train()
        for optimiser in (muon, adamw):
            set_learning_rate(optimiser, cosine(step, STEPS, RATE, 100))
        rng = random.Random(step)
        count = round(WRITTEN_SHARE * BATCH)
        rows = rng.sample(written, count) + rng.sample(others, BATCH - count)
        labels = torch.from_numpy(pictures.labels[rows]).long().flatten(2).to(stage.device)
        with quick_precision(stage.device):
            features = encoder(pixels_of(pictures, rows, rng).to(stage.device))
            logits = {name: head(features).float() for name, head in heads.items()}
        # background is most of a picture: it weighs little
        losses = {name: _loss(logits[name], labels[:, i]) for i, name in enumerate(ATTRIBUTES)}
        found = present[rows].to(stage.device)[:, None].expand_as(logits["present"])
        losses["present"] = F.binary_cross_entropy_with_logits(logits["present"], found)
        loss = torch.stack(list(losses.values())).sum()
        for optimiser in (muon, adamw):
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        for optimiser in (muon, adamw):
            optimiser.step()
        return {name: value.item() for name, value in losses.items()}

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # shapes of its own
    def evaluate() -> dict[str, float]:
        """Shares of the patches that show something of a kind on which it is named; of background that is known."""
        encoder.eval()
        rows = list(range(training, training + HELD_OUT))
        parts = [pixels_of(pictures, rows[i : i + 50]).to(stage.device) for i in range(0, HELD_OUT, 50)]
        features = torch.cat([encoder(part) for part in parts])
        labels = torch.from_numpy(pictures.labels[rows]).flatten(2).to(stage.device)
        accuracy = {}
        for i, name in enumerate(ATTRIBUTES):
            right = heads[name](features).argmax(-1) == labels[:, i]
            accuracy[name] = right[labels[:, i] > 0].float().mean().item()
            if name == "shape":
                accuracy["background"] = right[labels[:, i] == 0].float().mean().item()
        found = heads["present"](features) > 0
        accuracy["present"] = (found == present[rows].to(stage.device)[:, None].bool()).float().mean().item()
        return accuracy

    stage.train(STEPS, parts, one_step, evaluate, evaluate_every=1000)
    measured = evaluate()
    encoder.cpu().eval()
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


def presence(scene: Scene) -> list[float]:
    """1 for each of PRESENT that occurs in the scene, else 0."""
    return [float(any(getattr(thing, name) == value for thing in scene.objects)) for name, value in PRESENT]


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
