"""The ASGI application: all routes of a server, what stands before them, and the errors they answer with."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from moshivis.errors import InputError, MoshivisError
from moshivis.inference.engine import Busy
from moshivis.serve.about import about_routes
from moshivis.serve.ask import Clerk, TooLarge
from moshivis.serve.chat import chat_routes
from moshivis.serve.guard import Guard, GuardMiddleware, deny
from moshivis.serve.hall import Closing, Hall
from moshivis.serve.live import live_routes
from moshivis.serve.metrics import CONTENT_TYPE, Metrics
from moshivis.serve.queue import queue_routes
from moshivis.serve.realtime import realtime_routes
from moshivis.serve.static import PAGE, HeadersMiddleware, page_routes

_log = logging.getLogger("moshivis.serve")

STOP_SECONDS = 5.0  # for conversations that are still there when the application is shut down
HEALTH = "/health"  # a crowd is no reason to restart the process


def create_app(
    hall: Hall,
    *,
    page: Path | None = PAGE,
    names: Iterable[str] | None = None,
    on_start: Callable[[BaseException | None], None] | None = None,
) -> Starlette:
    """The application of a hall. Its engine is started with it, unless it is running, and stopped with it.

    `page` is the folder of the page, None for a server without one; `names` are the guard's; `on_start` hears when the
    engine has warmed up, or why it could not.
    """
    clerk = Clerk(hall)
    limits = hall.limits

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        starting = asyncio.create_task(_start(hall, on_start))
        yield
        await hall.close(STOP_SECONDS)
        clerk.close()
        await starting
        await asyncio.to_thread(hall.engine.stop)

    middleware = [Middleware(HeadersMiddleware), Middleware(Crowd, most=limits.connections, metrics=hall.metrics)]
    if limits.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=limits.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type"],
                expose_headers=["X-Scene", "Retry-After"],
            )
        )
    middleware.append(Middleware(GuardMiddleware, guard=Guard(limits, names), metrics=hall.metrics))
    routes: list[BaseRoute] = [
        *_state_routes(hall),
        *about_routes(hall),
        *clerk.routes(),
        *queue_routes(hall),
        *chat_routes(hall),
        *realtime_routes(hall),
        *live_routes(hall),
        WebSocketRoute("/{path:path}", _answer_lost),
        *page_routes(page),
    ]
    handlers = {HTTPException: _answer_http, MoshivisError: _answer_ours, Exception: _answer_ours}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)


async def _start(hall: Hall, on_start: Callable[[BaseException | None], None] | None) -> None:
    """Warm the engine up while the server answers already that it is not ready."""
    failure: BaseException | None = None
    if not hall.engine.ready:
        try:
            await asyncio.to_thread(hall.engine.start)
        except Exception as error:
            _log.exception("the engine could not start")
            failure = error
    hall.warm = failure is None
    if on_start is not None:
        on_start(failure)


def _state_routes(hall: Hall) -> list[BaseRoute]:
    def trouble() -> str | None:
        if not hall.accepting:
            return "stopping"
        if hall.engine.ready:
            return None
        return "the engine has stopped" if hall.warm else "warming up"

    async def health(request: Request) -> Response:
        """Whether to leave the process alone: false only when nothing but a new one helps."""
        dead = trouble() == "the engine has stopped"
        return JSONResponse({"status": "the engine has stopped" if dead else "ok"}, 503 if dead else 200)

    async def ready(request: Request) -> Response:
        why = trouble()
        return JSONResponse({"ready": why is None, "why": why}, 503 if why else 200)

    async def metrics(request: Request) -> Response:
        hall.metrics.queue_length(hall.queued)
        return Response(hall.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return [Route(HEALTH, health), Route("/ready", ready), Route("/metrics", metrics)]


class Crowd:
    """Lets in so many requests and sockets at once, and no more. Whoever asks for the health is always let in."""

    def __init__(self, app: ASGIApp, most: int, metrics: Metrics):
        self.app, self.most, self.metrics = app, most, metrics
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] == HEALTH:
            return await self.app(scope, receive, send)
        if self.inside >= self.most:
            self.metrics.rejected("connections")
            return await deny(scope, receive, send, 503, "too many connections; try again later", {"Retry-After": "5"})
        self.inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.inside -= 1


# errors ---------------------------------------------------------------------------------------------------------------


async def _answer_lost(socket: WebSocket) -> None:
    """Of itself starlette would refuse a path that is not there as it does a stranger: with 403, and no word."""
    sentence = "there is no WebSocket at this path; conversations are at /api/chat"
    await deny(socket.scope, socket.receive, socket.send, 404, sentence)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, dict(error.headers or {}))


async def _answer_ours(request: Request, error: Exception) -> Response:
    """Our own sentences are meant for people; of any other error only the log learns."""
    if request.scope["type"] == "websocket":
        raise error
    match error:
        case TooLarge():
            return JSONResponse({"error": str(error)}, 413)
        case InputError():
            return JSONResponse({"error": str(error)}, 400)
        case Busy() | Closing():
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "5"})
        case _:
            return JSONResponse({"error": "something went wrong inside the server; its log says more"}, 500)
