"""What a farm keeps beside its corpus, in `CORPUS.farm`: plan, attempts, TensorBoard, report."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_nuwa.errors import MachineError, UserError
from megatron_nuwa.files import try_lock, write_text_atomically

_LOCK = "lock"


@contextmanager
def writing(place: Path, what: str = "output") -> Iterator[None]:
    """Turn what the disk refuses in the block into a `MachineError` that names the place."""
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"{what} {place} cannot be written: {error.strerror or error}"
        ) from error


class FarmFolder:
    """Paths of the farm's own files; none of them is part of the corpus."""

    def __init__(self, output: Path) -> None:
        output = output.absolute()
        self.path = output.with_name(f"{output.name}.farm")
        self.plan = self.path / "plan"
        self.attempts = self.path / "attempts"
        self.looks = self.path / "looks"
        self.tensorboard = self.path / "tensorboard"
        self.report = self.path / "report.html"
        self._engines = self.path / "engines.json"
        self._retry = self.path / "retry.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other farms from working at the same corpus; `UserError` where one does."""
        with writing(self.path, "farm folder"):
            self.attempts.mkdir(parents=True, exist_ok=True)
            lock = try_lock(self.path / _LOCK)
        if lock is None:
            raise UserError(
                f"another farm is at work on this corpus (it holds {self.path / _LOCK}); wait for "
                f"it, or end it"
            )
        try:
            yield
        finally:
            lock.release()

    def engines(self) -> list[str]:
        """What the corpus has been encoded with so far, as far as it is noted."""
        try:
            noted = json.loads(self._engines.read_text())
        except (OSError, ValueError):
            return []
        return [str(name) for name in noted] if isinstance(noted, list) else []

    def note_engines(self, engines: Sequence[str], new: bool) -> list[str]:
        """Add to what the corpus is encoded with, or begin anew, and return all of it."""
        noted = sorted({*engines, *([] if new else self.engines())})
        write_text_atomically(self._engines, json.dumps(noted, indent=1))
        return noted

    def is_retrying(self, limits: Mapping[str, object]) -> bool:
        """Whether failed items are being tried again within these limits, and not to the end."""
        try:
            return bool(json.loads(self._retry.read_text()) == limits)
        except (OSError, ValueError):
            return False

    def note_retry(self, limits: Mapping[str, object]) -> None:
        """Note that the failed items are to be tried again within these limits."""
        write_text_atomically(self._retry, json.dumps(limits, indent=1))

    def forget_retry(self) -> None:
        """Remove that note: they have come to their end, or another one begins."""
        self._retry.unlink(missing_ok=True)

    def forget_plan(self) -> None:
        """Remove the plan, which a finished corpus needs no more."""
        shutil.rmtree(self.plan, ignore_errors=True)

    def discard(self) -> None:
        """Remove everything."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.path)
