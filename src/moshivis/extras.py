"""The packages of an extra, asked for before they are needed."""

from __future__ import annotations

from importlib.util import find_spec

from moshivis.errors import MoshivisError


def need(packages: tuple[str, ...], *, extra: str, what: str) -> None:
    """Raise MoshivisError, with what to install, unless all the packages are there; `what` is what needs them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MoshivisError(f"{what} needs {', '.join(missing)}; install with: pip install 'moshivis[{extra}]'")
