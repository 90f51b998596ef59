"""`moshivis data tokenize` and `moshivis data inspect`."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moshivis.audio import write_wav
from moshivis.checkpoints.codec import load_codec
from moshivis.checkpoints.load import find_folder
from moshivis.data.encode import Encoder
from moshivis.data.inspect import inspect_line, inspect_shards
from moshivis.data.layout import SPEAKER_MAIN
from moshivis.data.part import Rules
from moshivis.data.sample import Speaker
from moshivis.data.shard_format import MANIFEST
from moshivis.data.tokenize import JOB, REPORT, OnProgress, Tokenized, tokenize
from moshivis.devices import usable_device
from moshivis.errors import InputError
from moshivis.files import atomic_write, keep_inputs, shown
from moshivis.inference.conversation import EMBEDDED

NAMED = 10  # broken conversations that are printed; all are in the report


def run_tokenize(arguments: argparse.Namespace) -> int:
    """Pack as the command line says. Raises MoshivisError for anything that the user can mend."""
    load = functools.partial(load_encoder, _folder_of(arguments.model, arguments.download), arguments.device)
    out = Path(arguments.out)
    rules = Rules(kind=arguments.kind, form=arguments.form, skip_broken=arguments.on_error == "skip")
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    with _progress(console) as on_progress:
        packed = tokenize(
            Path(arguments.source),
            out,
            load,
            rules=rules,
            workers=arguments.workers,
            lines_a_part=arguments.part,
            on_progress=on_progress,
        )
    _print_report(console, packed, out)
    print(json.dumps(_summary(packed, out)))
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Write what a sample looks and sounds like. Raises MoshivisError for anything that the user can mend."""
    source, out = Path(arguments.source), Path(arguments.out)
    if source.suffix == ".parquet" and (source.parent / MANIFEST).exists():
        raise InputError(f"{source} is one file of a folder of packed samples; name the folder, {source.parent}")
    encoder = load_encoder(_folder_of(arguments.model, arguments.download), "cpu")
    if any((source / name).exists() for name in (MANIFEST, JOB)):
        inspected = inspect_shards(source, arguments.index, encoder, arguments.kind)
    else:
        inspected = inspect_line(source, arguments.index, encoder, arguments.form)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for speaker, text in inspected.transcript(encoder):
        label = {Speaker.ASSISTANT: "Assistant", Speaker.USER: "User"}.get(speaker, "")
        console.print(f"{label:<11}", text, sep="")
    suffixes = ("png",) if inspected.waves is None else ("png", "wav")
    name = f"inspect-{inspected.sample.kind}-{arguments.index}"
    written = [out / f"{name}.{suffix}" for suffix in suffixes]
    keep_inputs(written, inspected.files)
    try:
        with atomic_write(written[0]) as temporary:
            inspected.draw(encoder).save(temporary)
        if inspected.waves is not None:
            rate = encoder.codec.config.sample_rate
            write_wav(written[1], np.ascontiguousarray(inspected.waves.T), rate)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    console.print("wrote " + " and ".join(map(shown, written)), style="dim")
    return 0


def load_encoder(folder: Path, device: str) -> Encoder:
    """The encoder of a model's folder; called in every process that packs."""
    checkpoint = load_codec(folder, usable_device(device))
    lm = checkpoint.config.speech_lm
    return Encoder(
        codec=checkpoint.codec,
        tokenizer=checkpoint.tokenizer,
        own_codebooks=lm.own_codebooks,
        user_codebooks=lm.user_codebooks,
    )


def _folder_of(model: str, download: bool) -> Path:
    return EMBEDDED[model] if model in EMBEDDED else find_folder(model, allow_download=download)


@contextmanager
def _progress(console: Console) -> Iterator[OnProgress]:
    """A bar that counts conversations."""
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _summary(packed: Tokenized, out: Path) -> dict[str, object]:
    manifest, tally = packed.manifest, packed.tally
    rows = {content: manifest.rows(content) for content in ("speech", "speechless", "pictures")}
    return {
        "folder": str(out),
        **rows,
        "seconds": round(tally.seconds, 1),
        "skipped": manifest.skipped,
        "mute": tally.mute,
        "lone": tally.lone,
        "unspelt": tally.unspelt,
    }


def _print_report(console: Console, packed: Tokenized, out: Path) -> None:
    manifest, tally = packed.manifest, packed.tally
    console.print(
        f"{out}: {manifest.rows('speech')} speech samples ({tally.seconds / 3600:.2f} h), "
        f"{manifest.rows('speechless')} speechless ones, {manifest.rows('pictures')} pictures"
    )
    if packed.earlier:
        console.print(
            f"It was packed before, and nothing was read again; to pack anew, remove {out} first", style="bold"
        )
    if manifest.rows("speech"):
        console.print(
            f"{tally.words} words of the assistant: {tally.late} begin after their frame; "
            f"{tally.lost} pieces lie behind the end",
            style="dim",
        )
    if tally.mute:
        console.print(
            f"In {tally.mute} recordings nobody but the user says a word: the assistant's words need the speaker "
            f"{SPEAKER_MAIN}",
            style="bold",
        )
    if tally.lone:
        console.print(
            f"In {tally.lone} recordings written down nobody but the assistant says a word: they teach to talk without "
            "being asked. The user's words need another speaker's name",
            style="bold",
        )
    if tally.unspelt:
        console.print(
            f"{tally.unspelt} words have signs that this model's vocabulary lacks, and lose them", style="bold"
        )
    if tally.broken:
        console.print(f"{len(tally.broken)} conversations were left out, all listed in {out / REPORT}:", style="bold")
        for broken in tally.broken[:NAMED]:
            console.print(f"  {broken.why}")
