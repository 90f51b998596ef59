"""Who may use the server: pages of which origin, and callers who know the token. For HTTP and WebSockets alike.

A browser lets any page open `ws://localhost:8998/api/chat`, and tells only in the Origin header who did it. So an
origin must be the server's own or a listed one; programs that are no browser send none and are let in.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moshivis.serve.limits import Limits
from moshivis.serve.metrics import Metrics

REALTIME = "realtime"  # the subprotocol that clients of the OpenAI kind offer
KEY = "openai-insecure-api-key."  # what stands before the token in a subprotocol
# The rest is the page, which holds nothing secret, and /health and /ready, for probes that know no token.
GUARDED = re.compile(r"/(api|v1|moshi|metrics)(/|$)")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why somebody is not let in."""

    status: int
    reason: str  # a word for the metrics
    sentence: str  # for the client


class Guard:
    """Decides by the headers and the query of a request. `names` are host names of a server that only this machine
    reaches: any other in the Host header is a page of a stranger that had its own name point here. None allows all.
    """

    def __init__(self, limits: Limits, names: Iterable[str] | None = None):
        self.origins = frozenset(limits.origins)
        self.token = limits.token
        listed = [urlsplit(origin).hostname or "" for origin in limits.origins]
        self.names = None if names is None else {name.lower() for name in (*names, *listed)}

    def refusal(self, connection: HTTPConnection) -> Refusal | None:
        """None: may enter."""
        return self._wrong_name(connection) or self._wrong_origin(connection) or self._wrong_token(connection)

    def _wrong_name(self, connection: HTTPConnection) -> Refusal | None:
        if self.names is None or self.token is not None or "*" in self.origins:
            return None
        host = _hostname(connection.headers.get("host", ""))
        if not host or host in self.names or _is_local(host):
            return None
        sentence = f"this server does not answer to the name {host!r}; its owner can allow it: --origin https://{host}"
        return Refusal(status=403, reason="host", sentence=sentence)

    def _wrong_origin(self, connection: HTTPConnection) -> Refusal | None:
        headers = connection.headers
        origin = headers.get("origin")
        if "*" in self.origins or origin in self.origins:
            return None
        if origin is None:  # a browser leaves it out when a page of another site embeds one of our addresses
            if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
                return None
            sentence = "pages of other sites may not use this server"
        elif _same_place(origin, headers.get("host", "")):
            return None
        else:
            sentence = f"pages of {origin} may not use this server; its owner can allow it: --origin {origin}"
        return Refusal(status=403, reason="origin", sentence=sentence)

    def _wrong_token(self, connection: HTTPConnection) -> Refusal | None:
        if self.token is None:
            return None
        known = self.token.encode()
        given = [*_tokens(connection)]
        if any(hmac.compare_digest(token.encode("utf-8", "replace"), known) for token in given):
            return None
        what = "the token is wrong" if given else "a token is needed"
        sentence = f"{what}: give it as ?token=… in the address, or in the header Authorization: Bearer …"
        return Refusal(status=401, reason="token", sentence=sentence)


class GuardMiddleware:
    """Asks the guard about everything but the page and the probes, and refuses before a WebSocket opens."""

    def __init__(self, app: ASGIApp, guard: Guard, metrics: Metrics):
        self.app, self.guard, self.metrics = app, guard, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        refusal = None
        if scope["type"] == "websocket" or GUARDED.match(scope["path"]):
            refusal = self.guard.refusal(HTTPConnection(scope))
        if refusal is None:
            return await self.app(scope, receive, _answering_subprotocol(scope, send))
        self.metrics.rejected(refusal.reason)
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
        await deny(scope, receive, send, refusal.status, refusal.sentence, headers)


async def deny(
    scope: Scope, receive: Receive, send: Send, status: int, sentence: str, headers: dict[str, str] | None = None
) -> None:
    """Answer with an error in JSON; to a WebSocket that has not been accepted yet, in place of the handshake."""
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
    await JSONResponse({"error": sentence}, status, headers)(scope, receive, send)


def _answering_subprotocol(scope: Scope, send: Send) -> Send:
    """A browser that offered subprotocols gives up unless one of them is chosen."""
    if scope["type"] != "websocket" or REALTIME not in scope.get("subprotocols", ()):
        return send

    async def choosing(message: Message) -> None:
        if message["type"] == "websocket.accept" and not message.get("subprotocol"):
            message = {**message, "subprotocol": REALTIME}
        await send(message)

    return choosing


def _tokens(connection: HTTPConnection) -> Iterable[str]:
    scheme, _, value = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        yield value.strip()
    if "token" in connection.query_params:
        yield connection.query_params["token"]
    for offered in connection.scope.get("subprotocols", ()):
        if offered.startswith(KEY):
            yield offered.removeprefix(KEY)


def _same_place(origin: str, host: str) -> bool:
    """Whether an Origin header names what the Host header names. Only the scheme may differ: a proxy that ends the
    encryption may stand before us."""
    scheme, _, own = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return port is not None and own != "" and own.removesuffix(port) == host.lower().removesuffix(port)


def _hostname(host: str) -> str:
    return re.sub(r":\d+$", "", host).strip("[]").lower()


def _is_local(host: str) -> bool:
    """An address, or a name that no stranger can make point anywhere."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
