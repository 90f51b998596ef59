"""What a stranger may ask of a server: sizes, numbers, times, origins, the token; the same for all protocols."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from urllib.parse import urlsplit

from moshivis.errors import InputError
from moshivis.vision.image import MAX_PIXELS

MIB = 2**20
ROOM = 1000  # bytes beside the picture in a message that carries one
_TOKEN = re.compile(r"[A-Za-z0-9._~-]+")  # what may stand in a header, a query and a subprotocol as it is


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server. `check` before use."""

    message_bytes: int = 21 * MIB  # of one WebSocket message; in base64 a picture takes a third more
    picture_bytes: int = 15 * MIB  # of an encoded picture
    picture_pixels: int = MAX_PIXELS  # of a decoded one; checked before it is decoded
    text_characters: int = 1000  # of a written question
    sessions: int = 4  # conversations at once: slots of the engine
    queue: int = 50  # callers who wait for a slot
    connections: int = 512  # requests and sockets at once, conversations and those who wait included
    first_message_s: float = 10.0  # from the connection to the first message, or to the head of an HTTP request
    idle_s: float = 60.0  # between two messages of a client, more for one that arrives slowly (`patience`)
    heartbeat_s: float = 20.0  # between two pings; a client of which no byte comes for as long again is gone
    session_s: float = 3600.0  # of one conversation
    send_buffer_frames: int = 25  # of 80 ms that wait for a slow reader; beyond them it loses the oldest
    origins: tuple[str, ...] = ()  # of other web pages that may use the server, as https://example.org; "*" is any
    token: str | None = None  # what a client must know

    def check(self) -> None:
        """Raises InputError that names the first limit out of its range."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("origins", "token"):
                continue
            if not math.isfinite(value) or value < 0 or (value == 0 and field.name != "queue"):
                low = "0 or more" if field.name == "queue" else "more than 0"
                raise InputError(f"the limit {field.name} must be {low}, not {value}")
        if self.picture_bytes * 4 // 3 + ROOM > self.message_bytes:
            raise InputError(
                f"the limit message_bytes ({self.message_bytes}) must be a third more than picture_bytes "
                f"({self.picture_bytes}), and {ROOM} more, or no such picture could be sent in base64"
            )
        for origin in self.origins:
            _check_origin(origin)
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise InputError("a token is made of letters, digits and . _ ~ - only, and has at least one of them")


def _check_origin(origin: str) -> None:
    """Only what a browser sends in its Origin header can ever match."""
    if origin == "*":
        return
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    default = {"http": 80, "https": 443}.get(parts.scheme, 0)
    host = f"[{parts.hostname}]" if parts.hostname and ":" in parts.hostname else parts.hostname
    written = f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, default) else "")
    if not default or not parts.hostname or written != origin:
        raise InputError(
            f"the origin {origin!r} cannot match: write it as a browser does, like https://example.org or "
            "http://localhost:3000, in small letters and without a path; or * for any"
        )
