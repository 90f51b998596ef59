"""What a server answers beside conversations, over real sockets: state, pictures, queue, page."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import moshivis
from chat_client import Client
from moshivis.errors import InputError
from moshivis.inference.conversation import Assistant
from moshivis.inference.engine import Busy, Engine
from moshivis.serve.app import create_app
from moshivis.serve.hall import Hall
from moshivis.serve.limits import Limits
from moshivis.serve.metrics import Metrics
from serve_support import RunningServer, serving

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
    """The application by itself, its engine not started. Who has a place in the queue keeps it."""
    hall = Hall(Engine(mini, 1, threads=1), Limits(sessions=1), Metrics())
    app = create_app(hall, page=None)
    status, body = asgi(app, "GET", "/ready")
    assert status == 503 and json.loads(body) == {"ready": False, "why": "warming up"}
    assert asgi(app, "GET", "/health")[0] == 200
    status, body = asgi(app, "POST", "/api/ask")
    assert status == 503 and json.loads(body) == {"error": "the server is still warming up"}
    ticket = hall.ticket().token
    for caller in (ticket, None):
        with pytest.raises(Busy, match="still warming up"):
            hall.check(caller)
        with pytest.raises(Busy, match="still warming up"):
            asyncio.run(hall.session(kind="chat", ticket=caller))
    assert hall.position(ticket) == 0


def test_a_server_whose_engine_is_gone_asks_to_be_restarted(mini: Assistant) -> None:
    with serving(mini, sessions=1) as server:
        server.hall.engine.stop()
        for path in ("/health", "/ready"):
            answer = server.get(path)
            assert answer.status == 503 and b"the engine has stopped" in answer.body
        answer = server.request("POST", "/api/ask", b'{"text": "a"}')
        assert answer.status == 503 and answer.json() == {"error": "the engine has stopped"}
        with connect(server.ws + "/api/chat") as socket:
            caller = Client(socket)
            assert caller.until_closed() == (1013, "the engine has stopped")


def asgi(app: Any, method: str, path: str) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "root_path": ""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_errors_are_json_and_paths_that_are_not_there_404(running_server: RunningServer) -> None:
    for path in ("/nothing", "/api/nothing", "/api/chat"):
        answer = running_server.get(path)
        assert answer.status == 404 and answer.json() == {"error": "Not Found"}
    assert running_server.request("POST", "/api/scene").status == 405
    stranger = running_server.request("POST", "/api/info", headers={"Origin": "https://elsewhere.example"})
    assert stranger.status == 403 and "--origin https://elsewhere.example" in stranger.json()["error"]
    assert running_server.request("GET", "/api/ask").status == 405


@pytest.mark.parametrize("path", ["/nothing", "/api/ask", "/", "/api/chat/"])
def test_sockets_at_paths_that_are_not_there_get_404_too(
    running_server: RunningServer, paged: RunningServer, path: str
) -> None:
    for server in (running_server, paged):
        with pytest.raises(InvalidStatus) as refusal:
            connect(server.ws + path, open_timeout=60)
        response = refusal.value.response
        assert response.status_code == 404 and "conversations are at /api/chat" in json.loads(response.body)["error"]


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
    assert running_server.request("POST", f"/api/leave?session_auth_id={user['session_auth_id']}").status == 204
    assert running_server.get("/api/info").json()["queued"] == 0


def check(server: RunningServer, user: dict[str, Any]) -> Any:
    answer = server.get(f"/api/check_user?session_id={user['session_id']}&session_auth_id={user['session_auth_id']}")
    assert answer.status == 200
    return answer.json()


def test_a_full_server_shows_the_position_and_lets_in_in_order(
    mini: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        # Who may enter and has come keeps the place while a picture is on its way.
        monkeypatch.setattr("moshivis.serve.hall.TICKET_SECONDS", 0.3)
        server.call(lambda: server.hall.check(first["session_auth_id"]))
        time.sleep(0.5)
        assert check(server, first)["current_position"] == "0"
        server.run(leave(server.run(enter(first["session_auth_id"]))))
        gone = server.get(f"/api/check_user?session_id=1&session_auth_id={first['session_auth_id']}")
        assert gone.status == 404 and "queue again" in gone.body.decode()


def test_a_place_waits_for_a_page_that_nobody_looks_at(mini: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Browsers let it ask once a minute."""
    now = time.monotonic()
    monkeypatch.setattr("moshivis.serve.hall.time", SimpleNamespace(monotonic=lambda: now))
    hall = Hall(Engine(mini, 1, threads=1), Limits(sessions=1), Metrics())
    asked, never_asked = hall.ticket(), hall.ticket()
    for _ in range(3):
        assert hall.position(asked.token) is not None
        now += 65
    assert hall.position(never_asked.token) is None and hall.position(asked.token) is not None
    now += 91
    assert hall.position(asked.token) is None


def test_a_try_that_fails_costs_no_place_in_the_queue(mini: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("moshivis.serve.hall.time", SimpleNamespace(monotonic=lambda: now))

    def full(*arguments: object) -> None:
        nonlocal now
        now += 1000  # longer than a ticket is kept that nobody asks for
        raise Busy("all places are taken")

    with serving(mini, sessions=1) as server:
        hall = server.hall
        first, second = server.call(hall.ticket).token, server.call(hall.ticket).token
        with pytest.raises(InputError, match="is not a picture"):
            server.run(hall.session(kind="chat", image=b"junk", ticket=first))
        assert server.call(lambda: [hall.position(first), hall.position(second)]) == [0, 1]
        monkeypatch.setattr(hall.engine, "open", full)
        with pytest.raises(Busy, match="all places are taken"):
            server.run(hall.session(kind="chat", ticket=first))
        assert server.call(lambda: [hall.position(first), hall.position(second)]) == [0, None]
        assert hall.active == 0 and "moshivis_queue_length 1.0" in server.get("/metrics").body.decode()


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
