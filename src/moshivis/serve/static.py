"""The page and the headers that keep it to itself."""

from __future__ import annotations

import mimetypes
import os
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = Path(__file__).parent / "page"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",  # audio worklets too
        "worker-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "font-src 'self'",
        "manifest-src 'self'",
        "connect-src 'self' ws: wss:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address can hold the token
    "Permissions-Policy": "microphone=(self), camera=(self), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
}
# What the system's own table may call otherwise; a browser runs no script of another type.
_TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
}


class Page(StaticFiles):
    """The files of a folder. A browser asks every time whether they changed: they carry no version in their name."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Cache-Control"] = "no-cache"
        return response


def page_routes(folder: Path | None) -> list[BaseRoute]:
    """The page at `/`; without a folder a pointer to what else there is."""
    if folder is None:
        return [Route("/", _no_page)]
    for suffix, kind in _TYPES.items():
        mimetypes.add_type(kind, suffix)
    return [Mount("/", Page(directory=folder, html=True))]


async def _no_page(request: Request) -> Response:
    return JSONResponse({"server": "moshivis", "page": None, "about": "/api/info", "conversations": "/api/chat"})


class HeadersMiddleware:
    """Adds the headers to every answer; what does not say otherwise is not to be stored."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self.app(scope, receive, adding if scope["type"] in ("http", "websocket") else send)
