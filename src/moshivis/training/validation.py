"""How well a model does on held-out samples: losses, words predicted, gates, and answers that it generates.

The samples are the same every time, the first ones of the held-out data. Generated answers go to OUT/samples/step-N:
a spoken one as a WAV (user left, assistant right) and its transcript with gates, a written one as a transcript.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moshivis.audio import write_wav
from moshivis.data.sample import Dataset, Sample, Speaker, skipped
from moshivis.errors import InputError
from moshivis.files import atomic_write
from moshivis.inference.conversation import Assistant, Conversation, StepResult, TextPiece
from moshivis.inference.sampling import Sampling
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.training.batch import split
from moshivis.training.distributed import Ranks
from moshivis.training.losses import Denominators
from moshivis.training.precision import dtype_of
from moshivis.training.recipe import Recipe
from moshivis.training.report import Report
from moshivis.training.trainer import Trainer

ROWS_AT_ONCE = 8
GREEDY = Sampling(text_temperature=0.0, audio_temperature=0.8)  # the text does not depend on luck, the voice is alive


class Validation:
    """Called with the number of steps done; reports what it finds. All ranks call it together.

    Raises InputError for answers that are to be shown by a base without a tokenizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        trainer: Trainer,
        sets: tuple[Dataset | None, Dataset | None],
        ranks: Ranks,
        report: Report,
    ):
        self.recipe, self.trainer, self.ranks, self.report = recipe, trainer, ranks, report
        self.sets = [dataset for dataset in sets if dataset is not None]
        if recipe.validation.samples and trainer.ready.tokenizer is None:
            raise InputError("validation.samples needs a base with a tokenizer, to show what was said")

    def __call__(self, step: int) -> None:
        values: dict[str, Any] = {}
        for dataset in self.sets:
            values |= self.measure(dataset)
        self.report.log(self.trainer.progress, values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
        self.report.say(f"validation  {shown}")
        if self.ranks.leads:
            folder = Path(self.recipe.out) / "samples" / f"step-{step:08d}"
            try:
                self._generate(folder)
            except OSError as error:  # a disk that is full
                self.report.warn(f"answers could not be written to {folder}: {error}")
        self.ranks.wait()

    @torch.no_grad()
    def measure(self, dataset: Dataset) -> dict[str, Any]:
        """Losses of the first samples, shared between the ranks; share of the assistant's words predicted; gates."""
        kind, ranks = dataset.kind, self.ranks
        rows = self.recipe.validation.rows
        rows = min(rows, getattr(dataset, "num_samples", None) or rows)  # each counts once
        count = -(-rows // ranks.count)  # as many on every rank: they must act alike
        before = skipped(dataset)
        positions = range(ranks.rank, rows, ranks.count)
        samples = [dataset[position] for position in positions]
        lost = ranks.sum(torch.tensor([skipped(dataset) - before]))
        samples += [_filler(dataset[0]) for _ in range(count - len(samples))]
        parts = [self.trainer.collate(some) for some in split(samples, -(-count // ROWS_AT_ONCE))]
        denominators = Denominators.of(parts, self.recipe.loss)
        ranks.sum(denominators.sums)
        sums, gates = torch.zeros(4, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        for part in parts:
            outcome = self.trainer.forward(part, gates=True)
            sums += torch.stack([x.cpu().double() for x in (outcome.text, outcome.audio, outcome.right, outcome.words)])
            if outcome.gates is not None and outcome.seen is not None:
                found = torch.cat([outcome.gates, outcome.seen[None]]).cpu().double()
                gates = found + (gates if len(gates) else 0)
        ranks.sum(sums)
        text, audio, right, words = sums.tolist()
        values: dict[str, Any] = {
            f"held_out_{kind}_text": text / denominators.text,
            f"held_out_{kind}_words_right": right / max(words, 1),
        }
        if kind == "speech":
            values["held_out_speech_audio"] = audio / denominators.audio
        if len(gates):
            *of_blocks, seen = ranks.sum(gates)
            mean = torch.stack(of_blocks) / seen.clamp(min=1)
            config = self.trainer.ready.model.config.adapters
            adapted = range(len(mean)) if config is None or config.layers is None else config.layers
            values[f"held_out_{kind}_gate"] = float(mean[list(adapted)].mean())
            values[f"held_out_{kind}_gates"] = [round(float(gate), 5) for gate in mean]
        if lost.item():
            values[f"held_out_{kind}_skipped"] = int(lost)
        return values

    def _generate(self, folder: Path) -> None:
        count, tokenizer = self.recipe.validation.samples, self.trainer.ready.tokenizer
        if not count or tokenizer is None:
            return
        assistant = Assistant(_for_inference(self.trainer.ready.model, dtype_of(self.recipe)), tokenizer, GREEDY)
        for dataset in self.sets:
            for position in range(count):
                sample = dataset[position]
                picture = None if sample.image is None else dataset.picture(sample.image)
                answer(assistant, sample, picture, folder / f"{dataset.kind}-{position}")


def _filler(sample: Sample) -> Sample:
    """One that no figure counts: every rank needs as many."""
    none = np.zeros(len(sample), bool)
    return replace(sample, text_graded=none, audio_graded=None if sample.audio is None else none, image=None)


def _for_inference(model: MoshiVis, dtype: torch.dtype) -> MoshiVis:
    """A copy for generation: it shares what is frozen, and what is trained is in `dtype`, as that is."""
    kept = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    kept |= {id(buffer): buffer for buffer in model.buffers()}  # type: ignore[misc]
    copied = copy.deepcopy(model, dict(kept))
    for name, parameter in copied.named_parameters():
        if parameter.requires_grad and not name.endswith((".lora_down", ".lora_up")):
            parameter.data = parameter.data.to(dtype)
    for module in copied.modules():
        vars(module).pop("forward", None)  # compiled or checkpointed, it would run the original's
    return copied


def clear_answers(folder: Path) -> None:
    """Remove what was being written there when a run was killed."""
    for left in folder.glob(".speech*-*-*"):
        if left.is_file() and left.suffix in (".json", ".wav"):
            left.unlink()


@torch.inference_mode()
def answer(assistant: Assistant, sample: Sample, picture: bytes | None, stem: Path) -> None:
    """Put the user's side of a sample to the model; its answer goes to STEM.json, with speech to STEM.wav too."""
    conversation = assistant.conversation(picture)
    said: Sequence[TextPiece]
    if sample.audio is None:
        said = _write(conversation, assistant.tokenizer, sample)
    else:
        said = _speak(conversation, assistant, sample, stem.with_suffix(".wav"))
    wanted = sample.text[sample.speaker == Speaker.ASSISTANT].tolist()
    transcript = {
        "origin": sample.origin,
        "picture": sample.image,
        "wanted": assistant.tokenizer.decode(wanted),
        "said": "".join(piece.text for piece in said).strip(),
        "pieces": [
            {"piece": p.text, "frame": p.frame, "gate": round(p.gate, 6) if math.isfinite(p.gate) else None}
            for p in said
            if p.text
        ],
    }
    with atomic_write(stem.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(transcript, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write(conversation: Conversation, tokenizer: TextTokenizer, sample: Sample) -> list[TextPiece]:
    """The user's sentences one by one, with the model's in between; a greeting first, if the sample has one."""
    runs = [
        (speaker, tokenizer.decode(int(token) for _, token in run))
        for speaker, run in itertools.groupby(zip(sample.speaker, sample.text, strict=True), lambda pair: pair[0])
        if speaker != Speaker.NOBODY
    ]
    asked = [sentence for speaker, sentence in runs if speaker == Speaker.USER and sentence]
    said = conversation.greet_text() if runs and runs[0][0] == Speaker.ASSISTANT else []
    return said + [piece for sentence in asked for piece in conversation.say_text(sentence, greeted=False)]


def _speak(conversation: Conversation, assistant: Assistant, sample: Sample, file: Path) -> list[StepResult]:
    """The user's voice, decoded from the sample's codes, against the model's answer, frame by frame."""
    lm = assistant.config.speech_lm
    assert sample.audio is not None
    user = sample.audio[lm.own_codebooks :].clip(min=0)  # a code that is not known is as good as any
    codes = torch.from_numpy(user.astype(np.int64))[None].to(assistant.device)
    wave = assistant.model.codec.decode(codes)[0, 0].float().cpu().numpy()
    size = assistant.frame_size
    frames = [wave[begin : begin + size] for begin in range(0, len(wave) - size + 1, size)]
    results = [conversation.step(frame) for frame in frames]
    voice = np.concatenate([result.audio for result in results])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_wav(file, np.stack([np.concatenate(frames), voice], axis=1))
    return results
