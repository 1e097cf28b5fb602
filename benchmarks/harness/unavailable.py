"""Why a peer is not in a table."""

from __future__ import annotations


class UnavailableError(Exception):
    """A peer that cannot run a case here; the text says why."""
