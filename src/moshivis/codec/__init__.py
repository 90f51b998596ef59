"""Mimi, the streaming neural audio codec (Moshi paper section 3.3; reference facts, mimi.md)."""

from moshivis.codec.mimi import CodecState, Mimi

__all__ = ["CodecState", "Mimi"]
