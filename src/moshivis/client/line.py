"""A conversation with a server over `/api/chat`, as a caller has it: 80 ms of sound go in, sound and words come out."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidStatus,
    InvalidURI,
    ProxyError,
)
from websockets.http11 import Response

from moshivis.client.address import Address
from moshivis.client.printable import printable
from moshivis.errors import MoshivisError
from moshivis.serve.pcm import PCM, PcmReader, PcmWriter
from moshivis.serve.wire import Close, Kind, message, split

CONNECT_SECONDS = 20.0
HANDSHAKE_SECONDS = 60.0  # the server may have other callers' pictures to look at first
SEND_SECONDS, UPLOAD_SECONDS = 10.0, 120.0  # for a frame, for a picture
LOCAL = ("localhost", "127.0.0.1", "::1")

Samples = NDArray[np.float32]  # [T] at 24 kHz


class ServerError(MoshivisError):
    """The server cannot be reached, refuses, or has ended the conversation for a bad reason."""


@dataclass(frozen=True, eq=False)
class Sound:
    samples: Samples


@dataclass(frozen=True)
class Words:
    text: str
    level: int | None  # of the gate, 0 to 10; None if the server tells no levels


@dataclass(frozen=True)
class News:
    """What the server tells of itself or of the conversation."""

    values: dict[str, Any]


class Line:
    """An open conversation. Made by `dial`; iterate it to hear, until the server ends it."""

    def __init__(self, socket: ClientConnection, address: Address, audio: str):
        self.about: dict[str, Any] = {}  # the server's first metadata
        self.end: tuple[int, str] | None = None  # code and sentence, once the conversation is over
        self._socket, self._address = socket, address
        self._error = ""
        if audio == "ogg":
            from moshivis.serve.opus import OpusReader, OpusWriter

            self._reader: PcmReader | OpusReader = OpusReader()
            self._writer: PcmWriter | OpusWriter = OpusWriter()
        else:
            self._reader, self._writer = PcmReader(PCM), PcmWriter(PCM)

    async def say(self, samples: Samples) -> None:
        """The user's next samples [T]. Nothing happens once the conversation is over."""
        payload = self._writer.write(samples)
        if payload:
            await self._send(Kind.AUDIO, payload, SEND_SECONDS)

    async def show(self, picture: bytes | None) -> None:
        """Show an encoded picture, or none."""
        await self._send(Kind.IMAGE, picture or b"", UPLOAD_SECONDS)

    async def _send(self, kind: Kind, payload: bytes, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                with suppress(ConnectionClosed):  # whoever listens hears why
                    await self._socket.send(message(kind, payload))
        except TimeoutError:
            raise ServerError(f"{self._address.place} took nothing for {seconds:g} s") from None

    async def __aiter__(self) -> AsyncIterator[Sound | Words | News]:
        while (received := await self._receive()) is not None:
            match received:
                case Kind.AUDIO, payload:
                    samples = self._reader.read(payload)
                    if len(samples):
                        yield Sound(samples)
                case Kind.TEXT, payload:
                    yield Words(payload.decode("utf-8", "replace"), None)
                case Kind.COLOURED, payload:
                    yield Words(payload[1:].decode("utf-8", "replace"), min(payload[0], 10) if payload else None)
                case Kind.METADATA, payload:
                    yield News(_object(payload))

    async def wait_handshake(self) -> None:
        """Until sound may start. Raises ServerError if the server ends it before, or says nothing."""
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                while (received := await self._receive()) is not None:
                    kind, payload = received
                    if kind == Kind.METADATA:
                        self.about = _object(payload)
                    if kind == Kind.HANDSHAKE:
                        return
        except TimeoutError:
            await self.hang_up()
            raise ServerError(
                f"{self._address.place} does not begin a conversation: no handshake within {HANDSHAKE_SECONDS:g} s"
            ) from None
        assert self.end is not None
        raise ServerError(f"{self._address.place} refuses: {self.end[1]}")

    async def hang_up(self) -> None:
        """End the conversation."""
        await self._socket.close()

    def check_end(self) -> None:
        """Raises ServerError if the server has ended the conversation before its time."""
        if self.end is not None and self.end[0] != Close.NORMAL:
            raise ServerError(f"the conversation was ended: {self.end[1]}")

    async def _receive(self) -> tuple[Kind | None, bytes] | None:
        """Kind and payload of the next message; None when the conversation is over."""
        try:
            data = await self._socket.recv()
        except ConnectionClosed as closed:
            frame = closed.rcvd
            code = Close.INTERNAL if frame is None else frame.code
            reason = "the connection was lost" if frame is None else frame.reason or f"closed with code {frame.code}"
            self.end = (code, printable(self._error or reason))
            return None
        if isinstance(data, str):
            return None, b""
        kind, payload = split(data)
        if kind == Kind.ERROR:
            self._error = payload.decode("utf-8", "replace")
        return kind, payload


async def dial(
    address: Address, query: dict[str, object], *, picture: bytes | None, token: str | None, insecure: bool
) -> Line:
    """Open a conversation, about a picture or about none, and wait until sound may start.

    `insecure` takes any certificate. Raises ServerError with a sentence that says what is wrong.
    """
    audio = "ogg" if find_spec("sphn") else "pcm"
    token = token or address.token
    url = address.url(page=1, picture=int(picture is not None), audio=audio, **query)
    try:
        connection = await connect(
            url,
            ssl=_tls(insecure) if address.tls else None,
            additional_headers={"Authorization": f"Bearer {token}"} if token else None,
            proxy=None if address.host in LOCAL else True,
            open_timeout=CONNECT_SECONDS,
            close_timeout=2,
            compression=None,
            max_size=2**22,
            max_queue=256,
        )
    except (OSError, InvalidHandshake, InvalidURI, ProxyError, EOFError, ValueError) as error:
        raise ServerError(_explain(error, address, token)) from error
    line = Line(connection, address, audio)
    if picture is not None:
        await line.show(picture)
    await line.wait_handshake()
    return line


def _tls(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _object(payload: bytes) -> dict[str, Any]:
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError):  # the latter of lists in lists in lists
        return {}
    return found if isinstance(found, dict) else {}


# what can go wrong ----------------------------------------------------------------------------------------------------


def _explain(error: Exception, address: Address, token: str | None) -> str:
    place = address.place
    match error:
        case ssl.SSLCertVerificationError():
            return (
                f"the certificate of {place} is not to be trusted: {error.verify_message}; "
                "if the server is your own, add --insecure"
            )
        case ssl.SSLError():
            return f"{place} does not speak TLS ({error.reason or error}); try http:// in place of https://"
        case InvalidStatus():
            return _explain_status(error.response, address, token)
        case TimeoutError():
            return f"{place} did not answer within {CONNECT_SECONDS:g} s"
        case socket.gaierror():
            return f"the host {address.host} is not known: {error.strerror or error}"
        case InvalidMessage() if "HTTP/1.0" in str(error.__cause__):
            return f"{place} is a web server, but no moshivis server: it speaks HTTP/1.0"
        case InvalidMessage() | EOFError() | ConnectionResetError():
            if address.tls:
                return f"{place} does not answer as a web server does"
            return f"{place} does not answer as a web server does; if it uses TLS, write https:// in the address"
        case OSError():
            return f"no server answers at {place} ({_reason(error)}); start one with: moshivis serve"
        case ProxyError():
            return f"the proxy that the environment names does not lead to {place}: {error}"
    return f"{place} is no moshivis server: {error}"


def _explain_status(response: Response, address: Address, token: str | None) -> str:
    place = address.place
    told = _object(bytes(response.body or b"")).get("error")
    sentence = printable(str(told)[:300]) if told else f"HTTP {response.status_code} {response.reason_phrase}"
    match response.status_code:
        case 401:
            return f"{place} wants a token: --token …" if token is None else f"{place} does not know this token"
        case 403 | 429 | 503:
            return f"{place} refuses: {sentence}"
        case 404 if told:
            return f"{place} does not know {address.path}: {sentence}"
        case 200 | 400 | 404 | 405 | 426:
            return f"{place} is a web server, but no moshivis server: {sentence} for {address.path}"
    return f"{place} has a problem: {sentence}"


def _reason(error: OSError) -> str:
    """Python wraps the errors of a host's several addresses in one."""
    return error.strerror or str(error).removeprefix("Multiple exceptions: ")
