"""`POST /api/ask`: a written question about a picture, answered in writing, beside the spoken conversations."""

from __future__ import annotations

import asyncio
import binascii
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moshivis.errors import InputError
from moshivis.inference.conversation import TextPiece
from moshivis.serve.events import MAX_MARKS, holds_too_much, picture_content
from moshivis.serve.hall import Full, Hall
from moshivis.vision.image import read_image

WAITING = 8  # questions that may wait for the one that is being answered
ARRIVING = 24  # requests that may be under way at once, each with a picture in memory
ROOM = 2**16  # bytes of a request beside the picture


class TooLarge(InputError):
    """More bytes than are accepted."""


class Clerk:
    """Answers written questions, one at a time, in a thread of its own."""

    def __init__(self, hall: Hall):
        self.hall = hall
        self.most_bytes = hall.limits.picture_bytes * 4 // 3 + ROOM  # base64 takes a third more
        self._waiting = self._arriving = 0
        # One thread of the processor: the rest belongs to the spoken conversations.
        self._thread = ThreadPoolExecutor(1, "moshivis-ask", initializer=torch.set_num_threads, initargs=(1,))

    def routes(self) -> list[Route]:
        return [Route("/api/ask", self.ask, methods=["POST"])]

    def close(self) -> None:
        """Answer nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def ask(self, request: Request) -> Response:
        """`{"text": …, "image": data URI or null}` -> `{"text": …, "pieces": [{"text", "gate"}, …]}`."""
        self._check()  # before a picture is taken for nothing
        self._arriving += 1
        try:
            body = await self._body(request)
        finally:
            self._arriving -= 1
        self._check()
        self._waiting += 1
        try:
            answering = asyncio.get_running_loop().run_in_executor(self._thread, self._answer, body)
            pieces = await self.hall.unless_closing(answering)
        finally:
            self._waiting -= 1
        said = [{"text": piece.text, "gate": piece.gate} for piece in pieces]
        return JSONResponse({"text": "".join(piece.text for piece in pieces).strip(), "pieces": said})

    def _check(self) -> None:
        """Raises Closing or Busy if a question could not be answered now."""
        hall = self.hall
        hall.check_ready()
        if self._waiting > WAITING or self._arriving >= ARRIVING:
            hall.metrics.rejected("questions full")
            waiting = self._waiting + self._arriving
            raise Full(f"{waiting} questions wait already; ask again in a moment", waiting)

    async def _body(self, request: Request) -> bytes:
        content = bytearray()
        try:
            async with asyncio.timeout(self.hall.limits.idle_s):
                async for piece in request.stream():
                    content += piece
                    if len(content) > self.most_bytes:
                        most = self.hall.limits.picture_bytes / 2**20
                        raise TooLarge(f"the request is too large: a picture may have {most:g} MiB")
        except ClientDisconnect:
            raise InputError("the request broke off") from None
        except TimeoutError:
            raise InputError(f"the request did not arrive within {self.hall.limits.idle_s:g} s") from None
        return bytes(content)

    def _answer(self, body: bytes) -> list[TextPiece]:
        """In the clerk's thread: also a request of many megabytes must not hold up the event loop."""
        limits, assistant = self.hall.limits, self.hall.engine.assistant
        text, picture = read_question(body, limits.text_characters)
        image = None
        if picture is not None:
            image = read_image(picture, max_bytes=limits.picture_bytes, max_pixels=limits.picture_pixels)
        seen = None if image is None else self.hall.engine.look(image)  # while no other picture is being looked at
        return assistant.conversation(seen).say_text(text)


def read_question(body: bytes, most_characters: int) -> tuple[str, bytes | None]:
    """Text and encoded picture of a request. Raises InputError that says what is wrong with it."""
    try:
        written = body.decode("utf-8-sig")
        if holds_too_much(written):
            raise InputError(f"the request holds more than {MAX_MARKS} values")
        request: Any = json.loads(written)
    except (ValueError, RecursionError):
        example = '{"text": "What do you see?", "image": data URI or null}'
        raise InputError(f"the request must be JSON in UTF-8: {example}") from None
    text = request.get("text") if isinstance(request, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError('there is no question: give it as "text"')
    if len(text) > most_characters:
        raise InputError(f"the question has {len(text)} characters; at most {most_characters} are accepted")
    return text, _picture(request.get("image"))


def _picture(uri: object) -> bytes | None:
    if uri is None:
        return None
    content = picture_content(uri) if isinstance(uri, str) else None
    if content is None:
        raise InputError('"image" must be null or the picture itself, as "data:image/png;base64,…"')
    try:
        return binascii.a2b_base64(content, strict_mode=True)
    except ValueError:
        raise InputError('"image" is damaged: what follows the comma is not base64') from None
