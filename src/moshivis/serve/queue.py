"""The queue as the released web client asks for it (reference facts, serving.md section 1.9).

That client shows the text of an error as it is, so errors are plain sentences here.
"""

from __future__ import annotations

import itertools

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from moshivis.serve.hall import Closing, Full, Hall

RETRY = {"Retry-After": "5"}


def queue_routes(hall: Hall) -> list[Route]:
    """`/api/add_user`, `/api/check_user`, `/api/user_feedback`, and our own `/api/leave`, to give the place back."""
    numbers = itertools.count(1)  # the client wants a number beside the ticket

    async def add_user(request: Request) -> Response:
        try:
            ticket = hall.ticket()
        except (Full, Closing) as error:
            return PlainTextResponse(f"{error}; please try again later", 503, RETRY)
        return JSONResponse({"session_id": next(numbers), "session_auth_id": ticket.token})

    async def check_user(request: Request) -> Response:
        number, ticket = request.query_params.get("session_id", ""), request.query_params.get("session_auth_id", "")
        if not (number.isascii() and number.isdigit() and len(number) < 16):
            return PlainTextResponse("session_id must be the number that add_user gave", 400)
        position = hall.position(ticket)
        if position is None:
            sentence = "this place in the queue is no more: nobody asked for it for a while; please queue again"
            return PlainTextResponse(sentence, 404)
        ready = position == 0
        return JSONResponse(
            {
                "session_id": int(number),
                "status": "ready" if ready else "wait",
                "worker_auth_id": ticket if ready else None,
                "worker_addr": "same" if ready else None,  # this very server
                "current_position": str(position),
            }
        )

    async def leave(request: Request) -> Response:
        hall.leave(request.query_params.get("session_auth_id", ""))
        return Response(status_code=204)

    async def user_feedback(request: Request) -> Response:
        if request.query_params.get("feedback") not in ("0", "1"):
            return PlainTextResponse("feedback must be 0 or 1", 400)
        return JSONResponse({"status": "ok"})  # nothing about a conversation is kept

    return [
        Route("/api/add_user", add_user),
        Route("/api/check_user", check_user),
        Route("/api/leave", leave, methods=["POST"]),
        Route("/api/user_feedback", user_feedback),
    ]
