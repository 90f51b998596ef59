"""`moshivis serve` in a process of its own, as people start it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import moshivis
from serve_support import PATIENCE, wait_for

SOURCE = str(Path(moshivis.__file__).parents[1])
COMMAND = [sys.executable, "-m", "moshivis.cli", "serve"]


class Process:
    """A server in a process of its own, and what it says."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        self.out: list[str] = []
        self.log: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((process.stdout, self.out), (process.stderr, self.log))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: IO[str], lines: list[str]) -> None:
        lines.extend(line.rstrip("\n") for line in stream)

    def address(self) -> str:
        """Of the one line that it prints when it is ready."""
        wait_for(lambda: bool(self.out) or self.process.poll() is not None, "the address")
        assert len(self.out) == 1, self.log
        found = re.fullmatch(r"moshivis serves \S+ at (https?://\S+/\S*)", self.out[0])
        assert found, self.out
        return found[1]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit status, and the seconds it took."""
        begun = time.monotonic()
        self.process.send_signal(number)
        return self.wait(), time.monotonic() - begun

    def wait(self) -> int:
        status = self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return status


@contextlib.contextmanager
def started(*arguments: str, **environment: str) -> Iterator[Process]:
    with subprocess.Popen(
        [*COMMAND, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE, "PYTHONUNBUFFERED": "1", **environment},
    ) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


def get(url: str, context: ssl.SSLContext | None = None) -> bytes:
    with urllib.request.urlopen(url, timeout=PATIENCE, context=context) as answer:
        content: bytes = answer.read()
        return content
