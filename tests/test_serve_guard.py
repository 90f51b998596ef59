"""Who gets in: origins, tokens, names; over real HTTP and real WebSockets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from moshivis.inference.conversation import Assistant
from serve_support import RunningServer, serving

TOKEN = "a-Token_1.~"
FRIEND = "https://friend.example"


@pytest.fixture(scope="module")
def closed(mini: Assistant) -> Iterator[RunningServer]:
    """A server with a token and a page elsewhere that may use it."""
    with serving(mini, token=TOKEN, origins=(FRIEND,)) as server:
        yield server


def refused(url: str, **options: Any) -> tuple[int, str]:
    """Status and body of a WebSocket that does not come about."""
    with pytest.raises(InvalidStatus) as refusal:
        connect(url, open_timeout=60, **options).close()
    response = refusal.value.response
    return response.status_code, (response.body or b"").decode()


def opened(server: RunningServer, path: str = "/api/chat", **options: Any) -> str | None:
    """Open a WebSocket and close it again; the subprotocol that was chosen."""
    with connect(server.ws + path, open_timeout=60, **options) as socket:
        chosen = socket.subprotocol
    server.wait_idle()
    return chosen


# origins --------------------------------------------------------------------------------------------------------------


def test_pages_of_this_server_and_programs_that_are_no_browser_may_enter(running_server: RunningServer) -> None:
    own = running_server.url
    opened(running_server)
    opened(running_server, origin=Origin(own))
    opened(running_server, origin=Origin(own.replace("http:", "https:")))  # a proxy ended the encryption
    for headers in ({}, {"Origin": own}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert running_server.get("/api/info", headers).status == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1", "http://localhost:1", "", "file://", "http://[", "🦄"],
)
def test_pages_of_others_may_not(running_server: RunningServer, origin: str) -> None:
    header = {"Origin": origin.encode().decode("latin-1")}
    answer = running_server.get("/api/info", header)
    assert answer.status == 403 and "may not use this server" in answer.json()["error"]
    assert running_server.request("POST", "/api/ask", b"{}", header).status == 403
    if origin.isascii():
        status, body = refused(running_server.ws + "/api/chat", additional_headers=header)
        assert status == 403 and "--origin" in body
    assert running_server.get("/health", header).status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_an_address_embedded_in_a_page_of_others_is_refused(running_server: RunningServer, site: str) -> None:
    before = running_server.call(lambda: running_server.hall.queued)
    answer = running_server.get("/api/add_user?queue_id=talktomoshi", {"Sec-Fetch-Site": site})
    assert answer.status == 403
    assert running_server.call(lambda: running_server.hall.queued) == before


def test_refusals_are_counted(running_server: RunningServer) -> None:
    def count() -> float:
        return (
            running_server.hall.metrics.registry.get_sample_value("moshivis_rejected_total", {"reason": "origin"}) or 0
        )

    before = count()
    running_server.get("/api/info", {"Origin": "https://evil.example"})
    assert count() == before + 1


def test_a_listed_origin_may_enter_and_read(closed: RunningServer) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    opened(closed, f"/api/chat?token={TOKEN}", origin=Origin(FRIEND))
    answer = closed.get("/api/info", {"Origin": FRIEND, **bearer})
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == FRIEND
    asking = {"Origin": FRIEND, "Access-Control-Request-Method": "POST"}
    allowed = closed.request("OPTIONS", "/api/ask", None, {**asking, "Access-Control-Request-Headers": "authorization"})
    assert allowed.status == 200 and allowed.headers["access-control-allow-origin"] == FRIEND
    other = closed.get("/api/info", {"Origin": "https://evil.example", **bearer})
    assert other.status == 403 and "access-control-allow-origin" not in other.headers


# tokens ---------------------------------------------------------------------------------------------------------------


def test_a_token_is_taken_from_header_query_and_subprotocol(closed: RunningServer) -> None:
    assert closed.get("/api/info", {"Authorization": f"Bearer {TOKEN}"}).status == 200
    assert closed.get("/api/info", {"Authorization": f"bearer  {TOKEN} "}).status == 200
    assert closed.get(f"/api/info?token={TOKEN}").status == 200
    assert opened(closed, additional_headers={"Authorization": f"Bearer {TOKEN}"}) is None
    assert opened(closed, f"/api/chat?token={TOKEN}") is None
    offered = [Subprotocol("realtime"), Subprotocol(f"openai-insecure-api-key.{TOKEN}")]
    assert opened(closed, subprotocols=offered) == "realtime"


@pytest.mark.parametrize(
    "headers, query",
    [
        ({}, ""),
        ({"Authorization": "Bearer wrong"}, ""),
        ({"Authorization": f"Basic {TOKEN}"}, ""),
        ({"Authorization": f"Bearer {TOKEN}x"}, ""),
        ({"Authorization": "Bearer"}, ""),
        ({}, "?token="),
        ({}, "?token=wrong"),
        ({}, f"?token={TOKEN[:-1]}"),
        ({}, "?token=%F0%9F%A6%84"),
        ({}, f"?worker_auth_id={TOKEN}"),
    ],
)
def test_without_the_token_nothing_but_the_probes(closed: RunningServer, headers: dict[str, str], query: str) -> None:
    for path in ("/api/info", "/metrics", "/api/scene", "/api/add_user", "/v1/nothing"):
        answer = closed.get(path + query, headers)
        assert answer.status == 401 and "token" in answer.json()["error"], path
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/api/chat", "/moshi/api/chat", "/nothing"):
        status, body = refused(closed.ws + path + query, additional_headers=headers)
        assert status == 401 and "token" in body
    for path in ("/health", "/ready", "/"):
        assert closed.get(path + query, headers).status == 200


def test_a_wrong_token_in_a_subprotocol(closed: RunningServer) -> None:
    offered = [Subprotocol("realtime"), Subprotocol("openai-insecure-api-key.wrong")]
    assert refused(closed.ws + "/v1/realtime", subprotocols=offered)[0] == 401


# names ----------------------------------------------------------------------------------------------------------------


def test_a_server_for_this_machine_answers_to_its_own_names_only(mini: Assistant) -> None:
    with serving(mini, names=["localhost"], origins=(FRIEND,)) as server:
        for host in ("localhost:1", "127.0.0.1", "[::1]:8998", "my.localhost", "friend.example"):
            assert server.get("/api/info", {"Host": host}).status == 200, host
        for host in ("evil.example", "evil.example:8998", "localhost.evil.example"):
            same = {"Host": host, "Origin": f"http://{host}"}  # what a browser sends after DNS rebinding
            answer = server.get("/api/info", same)
            assert answer.status == 403 and "does not answer to the name" in answer.json()["error"], host
