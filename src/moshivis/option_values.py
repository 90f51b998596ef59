"""Values of options on a command line, as `type` of argparse: each raises ArgumentTypeError with what it must be."""

from __future__ import annotations

import argparse
import math

LONGEST = 1e9  # seconds, 32 years


def duration(text: str) -> float:
    """Seconds: a number above 0 that a clock can count."""
    value = not_negative(text)
    if not 0 < value <= LONGEST:
        raise argparse.ArgumentTypeError(f"must be more than 0 and at most {LONGEST:.0f} seconds, not {text}")
    return value


def not_negative(text: str) -> float:
    """A number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not {text}")
    return value


def count(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0, "0 or more")


def some(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1, "1 or more")


def seed(text: str) -> int:
    """A whole number that a random generator takes."""
    return _whole(text, 0, "from 0 to 2^63 - 1", 2**63)


def _whole(text: str, least: int, range_: str, end: float = math.inf) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text}") from None
    if not least <= value < end:
        raise argparse.ArgumentTypeError(f"must be {range_}, not {text}")
    return value
