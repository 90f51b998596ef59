"""An end that is asked for from outside: Ctrl-C, or the SIGTERM that batch systems send before they take a machine."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAYS = b"\nmoshivis: ending with the step under way, and a checkpoint of it; Ctrl-C again ends at once\n"


class Stopping:
    """While it is entered, in a program's main thread, the first such signal only sets `asked`."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave(self) -> NoReturn:
        """End the program as the signal would have."""
        if self.asked == signal.SIGTERM:
            sys.exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is None:
            os.write(2, _SAYS)  # the console may be in the middle of a line
        self.asked = number
