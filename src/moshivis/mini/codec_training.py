"""Stage `codec`: train the miniature's codec on the spoken clips.

First as an autoencoder without a quantizer, then k-means codebooks, then quantised with moving-average codebooks,
commitment, dropout of acoustic levels and a semantic codebook that is distilled from the recogniser's features.

Stage `voice`: the codes stay, and the decoding half goes on learning, mostly the voice that it has to speak with, and
to be understood: what it decodes should be to the recogniser what was encoded. It may run at any time after the codec.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.codec import Mimi
from moshivis.codec.losses import random_resolutions, spectral_loss
from moshivis.config import CodecConfig
from moshivis.evaluation.recogniser import WIDTH as RECOGNISER_WIDTH
from moshivis.evaluation.recogniser import Recogniser
from moshivis.layers.conv import CausalConv1d, CausalConvTranspose1d
from moshivis.mini.augment import augment
from moshivis.mini.clips import ClipStore
from moshivis.mini.stage import Stage, cosine, set_learning_rate
from moshivis.training.precision import quick_precision

AUTOENCODER_STEPS, QUANTISED_STEPS, VOICE_STEPS = 1500, 3000, 2400
BATCH, CROP_FRAMES = 4, 16
ASSISTANT_SHARE = 0.35  # the voice that the model must speak with
BYPASS, DROPOUT = 0.1, 0.35
WORDS_WEIGHT = 2.0


def train_codec(stage: Stage, config: CodecConfig, clips: ClipStore, teacher: Callable[[], Recogniser]) -> Mimi:
    """Train (or resume, or just load) the codec in `stage`. `teacher` is called when distillation begins."""
    torch.manual_seed(0)
    codec = Mimi(config)
    initialise(codec)
    codec.to(stage.device)
    trainer = _Trainer(codec, clips, teacher, stage.device)
    parts = {"codec": codec, "student": trainer.student, "optimiser": trainer.optimiser}
    total = AUTOENCODER_STEPS + QUANTISED_STEPS
    if stage.done:
        stage.restore(parts)
        return codec.cpu().eval()
    stage.train(total, parts, trainer.step, trainer.evaluate, evaluate_every=1000)
    evaluation = trainer.evaluate(rows=32)
    codec.cpu().eval()
    stage.finish(evaluation)
    return codec


def train_voice(
    stage: Stage, codec: Mimi, clips: ClipStore, teacher: Callable[[], Recogniser], num_codebooks: int
) -> Mimi:
    """Train (or resume, or just load) the decoding half of `codec`; its codes do not change."""
    decoding = nn.ModuleDict(
        {
            "semantic": codec.quantizer.semantic.output_proj,
            "acoustic": codec.quantizer.acoustic.output_proj,
            "upsample": codec.upsample,
            "transformer": codec.decoder_transformer,
            "decoder": codec.decoder,
        }
    )
    optimiser = torch.optim.AdamW(decoding.parameters(), lr=1e-3, betas=(0.8, 0.99), weight_decay=1e-3)
    parts = {"decoding": decoding, "optimiser": optimiser}
    if stage.done:
        stage.restore(parts)
        return codec.cpu().eval()
    codec.to(stage.device).requires_grad_(False)
    decoding.requires_grad_(True)
    crops = Crops(clips, codec.config, assistant_share=0.9)
    recogniser = teacher().to(stage.device).requires_grad_(False)

    def unlike(estimate: Tensor, wave: Tensor) -> Tensor:
        heard, meant = (recogniser.features(x[:, 0]) for x in (estimate, delayed(codec.config, wave)))
        return 1 - F.cosine_similarity(heard.float(), meant.float(), dim=1).mean()

    def one_step(step: int) -> dict[str, float]:
        set_learning_rate(optimiser, cosine(step, VOICE_STEPS, 1e-3, 100))
        rng = random.Random(f"voice {step}")
        wave = crops.batch(rng, 6).to(stage.device)
        with quick_precision(stage.device):
            with torch.no_grad():
                codes = codec.encode(wave, num_codebooks)
            estimate = codec.decode(codes)
        loss = reconstruction_loss(codec.config, estimate, wave, random_resolutions(rng))
        words = unlike(estimate, wave)
        optimiser.zero_grad(set_to_none=True)
        (loss + WORDS_WEIGHT * words).backward()
        nn.utils.clip_grad_norm_(decoding.parameters(), 1.0)
        optimiser.step()
        return {"reconstruction": loss.item(), "words": words.item()}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        wave = crops.batch(random.Random(778), 32).to(stage.device)
        estimate = codec.decode(codec.encode(wave, num_codebooks))
        loss = reconstruction_loss(codec.config, estimate, wave, [512, 2048])
        return {"loss": loss.item(), "words": unlike(estimate, wave).item()}

    stage.train(VOICE_STEPS, parts, one_step, evaluate, evaluate_every=500)
    stage.finish(evaluate())
    return codec.cpu().eval()


class _Trainer:
    def __init__(self, codec: Mimi, clips: ClipStore, teacher: Callable[[], Recogniser], device: torch.device):
        self.codec, self.device = codec, device
        self.teacher = functools.cache(lambda: teacher().to(device))
        self.student = nn.Conv1d(codec.config.dimension, RECOGNISER_WIDTH, 1).to(device)
        parameters = [*codec.parameters(), *self.student.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.8, 0.99), weight_decay=1e-3)
        self.crops = Crops(clips, codec.config)
        self.levels = codec.quantizer.num_codebooks

    def step(self, step: int) -> dict[str, float]:
        quantised = step >= AUTOENCODER_STEPS
        rng = random.Random(step)
        torch.manual_seed(step)  # of k-means and of dead entries, else a resumed training would draw them anew
        if step == AUTOENCODER_STEPS:
            self.initialise_codebooks()
        self.codec.quantizer.count_from(max(0, step - AUTOENCODER_STEPS))
        set_learning_rate(self.optimiser, _rate(step))
        self.codec.train()
        wave = self.crops.batch(rng, BATCH).to(self.device)
        with quick_precision(self.device):
            if not quantised:
                estimate = self.codec.decode_latent(self.codec.encode_to_latent(wave))
                penalty = distance = wave.new_zeros(())
            else:
                levels = rng.randint(2, self.levels) if rng.random() < DROPOUT else self.levels
                bypass = torch.tensor([rng.random() < BYPASS for _ in range(BATCH)], device=self.device)
                output = self.codec(wave, levels, bypass)
                estimate, penalty = output.wave, output.penalty
                distance = self.distance(output.semantic, wave)
        reconstruction = reconstruction_loss(self.codec.config, estimate, wave, random_resolutions(rng))
        loss = reconstruction + 0.25 * penalty + distance
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.codec.parameters(), 1.0)
        self.optimiser.step()
        values = {"reconstruction": reconstruction, "penalty": penalty, "semantic": distance}
        return {name: value.item() for name, value in values.items()}

    def distance(self, semantic: Tensor | None, wave: Tensor) -> Tensor:
        """1 - cosine similarity of the student's projection to the recogniser's features, pooled to frames."""
        assert semantic is not None
        with torch.no_grad():
            target = F.avg_pool1d(self.teacher().features(wave[:, 0]).float(), self.codec.config.resample_stride)
        return 1 - F.cosine_similarity(self.student(semantic).float(), target, dim=1).mean()

    @torch.no_grad()
    def initialise_codebooks(self) -> None:
        self.codec.eval()
        rng = random.Random(12345)
        latents = torch.cat([self.codec.encode_to_latent(self.crops.batch(rng, 16).to(self.device)) for _ in range(25)])
        self.codec.quantizer.train()
        for _ in range(self.levels):  # every pass initialises one more level
            self.codec.quantizer(latents, self.levels)

    @torch.no_grad()
    def evaluate(self, rows: int = 16) -> dict[str, float]:
        self.codec.eval()
        wave = self.crops.batch(random.Random(777), rows).to(self.device)
        latent = self.codec.encode_to_latent(wave)
        result = {}
        if bool(self.codec.quantizer.semantic.levels[0].initialized):
            codes = self.codec.quantizer.encode(latent, self.levels)
            for levels in (4, 6, 8):
                estimate = self.codec.decode(codes[:, :levels])
                result[f"loss_{levels}_codebooks"] = reconstruction_loss(
                    self.codec.config, estimate, wave, [512, 2048]
                ).item()
            used = [float(len(codes[:, k].unique())) for k in range(self.levels)]
            result["codes_used"] = sum(used) / len(used)
        estimate = self.codec.decode_latent(latent)
        return {
            "loss_unquantised": reconstruction_loss(self.codec.config, estimate, wave, [512, 2048]).item(),
            **result,
        }


def reconstruction_loss(config: CodecConfig, estimate: Tensor, wave: Tensor, windows: list[int]) -> Tensor:
    """Spectral distance of the decoded waves to the encoded ones [B, 1, T], which they lag by the decoder's delay."""
    aligned = delayed(config, wave)
    loss = spectral_loss(estimate[:, 0], aligned[:, 0], config.sample_rate, windows)
    # log distances alone leave the energy too low
    energy = (estimate.square().mean(-1) + 1e-5).log() - (aligned.square().mean(-1) + 1e-5).log()
    return loss + 0.05 * energy.abs().mean()


def delayed(config: CodecConfig, wave: Tensor) -> Tensor:
    """The wave [B, 1, T] as late as the decoder gives it."""
    return F.pad(wave, (config.decoder_delay, 0))[..., : wave.shape[-1]]


def _rate(step: int) -> float:
    if step < AUTOENCODER_STEPS:
        return 2e-3 * min(1.0, (step + 1) / 100)
    return cosine(step - AUTOENCODER_STEPS, QUANTISED_STEPS, 1.2e-3, 100)


class Crops:
    """Random excerpts of clips, with some silence around them."""

    def __init__(self, clips: ClipStore, config: CodecConfig, assistant_share: float = ASSISTANT_SHARE):
        self.clips, self.assistant_share = clips, assistant_share
        self.samples = CROP_FRAMES * config.frame_size
        self.assistant = [i for i, clip in enumerate(clips.clips) if clip.role == "assistant"]
        self.user = [i for i, clip in enumerate(clips.clips) if clip.role == "user"]

    def batch(self, rng: random.Random, rows: int) -> Tensor:
        """[rows, 1, samples]; the assistant's voice clean, the users' augmented."""
        return torch.from_numpy(np.stack([self.crop(rng) for _ in range(rows)]))[:, None]

    def crop(self, rng: random.Random) -> np.ndarray:
        assistant = bool(self.assistant) and rng.random() < self.assistant_share
        clip = self.clips.audio(rng.choice(self.assistant if assistant else self.user))
        start = rng.randint(-self.samples // 3, max(0, len(clip) - self.samples // 2))
        piece = np.zeros(self.samples, np.float32)
        source = clip[max(0, start) : start + self.samples]
        piece[max(0, -start) : max(0, -start) + len(source)] = source
        return piece if assistant else augment(piece, np.random.default_rng(rng.getrandbits(32)))


@torch.no_grad()
def initialise(codec: Mimi) -> None:
    """Variance-preserving weights: PyTorch's own defaults let the signal of a deep convolutional stack die out."""
    for module in codec.modules():
        if isinstance(module, (CausalConv1d, CausalConvTranspose1d)):
            conv = module.conv if isinstance(module, CausalConv1d) else module.convtr
            if isinstance(module, CausalConv1d):
                fan_in = conv.weight[0].numel()
            else:
                fan_in = 2 * (1 if module.depthwise else conv.in_channels)  # two inputs reach every output
            conv.weight.normal_(0, math.sqrt(1 / fan_in))
            if conv.bias is not None:
                conv.bias.zero_()
    first = codec.encoder.model[0]
    assert isinstance(first, CausalConv1d)
    first.conv.weight.mul_(6)  # speech is quiet: bring it to unit scale
    if codec.config.decoder == "istft":
        head = codec.decoder.head
        assert isinstance(head, nn.Linear)
        head.weight.mul_(0.5)
        head.bias[: head.out_features // 2] = -1.0
