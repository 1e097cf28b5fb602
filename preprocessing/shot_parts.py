"""The parts of a manifest of shots in the making, in a hidden folder beside it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import try_lock
from preprocessing import attempts
from preprocessing.attempts import Attempts
from preprocessing.state import writing

# A film takes from seconds to hours, and one that is done shall not be done again because a rank
# dies at the next: a part is one film, unless a folder would have to hold more files than this.
MOST_PARTS = 1 << 16
# Raised whenever parts of before would not do.
RULES_VERSION = 3


@dataclass(frozen=True)
class Parts:
    """Rows of a source in parts, each of which is there whole or not at all."""

    folder: Path
    items: int
    size: int

    @classmethod
    def of(cls, output: Path, items: int, key: str) -> Parts:
        """The parts of an output; `key` holds all that its rows depend on."""
        digest = hashlib.sha256(f"{RULES_VERSION} {key} {Path.cwd()}".encode()).hexdigest()[:16]
        folder = output.with_name(f".{output.name}.{digest}.parts")
        return cls(folder, items, max(1, -(-items // MOST_PARTS)))

    @property
    def attempts(self) -> Path:
        """The folder of the attempts at the rows."""
        return self.folder / "attempts"

    @property
    def count(self) -> int:
        """How many there are."""
        return -(-self.items // self.size)

    def rows(self, part: int) -> range:
        """The source's rows of one part."""
        return range(part * self.size, min((part + 1) * self.size, self.items))

    def path(self, part: int) -> Path:
        """The file of one part."""
        return self.folder / f"{part:08d}.jsonl"

    def begin(self, output: Path) -> tuple[list[int], dict[int, Attempts]]:
        """Prepare the folder: the parts that are not there, and the attempts at rows so far."""
        for other in output.parent.glob(f".{output.name}.*.parts"):
            if other != self.folder:
                shutil.rmtree(other)
        self.attempts.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".*"):
            unfinished.unlink()
        missing = [part for part in range(self.count) if not self.path(part).exists()]
        return missing, attempts.collect(self.attempts)

    def done(self) -> int:
        """How many rows are done."""
        names = (name for name in os.listdir(self.folder) if not name.startswith("."))
        return min(self.items, self.size * sum(name.endswith(".jsonl") for name in names))


@contextmanager
def only_command(output: Path) -> Iterator[None]:
    """Keep other commands from making the same output; `UserError` where one does."""
    path = output.with_name(f".{output.name}.lock")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = try_lock(path)
    if lock is None:
        raise UserError(
            f"another command is writing {output} (it holds {path}); wait for it, or end it"
        )
    try:
        yield
    finally:
        # What ends the block may be a disk that takes nothing any more, not this either.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()
