"""Parity with the released model, number for number: `moshivis conform` walks folders of golden cases."""

from moshivis.conform.run import run_conform

__all__ = ["run_conform"]
