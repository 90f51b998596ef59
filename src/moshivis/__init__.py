"""MoshiVis: a full-duplex speech model that sees. `moshivis.load()` is the way in; see the README."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moshivis.inference.conversation import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import moshivis` and `moshivis --help` should not wait for torch.
    if name == "load":
        from moshivis.inference.conversation import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
