"""A sample made visible and audible: from a folder of shards, or of a `.jsonl` file as packing it would make it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moshivis.codec.mimi import Mimi
from moshivis.data.alignment import Word, words_of
from moshivis.data.drawing import draw_spoken, draw_written
from moshivis.data.encode import BLOCK_FRAMES, HEARD_LATE, Encoder, speech_sample, stereo_blocks
from moshivis.data.layout import Dialogue, Entry, Line, Recording, parse_line, read_lines, read_words
from moshivis.data.sample import Kind, Sample, Speaker
from moshivis.data.shard_format import Manifest, codec_fingerprint, tokenizer_fingerprint
from moshivis.data.shards import open_shards
from moshivis.data.written import Form, speechless_sample
from moshivis.errors import InputError
from moshivis.files import read_limited
from moshivis.vision.image import MAX_BYTES, read_image


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """A sample and what it shows."""

    sample: Sample
    picture: Image.Image | None
    waves: np.ndarray | None  # [2, T * frame_size] assistant and user, in -1..1; None for a written sample
    words: tuple[Sequence[Word], Sequence[Word]]  # of assistant and user; the user's are known of recordings only
    files: tuple[Path, ...] = ()  # recordings and pictures of its `.jsonl` file, which must not be replaced

    def draw(self, encoder: Encoder) -> Image.Image:
        if self.waves is None:
            return draw_written(self.sample, encoder.tokenizer, self.picture)
        return draw_spoken(self.sample, encoder.own_codebooks, self.waves, self.words, self.picture)

    def transcript(self, encoder: Encoder) -> list[tuple[Speaker, str]]:
        """Turn after turn, of a spoken sample with the second at which it begins."""
        if self.waves is None:
            return _written_turns(self.sample, encoder)
        marked = [(Speaker.ASSISTANT, word) for word in self.words[0]]
        marked += [(Speaker.USER, word) for word in self.words[1]]
        turns: list[tuple[Speaker, str]] = []
        for speaker, word in sorted(marked, key=lambda pair: pair[1].start):
            if turns and turns[-1][0] == speaker:
                turns[-1] = speaker, f"{turns[-1][1]} {word.text}"
            else:
                turns.append((speaker, f"[{word.start:.1f} s] {word.text}"))
        return turns


def inspect_line(source: Path, index: int, encoder: Encoder, form: Form | None = None) -> Inspected:
    """The conversation of line `index` (from 0, blank lines not counted). Raises InputError if it is broken."""
    lines = read_lines(source)
    if not 0 <= index < len(lines):
        raise InputError(f"{source} has {len(lines)} conversations: there is no --index {index}")
    try:
        inspected = _inspect(parse_line(lines[index]), encoder, form)
    except InputError as error:
        if str(error).startswith(where := lines[index].where):
            raise
        raise InputError(f"{where}: {error}") from error
    return dataclasses.replace(inspected, files=tuple(_files(lines)))


def _files(lines: Sequence[Line]) -> Iterator[Path]:
    """Recordings and pictures of all lines that can be parsed."""
    for line in lines:
        try:
            entry = parse_line(line)
        except InputError:
            continue
        if isinstance(entry, Recording):
            yield entry.audio
        if entry.image is not None:
            yield entry.image


def _inspect(entry: Entry, encoder: Encoder, form: Form | None) -> Inspected:
    picture = None
    if entry.image is not None:
        try:
            picture = read_image(read_limited(entry.image, max_bytes=MAX_BYTES, noun="picture"))
        except InputError as error:
            raise InputError(f"picture {entry.image}: {error}") from error
    if isinstance(entry, Dialogue):
        sample = speechless_sample(entry.turns, encoder.tokenizer, form=form, origin=entry.where)
        return Inspected(sample=sample, picture=picture, waves=None, words=((), ()))
    words = read_words(entry)
    sample = speech_sample(entry, words, encoder).sample
    config = encoder.codec.config
    blocks = stereo_blocks(entry.audio, config.sample_rate, config.frame_size, BLOCK_FRAMES)
    waves = np.concatenate(list(blocks), axis=1)
    return Inspected(sample=sample, picture=picture, waves=waves, words=(words.assistant, words.user))


def inspect_shards(folder: Path, index: int, encoder: Encoder, kind: Kind | None = None) -> Inspected:
    """Sample `index` (from 0) of one kind in a folder, as it is stored; `kind` None takes speech if there is any.

    Raises InputError if there is no such sample, or if the folder was packed with another tokenizer or codec.
    """
    manifest = Manifest.read(folder)
    if kind is None:
        kind = "speech" if manifest.rows("speech") else "speechless"
    dataset = open_shards(folder, kind, seed=None)
    if not 0 <= index < dataset.rows:
        raise InputError(f"{folder} has {dataset.rows} {kind} samples: there is no --index {index}")
    if manifest.tokenizer != tokenizer_fingerprint(encoder.tokenizer):
        raise InputError(f"{folder} was packed with another tokenizer; name its model with --model")
    if kind == "speech" and manifest.codec != codec_fingerprint(encoder.codec):
        raise InputError(f"{folder} was packed with another codec; name its model with --model")
    sample = dataset[index]
    picture = None if sample.image is None else read_image(dataset.picture(sample.image))
    waves = None
    if sample.audio is not None:
        own, late = sample.audio[: encoder.own_codebooks], sample.audio[encoder.own_codebooks :]
        user = np.pad(late, ((0, 0), (0, HEARD_LATE)), mode="edge")[:, HEARD_LATE:]
        waves = np.stack([decode(own, encoder.codec), decode(user, encoder.codec)])
    words = words_of(sample.text, encoder.tokenizer) if waves is not None else []
    return Inspected(sample=sample, picture=picture, waves=waves, words=(words, ()))


@torch.inference_mode()
def decode(codes: np.ndarray, codec: Mimi) -> np.ndarray:
    """Codes [K, T] -> waveform [T * frame_size] float32; unknown codes count as the first of their book."""
    device = next(codec.parameters()).device
    state = codec.new_decoder_state(1, frames=BLOCK_FRAMES)
    blocks = torch.from_numpy(codes.astype(np.int64)).clamp(min=0)[None].to(device).split(BLOCK_FRAMES, dim=-1)
    wave = torch.cat([codec.decode_step(state, block) for block in blocks], dim=-1)
    return wave[0, 0].float().cpu().numpy()


def _written_turns(sample: Sample, encoder: Encoder) -> list[tuple[Speaker, str]]:
    borders = np.flatnonzero(np.diff(sample.speaker)) + 1
    begins = [0, *borders.tolist()]
    turns = zip(begins, np.split(sample.text, borders), strict=True)
    return [(Speaker(int(sample.speaker[begin])), encoder.tokenizer.decode(text.tolist())) for begin, text in turns]
