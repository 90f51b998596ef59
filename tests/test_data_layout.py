"""Conversations in folders: what is read, and what is said about lines that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from data_support import write_corpus, write_recording
from moshivis.checkpoints.load import load_model
from moshivis.commands.data import load_encoder
from moshivis.data.alignment import Word
from moshivis.data.encode import BLOCK_FRAMES, Encoder, encode_recording, speech_sample, stereo_blocks
from moshivis.data.inspect import decode
from moshivis.data.layout import Dialogue, Line, Recording, SpokenWords, Turn, parse_line, read_lines, read_words
from moshivis.errors import InputError
from moshivis.inference.conversation import EMBEDDED
from moshivis.speech_lm.streams import model_inputs


def parse(fields: Any) -> Recording | Dialogue:
    return parse_line(Line(Path("set/a.jsonl"), 7, json.dumps(fields)))


def test_lines_of_both_kinds() -> None:
    recording = parse({"path": "wav/a.wav", "duration": 3, "image": "a.png"})
    assert recording == Recording(
        where="set/a.jsonl:7", audio=Path("set/wav/a.wav"), duration=3.0, image=Path("set/a.png")
    )
    dialogue = parse({"turns": [{"role": "user", "text": " what? "}, {"role": "assistant", "text": "that"}]})
    turns = (Turn("user", "what?"), Turn("assistant", "that"))
    assert dialogue == Dialogue(where="set/a.jsonl:7", turns=turns, image=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "no JSON object"),
        ({}, 'neither "path"'),
        ({"path": "a.wav", "duration": 0}, "duration must be a number of seconds above 0, not 0"),
        ({"path": "/", "duration": 1}, "path must name a recording, not '/'"),
        ({"path": "a.wav", "duration": True}, "duration"),
        ({"path": "a.wav", "duration": float("nan")}, "duration"),
        ({"path": "a.wav", "duration": 1, "image": 3}, "image must be the path"),
        ({"turns": []}, "at least one turn"),
        ({"turns": ["hello"]}, "turn 1 has the role None"),
        ({"turns": [{"role": "user", "text": "a"}, {"role": "system", "text": "b"}]}, "turn 2 has the role 'system'"),
        ({"turns": [{"role": "user", "text": "  "}]}, "turn 1 has no text"),
        ({"turns": [{"role": "user", "text": "a", "image": "a.png"}]}, 'turn 1 has an "image"; a conversation has one'),
        ({"turns": [{"role": "user", "text": "a"}], "path": "a.wav", "duration": 1}, 'both "path" and "turns"'),
        (
            {"path": "a.wav", "duration": 1, "images": ["a.png"]},
            'there is "images", but the key of a picture is "image"',
        ),
    ],
)
def test_a_wrong_line_is_named(fields: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^set/a.jsonl:7: .*{message}"):
        parse(fields)


@pytest.mark.parametrize(
    "text", ['{"turns": ' + "[" * 100_000, '{"path": "a.wav", "duration": 1' + "0" * 400 + "}"], ids=["deep", "long"]
)
def test_what_json_may_hold_and_nobody_means(text: str) -> None:
    with pytest.raises(InputError, match=r"set/a.jsonl:7: (this line is no JSON|duration must be a number)"):
        parse_line(Line(Path("set/a.jsonl"), 7, text))


def test_halves_of_surrogate_pairs_are_question_marks() -> None:
    line = Line(Path("set\udce4/a.jsonl"), 7, r'{"turns": [{"role": "user", "text": "a star\ud83d"}]}')
    parsed = parse_line(line)
    assert isinstance(parsed, Dialogue)
    assert (parsed.where, parsed.turns[0].text) == ("set?/a.jsonl:7", "a star?")


def test_lines_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"path": "a.wav", "duration": 1}\n\n{broken\n')
    lines = read_lines(path)
    assert [line.number for line in lines] == [2, 4]
    with pytest.raises(InputError, match=r"a.jsonl:4: this line is no JSON"):
        parse_line(lines[1])
    path.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        read_lines(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_lines(tmp_path / "none.jsonl")


# words ----------------------------------------------------------------------------------------------------------------


def recording_with(tmp_path: Path, content: Any) -> Recording:
    (tmp_path / "a.json").write_text(json.dumps(content))
    return Recording(where="a.jsonl:1", audio=tmp_path / "a.wav", duration=1.0, image=None)


def test_words_of_both_sides_and_the_turns_they_make(tmp_path: Path) -> None:
    alignments = [
        ["yes", [2.0, 2.1], "SPEAKER_MAIN"],
        [" is ", [0.0, 0.1], "SPEAKER_00"],
        ["it", [0.2, 0.3], "SPEAKER_00"],
        ["", [0.2, 0.3], "SPEAKER_00"],
        ["it", [2.2, 2.3], "SPEAKER_MAIN"],
    ]
    words = read_words(recording_with(tmp_path, {"alignments": alignments}))
    assert [word.text for word in words.assistant] == ["yes", "it"]
    assert words.turns() == (Turn("user", "is it"), Turn("assistant", "yes it"))


def test_an_interjection_does_not_end_a_turn(tmp_path: Path) -> None:
    spoken = [("the", 0.0), ("star", 0.3), ("is", 0.6), ("blue", 0.9), ("and", 2.0)]
    alignments = [[word, [start, start + 0.2], "SPEAKER_MAIN"] for word, start in spoken]
    alignments += [["mhm", [0.4, 0.6], "SPEAKER_00"], ["what", [1.2, 1.5], "SPEAKER_00"]]
    turns = read_words(recording_with(tmp_path, {"alignments": alignments})).turns()
    assert turns == (
        Turn("assistant", "the star is blue"),
        Turn("user", "mhm"),
        Turn("user", "what"),
        Turn("assistant", "and"),
    )


def test_a_short_question_stands_before_its_answer(tmp_path: Path) -> None:
    """Though the assistant is as quick as if it went on: nobody spoke into anything."""
    alignments = [["red", [1.6, 1.9], "SPEAKER_MAIN"], ["seven", [2.15, 2.4], "SPEAKER_MAIN"]]
    alignments += [["why", [1.95, 2.12], "SPEAKER_00"]]
    turns = read_words(recording_with(tmp_path, {"alignments": alignments})).turns()
    assert turns == (Turn("assistant", "red"), Turn("user", "why"), Turn("assistant", "seven"))


def test_a_folder_is_read_as_its_recordings(tmp_path: Path) -> None:
    for name in ("b.wav", "a.flac", "below/c.WAV", "notes.txt", "a.jpg", "below/c.png", "other.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    entries = [parse_line(line) for line in read_lines(tmp_path)]
    found = [(entry.audio, entry.image) for entry in entries if isinstance(entry, Recording) and not entry.duration]
    below = tmp_path / "below"
    assert found == [
        (tmp_path / "a.flac", tmp_path / "a.jpg"),
        (tmp_path / "b.wav", None),
        (below / "c.WAV", below / "c.png"),
    ]
    with pytest.raises(InputError, match=r"holds no recordings \(.wav, .flac, .ogg\)"):
        (tmp_path / "empty").mkdir()
        read_lines(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold"),
        ({"alignments": [["a", [0, 1]]]}, "alignment 0 is"),
        ({"alignments": [["a", [0, 1], "S"], ["b", [2, 1], "S"]]}, "alignment 1: the word 'b' goes from 2 to 1 s"),
        ({"alignments": [["a", [-1, 1], "S"]]}, "no span of time"),
        ({"alignments": [["a", ["0", 1], "S"]]}, "alignment 0 is"),
    ],
)
def test_wrong_words_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_words(recording_with(tmp_path, content))


def test_missing_words(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, recordings=1)
    (tmp_path / "0.json").unlink()
    recording = parse_line(read_lines(corpus)[0])
    assert isinstance(recording, Recording)
    with pytest.raises(InputError, match=r"all.jsonl:1: the words of 0.wav are missing"):
        read_words(recording)


# sound ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [24000, 44100, 8000])
def test_blocks_are_the_recording(tmp_path: Path, rate: int) -> None:
    write_recording(tmp_path / "a.wav", 1.23, rate=rate)
    blocks = list(stereo_blocks(tmp_path / "a.wav", 24000, 1920, 5))
    assert [block.shape for block in blocks] == [(2, 9600)] * 3 + [(2, 1920)]
    joined = np.concatenate(blocks, axis=1)
    length = round(1.23 * 24000)
    times = np.arange(length) / 24000
    tone = 0.3 * np.sin(2 * np.pi * 200 * times)  # on the right, the user's side
    assert np.abs(joined[1, 100 : length - 100] - tone[100:-100]).max() < 0.01
    assert np.abs(joined[0, :length]).mean() > 0.02
    assert np.abs(joined[:, length + 10 :]).max() < 0.01


def test_codes_are_those_of_a_live_conversation(tmp_path: Path) -> None:
    """The embedded codec's window is shorter than a block, and what it sees of the past decides many of its codes."""
    codec, rng = load_model(EMBEDDED["mini"]).model.codec, np.random.default_rng(0)
    envelope = 0.1 * np.abs(np.sin(np.arange(12 * 1920 * 5) / 3000))
    soundfile.write(tmp_path / "a.wav", rng.standard_normal((len(envelope), 2)) * envelope[:, None], 24000)
    codes = encode_recording(tmp_path / "a.wav", codec, codec.config.num_codebooks)
    assert codes.shape == (2, 6, 60)
    assert codes.dtype == np.int16
    assert BLOCK_FRAMES > codec.config.transformer.context // codec.config.resample_stride
    state = codec.new_encoder_state(1)
    right = np.concatenate(list(stereo_blocks(tmp_path / "a.wav", 24000, 1920, 1)), axis=1)[1]
    with torch.inference_mode():
        frames = [codec.encode_step(state, torch.from_numpy(frame)[None, None]) for frame in np.split(right, 60)]
        live = torch.cat(frames, dim=-1)
        state = codec.new_decoder_state(1)
        heard = torch.cat([codec.decode_step(state, frame) for frame in live.split(1, dim=-1)], dim=-1)
    assert (codes[1] == live[0].numpy()).mean() > 0.99  # a code may hang on the last bit
    assert np.allclose(decode(live[0].numpy(), codec), heard[0, 0].numpy(), atol=1e-3)


def test_what_is_heard_stands_beside_what_is_said_then(tmp_path: Path) -> None:
    """Of two channels that sound alike, the model hears the user's while its own of the same moment is fed back.

    It is so live: the sound of a step comes out while the next frame is recorded.
    """
    checkpoint = load_model(EMBEDDED["mini"])
    lm = checkpoint.model.config.speech_lm
    assert checkpoint.tokenizer is not None
    noise = 0.1 * np.random.default_rng(0).standard_normal(30 * 1920)
    soundfile.write(tmp_path / "a.wav", np.stack([noise, noise], axis=1), 24000)
    encoder = Encoder(
        codec=checkpoint.model.codec,
        tokenizer=checkpoint.tokenizer,
        own_codebooks=lm.own_codebooks,
        user_codebooks=lm.user_codebooks,
    )
    recording = Recording(where="a.jsonl:1", audio=tmp_path / "a.wav", duration=2.4, image=None)
    sample = speech_sample(recording, SpokenWords((), ()), encoder).sample
    assert sample.audio is not None
    codes = np.concatenate([sample.text[None], sample.audio]).astype(np.int64)
    inputs = model_inputs(torch.from_numpy(codes)[None], lm)[0]
    own, heard = inputs[1 : 1 + lm.own_codebooks], inputs[1 + lm.own_codebooks :]
    assert len(set(own[0].tolist())) > 5
    assert torch.equal(own[:, 3:], heard[:, 3:])


@pytest.mark.parametrize("late", ["the assistant's", "the user's"])
def test_words_that_begin_after_the_end(tiny_folder: Path, tmp_path: Path, late: str) -> None:
    write_recording(tmp_path / "a.wav", 1.0)
    recording = Recording(where="a.jsonl:1", audio=tmp_path / "a.wav", duration=1.0, image=None)
    sides = [(Word("the", 0.1, 0.2), Word(late, 300, 400)), (Word("star", 0.1, 0.2),)]
    words = SpokenWords(*(sides if late == "the assistant's" else sides[::-1]))
    with pytest.raises(InputError, match=f'"{late}" begins at 300, but .*a.wav lasts 1.0 s; times are in seconds'):
        speech_sample(recording, words, load_encoder(tiny_folder, "cpu"))


def test_recordings_that_cannot_be_used(tmp_path: Path) -> None:
    def blocks(path: Path) -> None:
        list(stereo_blocks(path, 24000, 1920, 5))

    with pytest.raises(InputError, match=r"there is no .*none.wav"):
        blocks(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(InputError, match=r"text.wav is not audio"):
        blocks(tmp_path / "text.wav")
    soundfile.write(tmp_path / "mono.wav", np.zeros(100), 24000)
    with pytest.raises(InputError, match="must have two channels.*not 1"):
        blocks(tmp_path / "mono.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), 24000)
    with pytest.raises(InputError, match="is empty"):
        blocks(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.full((100, 2), np.nan, np.float32), 24000, subtype="FLOAT")
    with pytest.raises(InputError, match="not finite"):
        blocks(tmp_path / "nan.wav")
