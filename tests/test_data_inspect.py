"""`moshivis data inspect`: samples looked at, of recordings and of packed folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_support import RATE, corpus, pack
from moshivis.cli import main
from moshivis.commands.data import load_encoder
from moshivis.data.inspect import inspect_shards

__all__ = ["corpus"]  # a fixture


def test_a_line_and_its_packed_sample_look_alike(
    corpus: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(tiny_folder)]
    assert main(["data", "tokenize", str(corpus), str(tmp_path / "set"), *model]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "folder": str(tmp_path / "set"),
        "speech": 6,
        "speechless": 4,
        "pictures": 2,
        "seconds": 7.5,
        "skipped": 0,
        "mute": 0,
        "lone": 0,
        "unspelt": 0,
    }
    assert "packed before" not in captured.err
    assert main(["data", "tokenize", str(corpus), str(tmp_path / "set"), *model]) == 0
    again = capsys.readouterr()
    assert again.out == captured.out
    assert "It was packed before, and nothing was read again" in again.err
    for source, out in ((corpus, tmp_path / "line"), (tmp_path / "set", tmp_path / "shard")):
        assert main(["data", "inspect", str(source), "--index", "1", "--out", str(out), *model]) == 0
        assert "Assistant  [0.4 s] the star" in capsys.readouterr().out
        stereo, rate = soundfile.read(out / "inspect-speech-1.wav")
        assert (stereo.shape, rate) == ((14 * 1920, 2), 24000)
        with Image.open(out / "inspect-speech-1.png") as drawn:
            assert drawn.size[0] == 1400
            colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24) or []}
            assert (0, 0, 255) in colours  # the picture
    original, _ = soundfile.read(corpus.parent / "1.wav")
    written, _ = soundfile.read(tmp_path / "line" / "inspect-speech-1.wav")
    assert np.abs(written[: len(original)] - original).max() < 1e-3


def test_a_written_sample(corpus: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "inspect", str(corpus), "--index", "6", "--out", str(tmp_path), "--model", str(tiny_folder)]
    assert main([*arguments, "--form", "marked"]) == 0
    assert "User       what colour is the star\nAssistant  the star is blue\n" in capsys.readouterr().out
    assert (tmp_path / "inspect-speechless-6.png").exists()
    assert not (tmp_path / "inspect-speechless-6.wav").exists()


@pytest.mark.parametrize("taken", ["wav", "png"])
def test_no_recording_or_picture_of_the_file_is_replaced(
    corpus: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], taken: str
) -> None:
    """Of no line: here it is another one that has the name."""
    file = corpus.parent / f"inspect-speech-0.{taken}"
    file.write_bytes(b"training data")
    other = {"path": "inspect-speech-0.wav", "duration": 1, "image": "inspect-speech-0.png"}
    far = {"path": "a.wav", "duration": 1, "image": 5000 * "a"}
    corpus.write_text("\n".join([corpus.read_text().splitlines()[0], "{", json.dumps(far), json.dumps(other)]))
    before = sorted(corpus.parent.iterdir())
    arguments = ["data", "inspect", str(corpus), "--out", str(corpus.parent), "--model", str(tiny_folder)]
    assert main(arguments) == 2
    assert f"inspect-speech-0.{taken} would replace what is read from it" in capsys.readouterr().err
    assert (sorted(corpus.parent.iterdir()), file.read_bytes()) == (before, b"training data")
    corpus.write_text(corpus.read_text().splitlines()[0])
    assert main(arguments) == main(arguments) == 0  # nothing names the file any more


def test_a_folder_of_recordings_stays_as_it_is(
    corpus: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(corpus, tmp_path / "set", tiny_folder)
    monkeypatch.chdir(corpus.parent)
    for name in ("sample-0.wav", "sample-0.png"):
        Path(name).write_bytes(b"training data")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert main(["data", "inspect", str(tmp_path / "set"), "--model", str(tiny_folder)]) == 0
    after = {path: path.read_bytes() for path in Path().iterdir()}
    assert {path: after[path] for path in before} == before
    assert sorted(path.name for path in set(after) - set(before)) == ["inspect-speech-0.png", "inspect-speech-0.wav"]


def test_samples_that_are_not_there(
    corpus: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(corpus, tmp_path / "set", tiny_folder)
    for source, message in ((corpus, "has 10 conversations"), (tmp_path / "set", "has 6 speech samples")):
        arguments = ["data", "inspect", str(source), "--index", "10", "--out", str(tmp_path)]
        assert main([*arguments, "--model", str(tiny_folder)]) == 2
        assert message in capsys.readouterr().err
    file = tmp_path / "set" / "speech-00000.parquet"
    assert main(["data", "inspect", str(file), "--model", str(tiny_folder)]) == 2
    assert f"name the folder, {file.parent}\n" in capsys.readouterr().err
    assert main(["data", "inspect", str(tmp_path / "set")]) == 2
    assert "was packed with another tokenizer; name its model with --model" in capsys.readouterr().err


def test_a_recording_of_one_frame_is_packed_and_shown(tiny_folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", np.full((RATE // 20, 2), 0.1), RATE)
    (tmp_path / "short.json").write_text('{"alignments": []}')
    corpus = tmp_path / "all.jsonl"
    corpus.write_text('{"path": "short.wav", "duration": 0.05}\n')
    encoder = load_encoder(tiny_folder, "cpu")
    pack(corpus, tmp_path / "out", tiny_folder)
    shown = inspect_shards(tmp_path / "out", 0, encoder)
    assert shown.waves is not None and shown.waves.shape == (2, encoder.codec.config.frame_size)
