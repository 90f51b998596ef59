"""What the page tells of a call is so: in a real browser."""

from __future__ import annotations

import re

import numpy as np
import pytest

from page_support import CHROMIUM
from page_visitor import Visitor
from serve_support import RunningServer

pytest.importorskip("playwright")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]


def test_the_state_is_true(server: RunningServer, visitor: Visitor) -> None:
    """Without a picture nothing is looked at; who is muted is not listened to."""
    page = visitor.open(server.url)
    page.evaluate(
        """() => {
          window.states = [];
          const state = document.querySelector('#state');
          new MutationObserver(() => window.states.push(state.textContent)).observe(state, { childList: true });
        }"""
    )
    page.click("#call")
    visitor.wait_state("talking")
    page.click("#mute")
    assert page.inner_text("#state") == "Muted: the model hears silence"
    page.click("#mute")
    assert page.inner_text("#state") == "Talk, it listens"
    page.click("#call")
    assert "The model looks at the picture…" in page.evaluate("window.states")
    page.click("#remove")
    page.evaluate("window.states = []")
    page.click("#call")
    visitor.wait_state("talking")
    page.click("#call")
    states = page.evaluate("window.states")
    assert "The model gets ready…" in states and "The model looks at the picture…" not in states


def test_what_the_model_did_not_hear_is_told(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    assert not page.is_visible("#fact-unheard")
    (session,) = server.hall._sessions.values()
    server.call(lambda: session.call.push(np.zeros(24000 * 10, np.float32)))
    page.wait_for_selector("#fact-unheard", state="visible")
    assert re.fullmatch(r"[89]\.\d s", page.inner_text("#fact-unheard")), "all but the 12 frames that may wait"
    page.click("#call")


def test_the_end_of_a_call_ends_what_is_said(server: RunningServer, visitor: Visitor) -> None:
    """Speech under way does not go on for ever, and screen readers get the last words and what happened."""
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    page.evaluate(
        """() => {
          const { on } = moshivis.call;
          const begin = on.speechBegin;
          on.speechBegin = () => {
            begin();
            on.text(' One', 5);
            setTimeout(() => document.querySelector('#call').click());
          };
        }"""
    )
    visitor.wait_state("idle")
    assert re.fullmatch(r"You spoke for \d\.\d s", page.inner_text("#transcript .you .meta"))
    assert page.evaluate("moshivis.transcript.toJSON().find(({ who }) => who === 'you').seconds > 0")
    assert re.search(r"One The call has ended after \d:\d\d$", page.inner_text("#spoken"))
