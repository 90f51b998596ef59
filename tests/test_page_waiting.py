"""How the page waits: for its place in the queue, for a line that opens, for a server that looks at a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from moshivis.inference.conversation import Assistant
from moshivis.serve.static import PAGE
from page_support import CHROMIUM, proxy, until
from page_visitor import Visitor
from serve_support import RunningServer, serving

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]
HURRY = """(() => {
  const slowly = window.setInterval;
  window.setInterval = (act, ms) => slowly(act, ms === 2000 ? 100 : ms);
})()"""  # the page looks twenty times as often whether the line is dead, and gives up as much sooner


# the queue ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["no answer", "a proxy's answer"])
def test_the_place_is_kept_while_the_server_does_not_answer(mini: Assistant, visitor: Visitor, failure: str) -> None:
    with serving(mini, page=PAGE, sessions=1) as server:
        taken = server.run(server.hall.session(kind="test"))
        page = visitor.open(server.url)
        page.click("#call")
        visitor.wait_state("queued")
        behind = server.get("/api/add_user").json()
        asked = f"/api/check_user?session_id=9&session_auth_id={behind['session_auth_id']}"
        assert server.get(asked).json()["current_position"] == "2"
        failed: list[str] = []

        def fail(route: Route) -> None:
            failed.append(route.request.url)
            if failure == "no answer":
                route.abort()
            else:
                route.fulfill(status=502, content_type="text/html", body="<h1>Bad Gateway</h1>")

        page.route("**/api/check_user?*", fail)
        for _ in range(3):
            with page.expect_request("**/api/check_user?*"):
                pass
        page.unroute("**/api/check_user?*")
        server.call(lambda: taken.end("closed"))
        visitor.wait_state("talking")
        assert len(set(failed)) == 1 and len(visitor.sockets) == 2, "the same ticket, which let in"
        assert server.get(asked).json()["current_position"] == "1"
        page.click("#call")


def test_who_must_queue_again_leaves_no_ghost(mini: Assistant, visitor: Visitor) -> None:
    with serving(mini, page=PAGE, sessions=1) as server:
        taken = server.run(server.hall.session(kind="test"))
        page = visitor.open(server.url)
        page.click("#call")
        visitor.wait_state("queued")
        page.route("**/api/check_user?*", lambda route: route.fulfill(status=404, body="gone"), times=1)
        with page.expect_response("**/api/add_user?*"):
            pass
        until(page, "moshivis.call.wire.place !== undefined")
        page.wait_for_timeout(1500)
        assert server.hall.queued == 1 and page.inner_text("#state") == "Number 1 in the queue"
        server.call(lambda: taken.end("closed"))
        visitor.wait_state("talking")
        page.click("#call")


def test_the_queue_is_told_once(mini: Assistant, visitor: Visitor) -> None:
    """Nobody is told every second what is so already; and the message can be closed."""
    with serving(mini, page=PAGE, sessions=1) as server:
        taken = server.run(server.hall.session(kind="test"))
        first = server.get("/api/add_user").json()
        asked = f"/api/check_user?session_id=9&session_auth_id={first['session_auth_id']}"
        assert server.get(asked).status == 200
        page = visitor.open(server.url)
        page.click("#call")
        visitor.wait_state("queued")
        assert "number 2" in visitor.problem()
        page.evaluate(
            """() => {
              window.changes = 0;
              const count = new MutationObserver((records) => (window.changes += records.length));
              const all = { subtree: true, childList: true, characterData: true, attributes: true };
              for (const id of ['problem', 'state']) count.observe(document.getElementById(id), all);
            }"""
        )
        for _ in range(3):
            with page.expect_response("**/api/check_user?*"):
                pass
        assert page.evaluate("window.changes") == 0
        page.click("#problem-close")
        with page.expect_response("**/api/check_user?*"):
            pass
        assert not page.is_visible("#problem")
        server.request("POST", f"/api/leave?session_auth_id={first['session_auth_id']}")
        assert "You are next" in visitor.problem()
        server.call(lambda: taken.end("closed"))
        visitor.wait_state("talking")
        page.click("#call")


def test_a_server_that_is_not_ready_is_asked_now_and_then(mini: Assistant, visitor: Visitor) -> None:
    """And the place in the queue is kept."""
    with serving(mini, page=PAGE) as server:
        page = visitor.open(server.url)
        server.call(lambda: setattr(server.hall.engine, "ready", False))
        page.click("#call")
        assert "The server is not ready yet" in visitor.problem() and "The engine has stopped." in visitor.problem()
        page.wait_for_timeout(3500)
        asked = visitor.sockets[1:]
        assert len(set(asked)) == 1 and 2 <= len(asked) <= 6, "the same ticket, about once a second"
        server.call(lambda: setattr(server.hall.engine, "ready", True))
        visitor.wait_state("talking")
        assert server.hall.queued == 0 and not page.is_visible("#problem")
        page.click("#call")


# the line -------------------------------------------------------------------------------------------------------------


def test_a_line_that_does_not_open_is_tried_again(server: RunningServer, visitor: Visitor) -> None:
    swallowed: list[bytes] = []

    def swallow_first(data: bytes) -> bytes:
        if b"Upgrade: websocket" in data and not swallowed:
            swallowed.append(data)
            return b""
        return data

    visitor.page.add_init_script(HURRY)
    with proxy(server, swallow_first) as url:
        page = visitor.open(url)
        page.click("#call")
        until(page, "moshivis.call.state === 'lost'", seconds=9)  # after 10 the server itself hangs up
        visitor.wait_state("talking")
        assert len(visitor.sockets) == 2
        page.click("#call")
    server.wait_idle()


def test_a_line_that_dies_before_the_picture_is_through_is_noticed(server: RunningServer, visitor: Visitor) -> None:
    visitor.page.add_init_script(HURRY)
    with proxy(server, lambda data: data if data.startswith((b"GET", b"POST")) else b"") as url:
        page = visitor.open(url)
        page.click("#call")
        visitor.wait_state("preparing")
        until(page, "moshivis.call.state === 'lost'", seconds=9)  # after 10 the server says that no picture came
        page.click("#call")


def test_a_picture_that_is_on_its_way_may_take_its_time(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    checks = page.evaluate(
        """async () => {
          const { Wire } = await import('./wire.js');
          const wire = new Wire({ audio: 'ogg' }, {});
          const line = { bufferedAmount: 1e6, close: () => {} };
          Object.assign(wire, { socket: line, opened: true, handshaken: false, quiet: 0, unsent: 0 });
          wire.over = () => (wire.dead = true);
          for (let i = 0; i < 1000; i++) {
            line.bufferedAmount -= 100;
            wire.check();
          }
          let checks = 0;
          while (!wire.dead) {
            wire.check();
            checks += 1;
          }
          return checks;
        }"""
    )
    assert checks == 30, "a minute in which nothing moves"
