"""Conversations packed into a folder of shards, by several processes, in any number of sittings.

The lines of a `.jsonl` file, or a folder's recordings, are cut into parts. A finished part stays finished: after an
interruption of any kind the same call goes on with the parts that are missing. Only what was left out as broken is
tried again by every call; a part is packed anew if some of it is mended. The manifest is written last.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moshivis.data.encode import Encoder
from moshivis.data.layout import Line, parse_line, read_lines
from moshivis.data.part import Done, Part, Rules, Tally, complete_part, lines_digest, note_path, pack_part, read_done
from moshivis.data.shard_format import MANIFEST, VERSION, Manifest, codec_fingerprint, tokenizer_fingerprint
from moshivis.data.shards import check_size
from moshivis.data.written import usual_form
from moshivis.errors import InputError, MoshivisError, ShardError
from moshivis.files import atomic_write, only_process
from moshivis.processes import end_with_parent

LINES_A_PART = 256
JOB, REPORT = "job.json", "report.json"
_LEFT_BEHIND = re.compile(r"\.(speech|speechless|pictures|part|job|report|manifest)-.*\.(parquet|json)")
_TICK = 0.2  # seconds between two looks at how far the processes are

OnProgress = Callable[[int, int], None]  # lines done, of how many


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """What a folder holds, and what became of the conversations on the way."""

    manifest: Manifest
    tally: Tally
    earlier: bool = False  # an earlier call had packed all of it; nothing was read


def tokenize(
    source: Path,
    folder: Path,
    load: Callable[[], Encoder],
    *,
    rules: Rules | None = None,
    workers: int = 1,
    lines_a_part: int = LINES_A_PART,
    on_progress: OnProgress = lambda done, total: None,
) -> Tokenized:
    """Pack the conversations of `source` into `folder`, or finish what an earlier call began.

    `load` gives the encoder; it is called in every worker process and must be picklable. One worker runs in this
    process.
    Raises InputError for a broken conversation unless `rules` skip them, if all are broken, if another process packs
    into the folder, if it cannot be written, as on a full disk, or if it holds anything but an earlier beginning of the
    same job; MoshivisError if a worker is killed.
    """
    if workers < 1 or lines_a_part < 1:
        raise InputError(f"{workers} workers cannot pack parts of {lines_a_part} conversations: both must be 1 or more")
    rules = rules or Rules()
    lines = read_lines(source)
    encoder = load()
    rules = dataclasses.replace(rules, form=rules.form or usual_form(encoder.tokenizer))
    try:
        _check_place(folder)
        with only_process(folder, f"another process is packing into {folder}; wait for it, or name another folder"):
            _claim(folder, _describe(source, lines, rules, encoder, lines_a_part))
            if (folder / MANIFEST).exists():
                return _finished(folder)
            parts = _parts(lines, lines_a_part)
            notes = _pack(parts, len(lines), folder, load, encoder, rules, workers, on_progress)
            return _finish(folder, notes, encoder)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror or error}; run the same again to go on"
        ) from error


def _pack(
    parts: list[Part],
    total: int,
    folder: Path,
    load: Callable[[], Encoder],
    encoder: Encoder,
    rules: Rules,
    workers: int,
    on_progress: OnProgress,
) -> list[Done]:
    """Pack what no earlier run has packed, or could not pack then; the notes of all parts."""
    notes = {part.number: read_done(folder, part) for part in parts}
    done = {number: note for number, note in notes.items() if note and not note.tally.broken}
    missing = [part for part in parts if part.number not in done]
    finished = total - sum(len(part.lines) for part in missing)

    def count(new: int) -> None:
        on_progress(finished + new, total)

    count(0)
    if workers == 1:
        done |= _pack_here(missing, folder, rules, encoder, count)
    else:
        done |= _pack_in_processes(missing, folder, rules, load, workers, count)
    # A picture that could not be read when its part was packed, or was another one then.
    while (lacking := _lacking_pictures(parts, done)) is not None:
        pictures = frozenset(path for path in map(_picture, lacking.lines) if path is not None)
        again = dataclasses.replace(lacking, pictures=pictures)
        done[lacking.number] = pack_part(again, folder, rules, encoder, on_line=lambda: None)
    return [done[part.number] for part in parts]


# the job --------------------------------------------------------------------------------------------------------------


def _describe(source: Path, lines: list[Line], rules: Rules, encoder: Encoder, lines_a_part: int) -> dict[str, Any]:
    """What makes two calls the same job."""
    return {
        "version": VERSION,
        "source": str(source.absolute()),
        "lines": len(lines),
        "sha256": lines_digest(lines),
        "lines_a_part": lines_a_part,
        "rules": {name: value for name, value in vars(rules).items() if name != "skip_broken"},
        "skip_broken": rules.skip_broken,
        "codebooks": [encoder.own_codebooks, encoder.user_codebooks],
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "codec": codec_fingerprint(encoder.codec),
    }


def _check_place(folder: Path) -> None:
    """Make the folder. Raises InputError if it holds anything but a job of ours."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the packed samples")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / JOB).exists():
        names = [entry.name for entry in folder.iterdir() if entry.name != ".DS_Store"]  # of a Mac's Finder
        strange = [name for name in names if not _LEFT_BEHIND.fullmatch(name)]
        if strange:
            raise InputError(f"{folder} is not empty, and {strange[0]} in it is not ours; name another folder")


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Begin the job, or make sure that it is the one begun in the folder."""
    path = folder / JOB
    if path.exists():
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged: {error}; remove the folder and begin anew") from error
        if not isinstance(begun, dict) or begun.get("version") != VERSION:
            raise InputError(f"{folder} was begun by another version of this program; remove it and pack again")
        free = () if (folder / MANIFEST).exists() else ("sha256", "skip_broken")  # a broken line mended, or left out
        differing = [name for name in job if name not in free and begun.get(name) != job[name]]
        if differing:
            raise InputError(
                f"{folder} was begun otherwise (different: {', '.join(differing)}); give the same arguments to go on, "
                "or another folder to begin anew"
            )
    for temporary in folder.glob(".*"):
        if _LEFT_BEHIND.fullmatch(temporary.name):  # by a run that was killed
            temporary.unlink()
    if not (folder / MANIFEST).exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")


def _parts(lines: list[Line], lines_a_part: int) -> list[Part]:
    """Every picture is stored by the first part that names it."""
    stored: set[Path] = set()
    parts = []
    for number, begin in enumerate(range(0, len(lines), lines_a_part)):
        chunk = tuple(lines[begin : begin + lines_a_part])
        named = {path for path in map(_picture, chunk) if path is not None}
        parts.append(Part(number=number, lines=chunk, pictures=frozenset(named - stored)))
        stored |= named
    return parts


def _lacking_pictures(parts: list[Part], done: dict[int, Done]) -> Part | None:
    """The first part with samples whose picture no part stores."""
    stored = {key for note in done.values() for key in note.stored}
    return next((part for part in parts if not stored.issuperset(done[part.number].named)), None)


def _picture(line: Line) -> Path | None:
    try:
        return parse_line(line).image
    except InputError:  # said when the line's turn comes
        return None


def _finished(folder: Path) -> Tokenized:
    """What an earlier call packed."""
    manifest = Manifest.read(folder)
    for file in manifest.files:
        try:
            check_size(folder, file)
        except ShardError as error:
            raise InputError(f"{error}. To pack everything again, remove {folder} first") from error
    try:
        tally = Tally.from_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # the samples do without it
        tally = Tally(conversations=manifest.rows("speech") + manifest.rows("speechless"))
    return Tokenized(manifest=manifest, tally=tally, earlier=True)


def _finish(folder: Path, notes: list[Done], encoder: Encoder) -> Tokenized:
    tally = Tally()
    for note in notes:
        tally.add(note.tally)
    if not tally.conversations:
        first = tally.broken[0]
        raise InputError(f"not one of {len(tally.broken)} conversations could be packed; the first: {first.why}")
    files = tuple(file for note in notes for file in note.files)
    has_speech = any(file.content == "speech" for file in files)
    manifest = Manifest(
        codebooks=encoder.codebooks if has_speech else 0,
        tokenizer=tokenizer_fingerprint(encoder.tokenizer),
        codec=codec_fingerprint(encoder.codec) if has_speech else None,
        files=files,
        skipped=len(tally.broken),
    )
    with atomic_write(folder / REPORT) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(tally), indent=1) + "\n", encoding="utf-8")
    manifest.write(folder)
    for number in range(len(notes)):
        note_path(folder, number).unlink(missing_ok=True)
    return Tokenized(manifest=manifest, tally=tally)


# running --------------------------------------------------------------------------------------------------------------


def _pack_here(
    parts: list[Part], folder: Path, rules: Rules, encoder: Encoder, count: Callable[[int], None]
) -> dict[int, Done]:
    packed = 0

    def on_line() -> None:
        nonlocal packed
        packed += 1
        count(packed)

    return {part.number: complete_part(part, folder, rules, encoder, on_line) for part in parts}


def _pack_in_processes(
    parts: list[Part],
    folder: Path,
    rules: Rules,
    load: Callable[[], Encoder],
    workers: int,
    count: Callable[[int], None],
) -> dict[int, Done]:
    context = multiprocessing.get_context("spawn")
    packed, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        min(workers, max(1, len(parts))), context, initializer=_start_worker, initargs=(load, packed, stop)
    )
    with pool:
        futures = {pool.submit(_work, part, folder, rules): part.number for part in parts}
        with _stopping(stop, pool):
            for _ in _until_done(set(futures)):
                count(packed.value)
        return {number: future.result() for future, number in futures.items()}


@contextmanager
def _stopping(stop: Any, pool: ProcessPoolExecutor) -> Iterator[None]:
    """If the block raises, let the processes end with the line that they are at."""
    try:
        yield
    except BaseException as error:
        stop.set()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise MoshivisError(
                "a process that packed samples was ended from outside, perhaps for want of memory; "
                "run the same again to go on, with fewer workers"
            ) from error
        raise


def _until_done(waiting: set[Future[Done]]) -> Iterator[None]:
    """Yields now and then; raises what a future raises."""
    while waiting:
        finished, waiting = wait(waiting, timeout=_TICK)
        for future in finished:
            future.result()
        yield


class _Worker:
    """What a process keeps from one part to the next."""

    encoder: Encoder
    packed: Any
    stop: Any


def _start_worker(load: Callable[[], Encoder], packed: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    end_with_parent()
    torch.set_num_threads(1)
    _Worker.encoder, _Worker.packed, _Worker.stop = load(), packed, stop


def _work(part: Part, folder: Path, rules: Rules) -> Done:
    return complete_part(part, folder, rules, _Worker.encoder, _on_line)


def _on_line() -> None:
    with _Worker.packed.get_lock():
        _Worker.packed.value += 1
    if _Worker.stop.is_set():
        raise MoshivisError("stopped")
