"""What the farm counts while it works."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Figures:
    """Sums over ranks and time; seconds are those of all threads together.

    `starved_seconds` is how long encode ranks had nothing to encode, `queue_samples` and
    `queue_fill` how often the queues were looked at and the sum of their fill shares.
    """

    items: int = 0
    failed: int = 0
    left_out: int = 0
    frames: int = 0
    shards: int = 0
    batches: int = 0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    starved_seconds: float = 0.0
    queue_samples: int = 0
    queue_fill: float = 0.0

    def add(self, other: Figures) -> None:
        """Add another rank's figures, or a later time's."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
