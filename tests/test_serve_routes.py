"""Everything that a server answers beside conversations, over real sockets: state, pictures, questions, queue, page."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import moshivis
from moshivis.inference.conversation import Assistant
from moshivis.inference.engine import Engine
from moshivis.serve.app import create_app
from moshivis.serve.hall import Hall
from moshivis.serve.limits import Limits
from moshivis.serve.metrics import Metrics
from serve_support import RunningServer, serving, wait_for

EXAMPLE = Path(moshivis.__file__).parent / "assets" / "example.png"


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


# state ----------------------------------------------------------------------------------------------------------------


def test_state_of_a_server_that_is_ready(running_server: RunningServer) -> None:
    assert running_server.get("/health").json() == {"status": "ok"}
    ready = running_server.get("/ready")
    assert ready.status == 200 and ready.json() == {"ready": True, "why": None}
    figures = running_server.get("/metrics")
    assert figures.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "moshivis_slots 2.0" in figures.body.decode()
    assert "process_resident_memory_bytes" in figures.body.decode()


def test_info_says_what_runs_and_what_may_be_asked(running_server: RunningServer) -> None:
    info = running_server.get("/api/info").json()
    assert info["name"] == "mini" and info["miniature"] is True and info["sees"] is True
    assert info["version"] == moshivis.__version__
    assert info["slots"] == 2 and info["active"] == 0 and info["queued"] == 0
    assert info["frame_rate"] == 12.5 and info["frame_size"] == 1920 and info["sample_rate"] == 24000
    assert info["limits"]["picture_bytes"] == 15 * 2**20
    assert set(info["ranges"]) <= set(info["sampling"])
    for name, (least, most) in info["ranges"].items():
        assert least <= info["sampling"][name] <= most
    assert len(info["questions"]) > 3 and all(question.endswith("?") for question in info["questions"])


def test_a_server_that_warms_up_says_so_and_turns_callers_away(mini: Assistant) -> None:
    """The application by itself, its engine not started."""
    hall = Hall(Engine(mini, 1, threads=1), Limits(sessions=1), Metrics())
    status, body = asgi_get(create_app(hall, page=None), "/ready")
    assert status == 503 and json.loads(body) == {"ready": False, "why": "warming up"}
    assert asgi_get(create_app(hall, page=None), "/health")[0] == 200


def test_a_server_whose_engine_is_gone_asks_to_be_restarted(mini: Assistant) -> None:
    with serving(mini, sessions=1) as server:
        server.hall.engine.stop()
        for path in ("/health", "/ready"):
            answer = server.get(path)
            assert answer.status == 503 and b"the engine has stopped" in answer.body
        assert server.request("POST", "/api/ask", b'{"text": "a"}').status == 503


def asgi_get(app: Any, path: str) -> tuple[int, bytes]:
    import asyncio

    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": [], "root_path": ""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_errors_are_json_and_paths_that_are_not_there_404(running_server: RunningServer) -> None:
    for path in ("/nothing", "/api/nothing", "/api/chat"):
        answer = running_server.get(path)
        assert answer.status == 404 and answer.json() == {"error": "Not Found"}
    assert running_server.request("POST", "/api/info").status == 405
    assert running_server.request("GET", "/api/ask").status == 405


# scenes ---------------------------------------------------------------------------------------------------------------


def test_a_scene_is_drawn_by_its_seed(running_server: RunningServer) -> None:
    answer = running_server.get("/api/scene?seed=12")
    assert answer.headers["content-type"] == "image/png" and "max-age" in answer.headers["cache-control"]
    assert Image.open(io.BytesIO(answer.body)).size == (256, 256)
    scene = json.loads(answer.headers["x-scene"])
    assert scene["seed"] == 12 and 1 <= len(scene["objects"]) <= 4
    assert set(scene["objects"][0]) == {"shape", "colour", "size", "place"}
    assert running_server.get("/api/scene?seed=12").body == answer.body
    assert running_server.get("/api/scene?seed=13").body != answer.body
    chance = running_server.get("/api/scene")
    assert chance.headers["cache-control"] == "no-store"
    seed = json.loads(chance.headers["x-scene"])["seed"]
    assert running_server.get(f"/api/scene?seed={seed}").body == chance.body


@pytest.mark.parametrize("seed", ["", "-1", "x", "1.5", str(2**53), "9" * 5000, "%D9%A3"])
def test_a_scene_of_no_seed(running_server: RunningServer, seed: str) -> None:
    answer = running_server.get(f"/api/scene?seed={seed}")
    assert answer.status == 400 and "seed must be" in answer.json()["error"]


# written questions ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"text": 1' + b"0" * 6000 + b"}"])
def test_a_question_that_is_not_json(running_server: RunningServer, body: bytes) -> None:
    answer = running_server.request("POST", "/api/ask", body)
    assert answer.status == 400 and answer.json()["error"]


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


# the queue ------------------------------------------------------------------------------------------------------------


def test_a_caller_with_a_free_place_need_not_wait(running_server: RunningServer) -> None:
    user = running_server.get("/api/add_user?queue_id=talktomoshi").json()
    assert isinstance(user["session_id"], int) and user["session_id"] > 0 and user["session_auth_id"]
    place = check(running_server, user)
    assert place == {
        "session_id": user["session_id"],
        "status": "ready",
        "worker_auth_id": user["session_auth_id"],
        "worker_addr": "same",
        "current_position": "0",
    }
    running_server.call(lambda: running_server.hall.leave(user["session_auth_id"]))


def check(server: RunningServer, user: dict[str, Any]) -> Any:
    answer = server.get(f"/api/check_user?session_id={user['session_id']}&session_auth_id={user['session_auth_id']}")
    assert answer.status == 200
    return answer.json()


def test_a_full_server_shows_the_position_and_lets_in_in_order(mini: Assistant) -> None:
    with serving(mini, sessions=1, queue=2) as server:

        async def enter(ticket: str | None) -> Any:
            return await server.hall.session(kind="chat", ticket=ticket)

        async def leave(session: Any) -> None:
            async with session:
                pass

        talking = server.run(enter(None))
        first, second = (server.get("/api/add_user").json() for _ in range(2))
        full = server.get("/api/add_user")
        assert full.status == 503 and "queue is full" in full.body.decode() and full.headers["retry-after"]
        assert [check(server, user)["current_position"] for user in (first, second)] == ["1", "2"]
        waiting = check(server, first)
        assert waiting["status"] == "wait" and waiting["worker_auth_id"] is None and waiting["worker_addr"] is None
        assert server.get("/api/info").json()["queued"] == 2
        assert "moshivis_queue_length 2.0" in server.get("/metrics").body.decode()
        server.run(leave(talking))
        server.wait_idle()
        assert [check(server, user)["current_position"] for user in (first, second)] == ["0", "1"]
        server.run(leave(server.run(enter(first["session_auth_id"]))))
        gone = server.get(f"/api/check_user?session_id=1&session_auth_id={first['session_auth_id']}")
        assert gone.status == 404 and "queue again" in gone.body.decode()


@pytest.mark.parametrize(
    "path, status",
    [
        ("/api/check_user", 400),
        ("/api/check_user?session_id=x&session_auth_id=y", 400),
        ("/api/check_user?session_id=1&session_auth_id=y", 404),
        ("/api/check_user?session_id=%C2%B2&session_auth_id=y", 400),
        (f"/api/check_user?session_id={'9' * 6000}&session_auth_id=y", 400),
        ("/api/user_feedback", 400),
        ("/api/user_feedback?feedback=2", 400),
        ("/api/user_feedback?feedback=1&session_id=1&timestamp=0&email=a%40b.c", 200),
    ],
)
def test_queue_requests(running_server: RunningServer, path: str, status: int) -> None:
    answer = running_server.get(path)
    assert answer.status == status and answer.body
    if status != 200:
        assert answer.headers["content-type"].startswith("text/plain")


# the page -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paged(mini: Assistant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a page of our own making, beside a file that it must not show."""
    folder = tmp_path_factory.mktemp("site")
    page = folder / "page"
    (page / "parts").mkdir(parents=True)
    (page / "index.html").write_text("<!doctype html><title>page</title>")
    (page / "script.js").write_text("export const answer = 42")
    (page / "parts" / "icon.svg").write_text("<svg/>")
    (folder / "secret.txt").write_text("secret")
    (page / "link.txt").symlink_to(folder / "secret.txt")
    (page / "up").symlink_to(folder)
    with serving(mini, page=page) as server:
        yield server


def test_the_page_is_served_and_revalidated(paged: RunningServer) -> None:
    index = paged.get("/?token=anything")
    assert index.status == 200 and index.headers["content-type"].startswith("text/html")
    assert b"<title>page</title>" in index.body
    script = paged.get("/script.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["cache-control"] == "no-cache"
    again = paged.get("/script.js", {"If-None-Match": script.headers["etag"]})
    assert again.status == 304 and again.body == b"" and again.headers["cache-control"] == "no-cache"
    assert paged.get("/parts/icon.svg").headers["content-type"] == "image/svg+xml"
    assert paged.request("POST", "/script.js").status == 405


def test_the_page_may_do_nothing_but_what_it_needs(paged: RunningServer) -> None:
    for path in ("/", "/script.js", "/api/info", "/nothing", "/api/scene?seed=x"):
        headers = paged.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["worker-src"] == "'self'"
        assert policy["connect-src"] == "'self' ws: wss:" and policy["img-src"] == "'self' blob: data:"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert paged.get("/api/info").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "/link.txt",
        "/up/secret.txt",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/parts/..%2f..%2fsecret.txt",
        "//etc/passwd",
        "/%2Fetc%2Fpasswd",
        "/a%00b",
        "/" + "a" * 5000,
        "/parts",
    ],
)
def test_nothing_outside_of_the_page_is_shown(paged: RunningServer, path: str) -> None:
    answer = paged.get(path)
    assert answer.status == 404 and b"secret" not in answer.body and b"root:" not in answer.body


def test_a_server_without_a_page_points_elsewhere(running_server: RunningServer) -> None:
    assert running_server.get("/").json()["about"] == "/api/info"
    assert running_server.get("/index.html").status == 404


# crowds and laggards --------------------------------------------------------------------------------------------------


def test_so_many_at_once_and_no_more(mini: Assistant) -> None:
    with serving(mini, connections=3) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(3)]
        for each in held:
            each.sendall(b"POST /api/ask HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")  # and the rest never comes
        wait_for(lambda: server.get("/health").status == 503, "a crowd")
        assert "too many connections" in server.get("/api/info").json()["error"]
        with pytest.raises(InvalidStatus, match="503"):
            connect(server.ws + "/api/chat", open_timeout=60)
        for each in held:
            each.close()
        wait_for(lambda: server.get("/health").status == 200, "room")


def test_connections_that_ask_nothing_are_ended(mini: Assistant) -> None:
    requests = {
        "silent": b"",
        "half a head": b"GET /health HTTP/1.1\r\nHost: a",
        "half of the second": b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /health HTTP/1.1\r\n",
    }
    with serving(mini, first_message_s=1.0) as server:
        begun = time.monotonic()
        open_ones = {name: socket.create_connection(("127.0.0.1", server.port), timeout=60) for name in requests}
        for name, connection in open_ones.items():
            connection.sendall(requests[name])
        for name, connection in open_ones.items():
            received = read_all(connection)
            assert received.count(b"200 OK") == (name == "half of the second"), name
        assert time.monotonic() - begun < 30
        assert server.get("/health").status == 200


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side ends the connection, properly or not."""
    received = b""
    with connection:
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
    return received


def test_a_client_that_neither_reads_nor_answers_pings_is_given_up(mini: Assistant) -> None:
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        "GET /api/chat?audio=pcm HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    )
    with serving(mini, heartbeat_s=1.0) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as dead:
            dead.sendall(head.encode())
            assert b"101" in dead.recv(1024)
            wait_for(lambda: server.hall.active == 1, "the conversation")
            server.wait_idle()
            wait_for(lambda: not server.server.server_state.connections, "the end of the connection")


def test_a_message_beyond_the_limit_ends_its_connection_only(mini: Assistant) -> None:
    with serving(mini, message_bytes=200_000, picture_bytes=100_000) as server:
        with connect(server.ws + "/api/chat", open_timeout=60) as other:
            with connect(server.ws + "/api/chat", open_timeout=60) as large:
                large.send(bytes(200_001))
                with pytest.raises(ConnectionClosed) as closed:
                    while True:
                        large.recv(60)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
            other.ping().wait(60)
        server.wait_idle()
