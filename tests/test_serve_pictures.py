"""Pictures that come faster than they are looked at: nothing waits for them, and the newest is seen."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from json_client import FRAME, PICTURE, UNHURRIED, JsonClient, data_uri, encoded, json_client, limited, png
from serve_support import PATIENCE, RunningServer

SILENCE = encoded(np.zeros(FRAME, "<i2"))


@contextlib.contextmanager
def looking_elsewhere(server: RunningServer) -> Iterator[None]:
    """Meanwhile the server looks at no picture."""
    look = threading.Event()
    server.call(lambda: server.hall._lookers.submit(look.wait, PATIENCE))
    try:
        yield
    finally:
        look.set()


@contextlib.contextmanager
def calling(server: RunningServer, path: str) -> Iterator[JsonClient]:
    with limited(server, **UNHURRIED), json_client(server, path) as client:
        yield client
    server.wait_idle()


def show_item(client: JsonClient, name: str, picture: bytes) -> None:
    content: list[dict[str, Any]] = [{"type": "input_image", "image_url": data_uri(picture)}]
    item = {"id": name, "type": "message", "role": "user", "content": content}
    client.send("conversation.item.create", item=item, event_id=name)


def check_replaced(client: JsonClient, name: str) -> None:
    error = client.until("error")
    assert (error["error"]["code"], error["client_event_id"]) == ("picture_replaced", name)


def items_shown(client: JsonClient, last: str) -> list[str]:
    """Names of the pictures that were taken, up to the last one."""
    names: list[str] = []
    while names[-1:] != [last]:
        item = client.until("conversation.item.done")["item"]
        names += [item["id"]] if item["role"] == "user" else []  # else it is what the assistant has said meanwhile
    return names


def test_a_live_call_goes_on_while_pictures_wait(running_server: RunningServer) -> None:
    with calling(running_server, "/v1/live/sessions") as client:
        client.ask("session.started", "session.start", session={})
        with looking_elsewhere(running_server):
            for name, colour in (("a", "red"), ("b", "green"), ("c", "blue")):
                client.send("session.image.set", image_url=data_uri(png(colour)), event_id=name)
            check_replaced(client, "b")
            client.send("session.image.set", image_url=None, event_id="d")
            check_replaced(client, "c")
            client.send("session.input_audio.append", audio=SILENCE)
            client.ask("session.input_audio.muted", "session.input_audio.mute")
        shown = [client.until("session.image.updated", "error") for _ in "ad"]
        assert [(event["client_event_id"], event["image"]["shown"]) for event in shown] == [("a", True), ("d", False)]


def test_a_realtime_call_opens_with_the_newest_picture(running_server: RunningServer) -> None:
    with calling(running_server, "/v1/realtime") as client:
        with looking_elsewhere(running_server):
            for name in "abcd":
                show_item(client, name, PICTURE)
            for name in "bc":
                check_replaced(client, name)
            client.send("input_audio_buffer.append", audio=SILENCE)
            client.ask("input_audio_buffer.cleared", "input_audio_buffer.clear")
        assert items_shown(client, "d") == ["a", "d"]
        client.until("response.output_audio_transcript.delta")


@pytest.mark.parametrize("last", [PICTURE, b"junk"], ids=["good", "bad"])
def test_a_call_that_was_asked_for_opens_whatever_the_pictures_are(running_server: RunningServer, last: bytes) -> None:
    with calling(running_server, "/v1/realtime") as client:
        with looking_elsewhere(running_server):
            show_item(client, "a", b"junk")
            client.send("response.create")
            for name in "bc":
                show_item(client, name, last)
            check_replaced(client, "b")
        assert client.until("error")["client_event_id"] == "a"
        if last == PICTURE:
            assert items_shown(client, "c") == ["c"]
        else:
            assert client.until("error")["client_event_id"] == "c"
        client.until("response.output_audio_transcript.delta")
