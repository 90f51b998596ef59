"""`moshivis talk`: questions about a picture from files and words, answers to files and to the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.style import Style
from rich.text import Text

from moshivis.audio import read_audio, write_wav
from moshivis.checkpoints.load import dtype_named
from moshivis.errors import InputError
from moshivis.evaluation.gates import draw_gates
from moshivis.files import atomic_write, keep_inputs, shown
from moshivis.inference.colour import GateScale
from moshivis.inference.conversation import Assistant, TextPiece, load
from moshivis.inference.sampling import Sampling
from moshivis.inference.talk import Question, TalkResult, Turn, talk
from moshivis.vision.image import read_image

ASSETS = Path(__file__).parents[1] / "assets"


def run_talk(arguments: argparse.Namespace) -> int:
    """Talk as the command line says. Raises MoshivisError for anything that the user can mend."""
    out, gates = _outputs(arguments)
    picture, questions = _inputs(arguments)
    console = Console(stderr=arguments.json, highlight=False, soft_wrap=True, markup=False)
    assistant = load(
        arguments.model,
        device=arguments.device,
        dtype=dtype_named(arguments.dtype),
        download=arguments.download,
        adapters=arguments.adapters,
    )
    _prepare(assistant)
    with _progress(assistant, spoken=questions[0].audio is not None) as on_frame:
        result = talk(
            assistant,
            picture,
            questions,
            seconds=arguments.seconds,
            seed=arguments.seed,
            sampling=_sampling(assistant.sampling, arguments),
            on_frame=on_frame,
        )
    scale = GateScale.of(assistant.config.adapters)
    audio: dict[str, str] = {}
    unwritten: InputError | None = None  # said last, lest the answer be lost
    try:
        audio = _write_audio(result, out)
    except InputError as error:
        unwritten = error
    try:
        if gates is not None:
            _write_picture(draw_gates(result, picture, scale), gates)
    except InputError as error:
        unwritten, gates = unwritten or error, None
    _print_transcript(console, result, scale)
    _print_summary(console, result, audio, gates, spoken_asked=arguments.out is not None and unwritten is None)
    if arguments.json:
        paths = {"audio": audio or None, "gates": None if gates is None else shown(gates)}
        print(json.dumps(result.to_json() | paths, ensure_ascii=False))
    if unwritten is not None:
        raise unwritten
    return 0


# what goes in ---------------------------------------------------------------------------------------------------------


def _inputs(arguments: argparse.Namespace) -> tuple[Image.Image, list[Question]]:
    picture, audio = arguments.picture, list(arguments.audio)
    text = [words.encode("utf-8", "replace").decode() for words in arguments.text]  # no terminal shows other bytes
    if arguments.example:
        picture = picture or ASSETS / "example.png"
        if not audio and not text:
            audio = [ASSETS / "example.wav"]
    if picture is None:
        raise InputError("there is no picture to talk about: name a file, or try --example")
    if not audio and not text:
        raise InputError('there is no question: ask with --audio question.wav or --text "What do you see?"')
    if audio and text:
        raise InputError("--audio and --text cannot be mixed: a conversation is either spoken or written")
    for words in text:
        if not words.strip():
            raise InputError("--text is empty: write a question")
    questions = [Question(audio=read_audio(path), label=shown(Path(path).name)) for path in audio]
    return read_image(picture), questions + [Question(text=words, label=words) for words in text]


def _outputs(arguments: argparse.Namespace) -> tuple[Path, Path | None]:
    """Checked before anything is computed, lest the answer be lost."""
    out, gates = Path(arguments.out or "answer.wav"), None
    if out.suffix.lower() != ".wav":
        raise InputError(f"--out {shown(out)} must end in .wav, the only kind of audio file that is written")
    if arguments.gates is not None:
        gates = Path(arguments.gates)
        if gates.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise InputError(f"--gates {shown(gates)} must end in .png, .jpg or .webp")
    written = [path for path in (out, _alone(out), gates) if path is not None]
    for path in written:
        if path.is_dir():
            raise InputError(f"{shown(path)} is a folder; name a file to be written")
    keep_inputs(written, [*arguments.audio, *([] if arguments.picture is None else [arguments.picture])])
    return out, gates


def _alone(out: Path) -> Path:
    """Where the assistant's voice goes without the user's."""
    return out.with_name(f"{out.stem}.assistant{out.suffix}")


def _sampling(usual: Sampling, arguments: argparse.Namespace) -> Sampling:
    given = {
        "audio_temperature": arguments.temperature,
        "text_temperature": arguments.text_temperature,
        "audio_top_k": arguments.top_k,
        "text_top_k": arguments.top_k,
    }
    return dataclasses.replace(usual, **{name: value for name, value in given.items() if value is not None})


def _prepare(assistant: Assistant) -> None:
    if assistant.device.type != "cpu":
        assistant.warm_up()
    elif assistant.threads is not None:
        torch.set_num_threads(assistant.threads)


@contextmanager
def _progress(assistant: Assistant, *, spoken: bool) -> Iterator[Callable[[TextPiece], None]]:
    """A line on a terminal that says how far the conversation is."""
    with Console(stderr=True).status("listening" if spoken else "reading") as status:

        def on_frame(piece: TextPiece) -> None:
            if not spoken:
                status.update(f"{piece.frame} tokens")
                return
            seconds = piece.frame * assistant.frame_size / assistant.config.codec.sample_rate
            status.update(f"{seconds:.1f} s of conversation")

        yield on_frame


# what comes out -------------------------------------------------------------------------------------------------------


def _write_audio(result: TalkResult, out: Path) -> dict[str, str]:
    """Paths of the files written; none for a written conversation."""
    if result.user is None or result.assistant is None:
        return {}
    alone = _alone(out)
    with _writing(out):
        write_wav(out, np.stack([result.user, result.assistant], axis=1))
    with _writing(alone):
        write_wav(alone, result.assistant)
    return {"conversation": shown(out), "assistant": shown(alone)}


def _write_picture(picture: Image.Image, path: Path) -> None:
    with _writing(path), atomic_write(path) as temporary:
        try:
            picture.save(temporary)
        except ValueError as error:  # WebP, among others, has a largest size
            raise InputError(f"{shown(path)} cannot be written: {error}; PNG has room for it") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be written: {error.strerror or error}") from error


def _print_transcript(console: Console, result: TalkResult, scale: GateScale) -> None:
    ends = [turn.frame for turn in result.turns[1:]] + [result.frames]
    begin = 0
    for turn, end in zip(result.turns, ends, strict=True):
        if turn.question is not None:
            console.print(Text.assemble(("You        ", "bold"), turn.question))
        said = [piece for piece in result.pieces if begin <= piece.frame < end]
        console.print(Text.assemble(("Assistant  ", "bold"), _coloured(said, scale), (_remark(turn), "dim")))
        begin = end


def _coloured(pieces: list[TextPiece], scale: GateScale) -> Text:
    if not pieces:
        return Text("(says nothing)", "dim")
    text = Text()
    for piece in pieces:
        style = Style(color="black", bgcolor=scale.colour(piece.gate))
        text.append(piece.text.lstrip() if not text else piece.text, style)
    return text


def _remark(turn: Turn) -> str:
    if turn.reaction_ms is None:
        return ""
    if turn.reaction_ms < 0:
        return f"  barged in {-turn.reaction_ms:.0f} ms before the end of the question"
    return f"  after {turn.reaction_ms:.0f} ms"


def _print_summary(
    console: Console, result: TalkResult, audio: dict[str, str], gates: Path | None, *, spoken_asked: bool
) -> None:
    if result.form == "spoken":
        console.print(f"{result.frames} frames, real-time factor {result.real_time_factor:.2f}", style="dim")
    else:
        console.print(f"{result.frames} tokens", style="dim")
    if audio:
        console.print(
            f"wrote {audio['conversation']} (left: you, right: {result.model}) and {audio['assistant']}", style="dim"
        )
    elif spoken_asked:
        console.print("no audio: a written question is answered in writing, --out has nothing to hold", style="dim")
    if gates is not None:
        console.print(f"wrote {shown(gates)}", style="dim")
