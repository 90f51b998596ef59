"""`moshivis chat` as people run it, against a real server; and what it says when there is none, or a wrong one."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

import moshivis
from moshivis.cli import main
from moshivis.client.address import Address, read_address
from moshivis.client.recording import FRAME
from moshivis.errors import InputError
from moshivis.inference.conversation import Assistant
from serve_support import RunningServer, serving, wait_for

ASSETS = Path(moshivis.__file__).parent / "assets"
SOURCE = str(Path(moshivis.__file__).parents[1])
QUESTION = ["--audio", str(ASSETS / "example.wav")]
PICTURE = ["--image", str(ASSETS / "example.png")]


def start(*arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": SOURCE}
    environment.pop("MOSHIVIS_TOKEN", None)
    return subprocess.Popen(
        [sys.executable, "-m", "moshivis.cli", "chat", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
        # a process that a shell started in the background would ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def run(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    with start(*arguments, cwd=cwd) as process:
        shown, told = process.communicate(timeout=280)
    return process.returncode, shown, told


def wait_active(server: RunningServer) -> None:
    wait_for(lambda: server.hall.active > 0, "the caller")


# with a server --------------------------------------------------------------------------------------------------------


def test_the_example_question(running_server: RunningServer, tmp_path: Path) -> None:
    talk = (*PICTURE, *QUESTION, "--out", "said/it.wav", "--seed", "1", "--json")
    status, shown, told = run(running_server.url, *talk, cwd=tmp_path)
    assert status == 0, told
    lines = shown.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result["model"] == "mini" and result["error"] is None and not result["interrupted"]
    assert [turn["question"] for turn in result["turns"]] == [None, "example.wav"]
    assert result["text"] and all(0 <= piece["level"] <= 10 for piece in result["pieces"])
    assert result["frames_received"] > 0
    both, rate = soundfile.read(tmp_path / "said" / "it.wav")
    assert rate == 24000 and both.ndim == 2 and both.shape[1] == 2
    assert len(both) >= result["frames_sent"] * FRAME
    assert np.abs(both[:, 0]).max() > 0.1
    if not result["dropped"]:  # a machine that is fast enough
        assert result["frames_received"] > result["frames_sent"] - 20 and np.abs(both[:, 1]).max() > 0.01
    assert "example.wav" in told and "a miniature model" in told
    running_server.wait_idle()


def test_two_questions_without_a_picture_for_people(running_server: RunningServer, tmp_path: Path) -> None:
    status, shown, told = run(running_server.url, *QUESTION, *QUESTION, "--seconds", "8", cwd=tmp_path)
    assert status == 0, told
    assert "Assistant" in shown and "You        example.wav" in shown
    assert not list(tmp_path.iterdir())
    running_server.wait_idle()


def test_interrupted_it_still_writes_the_file(running_server: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "it.wav"
    with start(running_server.url, *QUESTION, "--out", str(out), "--json") as process:
        wait_active(running_server)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        shown, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert json.loads(shown)["interrupted"] and "Traceback" not in told
    both, _ = soundfile.read(out)
    assert len(both) > 0 and both.shape[1] == 2
    running_server.wait_idle()


def test_a_busy_server(running_server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = running_server.ws + "/moshi/api/chat"
    with connect(url) as one, connect(url) as other:
        assert one.recv() == other.recv() == bytes(9)
        assert main(["chat", running_server.url, *QUESTION]) == 2
    error = capsys.readouterr().err
    assert "all 2 places are taken" in error and "number 1 in the queue" in error and error.count("\n") == 1
    running_server.wait_idle()


def test_tokens(mini: Assistant, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOSHIVIS_TOKEN", raising=False)
    with serving(mini, token="secret") as server:
        talk = [*QUESTION, "--seconds", "1", "--json"]
        assert main(["chat", server.url, *talk]) == 2
        assert "wants a token" in capsys.readouterr().err
        assert main(["chat", server.url, *talk, "--token", "guess"]) == 2
        assert "does not know this token" in capsys.readouterr().err
        assert main(["chat", server.url, *talk, "--token", "secret"]) == 0
        assert main(["chat", f"{server.url}/?token=secret", *talk]) == 0
        monkeypatch.setenv("MOSHIVIS_TOKEN", "secret")
        assert main(["chat", server.url, *talk]) == 0
        monkeypatch.setenv("MOSHIVIS_TOKEN", "of-another-server")  # which this one must not learn
        assert main(["chat", f"{server.url}/?token=secret", *talk]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_servers_reasons_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def script(connection: ServerConnection) -> None:
        connection.send(b"\x05no \x1b[2J place")
        connection.close(1013, "busy")

    with scripted(script) as url:
        assert main(["chat", url, *QUESTION]) == 2
    error = capsys.readouterr().err
    assert "no  [2J place" in error and "\x1b" not in error


def test_a_bad_picture_is_the_servers_to_refuse(
    running_server: RunningServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = tmp_path / "words.png"
    words.write_text("no picture")
    assert main(["chat", running_server.url, *QUESTION, "--image", str(words)]) == 2
    assert "refuses: this picture is not a picture" in capsys.readouterr().err
    assert main(["chat", running_server.url, *QUESTION, "--temperature", "50"]) == 2
    assert "refuses: audio_temperature must be a number from 0 to 2" in capsys.readouterr().err


def test_a_server_that_stops(mini: Assistant, tmp_path: Path) -> None:
    out = tmp_path / "it.wav"
    with serving(mini) as server:
        with start(server.url, *QUESTION, "--out", str(out), "--json") as process:
            wait_active(server)
            time.sleep(1)
            server.server.should_exit = True
            shown, told = process.communicate(timeout=60)
    assert process.returncode == 2 and json.loads(shown)["error"]
    assert told.splitlines()[-1] == "moshivis: the conversation was ended: the server is stopping"
    assert out.exists()


def test_a_path_that_the_server_does_not_have(
    running_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", f"{running_server.url}/voice", *QUESTION]) == 2
    error = capsys.readouterr().err
    assert "does not know /voice/api/chat: " in error and "conversations are at /api/chat" in error


# without one ----------------------------------------------------------------------------------------------------------


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert main(["chat", f"http://127.0.0.1:{port}", *QUESTION]) == 2
    error = capsys.readouterr().err
    assert f"no server answers at 127.0.0.1:{port}" in error and "moshivis serve" in error and error.count("\n") == 1


def test_an_unknown_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "http://no-such-host.invalid", *QUESTION]) == 2
    assert "no-such-host.invalid" in capsys.readouterr().err


@pytest.mark.parametrize("version, sentence", [("HTTP/1.1", "HTTP 404"), ("HTTP/1.0", "it speaks HTTP/1.0")])
def test_another_web_server(version: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = version

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert main(["chat", f"127.0.0.1:{server.server_port}", *QUESTION]) == 2
        assert f"is a web server, but no moshivis server: {sentence}" in capsys.readouterr().err
        assert main(["chat", f"https://127.0.0.1:{server.server_port}", *QUESTION]) == 2
        assert "does not speak TLS" in capsys.readouterr().err
        server.shutdown()


def test_a_server_that_is_no_web_server(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(100)
                peer.sendall(b"220 mail.example.org ESMTP\r\n")

        threading.Thread(target=greet, daemon=True).start()
        assert main(["chat", f"127.0.0.1:{server.getsockname()[1]}", *QUESTION]) == 2
    assert "does not answer as a web server does" in capsys.readouterr().err


@contextmanager
def scripted(script: Callable[[ServerConnection], None], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that does what no good one would, or what another kind of server does."""

    def handle(connection: ServerConnection) -> None:
        try:
            script(connection)
            for _ in connection:
                pass
        except ConnectionClosed:
            pass

    with serve(handle, "127.0.0.1", 0, ssl=tls) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def test_certificates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moshivis.serve.tls import self_signed

    made = self_signed(str(tmp_path), "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.cert, made.key)
    with scripted(lambda connection: connection.send(b"\0"), context) as url:
        assert main(["chat", url, *QUESTION, "--seconds", "0.5"]) == 2
        error = capsys.readouterr().err
        assert "certificate" in error and "--insecure" in error and error.count("\n") == 1
        assert main(["chat", url, *QUESTION, "--seconds", "0.5", "--insecure"]) == 0
        assert main(["chat", url.replace("https", "http"), *QUESTION]) == 2
        assert "write https://" in capsys.readouterr().err


def test_other_servers_of_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    """A handshake of one byte, text without colours, kinds that we do not know, text that would steer the terminal."""

    def script(connection: ServerConnection) -> None:
        connection.send(b"\0")
        connection.send(b"\x04" + b"[" * 100_000)
        for data in (b"\x63?", b"", b"\x04not json", b"\x02 Hello\x1b[31m", b"\x07", b"\x07\x63 you", b"\x01junk"):
            connection.send(data)
        connection.send("a text frame")

    with scripted(script) as url:
        assert main(["chat", url, *QUESTION, "--seconds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Hello [31m you" in shown and "\x1b" not in shown


def test_a_server_that_breaks_off(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def script(connection: ServerConnection) -> None:
        connection.send(bytes(9))
        connection.send(b"\x02 Well")
        time.sleep(0.5)
        connection.socket.close()

    out = tmp_path / "it.wav"
    with scripted(script) as url:
        assert main(["chat", url, *QUESTION, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert "the connection was lost" in captured.err and "Well" in captured.out and out.exists()


def test_a_limit_is_a_good_end(capsys: pytest.CaptureFixture[str]) -> None:
    def script(connection: ServerConnection) -> None:
        connection.send(bytes(9))
        connection.close(1000, "the conversation has reached its limit")

    with scripted(script) as url:
        assert main(["chat", url, *QUESTION]) == 0


# the command line -----------------------------------------------------------------------------------------------------


def test_without_a_microphone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["chat", "localhost"]) == 2
    assert "install sounddevice" in capsys.readouterr().err


BAD: dict[str, tuple[list[str], str]] = {
    "no such audio": (["localhost", "--audio", "none.wav"], "none.wav: no such file"),
    "no such picture": (["localhost", *QUESTION, "--image", "none.png"], "none.png: no such file"),
    "not a wav": (["localhost", *QUESTION, "--out", "it.mp3"], "must end in .wav"),
    "a folder": (["localhost", *QUESTION, "--out", "folder.wav"], "is a folder"),
    "no address": (["ftp://localhost", *QUESTION], "is no address of a server"),
    "no port": (["localhost:port", *QUESTION], "is no address"),
}


@pytest.mark.parametrize("arguments, sentence", BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.wav").mkdir()
    assert main(["chat", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and sentence in captured.err and captured.err.count("\n") == 1


def test_no_model_is_loaded() -> None:
    """A caller does not wait for torch."""
    imported = "import sys, moshivis.commands.chat, moshivis.client.chat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], env=os.environ | {"PYTHONPATH": SOURCE}).returncode == 0


# addresses and recordings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, url, token",
    [
        ("localhost", "ws://localhost:8998/api/chat", None),
        ("example.org:9", "ws://example.org:9/api/chat", None),
        ("http://localhost:8998/?token=abc", "ws://localhost:8998/api/chat", "abc"),
        ("https://example.org", "wss://example.org:443/api/chat", None),
        ("http://example.org/", "ws://example.org:80/api/chat", None),
        ("wss://example.org/moshi/api/chat", "wss://example.org:443/moshi/api/chat", None),
        ("https://example.org/voice", "wss://example.org:443/voice/api/chat", None),
        ("http://[::1]:9/", "ws://[::1]:9/api/chat", None),
    ],
)
def test_addresses(text: str, url: str, token: str | None) -> None:
    address = read_address(text)
    assert address.url() == url and address.token == token


def test_the_query_of_an_address() -> None:
    address = Address(host="h", port=1, tls=False, path="/api/chat")
    assert address.url(page=1, seed=None, text_topk=5) == "ws://h:1/api/chat?page=1&text_topk=5"


@pytest.mark.parametrize("text", ["", "http://", "://x", "http://a b", "localhost:99999", "file:///etc/passwd"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        read_address(text)
