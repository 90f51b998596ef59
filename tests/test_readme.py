"""What README.md and docs/*.md show works: their commands and Python are run, beside a picture and a question."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_support import write_corpus

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ASSETS = ROOT / "src" / "moshivis" / "assets"
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)\)")
MOSHIVIS = "import sys; from moshivis.cli import main; sys.exit(main())"

# Commands of the blocks tagged `bash not-in-tests`, and why they are not run here.
NOT_RUN = {
    "make run": "installs into a new environment and serves until it is stopped",
    "make answer": "installs into a new environment",
    "pip install 'moshivis[serve]'": "changes the environment that runs this test",
    "moshivis serve --open": "serves until it is stopped; tests/test_serve_command.py starts it",
    "moshivis chat http://localhost:8998 --image picture.png --audio question.wav --out both.wav": (
        "needs that server; tests/test_client_chat.py runs it"
    ),
    "moshivis bench serve --sessions 1,8,12 --seconds 25": "takes minutes",
    "moshivis talk picture.png --audio question.wav --model hf://kyutai/moshika-vis-pytorch-bf16 --device cuda": (
        "downloads 17 GB and needs a GPU"
    ),
    "moshivis talk picture.png --audio question.wav --model path/to/folder --device cuda": "needs those 17 GB",
    "moshivis bench step --preset moshika-vis --random": "needs 24 GB of memory",
    "apt-get install g++ espeak-ng flite festival festvox-us-slt-hts librsvg2-bin fonts-dejavu-core fonts-liberation": (
        "needs an administrator"
    ),
    "pip install 'moshivis[train,data]'": "changes the environment that runs this test",
    "torchrun --nproc-per-node 8 -m moshivis train paper": "needs eight GPUs, and data that nobody may pass on",
    "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m moshivis train paper": (
        "needs two such machines"
    ),
    "pip install -e '.[eval,mini,train]'": "changes the environment that runs this test",
    "python -m moshivis.mini build --out runs/miniature": "takes hours",
    "python -m moshivis.mini improve --out runs/better": "takes hours; tests/test_mini_improve.py runs its stages",
    "python -m moshivis.mini measure --model runs/miniature/model": "takes minutes, and needs the speech programs",
}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Info string after the language, and content, of all blocks of a language."""
    for document in DOCUMENTS:
        for found, tag, content in BLOCK.findall(document.read_text(encoding="utf-8")):
            if found == language:
                yield tag.strip(), content


def commands(tag: str) -> list[str]:
    """Lines of the bash blocks with this tag, comments left out."""
    lines = [line for found, content in blocks("bash") if found == tag for line in content.splitlines()]
    return [command for line in lines if (command := shlex.join(shlex.split(line, comments=True)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As if one stood in the repository, with picture.png and question.wav beside."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ASSETS / "example.png", folder / "picture.png")
    shutil.copy(ASSETS / "example.wav", folder / "question.wav")
    (folder / "tests").symlink_to(ROOT / "tests")
    write_corpus(folder / "talks")
    for recording in (folder / "talks").glob("*.wav"):
        shutil.copy(folder / "picture.png", recording.with_suffix(".png"))
    return folder


def run(arguments: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands(""))
def test_commands_run(command: str, folder: Path) -> None:
    program, *arguments = shlex.split(command)
    if program == "moshivis":
        assert run(["-c", MOSHIVIS, *arguments], folder)
    else:
        assert (program, arguments[0]) == ("python", "-m"), "only moshivis and python -m can be run here"
        assert run(arguments, folder)


@pytest.mark.parametrize("source", [content for tag, content in blocks("python") if not tag])
def test_python_runs(source: str, folder: Path) -> None:
    run(["-c", source], folder)


def test_there_is_something_to_run() -> None:
    verbs = {tuple(shlex.split(command)[:2]) for command in commands("")}
    assert {("moshivis", "talk"), ("moshivis", "conform"), ("moshivis", "bench")} <= verbs
    assert any("moshivis.load()" in content for _, content in blocks("python"))


def test_every_command_that_is_not_run_has_a_reason() -> None:
    assert {tag for tag, _ in blocks("bash")} == {"", "not-in-tests"}
    # the client of a server, which tests/test_serve_openai_sdk.py runs in full
    assert all("AsyncOpenAI" in content for tag, content in blocks("python") if tag)
    assert set(commands("not-in-tests")) == set(NOT_RUN)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = LINK.findall(document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]


def test_every_figure_names_its_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", text.split("| what | figure | command |")[1], re.MULTILINE)[1:]
    assert len(rows) > 10
    for what, figure, command in rows:
        assert re.search(r"\d", figure), what
        assert command.startswith(("`", "same")), what
