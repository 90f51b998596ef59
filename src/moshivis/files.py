"""Reading what a stranger hands us within limits; writing files and folders so that a reader sees all or nothing."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moshivis.errors import InputError

_RANDOM = "[a-z0-9_]{8}"  # what `tempfile` makes of a prefix


def read_limited(source: str | os.PathLike[str] | bytes, *, max_bytes: int, noun: str) -> bytes:
    """The content of a file, or `source` itself if it is bytes already.

    `noun` names the thing in messages ("picture"). Never more than `max_bytes` + 1 bytes are read, whatever the file.
    Raises InputError if there is no such file, if it is a folder, cannot be read, is empty, or holds more bytes.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        name, content = f"this {noun}", bytes(source)
    else:
        name = os.fspath(source)
        try:
            with open(name, "rb") as file:
                content = file.read(max_bytes + 1)
        except FileNotFoundError:
            raise InputError(f"{name}: no such file; give the path of a {noun}") from None
        except IsADirectoryError:
            raise InputError(f"{name} is a folder; give the path of a {noun}") from None
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise InputError(f"{name} cannot be read: {error}") from error
    if not content:
        raise InputError(f"{name} is empty: it has no bytes at all")
    if len(content) > max_bytes:
        raise InputError(f"{name} has more than {max_bytes / 2**20:g} MiB, the limit for a {noun}; make it smaller")
    return content


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that every terminal and every JSON file takes, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", "replace")


def keep_inputs(outputs: Iterable[Path], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raises InputError if one of the files to be written is one of those that are read."""
    read = [path for path in map(Path, inputs) if os.path.exists(path)]  # Path.exists raises for too long a name
    for out in outputs:
        if os.path.exists(out) and any(out.samefile(path) for path in read):
            raise InputError(f"{shown(out)} would replace what is read from it; name another file to be written")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file beside `path`; on leaving the block it takes `path`'s place.

    The temporary name keeps the suffix of `path`, for writers that choose their format by it. Missing parent folders
    are created. If the block raises, the temporary file is removed and an older file at `path` stays as it was.

    Raises IsADirectoryError if `path` is a folder, OSError if its folder cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder, not a file that could be written")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_default_mode(0o666))  # mkstemp makes files that only their owner can read
        _flush(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on leaving the block it takes `path`'s place.

    An empty folder at `path` is replaced. One with content is refused: nothing that somebody wrote is deleted; or, with
    `replace`, it stays until the new one is complete. If the block raises, the temporary folder and all that was
    written to it are removed.

    Raises FileExistsError if `path` is a file, or a folder with content that is not to be replaced or is behind a link,
    OSError if its parent cannot be written.
    """
    target = Path(path)
    replace = replace and target.is_dir() and not target.is_symlink()
    if not replace:
        refuse_occupied(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(_default_mode(0o777))
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(_default_mode(0o666))  # safetensors makes files that only their owner can read
                _flush(file)
        if replace:
            os.replace(target, _aside(target))
        else:
            refuse_occupied(target)
            if target.is_dir():
                target.rmdir()
        os.replace(temporary, target)
        if replace:
            shutil.rmtree(_aside(target), ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_interrupted(path: str | os.PathLike[str]) -> None:
    """Remove what an `atomic_write` or `atomic_directory` of `path` left beside it when its process was killed.

    A folder that was just being replaced is back in its place then. Nobody may be writing `path` meanwhile.
    Raises OSError if its parent is not there or cannot be written.
    """
    target = Path(path)
    if _aside(target).is_dir() and not target.exists():
        os.replace(_aside(target), target)
    stem, name, suffix = (re.escape(part) for part in (target.stem, target.name, target.suffix))
    leftover = re.compile(rf"\.{stem}-{_RANDOM}{suffix}|\.{name}-({_RANDOM}|old)")
    for left in [entry for entry in target.parent.iterdir() if leftover.fullmatch(entry.name)]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


@contextmanager
def only_process(folder: str | os.PathLike[str], otherwise: str) -> Iterator[None]:
    """Hold `folder`, which exists, for this process alone; the system lets go of it however the process ends.

    Processes that do not ask are not kept away, and where the system or the disk knows no such locks nobody is.
    Raises InputError with the sentence `otherwise` if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(otherwise) from None
        except OSError:  # a disk of the network that has none
            pass
        yield
    finally:
        os.close(handle)


def refuse_occupied(target: Path) -> None:
    """Raises FileExistsError if there is a file, or a folder with content: nothing that somebody wrote is deleted."""
    if target.is_dir():
        if any(target.iterdir()):
            raise FileExistsError(f"{target} already exists and is not empty; remove it or choose another name")
    elif target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} already exists and is not a folder; remove it or choose another name")


def _aside(target: Path) -> Path:
    """Where a folder waits while another takes its place."""
    return target.with_name(f".{target.name}-old")


def _flush(file: Path) -> None:
    """Bring a file's content to the disk, so that a power cut after the rename leaves no file of zeros."""
    with file.open("rb+" if os.name == "nt" else "rb") as opened:  # Windows flushes what is open for writing only
        os.fsync(opened.fileno())


def _default_mode(mode: int) -> int:
    """`mode` less the bits that the process's umask takes away."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask
