"""Stages `recogniser` and `listener`: train word recognisers on original clips.

The recogniser hears all voices and teaches the codec's semantic codebook. The listener hears the assistant's voice
only and measures the speech that the model produces; it has no part in training.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import numpy as np
import soxr
import torch
from torch import nn
from torch.nn import functional as F

from moshivis.evaluation.recogniser import BLANK, HOP, Recogniser, RecogniserConfig, word_error_rate
from moshivis.mini.augment import augment
from moshivis.mini.clips import ClipStore
from moshivis.mini.grammar import normalise, vocabulary
from moshivis.mini.stage import Stage, cosine, set_learning_rate
from moshivis.mini.voices import SAMPLE_RATE
from moshivis.training.precision import quick_precision

BATCH = 12
SILENCE = int(0.15 * SAMPLE_RATE)  # at most, at each end of a clip: a word is to be heard wherever one cuts
SENTENCES = ("question", "whole", "answer", "greeting", "listener")


def train_recogniser(
    stage: Stage, stores: Sequence[ClipStore], roles: tuple[str, ...], width: int, steps: int
) -> Recogniser:
    """Train (or resume, or just load) a recogniser of the speech of `roles` in `stage`.

    A fiftieth of the first store is held out, to measure it, and in the others what says the same.
    """
    torch.manual_seed(len(roles))
    model = Recogniser(RecogniserConfig(words=tuple(sorted(vocabulary())), width=width)).to(stage.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    parts = {"model": model, "optimiser": optimiser}
    if stage.done:
        stage.restore(parts)
        return model.cpu().eval()
    index = {word: i + 1 for i, word in enumerate(model.config.words)}
    chosen = [[(store, i) for i, clip in enumerate(store.clips) if clip.role in roles] for store in stores]
    held_out = chosen[0][::50]
    unseen = {store.clips[i].text for store, i in held_out}
    training = [place for n, place in enumerate(chosen[0]) if n % 50]
    training += [(store, i) for store, i in sum(chosen[1:], []) if not _says(store.clips[i].text, unseen)]
    # three sentences to a phrase: there are more phrases, but they are alike
    sentences = [(store, i) for store, i in training if store.clips[i].kind in SENTENCES]
    phrases = [(store, i) for store, i in training if store.clips[i].kind not in SENTENCES]

    def one_step(step: int) -> dict[str, float]:
        model.train()
        set_learning_rate(optimiser, cosine(step, steps, 1.5e-3, 100))
        rng = random.Random(step)
        torch.manual_seed(step)  # of what the model itself draws, else a resumed training would draw it anew
        # clips of like length share a batch, so that little of it is padding
        drawn = rng.sample(sentences, 3 * BATCH) + rng.sample(phrases, BATCH)
        rows = sorted(drawn, key=lambda place: place[0].clips[place[1]].samples)
        start = rng.randrange(3 * BATCH)
        rows = rows[start : start + BATCH]
        waves = [_varied(store.audio(i), rng) for store, i in rows]
        targets = [[index[w] for w in normalise(store.clips[i].text).split()] for store, i in rows]
        length = max(map(len, waves))
        length += -length % (4 * HOP)
        batch = torch.stack([F.pad(torch.from_numpy(w), (0, length - len(w))) for w in waves])
        with quick_precision(stage.device):
            log_probs = model(batch.to(stage.device))
        loss = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor(sum(targets, []), device=stage.device),
            torch.full((BATCH,), log_probs.shape[1]),
            torch.tensor([len(t) for t in targets]),
            blank=BLANK,
            zero_infinity=True,
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return {"ctc": loss.item()}

    def evaluate(limit: int = 40) -> dict[str, float]:
        model.eval()
        result = {}
        for role in roles:
            rows = [(store, i) for store, i in held_out if store.clips[i].role == role][:limit]
            references = [normalise(store.clips[i].text).split() for store, i in rows]
            heard = [model.transcribe(torch.from_numpy(store.audio(i)).to(stage.device)) for store, i in rows]
            result[f"wer_{role}"] = word_error_rate(references, heard)
        return result

    stage.train(steps, parts, one_step, evaluate, evaluate_every=500)
    measured = evaluate(200)
    model.cpu().eval()
    stage.finish(measured)
    return model


def _says(text: str, sentences: Collection[str]) -> bool:
    """Whether the text holds one of the sentences: the listener's own texts are often two answers."""
    return any(sentence in text for sentence in sentences)


def _varied(audio: np.ndarray, rng: random.Random) -> np.ndarray:
    """A little faster or slower, up to 150 ms of silence at its ends, and half of the time in another room."""
    audio = soxr.resample(audio, SAMPLE_RATE * rng.uniform(0.93, 1.07), SAMPLE_RATE, "MQ")
    audio = np.pad(audio, [rng.randrange(SILENCE) for _ in range(2)])
    return augment(audio, np.random.default_rng(rng.getrandbits(32))) if rng.random() < 0.5 else audio
