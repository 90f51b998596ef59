"""The colour of a transcript by its gates: green is general knowledge, orange is the image (model.md 5.5)."""

from __future__ import annotations

from dataclasses import dataclass

from moshivis.config import AdapterConfig

PALETTE = (
    "#38c886", "#5bd09a", "#80d9af", "#a4e2c4", "#c8ead9",
    "#f2f1f1",
    "#f4e0cb", "#f5cea6", "#f5bd81", "#f6ac5b", "#f79b37",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GateScale:
    """What gate has which colour: `low` is the greenest, `low + width` the most orange."""

    low: float
    width: float

    @classmethod
    def of(cls, adapters: AdapterConfig | None) -> GateScale:
        """That of a model: gates of differently trained adapters range differently."""
        low, width = (adapters or AdapterConfig()).gate_scale
        return cls(low=low, width=width)

    def index(self, gate: float) -> int:
        """0 to 10, an index of PALETTE, for the aggregated gate of a frame."""
        return round(min(max((gate - self.low) / self.width, 0.0), 1.0) * 10)

    def colour(self, gate: float) -> str:
        """As `#rrggbb`."""
        return PALETTE[self.index(gate)]


RELEASED_SCALE = GateScale.of(None)
