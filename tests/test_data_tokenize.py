"""`moshivis data tokenize`: folders of recordings packed by real processes, killed and continued."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moshivis
from data_support import corpus, pack, same, write_corpus, write_recording
from moshivis.cli import main
from moshivis.commands.data import load_encoder
from moshivis.data.alignment import words_of
from moshivis.data.part import Rules
from moshivis.data.shard_format import Manifest
from moshivis.data.shards import open_shards
from moshivis.data.tokenize import tokenize
from moshivis.errors import InputError
from moshivis.files import only_process
from moshivis.speech_lm.tokenizer import TextTokenizer

__all__ = ["corpus"]  # a fixture
SOURCE = str(Path(moshivis.__file__).parents[1])


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.parquet")) + [folder / "manifest.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_conversations_become_samples(
    corpus: Path, tiny_folder: Path, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    packed = pack(corpus, tmp_path / "out", tiny_folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 10) for done in range(11)]
    assert (packed.tally.conversations, packed.tally.words, packed.tally.broken) == (10, 12, [])
    manifest = Manifest.read(tmp_path / "out")
    assert [manifest.rows(content) for content in ("speech", "speechless", "pictures")] == [6, 4, 2]
    speech = open_shards(tmp_path / "out", "speech", seed=None)
    for number in range(6):
        sample = speech[number]
        assert sample.audio is not None
        assert sample.audio.shape == (6, len(sample))
        assert sample.origin == f"{corpus}:{number + 1}"
        assert [word.text for word in words_of(sample.text, tiny_tokenizer)] == ["the", "star"]
        assert (sample.image is None) == (number % 3 == 2)
    written = open_shards(tmp_path / "out", "speechless", seed=None)[0]
    assert tiny_tokenizer.decode(written.text.tolist()) == "what colour is the star the star is blue"
    assert written.image is not None
    file = open_shards(tmp_path / "out", "speechless").picture(written.image)
    assert file == (corpus.parent / "red.png").read_bytes()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".parquet"}


def test_processes_make_the_same_files(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    pack(corpus, tmp_path / "one", tiny_folder)
    pack(corpus, tmp_path / "two", tiny_folder, workers=2)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")


def test_recordings_as_transcripts(
    corpus: Path, tiny_folder: Path, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    packed = pack(corpus, tmp_path / "out", tiny_folder, rules=Rules(kind="speechless"))
    assert (packed.manifest.rows("speech"), packed.manifest.rows("speechless")) == (0, 10)
    assert packed.manifest.codec is None
    first = open_shards(tmp_path / "out", "speechless", seed=None)[0]
    assert tiny_tokenizer.decode(first.text.tolist()) == "what star the star"


@pytest.mark.timeout(900)  # seven processes import torch, which takes its time on a busy machine
def test_killed_at_any_moment_it_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", recordings=12)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "moshivis.cli", "data", "tokenize", str(corpus), str(out)]
    command += ["--model", str(tiny_folder), "--part", "2", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        while not list(out.glob("part-*.json")):
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in map(out.joinpath, _files_of_finished_parts(out))}
    assert kept
    assert not (out / "manifest.json").exists()
    with pytest.raises(InputError, match="its packing was interrupted; the same"):
        open_shards(out, "speech")
    (out / ".speech-00007-x.parquet").write_bytes(b"half a file")
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert json.loads(finished.stdout)["speech"] == 12
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pack_all = functools.partial(load_encoder, tiny_folder, "cpu")
    tokenize(corpus, tmp_path / "whole", pack_all, lines_a_part=2)
    assert checksums(out) == checksums(tmp_path / "whole")
    assert not list(out.glob(".*"))


def _files_of_finished_parts(out: Path) -> list[str]:
    notes = [json.loads(path.read_text()) for path in out.glob("part-*.json")]
    return [file["name"] for note in notes for file in note["files"]]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files cannot become larger than so many bytes, those of processes that are started here neither."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        with pytest.raises(InputError, match="out cannot be written: .*File too large.*; run the same again to go on"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.mark.timeout(900)  # processes import torch
@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_full_disk_it_goes_on(corpus: Path, tiny_folder: Path, tmp_path: Path, workers: int) -> None:
    """The last part has a picture that the disk has no room for."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(corpus.parent / "noise.png")
    with corpus.open("a") as file:
        file.write(json.dumps({"turns": [{"role": "user", "text": "what is the star"}], "image": "noise.png"}) + "\n")
    out = tmp_path / "out"
    with full_disk(50_000):
        pack(corpus, out, tiny_folder, workers=workers)
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".*"))
    kept = {path: path.stat().st_mtime_ns for path in map(out.joinpath, _files_of_finished_parts(out))}
    assert kept or workers > 1  # of two, one may be quick to meet the last part
    pack(corpus, out, tiny_folder, workers=workers)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pack(corpus, tmp_path / "whole", tiny_folder)
    assert checksums(out) == checksums(tmp_path / "whole")


def test_whichever_file_fills_the_disk(tiny_folder: Path, tmp_path: Path) -> None:
    """The first one, a picture, samples, and the manifest after all parts."""
    corpus = write_corpus(tmp_path / "corpus", recordings=0, dialogues=20)
    load = functools.partial(load_encoder, tiny_folder, "cpu")
    tokenize(corpus, tmp_path / "whole", load, lines_a_part=1)
    size = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    files = ("job.json", "pictures-00000.parquet", "speechless-00003.parquet", "manifest.json")
    assert sorted(files, key=size.__getitem__) == list(files)
    for name in files:
        with full_disk(size[name] - 1):
            tokenize(corpus, tmp_path / "out", load, lines_a_part=1)
        assert not list((tmp_path / "out").glob(".*"))
    assert len(list((tmp_path / "out").glob("part-*.json"))) == 20
    tokenize(corpus, tmp_path / "out", load, lines_a_part=1)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    first = pack(corpus, tmp_path / "out", tiny_folder)
    before = checksums(tmp_path / "out")
    again = dataclasses.replace(first, earlier=True)
    assert pack(corpus, tmp_path / "out", tiny_folder) == again
    assert checksums(tmp_path / "out") == before
    (tmp_path / "out" / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (tmp_path / "out" / ".cache").mkdir()
    (tmp_path / "out" / ".job-x1.json").write_text("left behind")
    assert pack(corpus, tmp_path / "out", tiny_folder) == again
    assert sorted(path.name for path in (tmp_path / "out").glob(".*")) == [".cache", ".gitattributes"]
    with pytest.raises(InputError, match=r"was begun otherwise \(different: rules\)"):
        pack(corpus, tmp_path / "out", tiny_folder, rules=Rules(form="plain"))
    corpus.write_text(corpus.read_text() + "\n" + corpus.read_text().splitlines()[0])
    with pytest.raises(InputError, match="different: lines, sha256"):
        pack(corpus, tmp_path / "out", tiny_folder)
    with pytest.raises(InputError, match="is not empty, and .* in it is not ours"):
        pack(corpus, corpus.parent, tiny_folder)


def test_what_is_damaged_in_a_finished_folder_is_said(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    first = pack(corpus, tmp_path / "out", tiny_folder)
    for content in ("{", None):
        report = tmp_path / "out" / "report.json"
        report.unlink() if content is None else report.write_text(content)
        again = pack(corpus, tmp_path / "out", tiny_folder)
        assert again.manifest == first.manifest and again.tally.conversations == first.tally.conversations
    next((tmp_path / "out").glob("speech-*")).write_bytes(b"cut")
    with pytest.raises(InputError, match=r"it has 3 bytes instead of .* remove .*out first"):
        pack(corpus, tmp_path / "out", tiny_folder)


def test_one_process_at_a_time(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with only_process(tmp_path / "out", "held"), pytest.raises(InputError, match="another process is packing into"):
        pack(corpus, tmp_path / "out", tiny_folder)
    (tmp_path / "out" / ".job-x1.json").write_text("all that a process left that was killed at once")
    (tmp_path / "out" / ".DS_Store").touch()
    assert pack(corpus, tmp_path / "out", tiny_folder).tally.conversations == 10


def test_every_sample_finds_its_picture_even_if_files_change_meanwhile(
    corpus: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """The part that would have stored a picture had packed another one, or none, before it was interrupted."""

    def interrupt(done: int, total: int) -> None:
        if done == 2:  # the first part has left its note
            Image.new("RGB", (9, 9), "green").save(corpus.parent / "red.png")
            raise KeyboardInterrupt

    load = functools.partial(load_encoder, tiny_folder, "cpu")
    with pytest.raises(KeyboardInterrupt):
        tokenize(corpus, tmp_path / "out", load, lines_a_part=1, on_progress=interrupt)
    assert (tmp_path / "out" / "part-00000.json").exists()
    tokenize(corpus, tmp_path / "out", load, lines_a_part=1)
    samples = [open_shards(tmp_path / "out", kind, seed=None) for kind in ("speech", "speechless")]
    keys = {dataset[number].image for dataset in samples for number in range(dataset.rows)} - {None}
    assert len(keys) == 3
    assert all(samples[0].picture(key) for key in keys if key is not None)


# broken conversations -------------------------------------------------------------------------------------------------


def break_some(corpus: Path) -> None:
    folder = corpus.parent
    (folder / "blue.png").write_bytes(b"no picture")
    (folder / "2.wav").unlink()
    write_recording(folder / "3.wav", 9.0)
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines, "{"]) + "\n")


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_conversations_are_named_and_counted(
    corpus: Path, tiny_folder: Path, tmp_path: Path, workers: int
) -> None:
    break_some(corpus)
    packed = pack(corpus, tmp_path / "out", tiny_folder, rules=Rules(skip_broken=True), workers=workers)
    reasons = {broken.where.rsplit(":", 1)[1]: broken.why for broken in packed.tally.broken}
    assert sorted(reasons, key=int) == ["2", "3", "4", "5", "8", "11"]
    assert "blue.png: this picture is not a picture" in reasons["2"]
    assert re.search(r"there is no .*2.wav", reasons["3"])
    assert "lasts 9.0 s, but the line says 1.3 s" in reasons["4"]
    assert "is no JSON" in reasons["11"]
    assert (packed.manifest.skipped, packed.tally.conversations) == (6, 5)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["broken"]) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_or_packing_stops(corpus: Path, tiny_folder: Path, tmp_path: Path, workers: int) -> None:
    break_some(corpus)
    with pytest.raises(InputError, match="all.jsonl:"):
        pack(corpus, tmp_path / "out", tiny_folder, workers=workers)
    assert not list((tmp_path / "out").glob(".*"))


def test_nothing_to_pack(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both must be 1 or more"):
        pack(corpus, tmp_path / "out", tiny_folder, workers=0)
    corpus.write_text("{}\n")
    with pytest.raises(InputError, match="not one of 1 conversations could be packed; the first: .*all.jsonl:1"):
        pack(corpus, tmp_path / "out", tiny_folder, rules=Rules(skip_broken=True))


def test_what_was_broken_is_tried_again(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (corpus.parent / "red.png").rename(corpus.parent / "late.png")
    (corpus.parent / "blue.png").unlink()
    lines = [line for line in corpus.read_text().splitlines() if "png" in line]
    corpus.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"not one of {len(lines)} conversations"):
        pack(corpus, tmp_path / "out", tiny_folder, rules=Rules(skip_broken=True))
    (corpus.parent / "late.png").rename(corpus.parent / "red.png")
    packed = pack(corpus, tmp_path / "out", tiny_folder, rules=Rules(skip_broken=True))
    assert packed.tally.conversations == sum("red.png" in line for line in lines)


@pytest.mark.timeout(900)  # processes import torch
@pytest.mark.parametrize(("mended", "workers"), [("1.wav", 1), ("late.png", 2)])
def test_what_is_mended_before_the_end_gets_in(
    corpus: Path, tiny_folder: Path, tmp_path: Path, mended: str, workers: int
) -> None:
    """Though parts are missing still. A part in which nothing was mended stays as it is."""
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    lines[1]["image"], lines[2]["image"] = "red.png", "late.png"
    corpus.write_text("\n".join(map(json.dumps, lines)))
    Image.new("RGB", (9, 9), "green").save(corpus.parent / "late.png")
    broken = {"1.wav": 2, "late.png": 3, "5.wav": 6}  # file -> line
    whole = {name: (corpus.parent / name).read_bytes() for name in broken}
    for name in broken:
        (corpus.parent / name).write_bytes(b"not yet")
    rules, out = Rules(skip_broken=True), tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if done == 7:  # two parts have left their notes
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(corpus, out, tiny_folder, rules=rules, on_progress=interrupt)
    assert sorted(path.name for path in out.glob("part-*.json")) == ["part-00000.json", "part-00001.json"]
    before = (out / "speech-00001.parquet").stat().st_mtime_ns
    (corpus.parent / mended).write_bytes(whole[mended])
    packed = pack(corpus, out, tiny_folder, rules=rules, workers=workers)
    left_out = [f"{corpus}:{line}" for name, line in broken.items() if name != mended]
    assert [broken.where for broken in packed.tally.broken] == left_out
    assert (out / "speech-00001.parquet").stat().st_mtime_ns == before
    pack(corpus, tmp_path / "whole", tiny_folder, rules=rules)
    assert checksums(out) == checksums(tmp_path / "whole")


def test_a_recording_without_a_header_is_no_audio(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    corpus.write_text('{"path": "0.raw", "duration": 1}\n')
    (corpus.parent / "0.wav").rename(corpus.parent / "0.raw")
    with pytest.raises(InputError, match="0.raw is not audio that can be read"):
        pack(corpus, tmp_path / "out", tiny_folder)


def test_after_a_broken_line_is_mended_or_left_out_packing_goes_on(
    corpus: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:-1], "{"]) + "\n")
    for out in ("mended", "left out"):
        with pytest.raises(InputError, match="is no JSON"):
            pack(corpus, tmp_path / out, tiny_folder)
    finished = {out: _files_of_finished_parts(tmp_path / out) for out in ("mended", "left out")}
    assert finished["mended"] == finished["left out"] != []
    before = {name: (tmp_path / "left out" / name).stat().st_mtime_ns for name in finished["left out"]}
    left_out = pack(corpus, tmp_path / "left out", tiny_folder, rules=Rules(skip_broken=True))
    assert len(left_out.tally.broken) == 1
    corpus.write_text("\n".join(lines) + "\n")
    mended = pack(corpus, tmp_path / "mended", tiny_folder)
    assert mended.tally.conversations == left_out.tally.conversations + 1 == len(lines)
    after = {name: (tmp_path / "left out" / name).stat().st_mtime_ns for name in finished["left out"]}
    assert after == before
    with pytest.raises(InputError, match=r"different: sha256, skip_broken"):  # it is finished with what was left out
        pack(corpus, tmp_path / "left out", tiny_folder)


def test_what_looks_like_a_mistake_is_said(
    corpus: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words that are all another speaker's, and signs that the vocabulary lacks; times in milliseconds are refused."""
    words = corpus.parent / "0.json"
    words.write_text(words.read_text().replace("SPEAKER_MAIN", "SPEAKER_01"))
    with corpus.open("a") as file:
        file.write(json.dumps({"turns": [{"role": "user", "text": "is the 日 star blue"}]}) + "\n")
    command = ["data", "tokenize", str(corpus), str(tmp_path / "set"), "--model", str(tiny_folder)]
    assert main(command) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["mute"], summary["unspelt"]) == (1, 1)
    assert "In 1 recordings nobody but the user says a word" in captured.err
    assert "1 words have signs that this model's vocabulary lacks" in captured.err
    assert main([*command[:3], str(tmp_path / "written"), *command[4:], "--kind", "speechless"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["mute"] == 1 and "In 1 recordings nobody but the user" in captured.err
    assert json.loads(captured.out)["lone"] == 0 and "nobody but the assistant" not in captured.err
    words.write_text(words.read_text().replace("SPEAKER_01", "SPEAKER_MAIN").replace("SPEAKER_OTHER", "SPEAKER_MAIN"))
    assert main([*command[:3], str(tmp_path / "lone"), *command[4:], "--kind", "speechless"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["lone"] == 1 and "nobody but the assistant says" in captured.err
    alignments = json.loads((corpus.parent / "1.json").read_text())["alignments"]
    late = [[word, [1000 * start, 1000 * end], speaker] for word, (start, end), speaker in alignments]
    (corpus.parent / "1.json").write_text(json.dumps({"alignments": late}))
    command[3] = str(tmp_path / "other")
    assert main(command) == 2
    assert re.search(r"all.jsonl:2: .* begins at .* lasts .* times are in seconds", capsys.readouterr().err)


def test_a_device_that_is_not_there(
    corpus: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(corpus), str(tmp_path / "set"), "--model", str(tiny_folder), "--device", "gpu"]
    assert main(["data", "tokenize", *words]) == 2
    assert "the device 'gpu' cannot be used here" in capsys.readouterr().err


def test_a_packed_folder_can_be_moved(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Nothing in it depends on where it or its source lies."""
    pack(corpus, tmp_path / "set", tiny_folder)
    before = open_shards(tmp_path / "set", "speech")[2]
    shutil.move(tmp_path / "set", tmp_path / "moved")
    shutil.rmtree(corpus.parent)
    assert same(open_shards(tmp_path / "moved", "speech")[2], before)
