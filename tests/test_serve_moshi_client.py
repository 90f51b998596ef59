"""The PyPI client `moshi`, unmodified, talks with our server through a sound card that PulseAudio makes up.

It runs in its own interpreter, named by the environment variable MOSHIVIS_PEER_PYTHON. Two null sinks stand for the
user's voice and the loudspeaker: what is played into the first is its microphone, what comes out of the second is
recorded.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pytest

import moshivis
from moshivis.audio import read_audio
from serve_support import PATIENCE, RunningServer, wait_for

PEER_PYTHON = os.environ.get("MOSHIVIS_PEER_PYTHON", "")
PROGRAMS = ("pulseaudio", "pacat", "parec")
QUESTION = read_audio(Path(moshivis.__file__).parent / "assets" / "example.wav")
FORMAT = ["--raw", "--format=s16le", "--rate=24000", "--channels=1"]
LOUD = 0.01  # root mean square of a second in which somebody speaks
SCRIPT = """
load-module module-native-protocol-unix auth-anonymous=1 socket={socket}
load-module module-null-sink sink_name=voice
load-module module-null-sink sink_name=speaker
set-default-sink speaker
set-default-source voice.monitor
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEER_PYTHON, reason="no MOSHIVIS_PEER_PYTHON, an interpreter that finds the package moshi"),
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)), reason="needs the Debian packages pulseaudio and pulseaudio-utils"
    ),
]


@pytest.fixture(scope="module")
def peer() -> str:
    """The interpreter, once it has shown that it finds the client and PortAudio."""
    found = subprocess.run([PEER_PYTHON, "-c", "import moshi.client"], capture_output=True, text=True, timeout=PATIENCE)
    if found.returncode:
        pytest.skip(f"{PEER_PYTHON} cannot import moshi.client: {found.stderr.strip().splitlines()[-1]}")
    return PEER_PYTHON


@dataclass
class SoundCard:
    """What programs need to know to use it, and what its loudspeaker has played."""

    environment: dict[str, str]
    recording: Path

    def say(self, samples: np.ndarray) -> None:
        """Into the microphone, [T] at 24 kHz; returns when it has been said."""
        sound = (samples * 32767).astype("<i2").tobytes()
        command = ["pacat", "--playback", "--device=voice", *FORMAT]
        subprocess.run(command, input=sound, env=self.environment, check=True, timeout=PATIENCE)

    def loud_seconds(self) -> int:
        """Seconds of the recording in which somebody speaks."""
        samples = np.frombuffer(self.recording.read_bytes()[: self.recording.stat().st_size // 2 * 2], "<i2") / 32768
        seconds = samples[: len(samples) // 24000 * 24000].reshape(-1, 24000)
        return int((np.sqrt(np.mean(np.square(seconds), axis=1)) > LOUD).sum())


@contextlib.contextmanager
def running(
    command: list[str], environment: dict[str, str], stdout: IO[bytes] | None = None, stderr: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def sound_card(tmp_path: Path) -> Iterator[SoundCard]:
    """A PulseAudio of its own, which ALSA, and so PortAudio, takes for the sound card."""
    socket, script = tmp_path / "socket", tmp_path / "script.pa"
    script.write_text(SCRIPT.format(socket=socket))
    (tmp_path / ".asoundrc").write_text("pcm.!default { type pulse }\nctl.!default { type pulse }\n")
    own = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    environment = {**os.environ, **own, "PULSE_SERVER": f"unix:{socket}", "PYTHONUNBUFFERED": "1"}
    daemon = ["pulseaudio", "-n", "-F", str(script), "--exit-idle-time=-1", "--use-pid-file=no", "--disable-shm"]
    recording = tmp_path / "speaker.raw"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "pulse.log").open("wb"))
        pulse = stack.enter_context(running(daemon, environment, stderr=log))
        wait_for(lambda: socket.is_socket() or pulse.poll() is not None, "PulseAudio")
        assert pulse.poll() is None, (tmp_path / "pulse.log").read_text()
        heard = stack.enter_context(recording.open("wb"))
        stack.enter_context(running(["parec", "--device=speaker.monitor", *FORMAT], environment, stdout=heard))
        yield SoundCard(environment, recording)


def counted(server: RunningServer, metric: str) -> float:
    """A metric, with its labels."""
    found = re.search(rf"^moshivis_{re.escape(metric)} (\S+)$", server.get("/metrics").body.decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["chat", "moshi"])
def test_a_conversation_with_the_client_of_moshi(
    running_server: RunningServer, sound_card: SoundCard, peer: str, kind: str, tmp_path: Path
) -> None:
    """By host and port it calls `/api/chat`, by address whatever stands before `/api/chat`."""
    server = running_server
    door = {"chat": ["--host", "127.0.0.1", "--port", str(server.port)], "moshi": ["--url", f"{server.url}/moshi"]}
    begins, ends = f'sessions_started_total{{kind="{kind}"}}', f'sessions_ended_total{{kind="{kind}",reason="closed"}}'
    reactions = "reaction_seconds_count"  # counts words that follow the user's voice: the microphone was heard
    before = {metric: counted(server, metric) for metric in (begins, ends, reactions)}
    out, log = tmp_path / "out", tmp_path / "log"
    command = [peer, "-m", "moshi.client", *door[kind]]
    with out.open("wb") as stdout, log.open("wb") as stderr:
        with running(command, sound_card.environment, stdout=stdout, stderr=stderr) as client:

            def reach(condition: Callable[[], bool], what: str) -> None:
                wait_for(lambda: condition() or client.poll() is not None, what)
                assert client.poll() is None, log.read_text()

            reach(lambda: len(out.read_text().split()) >= 2, "the greeting")
            sound_card.say(QUESTION)
            reach(lambda: counted(server, reactions) > before[reactions], "a word after the question")
            words = len(out.read_text().split())
            reach(lambda: len(out.read_text().split()) > words, "the answer")
            reach(lambda: sound_card.loud_seconds() >= 2, "sound")
            assert server.hall.active == 1
            text, told = out.read_text(), log.read_text()
            client.send_signal(signal.SIGINT)
            status = client.wait(PATIENCE)
    server.wait_idle()
    assert status == 0 and log.read_text().endswith("Warning: Interrupting, exiting connection.\nInfo: All done!\n")
    assert "Info: connected!" in told and "Warning: unknown message kind 0" in told  # its word for the handshake
    assert "Error" not in told and "Traceback" not in log.read_text()
    assert re.fullmatch(r"[\w ,.?!'-]+", text)
    assert all(counted(server, metric) == before[metric] + 1 for metric in (begins, ends))
    print(f"{kind}: {text!r}, {sound_card.loud_seconds()} loud seconds, {told.count('[LAG]')} lags")
