"""Small conversations on disk and in memory, for the tests of the data room."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from moshivis.commands.data import load_encoder
from moshivis.data.sample import Kind, Sample, Speaker
from moshivis.data.tokenize import Tokenized, tokenize

RATE = 24000


def sample(
    number: int, *, length: int = 20, codebooks: int = 6, image: str | None = None, kind: Kind = "speech"
) -> Sample:
    """A sample whose content follows from its number."""
    rng = np.random.default_rng(number)
    text = rng.choice([3, 3, 3, 0, 7, 8], length).astype(np.int32)
    for pause in rng.integers(length, size=length // 15):
        text[pause : pause + 13] = 3
    speaker = np.where(text == 3, Speaker.NOBODY, Speaker.ASSISTANT).astype(np.uint8)
    if kind == "speechless":
        turns = [Speaker.USER, Speaker.ASSISTANT] * 2
        speaker = np.repeat(turns, [*[length // 4] * 3, length - 3 * (length // 4)]).astype(np.uint8)
    audio = rng.integers(0, 32, (codebooks, length)).astype(np.int16) if kind == "speech" else None
    graded = rng.random(length) < 0.5 if number % 3 == 0 else None
    return Sample(text=text, speaker=speaker, audio=audio, image=image, text_graded=graded, origin=str(number))


def same(one: Sample, other: Sample) -> bool:
    pairs = [(one.text, other.text), (one.speaker, other.speaker), (one.audio, other.audio)]
    pairs += [(one.text_graded, other.text_graded), (one.audio_graded, other.audio_graded)]
    equal = all((a is None) == (b is None) and (a is None or b is None or np.array_equal(a, b)) for a, b in pairs)
    return equal and one.image == other.image and one.origin == other.origin


class Numbered:
    """A `Dataset` of made samples; `origin` tells the position."""

    def __init__(self, name: str = "numbered", kind: Kind = "speech", length: int = 20, image: str | None = None):
        self.name, self.kind, self.length, self.image = name, kind, length, image

    def __getitem__(self, position: int) -> Sample:
        return sample(position, length=self.length, kind=self.kind, image=self.image)

    def picture(self, key: str) -> bytes:
        if key != self.image:
            raise KeyError(key)
        return key.encode()


def write_corpus(folder: Path, recordings: int = 6, dialogues: int = 4) -> Path:
    """A .jsonl file of both kinds; two pictures are shared by all, every third conversation has none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    lines: list[dict[str, object]] = []
    for number in range(recordings):
        seconds = 1.0 + 0.1 * number
        write_recording(folder / f"{number}.wav", seconds, number)
        lines.append({"path": f"{number}.wav", "duration": seconds, **_image(number)})
    for number in range(dialogues):
        turns = [{"role": "user", "text": "what colour is the star"}, {"role": "assistant", "text": "the star is blue"}]
        lines.append({"turns": turns, **_image(number)})
    path = folder / "all.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


def write_recording(path: Path, seconds: float, seed: int = 0, rate: int = RATE) -> None:
    """Noise left and a tone right, and the words beside it."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate)) / rate
    stereo = np.stack([0.1 * rng.standard_normal(len(times)), 0.3 * np.sin(2 * np.pi * (200 + 20 * seed) * times)], 1)
    soundfile.write(path, stereo, rate)
    words = [
        ["what", [0.0, 0.2], "SPEAKER_OTHER"],
        ["star", [0.2, 0.35], "SPEAKER_OTHER"],
        ["the", [0.4, 0.5], "SPEAKER_MAIN"],
        ["star", [0.8, 0.9], "SPEAKER_MAIN"],
    ]
    path.with_suffix(".json").write_text(json.dumps({"alignments": words}), encoding="utf-8")


def _image(number: int) -> dict[str, str]:
    return {} if number % 3 == 2 else {"image": ("red.png", "blue.png")[number % 3]}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def pack(corpus: Path, out: Path, model: Path, **options: Any) -> Tokenized:
    return tokenize(corpus, out, functools.partial(load_encoder, model, "cpu"), lines_a_part=3, **options)
