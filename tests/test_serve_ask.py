"""Written questions over HTTP: `/api/ask`, with pictures and without."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import moshivis
from moshivis.inference.conversation import Assistant
from moshivis.inference.engine import Engine
from moshivis.serve.ask import ARRIVING, read_question
from moshivis.serve.hall import Closing, Hall
from moshivis.serve.limits import Limits
from moshivis.serve.metrics import Metrics
from serve_support import PATIENCE, RunningServer, serving, wait_for

EXAMPLE = Path(moshivis.__file__).parent / "assets" / "example.png"


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def ask(server: RunningServer, request: object) -> Any:
    return server.request("POST", "/api/ask", json.dumps(request).encode(), {"Content-Type": "application/json"})


def test_a_written_question_is_answered(running_server: RunningServer, mini: Assistant) -> None:
    answer = ask(running_server, {"text": "What do you see?", "image": data_uri(EXAMPLE.read_bytes())})
    assert answer.status == 200
    said = answer.json()
    assert said["text"] == "".join(piece["text"] for piece in said["pieces"]).strip()
    assert all(0 < piece["gate"] < 1 for piece in said["pieces"])
    assert (
        said["text"].split() == "".join(p.text for p in mini.conversation(EXAMPLE).say_text("What do you see?")).split()
    )
    blind = ask(running_server, {"text": "What is the sky?"})
    assert blind.status == 200 and all(piece["gate"] == 0 for piece in blind.json()["pieces"])


BAD_QUESTIONS: list[tuple[object, str]] = [
    ([], "there is no question"),
    ({}, "there is no question"),
    ({"text": 5}, "there is no question"),
    ({"text": "  "}, "there is no question"),
    ({"text": "a" * 1001}, "has 1001 characters"),
    ({"text": "a", "image": 5}, '"image" must be null or the picture itself'),
    ({"text": "a", "image": "https://example.org/a.png"}, '"image" must be null or the picture itself'),
    ({"text": "a", "image": "data:image/png;base64,!!!"}, "not base64"),
    ({"text": "a", "image": "data:image/png;base64,🦄"}, "not base64"),
    ({"text": "a", "image": data_uri(b"")}, "is empty"),
    ({"text": "a", "image": data_uri(b"no picture")}, "is not a picture"),
    ({"text": "a", "image": data_uri(EXAMPLE.read_bytes()[:900])}, "damaged"),
]


@pytest.mark.parametrize("request_, sentence", BAD_QUESTIONS, ids=lambda value: str(value)[:40])
def test_a_question_that_cannot_be_answered(running_server: RunningServer, request_: object, sentence: str) -> None:
    answer = ask(running_server, request_)
    assert answer.status == 400 and sentence in answer.json()["error"]


@pytest.mark.parametrize("head", ["data:image/png", "DATA:image/PNG", "data:image/jpeg;charset=x"])
def test_a_picture_may_come_in_any_good_data_uri(head: str) -> None:
    body = json.dumps({"text": "a", "image": f"{head};base64,AAEC"}).encode()
    assert read_question(body, 10) == ("a", b"\0\1\2")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"text": 1' + b"0" * 6000 + b"}"])
def test_a_question_that_is_not_json(running_server: RunningServer, body: bytes) -> None:
    answer = running_server.request("POST", "/api/ask", body)
    assert answer.status == 400 and answer.json()["error"]


@pytest.mark.parametrize(
    "body, sentence",
    [
        (b'{"text": "x", "image": [' + b"[]," * 3_000_000 + b"[]]}", "more than 20000 values"),
        ('{"text": "What do you see?"}'.encode("utf-16"), "must be JSON in UTF-8"),
    ],
    ids=["values", "utf-16"],
)
def test_a_question_is_not_unfolded_for_long(running_server: RunningServer, body: bytes, sentence: str) -> None:
    answer = running_server.request("POST", "/api/ask", body)
    assert answer.status == 400 and sentence in answer.json()["error"]


def test_half_a_surrogate_pair_is_read_as_something(running_server: RunningServer) -> None:
    answer = running_server.request("POST", "/api/ask", b'{"text": "\\ud83e what do you see?"}')
    assert answer.status == 200


def test_pictures_beyond_the_limits_are_refused_before_they_are_read(mini: Assistant) -> None:
    picture = io.BytesIO()
    Image.new("1", (3000, 3000)).save(picture, format="PNG")
    with serving(mini, picture_bytes=100_000, picture_pixels=1_000_000) as server:
        many = ask(server, {"text": "a", "image": data_uri(picture.getvalue())})
        assert many.status == 400 and "9.0 megapixels, the limit is 1" in many.json()["error"]
        large = ask(server, {"text": "a", "image": data_uri(bytes(110_000))})
        assert large.status == 400 and "limit for a picture" in large.json()["error"]
        huge = ask(server, {"text": "a" * 300_000})
        assert huge.status == 413 and "too large" in huge.json()["error"]


def test_a_question_that_cannot_be_answered_now_is_not_even_read(running_server: RunningServer) -> None:
    clerk = running_server.hall
    clerk.accepting = False
    try:
        with contextlib.closing(HTTPConnection("127.0.0.1", running_server.port, timeout=PATIENCE)) as connection:
            connection.putrequest("POST", "/api/ask")
            connection.putheader("Content-Length", "10000000")  # of which nothing is ever sent
            connection.endheaders()
            response = connection.getresponse()
            assert response.status == 503 and "about to stop" in response.read().decode()
    finally:
        clerk.accepting = True


def test_requests_under_way_are_counted(running_server: RunningServer) -> None:
    with contextlib.ExitStack() as open_:
        for _ in range(ARRIVING):
            connection = open_.enter_context(
                contextlib.closing(HTTPConnection("127.0.0.1", running_server.port, timeout=PATIENCE))
            )
            connection.putrequest("POST", "/api/ask")
            connection.putheader("Content-Length", "10000000")
            connection.endheaders(b"{")
        wait_for(lambda: ask(running_server, {"text": "And I?"}).status == 503, "the server to have them all")
    wait_for(lambda: ask(running_server, {"text": "And now?"}).status == 200, "the server to see that they have gone")


def test_questions_of_many_are_answered_or_refused_but_never_pile_up(running_server: RunningServer) -> None:
    statuses: list[int] = []

    def work() -> None:
        statuses.append(ask(running_server, {"text": "Describe the picture.", "image": None}).status)

    threads = [threading.Thread(target=work) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503} and statuses.count(200) >= 9
    assert ask(running_server, {"text": "And now?"}).status == 200


def test_pictures_that_wait_when_the_server_stops_are_told(mini: Assistant) -> None:
    async def run() -> None:
        hall = Hall(Engine(mini, 1), Limits(), Metrics())
        busy, go_on = threading.Event(), threading.Event()

        def work() -> None:
            busy.set()
            go_on.wait(PATIENCE)

        hall._lookers.submit(work)
        busy.wait(PATIENCE)
        looking = asyncio.ensure_future(hall.look(EXAMPLE.read_bytes()))
        await asyncio.sleep(0)
        await hall.close(grace=0)
        go_on.set()
        with pytest.raises(Closing, match="about to stop"):
            await looking

    asyncio.run(run())
