"""`moshivis serve` as people start and stop it: real processes, real signals."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from moshivis.checkpoints.adapters import replace_adapters, save_adapters
from moshivis.checkpoints.fingerprint import base_fingerprint
from moshivis.cli import main
from moshivis.config import AdapterConfig
from moshivis.inference.conversation import EMBEDDED
from moshivis.model import MoshiVis
from moshivis.serve.address import bind
from moshivis.serve.tls import self_signed
from page_support import PICTURE
from serve_support import PATIENCE, wait_for
from server_process import COMMAND, SOURCE, get, started

pytestmark = pytest.mark.skipif(not EMBEDDED["mini"].exists(), reason="the embedded model has not been built yet")


def test_a_server_says_where_it_is_logs_what_happens_and_ends_when_told() -> None:
    with started("--no-page", "--sessions", "1") as server:
        address = server.address()
        assert re.fullmatch(r"http://localhost:\d+/", address)
        info = json.loads(get(address + "api/info"))
        assert info["slots"] == 1 and info["ready"]
        spoken = "what nobody else may read"
        question = urllib.request.Request(address + "api/ask", json.dumps({"text": spoken}).encode(), method="POST")
        assert urllib.request.urlopen(question, timeout=PATIENCE).status == 200
        with connect(address.replace("http", "ws") + "api/chat?audio=pcm", open_timeout=PATIENCE) as call:
            call.recv(PATIENCE)
            wait_for(lambda: any("begins: chat" in line for line in server.log), "a line about the call")
            status, seconds = server.stop()
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    call.recv(PATIENCE)
            assert closed.value.rcvd is not None and closed.value.rcvd.reason == "the server is stopping"
        assert status == 0 and seconds < 20
        ends = [line for line in server.log if "ends: chat" in line]
        assert len(ends) == 1
        assert re.fullmatch(r"\d\d:\d\d:\d\d  \w+ ends: chat after \d+ s, \d+ frames, server is stopping", ends[0])
        assert not any(spoken in line or "Traceback" in line for line in server.log)
        assert not any("moshivis:" in line for line in server.log)
        with pytest.raises(OSError):
            get(address + "health")
        for bound in bind("localhost", int(address.rstrip("/").rpartition(":")[2])):  # free again at once
            bound.listen()
            bound.close()


def test_the_page_that_comes_with_the_package_is_at_the_address() -> None:
    with started("--token", "secret-1", "--origin", "https://example.org") as server:
        address = server.address()
        assert re.fullmatch(r"http://localhost:\d+/\?token=secret-1", address)
        assert b"<!doctype html" in get(address)[:100].lower()
        assert json.loads(get(address.replace("/?", "/api/info?")))["name"] == "mini"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(address.partition("?")[0] + "api/info")
        assert server.stop(signal.SIGINT)[0] == 0


def test_a_certificate_is_made_and_reached_with_it(tmp_path: Path) -> None:
    with started("--no-page", "--tls-self-signed", str(tmp_path), MOSHIVIS_TOKEN="from-outside") as server:
        address = server.address()
        assert re.fullmatch(r"https://localhost:\d+/\?token=from-outside", address)
        trusting = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
        health, chat = (address.replace("/?", f"/{path}?") for path in ("health", "api/chat"))
        assert json.loads(get(health, trusting)) == {"status": "ok"}
        get(health.replace("localhost", "127.0.0.1"), trusting)
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            get(health)
        with connect(chat.replace("https", "wss"), ssl=trusting, open_timeout=PATIENCE) as call:
            call.recv(PATIENCE)
        assert server.stop()[0] == 0


def test_given_files_on_all_addresses(tmp_path: Path) -> None:
    made = self_signed(tmp_path, "0.0.0.0")
    with started("--no-page", "--host", "0.0.0.0", "--tls", str(made.cert), str(made.key)) as server:
        address = server.address()
        assert "0.0.0.0" not in address and "localhost" not in address
        get(address + "health", ssl.create_default_context(cafile=str(made.cert)))
        assert not any("microphone" in line for line in server.log)
        assert any("add --token" in line for line in server.log)
        assert server.stop()[0] == 0


def test_a_server_for_others_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = ["serve", "--host", "0.0.0.0", "--port", "0", "--model", "maxi"]
    assert main(elsewhere) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "no microphone" in lines[0] and "--tls-self-signed" in lines[0] and "add --token" in lines[1]
    assert main([*elsewhere, "--token", "abc"]) == 2
    assert "--token" not in capsys.readouterr().err


@pytest.fixture
def adapters(tiny_model: MoshiVis, tmp_path: Path) -> Path:
    """A file of adapters for the tiny model: half of every update passes, whatever it is."""
    model = copy.deepcopy(tiny_model)
    replace_adapters(model, AdapterConfig(gate_input="constant", gate_scale=(0.25, 0.5)), None, "cpu")
    assert model.adapters is not None
    for name, parameter in model.adapters.named_parameters():
        if name.endswith("alpha"):
            parameter.data.fill_(4.0)  # sigmoid(4 - 4)
    file, trained = tmp_path / "adapters.safetensors", dict(model.trainable_parameters())
    save_adapters(file, model.config, trained, base=base_fingerprint(model), dtype=torch.float32)
    return file


def test_adapters_of_a_file_are_those_that_speak(adapters: Path, tiny_folder: Path) -> None:
    with started("--no-page", "--model", str(tiny_folder), "--adapters", str(adapters)) as server:
        address = server.address()
        info = json.loads(get(address + "api/info"))
        assert info["name"] == "tiny" and info["gate_scale"] == {"low": 0.25, "width": 0.5}
        gates: list[float] = []
        with connect(address.replace("http", "ws") + "api/chat?audio=pcm&page=1", open_timeout=PATIENCE) as call:
            call.send(b"\x08" + PICTURE.read_bytes())
            while len(gates) < 5:
                message = call.recv(PATIENCE)
                assert isinstance(message, bytes)
                if message[0] in (0, 1):  # the handshake, and every frame that is answered
                    call.send(b"\x01" + bytes(2 * 1920))
                told = json.loads(message[1:]) if message[0] == 4 else {}
                gates += told.get("values", []) if told.get("type") == "gate" else []
        assert set(gates[1:]) == {0.5}, gates  # the first frame is not complete
        assert server.stop()[0] == 0


def test_adapters_that_cannot_be_used(adapters: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for file, sentence in (
        (adapters, "was trained on another base than mini"),
        (tmp_path / "none.safetensors", "there is no file"),
    ):
        assert main(["serve", "--port", "0", "--adapters", str(file)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and sentence in captured.err and captured.err.startswith("moshivis: ")


@pytest.mark.parametrize("numbers, expected", [([signal.SIGTERM], 0), ([signal.SIGINT, signal.SIGINT], 130)])
def test_who_does_not_end_is_not_waited_for(numbers: list[signal.Signals], expected: int) -> None:
    """For ten seconds after one signal, not at all after a second interrupt."""
    with started("--no-page") as server:
        port = int(server.address().rstrip("/").rpartition(":")[2])
        with socket.create_connection(("localhost", port), timeout=PATIENCE) as endless:
            endless.sendall(b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            time.sleep(0.5)
            for number in numbers[:-1]:
                server.process.send_signal(number)
                wait_for(lambda: any("stopping" in line for line in server.log), "the server to stop")
            status, seconds = server.stop(numbers[-1])
        assert status == expected
        assert seconds < (5 if expected else 20)


BAD: dict[str, tuple[list[str], str]] = {
    "unknown model": (["--model", "maxi"], "no model 'maxi'"),
    "unknown device": (["--device", "gpu"], "device 'gpu' cannot be used"),
    "unknown dtype": (["--dtype", "int8"], "dtype must be float32, bfloat16 or float16, not 'int8'"),
    "no such certificate": (["--tls", "none.pem", "none.pem"], "none.pem cannot be read"),
    "folder that cannot be": (["--tls-self-signed", "/dev/null/x"], "cannot be written to /dev/null/x"),
    "unknown host": (["--host", "no.such.host.invalid"], "is not known here"),
    "port": (["--port", "70000"], "from 0 to 65535"),
    "origin": (["--origin", "example.org"], "cannot match"),
    "token": (["--token", "two words"], "a token is made of"),
}


@pytest.mark.parametrize("arguments, sentence", BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_named(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serve", "--port", "0", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and sentence in captured.err
    assert captured.err.startswith("moshivis: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [["--sessions", "0"], ["--queue", "-1"], ["--idle-seconds", "0"], ["--port", "x"], ["--tls", "a"]],
    ids=" ".join,
)
def test_numbers_out_of_range(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *wrong])
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_anything_is_loaded() -> None:
    (taken,) = bind("127.0.0.1", 0)
    with taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--host", "127.0.0.1", "--port", port, "--model", "never loaded"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": SOURCE},
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr == (
        f"moshivis: port {port} on 127.0.0.1 is taken by another program; end it, or choose another one with --port\n"
    )


def test_without_its_packages_the_command_says_what_to_install(tmp_path: Path) -> None:
    """An environment that holds all packages but starlette."""
    import starlette

    site = Path(starlette.__file__).parents[1]
    for entry in site.iterdir():
        if not entry.name.startswith(("starlette", "__pycache__")):
            (tmp_path / entry.name).symlink_to(entry)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "moshivis.cli", "serve"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{tmp_path}"},
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "moshivis: the server needs starlette; install with: pip install 'moshivis[serve]'\n"


def test_help_does_not_wait_for_the_server() -> None:
    asked = "import sys; from moshivis.cli import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass\n"
    asked += "sys.exit(any(name in sys.modules for name in ('torch', 'starlette', 'uvicorn')))"
    done = subprocess.run(
        [sys.executable, "-c", asked],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": SOURCE},
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and "--tls-self-signed" in done.stdout
