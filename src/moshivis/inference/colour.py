"""The colour of a transcript by its gates: green is general knowledge, orange is the image (model.md 5.5)."""

from __future__ import annotations

PALETTE = (
    "#38c886", "#5bd09a", "#80d9af", "#a4e2c4", "#c8ead9",
    "#f2f1f1",
    "#f4e0cb", "#f5cea6", "#f5bd81", "#f6ac5b", "#f79b37",
)  # fmt: skip


def colour_index(gate: float) -> int:
    """0 to 10, an index of PALETTE, for the aggregated gate of a frame."""
    return round(min(max((gate - 0.005) / 0.016, 0.0), 1.0) * 10)
