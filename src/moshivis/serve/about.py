"""What a client can know before it talks: what runs here, what it may ask, pictures to talk about."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moshivis import __version__
from moshivis.errors import InputError
from moshivis.inference.colour import GateScale
from moshivis.inference.conversation import EMBEDDED
from moshivis.inference.rows import MAX_PADDING_BIAS, MAX_TEMPERATURE, MAX_TOP_K
from moshivis.mini.drawing import draw_scene
from moshivis.mini.scenes import sample_scene
from moshivis.serve.hall import Hall

MAX_SEED = 2**53 - 1  # the whole numbers that JavaScript knows
SCENE_SIDE = 256  # pixels

MINIATURE_QUESTIONS = (
    "What do you see?",
    "What colour is the star?",
    "How many circles are there?",
    "Where is the heart?",
    "What is on the left?",
    "Is there a red square?",
    "How big is the triangle?",
    "Why is the star green?",
)
QUESTIONS = ("What do you see?", "What is in the middle of the picture?", "Which colours are there?", "Tell me more.")


def about_routes(hall: Hall) -> list[Route]:
    """`/api/info` and `/api/scene`."""

    async def info(request: Request) -> Response:  # by POST too: with it a browser sends the Origin that decides
        return JSONResponse(describe(hall))

    painter = ThreadPoolExecutor(1, thread_name_prefix="moshivis-scene")  # more would take the processor from the ticks

    async def scene(request: Request) -> Response:
        return await asyncio.get_running_loop().run_in_executor(painter, _scene, request)

    return [Route("/api/info", info, methods=["GET", "POST"]), Route("/api/scene", scene)]


def describe(hall: Hall) -> dict[str, Any]:
    """All that `/api/info` tells."""
    engine, limits = hall.engine, hall.limits
    config = engine.assistant.config
    miniature = config.name in EMBEDDED
    usual = engine.usual_settings()
    return {
        "name": config.name,
        "miniature": miniature,
        "version": __version__,
        "gate_scale": dataclasses.asdict(GateScale.of(config.adapters)),
        "sees": engine.assistant.model.adapters is not None,
        "ready": engine.ready,
        "accepting": hall.accepting,
        "slots": hall.slots,
        "active": hall.active,
        "queued": hall.queued,
        "ticks": engine.stats().to_json(),
        "frame_rate": engine.sample_rate / engine.frame_size,
        "frame_size": engine.frame_size,
        "sample_rate": engine.sample_rate,
        "limits": {
            name: getattr(limits, name)
            for name in ("picture_bytes", "picture_pixels", "message_bytes", "text_characters", "session_s", "idle_s")
        },
        "sampling": dataclasses.asdict(usual),
        "ranges": {
            "text_temperature": [0, MAX_TEMPERATURE],
            "audio_temperature": [0, MAX_TEMPERATURE],
            "text_top_k": [0, MAX_TOP_K],
            "audio_top_k": [0, MAX_TOP_K],
            "padding_bias": [-MAX_PADDING_BIAS, MAX_PADDING_BIAS],
        },
        "questions": list(MINIATURE_QUESTIONS if miniature else QUESTIONS),
    }


def _scene(request: Request) -> Response:
    """A drawn scene of the miniature world; the same seed gives the same one. Its objects are in the header X-Scene."""
    text = request.query_params.get("seed")
    if text is not None and not (text.isascii() and text.isdigit() and len(text) < 17 and int(text) <= MAX_SEED):
        raise InputError(f"seed must be a whole number from 0 to {MAX_SEED}")
    seed = random.randrange(2**31) if text is None else int(text)
    rng = random.Random(seed)
    scene = sample_scene(rng)
    picture = io.BytesIO()
    draw_scene(scene, rng, (SCENE_SIDE, SCENE_SIDE)).save(picture, format="PNG")
    objects = [dataclasses.asdict(thing) for thing in scene.objects]
    headers = {
        "X-Scene": json.dumps({"seed": seed, "background": scene.background, "objects": objects}),
        "Cache-Control": "no-store" if text is None else "public, max-age=86400",
    }
    return Response(picture.getvalue(), media_type="image/png", headers=headers)
