"""Kinds of command-line values."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A count from the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
