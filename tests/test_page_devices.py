"""Which microphone the page listens to, in a real browser with several that are not real."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from page_support import CHROMIUM, until
from page_visitor import Visitor
from serve_support import RunningServer

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]


def listening(page: Page) -> dict[str, Any]:
    """The track that the page sends, and the state of the one before."""
    found = page.evaluate(
        """() => {
          const [track] = moshivis.call.sound.stream.getAudioTracks();
          const { enabled, readyState } = track;
          const { deviceId: device } = track.getSettings();
          return { device, enabled, readyState, before: window.track?.readyState ?? null };
        }"""
    )
    assert isinstance(found, dict)
    return found


def choose(page: Page, device: str) -> None:
    """Choose a microphone in the settings, and wait until the page listens to another track."""
    page.evaluate("[window.track] = moshivis.call.sound.stream.getAudioTracks()")
    page.select_option("#microphone", device)
    until(page, "moshivis.call.sound.stream.getAudioTracks()[0] !== window.track")


def talking(server: RunningServer, visitor: Visitor) -> Page:
    """The page in a call, with its choice of microphones open."""
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    page.click("#open-sound")
    until(page, "document.querySelectorAll('#microphone option').length > 2")
    return page


def test_the_microphone_is_changed_during_a_call(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    devices = page.eval_on_selector_all("#microphone option", "options => options.map(option => option.value)")
    assert devices[0] == "" and len(set(devices)) == len(devices)
    labels = page.eval_on_selector_all("#microphone option", "options => options.map(option => option.textContent)")
    assert labels[0] == "System default" and all(label.strip() for label in labels)

    for device in devices[1:3]:
        choose(page, device)
        assert listening(page) == {"device": device, "enabled": True, "readyState": "live", "before": "ended"}
    page.evaluate("document.querySelector('#settings').close()")
    page.click("#mute")
    page.click("#open-sound")
    until(page, "device => document.querySelector('#microphone').value === device", devices[2])
    choose(page, devices[1])
    assert not listening(page)["enabled"], "who is muted stays so"
    page.evaluate("document.querySelector('#settings').close()")
    page.click("#mute")
    assert listening(page)["enabled"]

    sent, heard = len(visitor.sounds), page.evaluate("moshivis.recording.seconds")
    until(page, "heard => moshivis.recording.seconds > heard + 1", heard)
    assert len(visitor.sounds) > sent and visitor.page.evaluate("moshivis.call.state") == "talking"
    assert not page.is_visible("#problem")
    page.click("#call")
    visitor.wait_state("idle")
    page.click("#call")
    visitor.wait_state("talking")
    assert listening(page)["device"] == devices[1], "the next call keeps it"
    page.click("#call")
    assert len(visitor.sockets) == 2 and visitor.complaints == []


def test_a_loudspeaker_that_is_gone_does_not_stop_the_call(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.evaluate(
        """() => {
          const speaker = document.querySelector('#speaker');
          speaker.append(new Option('Gone', 'no-such-device'));
          speaker.value = 'no-such-device';
          speaker.dispatchEvent(new Event('change'));
        }"""
    )
    page.click("#call")
    visitor.wait_state("talking")
    assert not page.is_visible("#problem")
    page.click("#call")


def test_a_microphone_that_is_gone_is_replaced(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    page.evaluate("document.querySelector('#microphone').append(new Option('Gone', 'no-such-device'))")
    choose(page, "no-such-device")
    now = listening(page)
    assert now["readyState"] == "live" and now["before"] == "ended" and now["device"] != "no-such-device"
    page.evaluate("[window.track] = moshivis.call.sound.stream.getAudioTracks()")
    page.evaluate("window.track.dispatchEvent(new Event('ended'))")  # as when it is unplugged
    until(page, "moshivis.call.sound.stream.getAudioTracks()[0] !== window.track")
    assert listening(page)["readyState"] == "live" and not page.is_visible("#problem")
    page.click("#settings footer .strong")
    page.click("#call")
    assert visitor.complaints == []


def test_a_microphone_that_comes_back_is_taken_up(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    page.click("#settings footer .strong")
    page.evaluate(
        """() => {
          const { mediaDevices } = navigator;
          window.ask = mediaDevices.getUserMedia.bind(mediaDevices);
          mediaDevices.getUserMedia = async () => { throw new DOMException('none', 'NotFoundError'); };
          const [track] = moshivis.call.sound.stream.getAudioTracks();
          track.stop();
          track.dispatchEvent(new Event('ended')); // as when it is unplugged
        }"""
    )
    assert "There is no microphone" in visitor.problem()
    page.evaluate(
        """() => {
          navigator.mediaDevices.getUserMedia = window.ask;
          navigator.mediaDevices.dispatchEvent(new Event('devicechange'));
        }"""
    )
    until(page, "moshivis.call.sound.stream.getAudioTracks()[0].readyState === 'live'")
    until(page, "document.querySelector('#problem').hidden")
    sent = len(visitor.sounds)
    until(page, "moshivis.call.state === 'talking'")
    page.wait_for_timeout(1000)
    assert len(visitor.sounds) > sent and len(visitor.sockets) == 1
    page.evaluate("[window.track] = moshivis.call.sound.stream.getAudioTracks()")
    page.evaluate("navigator.mediaDevices.dispatchEvent(new Event('devicechange'))")
    page.wait_for_timeout(1000)
    assert listening(page)["before"] == "live", "one that works stays"
    page.click("#call")
    assert visitor.complaints == []


def test_another_loudspeaker_leaves_the_microphone_alone(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    page.evaluate("[window.track] = moshivis.call.sound.stream.getAudioTracks()")
    devices = page.eval_on_selector_all("#speaker option", "options => options.map(option => option.value)")
    assert len(devices) > 1
    page.select_option("#speaker", devices[1])
    until(page, "id => moshivis.call.sound.context.sinkId === id", devices[1])
    page.select_option("#speaker", "")
    until(page, "moshivis.call.sound.context.sinkId === ''")
    page.wait_for_timeout(500)
    assert listening(page)["before"] == "live"
    page.click("#settings footer .strong")
    page.click("#call")
    assert visitor.complaints == []


def test_the_last_of_two_quick_choices_counts(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    devices = page.eval_on_selector_all("#microphone option", "options => options.map(option => option.value)")
    page.evaluate(
        """(slow) => {
          const { mediaDevices } = navigator;
          const ask = mediaDevices.getUserMedia.bind(mediaDevices);
          mediaDevices.getUserMedia = async (wish) => {
            const stream = await ask(wish);
            if (wish.audio.deviceId?.exact === slow) {
              await new Promise((done) => setTimeout(done, 1000));
              window.late = stream;
            }
            return stream;
          };
        }""",
        devices[1],
    )
    page.select_option("#microphone", devices[1])
    page.select_option("#microphone", devices[2])
    until(page, "window.late !== undefined")
    page.wait_for_timeout(300)
    assert listening(page)["device"] == devices[2]
    assert page.evaluate("window.late.getAudioTracks()[0].readyState") == "ended"
    page.click("#settings footer .strong")
    page.click("#call")


def test_chosen_devices_are_kept(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    device = page.eval_on_selector_all("#microphone option", "options => options.map(option => option.value)")[2]
    choose(page, device)
    page.reload()
    until(page, "document.querySelector('#thumbs img')?.complete")
    page.click("#call")
    visitor.wait_state("talking")
    assert listening(page)["device"] == device
    page.click("#open-sound")
    until(page, "device => document.querySelector('#microphone').value === device", device)
    page.click("#settings footer .strong")
    page.click("#call")
