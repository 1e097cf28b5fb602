"""Attempts at items, counted on disk before the work, so that a killed rank leaves its trace."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from megatron_nuwa.decoders import DecodeError
from megatron_nuwa.errors import MachineError, UserError
from megatron_nuwa.files import sync, write_text_atomically
from preprocessing.sources.items import Media
from preprocessing.state import writing

T = TypeVar("T")

# A rank may die for another reason than the item it was at, so deaths weigh less than failures.
DEATHS_PER_ATTEMPT = 2
_COUNTS = "attempts.json"
_JOURNALS = "journal-*"
# The first line of a journal is the row under work, of fixed width, so that it is overwritten.
_ROW_WIDTH = 20
SYNC_SECONDS = 1.0
_FOLDER = "farm folder"


@dataclass(frozen=True)
class Attempts:
    """What became of an item before: attempts that failed, and runs that ended amid one."""

    failed: int = 0
    deaths: int = 0


class Journal:
    """The attempts of one decode thread: the row under work, and the rows that failed."""

    def __init__(self, folder: Path) -> None:
        # Ranks of several nodes write into one folder.
        name = f"journal-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._folder = folder
        with writing(folder, _FOLDER):
            self._file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._end = _ROW_WIDTH
        self._is_open, self._has_news = True, False
        self._refusal: OSError | None = None
        # Between whoever closes the file and whoever brings it to the disk.
        self._lock = threading.Lock()
        try:
            self._write(b"", 0)
        except MachineError:
            os.close(self._file)
            raise

    def begin(self, row: int) -> None:
        """Note that an attempt at a row begins."""
        self._write(str(row).encode(), 0)

    def succeed(self) -> None:
        """Note that the attempt has ended well."""
        self._write(b"", 0)

    def fail(self, row: int) -> None:
        """Note that the attempt has failed."""
        self._write(str(row).encode(), self._end)
        self._end += _ROW_WIDTH
        self._write(b"", 0)

    def close(self) -> None:
        """Forget the row under work: the rank ends in good order."""
        try:
            self._write(b"", 0)
        finally:
            self._let_go()

    def sync(self) -> None:
        """Have what was noted on the disk; a disk that refuses shows at the next note."""
        with self._lock:
            if not (self._has_news and self._is_open):
                return
            # Before the disk is asked: what is noted meanwhile is news again.
            self._has_news = False
            try:
                os.fdatasync(self._file)
            except OSError as error:
                self._refusal = error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None or issubclass(kind, (UserError, KeyboardInterrupt)):
            self.close()
        else:
            # What nobody foresaw, such as memory that runs out, is the end of a rank like another.
            self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            self._is_open = False
            os.close(self._file)

    def _write(self, text: bytes, offset: int) -> None:
        record = text.ljust(_ROW_WIDTH - 1) + b"\n"
        with writing(self._folder, _FOLDER):
            if self._refusal is not None:
                raise self._refusal
            # A disk takes as much of it as there is room for, and complains of the rest alone.
            while record:
                written = os.pwrite(self._file, record, offset)
                record, offset = record[written:], offset + written
        self._has_news = True


class Journals:
    """The journals of a process, which a thread brings to the disk every `seconds` seconds.

    A killed process loses nothing of what it noted; a machine that loses its power, what was
    noted since. At every note the disk would be slower than the decoding of images.
    """

    def __init__(self, folder: Path, seconds: float = SYNC_SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._journals: list[Journal] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._sync, name="journals", daemon=True)
        self._thread.start()

    def open(self) -> Journal:
        """One more journal, which the caller closes."""
        journal = Journal(self._folder)
        self._journals.append(journal)
        return journal

    def close(self) -> None:
        """End the thread; the journals are closed by then."""
        self._ending.set()
        self._thread.join()

    def _sync(self) -> None:
        named = 0
        while not self._ending.wait(self._seconds):
            journals = list(self._journals)
            if len(journals) > named:
                named = len(journals)
                # Their names, without which their content would be lost.
                with contextlib.suppress(OSError):
                    sync(self._folder)
            for journal in journals:
                journal.sync()


class Trial(NamedTuple):
    """An item to be tried: its row, its medium, what became of it before, how often it may fail."""

    row: int
    media: Media
    before: Attempts
    most: int


def try_item(trial: Trial, journal: Journal, here: Callable[[], T], alone: Callable[[], T]) -> T:
    """What one of two ways to work at an item gives; its last `DecodeError` where none does.

    It is the one in a process of its own where the item was at work when a rank died.
    """
    if trial.before.deaths >= DEATHS_PER_ATTEMPT * trial.most:
        raise DecodeError(f"{trial.media} was at work each time that the farm's ranks died")
    action = alone if trial.before.deaths else here
    # The last attempt is always made again: its reason belongs into the corpus.
    left = max(1, trial.most - trial.before.failed)
    while True:
        journal.begin(trial.row)
        try:
            result = action()
        except DecodeError as error:
            journal.fail(trial.row)
            left -= 1
            # A decoder may know of an error that no further attempt can mend.
            if not left or error.permanent:
                raise
        except MachineError:
            raise
        except UserError:
            # A filter, or the manifest, has decided: the next item may be long in coming.
            journal.succeed()
            raise
        else:
            journal.succeed()
            return result


def collect(folder: Path) -> dict[int, Attempts]:
    """Add the journals of ended runs to the counts of the runs before them, and remove them.

    Only one process may call it, while no journal is open. Returns the counts by row.
    """
    counts, counted = _read_counts(folder / _COUNTS)
    journals = sorted(folder.glob(_JOURNALS))
    for journal in journals:
        if journal.name not in counted:
            _count(journal, counts)
    if journals:
        # Their names are kept: a run that ends before they are removed must not count them twice.
        _save(folder, counts, [journal.name for journal in journals])
        sync(folder)
    for journal in journals:
        journal.unlink()
    return counts


def forget(folder: Path) -> None:
    """Remove all counts: every item has come to its end."""
    for path in (*folder.glob(_JOURNALS), folder / _COUNTS):
        path.unlink(missing_ok=True)


def _count(journal: Path, counts: dict[int, Attempts]) -> None:
    content = journal.read_bytes()
    whole = content[: len(content) // _ROW_WIDTH * _ROW_WIDTH]
    # What a full disk has cut off would be the number of another row.
    under_work, *failed = [line.strip() for line in whole.splitlines()] or [b""]
    for row in (int(text) for text in failed if text.isdigit()):
        before = counts.get(row, Attempts())
        counts[row] = replace(before, failed=before.failed + 1)
    if under_work.isdigit():
        before = counts.get(int(under_work), Attempts())
        counts[int(under_work)] = replace(before, deaths=before.deaths + 1)


def _save(folder: Path, counts: Mapping[int, Attempts], journals: Sequence[str]) -> None:
    rows = {str(row): asdict(attempts) for row, attempts in sorted(counts.items())}
    tree = {"journals": list(journals), "rows": rows}
    write_text_atomically(folder / _COUNTS, json.dumps(tree) + "\n")


def _read_counts(path: Path) -> tuple[dict[int, Attempts], set[str]]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows = {int(row): Attempts(**counts) for row, counts in tree["rows"].items()}
        return rows, set(tree["journals"])
    except FileNotFoundError:
        return {}, set()
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is not what a farm writes; remove it") from error
