"""The `moshivis` command as people run it: answers, files, errors in one sentence, exit statuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import moshivis
from moshivis.cli import main
from moshivis.commands.talk import _write_picture
from moshivis.errors import InputError
from moshivis.inference.conversation import EMBEDDED

SOURCE = str(Path(moshivis.__file__).parents[1])


@pytest.fixture(scope="module")
def inputs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good inputs and bad ones."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.new("RGB", (60, 40), "red").save(folder / "picture.png")
    tone = 0.3 * np.sin(np.arange(20000) * 0.1)
    soundfile.write(folder / "question.wav", np.stack([tone, tone], 1), 44100)
    soundfile.write(folder / "question.flac", tone, 16000)
    soundfile.write(folder / "empty.wav", tone[:0], 24000)
    (folder / "words.txt").write_text("neither a picture nor a sound")
    Image.new("1", (20000, 15000)).save(folder / "huge.png")
    shutil.copytree(tiny_folder, folder / "tiny")
    broken = Path(shutil.copytree(tiny_folder, folder / "broken"))
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:5000])
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All inputs in a current folder of their own."""
    monkeypatch.chdir(tmp_path)
    for path in inputs.iterdir():
        Path(path.name).symlink_to(path)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moshivis.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": SOURCE}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False, **options)


@pytest.mark.usefixtures("here")
def test_a_spoken_question_is_answered_in_sound() -> None:
    # A name of an old disk, where the system has such names.
    odd, said = (os.fsdecode(b"\xfc.flac"), "\ufffd.flac") if sys.platform == "linux" else ("ü.flac", "ü.flac")
    shutil.copy("question.flac", odd)
    talk = ("talk", "picture.png", "--model", "tiny", "--audio", "question.wav", "--audio", odd)
    done = run(*talk, "--seconds", "0.8", "--seed", "3", "--out", "said/it.wav", "--gates", "gates.png", "--json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert {"text", "pieces", "reaction_ms", "frames", "real_time_factor", "audio", "turns"} <= set(result)
    assert result["audio"] == {"conversation": "said/it.wav", "assistant": "said/it.assistant.wav"}
    assert [turn["question"] for turn in result["turns"]] == [None, "question.wav", said]
    for piece in result["pieces"]:
        assert set(piece) == {"piece", "frame", "gate"} and 0 < piece["gate"] < 1 and piece["frame"] < result["frames"]
    both, rate = soundfile.read("said/it.wav")
    alone, _ = soundfile.read("said/it.assistant.wav")
    assert rate == 24000 and both.shape == (result["frames"] * 1920, 2)
    np.testing.assert_array_equal(both[:, 1], alone)
    start = result["turns"][1]["frame"] * 1920
    assert np.abs(both[:start, 0]).max() == 0 and np.abs(both[start : start + 9000, 0]).max() > 0.25
    assert Image.open("gates.png").size[0] > 1000
    assert sorted(path.name for path in Path("said").iterdir()) == ["it.assistant.wav", "it.wav"]


@pytest.mark.usefixtures("here")
def test_a_written_question_is_answered_in_writing(capsys: pytest.CaptureFixture[str]) -> None:
    talk = ["talk", "picture.png", "--model", "tiny", "--text", "what colour is it", "--text", "the star"]
    assert main([*talk, "--seed", "1", "--json"]) == 0
    once = json.loads(capsys.readouterr().out)
    assert once["form"] == "written" and once["audio"] is None and once["reaction_ms"] is None
    assert [turn["question"] for turn in once["turns"]] == [None, "what colour is it", "the star"]
    assert not list(Path().glob("*answer*"))
    assert main([*talk, "--seed", "1", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["pieces"] == once["pieces"]
    assert main([*talk, "--text-temperature", "0", "--top-k", "3", "--out", "no.wav"]) == 0
    shown = capsys.readouterr().out
    assert "what colour is it" in shown and "answered in writing" in shown


BAD: dict[str, tuple[list[str], str]] = {
    "no such picture": (["none.png", "--audio", "question.wav"], "none.png: no such file"),
    "not a picture": (["words.txt", "--audio", "question.wav"], "words.txt is not a picture"),
    "300 megapixels": (["huge.png", "--audio", "question.wav"], "huge.png has too many pixels"),
    "no picture": (["--audio", "question.wav"], "no picture to talk about"),
    "no question": (["picture.png"], "there is no question"),
    "no such audio": (["picture.png", "--audio", "none.wav"], "none.wav: no such file"),
    "not audio": (["picture.png", "--audio", "words.txt"], "words.txt is not audio"),
    "empty audio": (["picture.png", "--audio", "empty.wav"], "empty.wav is empty"),
    "empty text": (["picture.png", "--text", " "], "--text is empty"),
    "both kinds": (["picture.png", "--text", "a", "--audio", "question.wav"], "cannot be mixed"),
    "unknown model": (["picture.png", "--text", "a", "--model", "maxi"], "no model 'maxi'"),
    "unknown repository": (["picture.png", "--text", "a", "--model", "some/one"], "fetched only when asked"),
    "broken model": (["picture.png", "--text", "a", "--model", "broken"], "broken/model-00001-of-00001.safetensors"),
    "a file as model": (["picture.png", "--text", "a", "--model", "words.txt"], "a model is a folder"),
    "unknown device": (["picture.png", "--text", "a", "--device", "gpu"], "device 'gpu' cannot be used"),
    "not a wav": (["picture.png", "--audio", "question.wav", "--out", "a.mp3"], "must end in .wav"),
    "not a png": (["picture.png", "--audio", "question.wav", "--gates", "a.txt"], "must end in .png"),
    "out is a folder": (["picture.png", "--audio", "question.wav", "--out", "folder.wav"], "is a folder"),
    "out is the question": (["picture.png", "--audio", "question.wav", "--out", "question.wav"], "would replace"),
    "gates are the picture": (["picture.png", "--text", "a", "--gates", "picture.png"], "would replace"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("arguments, sentence", BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    Path("folder.wav").mkdir()
    before = sorted(path.name for path in Path().iterdir())
    assert main(["talk", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moshivis: ") and sentence in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == before


def test_gates_too_tall_for_their_format_are_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tall\.webp cannot be written: .*16383.*; PNG has room for it"):
        _write_picture(Image.new("RGB", (4, 16400)), tmp_path / "tall.webp")
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_in_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moshivis.commands.talk.run_talk", lambda _: torch.empty(2**60))
    assert main(["talk", "--example"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moshivis: the memory is too small: ") and error.count("\n") == 1
    assert "you tried to allocate" in error and "enforce" not in error
    monkeypatch.setattr("moshivis.commands.talk.run_talk", lambda _: np.empty(2**55))
    assert main(["talk", "--example"]) == 2
    assert "the memory is too small: Unable to allocate" in capsys.readouterr().err

    def without_words(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("moshivis.commands.talk.run_talk", without_words)
    assert main(["talk", "--example"]) == 2
    assert "the memory is too small; a smaller model" in capsys.readouterr().err
    monkeypatch.setattr("moshivis.commands.talk.run_talk", lambda _: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # any other is a fault of ours, and keeps its traceback
        main(["talk", "--example"])


@pytest.mark.usefixtures("here")
def test_an_error_has_no_traceback_and_status_2() -> None:
    done = run("talk", "huge.png", "--text", "a", "--json")
    assert done.returncode == 2 and done.stdout == ""
    assert "huge.png has too many pixels" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.usefixtures("here")
def test_an_answer_that_cannot_be_written_is_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    talk = ["talk", "picture.png", "--model", "tiny", "--audio", "question.wav", "--seconds", "0.1"]
    assert main([*talk, "--out", "words.txt/answer.wav"]) == 2
    said = capsys.readouterr()
    assert "words.txt/answer.wav cannot be written" in said.err
    assert "question.wav" in said.out and "wrote" not in said.out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--seconds", "1e305"],
        ["--seed", "-1"],
        ["--temperature", "-1"],
        ["--top-k", "-5"],
        ["--seed", "x"],
        ["--temperature", "warm"],
    ],
    ids=" ".join,
)
def test_numbers_out_of_range(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["talk", "picture.png", "--text", "a", *wrong])
    assert stop.value.code == 2
    assert f"argument {wrong[0]}: must be " in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_path_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    talk = ["talk", "picture.png", "--model", "tiny", "--audio", "question.wav", "--seconds", "0.1"]
    assert main([*talk, "--out", "an [bold]answer[/x].wav"]) == 0
    assert "wrote an [bold]answer[/x].wav (left" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, package",
    [
        (["train", "mini"], "pyarrow"),
        (["bench", "train"], "pyarrow"),
        (["bench", "serve"], "websockets"),
        (["data", "inspect", "set"], "pyarrow"),
        (["chat", "localhost"], "websockets"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    words: list[str], package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moshivis.extras.find_spec", lambda name: None if name == package else object())
    assert main(words) == 2
    assert f" needs {package}; install with: pip install 'moshivis[" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    # a process that a shell started in the background ignores the signal until it says otherwise
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    talk = ["talk", "picture.png", "--model", "tiny", "--audio", "question.wav", "--seconds", "36000"]
    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        assert main(talk) == 130
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.endswith("moshivis: interrupted\n")
    assert not list(Path().glob("*answer*"))


def test_version_and_help_do_not_wait_for_torch() -> None:
    done = run("--version")
    assert done.stdout == f"moshivis {moshivis.__version__}\n" and done.returncode == 0
    shown = run("talk", "--help")
    assert "--gates" in shown.stdout
    imported = "import sys, moshivis.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], env=os.environ | {"PYTHONPATH": SOURCE}).returncode == 0


def test_conform_and_bench_are_passed_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["conform", str(tmp_path)]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cases"] == 0
    assert main(["bench", "step", "--random", "--preset", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


@pytest.mark.skipif(not EMBEDDED["mini"].exists(), reason="the embedded model has not been built yet")
def test_the_example(tmp_path: Path) -> None:
    done = run("talk", "--example", "--out", "answer.wav", "--gates", "gates.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Assistant" in done.stdout and "example.wav" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"answer.wav", "answer.assistant.wav", "gates.png"}
