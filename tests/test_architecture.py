"""The house as docs/architecture.md draws it: rooms import downwards only, and files stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "moshivis"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400


def table() -> dict[str, list[str]]:
    """Room -> the rooms that its row of the document names, in the document's order."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = text.partition("| room |")[2].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {room.strip("`"): re.findall(r"`([^`]+)`", imports) for room, _, imports in cells}


def room_of(path: Path) -> str:
    first, *rest = path.relative_to(PACKAGE).parts
    return f"{first}/" if rest else first


def imported_rooms(source: str) -> set[str]:
    """Rooms that a file's source imports, wherever in the file it does."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = [module.split(".")[1:] for module in modules if module.split(".")[0] == "moshivis"]
    return {_room(parts[0] if parts else "") for parts in ours}


def _room(module: str) -> str:
    if (PACKAGE / module).is_dir() and module:
        return f"{module}/"
    return f"{module}.py" if (PACKAGE / f"{module}.py").exists() else "__init__.py"


def allowed() -> dict[str, set[str]]:
    """Room -> all rooms that it may import: those of its row, and what they may import."""
    closure: dict[str, set[str]] = {}
    for room, named in table().items():
        above = [name for name in named if name not in closure]
        assert not above, f"the row of {room} names {above}, which no row above it describes"
        closure[room] = set(named).union(*(closure[name] for name in named))
    return closure


def test_the_document_describes_every_room_and_no_other() -> None:
    assert {room_of(path) for path in FILES} == set(table())


def test_imports_run_downwards() -> None:
    rooms = allowed()
    upwards = {}
    for path in FILES:
        own = room_of(path)
        wrong = imported_rooms(path.read_text(encoding="utf-8")) - rooms[own] - {own}
        if wrong:
            upwards[str(path.relative_to(PACKAGE))] = wrong
    assert not upwards


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_every_path_that_the_document_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`([\w/]+(?:\.py|/))`", text)
    assert len(paths) > 20
    missing = [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()]
    assert not missing


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import torch
import moshivis.mini.recipe
from moshivis import config
from moshivis import __version__

def late():
    from moshivis.inference.sampling import sample
"""
    assert imported_rooms(source) == {"mini/", "config.py", "__init__.py", "inference/"}
    assert not imported_rooms(source) <= allowed()["layers/"]
