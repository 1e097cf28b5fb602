"""A folder that one call writes to, and no other call at the same time."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import Lock, try_lock
from megatron_nuwa.generation.drafts import carry_over, listed_files

_LOCK = ".generate.lock"
_DRAFTS = ".generate"


class ReservedFolder:
    """A folder, and in it the hidden folder `drafts` for what is not whole yet.

    It is reserved as long as its lock file is locked, so that whatever a killed process leaves
    counts for nothing. `release`, or the end of a `with` block, gives it back, and removes the
    folders that were `made` for it where they are empty.
    """

    def __init__(self, folder: Path, lock: Lock, made: Sequence[Path]) -> None:
        self.folder = folder
        self.drafts = folder / _DRAFTS
        self._lock, self._made = lock, made
        self._is_held = True

    def __enter__(self) -> ReservedFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def become_drafts_of(self, other: ReservedFolder) -> None:
        """Turn the whole folder into the drafts of another one, in one step, and give it back."""
        self.release()
        shutil.rmtree(other.drafts)
        self.folder.rename(other.drafts)

    def release(self) -> None:
        """Give the folder back, without its hidden files; a second time does nothing.

        Finished drafts that could not be carried over stay for the next call.
        """
        if not self._is_held:
            return
        self._is_held = False
        if listed_files(self.drafts) is None:
            shutil.rmtree(self.drafts, ignore_errors=True)
        # Removed while it is held: a moment later it could be that of another call.
        (self.folder / _LOCK).unlink(missing_ok=True)
        self._lock.release()
        _remove_empty(self._made)


def reserve(folder: Path) -> ReservedFolder:
    """Reserve the folder of `--output`, and make it where it is not there.

    Raises `UserError` where it cannot be written to and where another call writes to it.
    """
    made = _absent(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reserved = _claimed(folder, made)
    except OSError as error:
        _remove_empty(made)
        raise _unwritable(folder, error) from error
    if reserved is None:
        raise UserError(f"--output {folder}: another call is writing to it; name another folder")
    return reserved


def reserve_new(folder: Path) -> ReservedFolder:
    """Reserve `folder`, or else `folder-2` and so on: the first that is not there yet.

    Of calls at the same time each gets another one. One that a killed call has left without a
    single file is taken, too. Raises `UserError` where it cannot be made.
    """
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    for name in (folder.name + number for number in numbers):
        place = folder.with_name(name)
        made = _absent(place)
        is_new = True
        try:
            place.mkdir(parents=True)
        except FileExistsError as error:
            # A folder above is a link to nowhere, and would be for every number.
            if not os.path.lexists(place):
                raise _unwritable(place, error) from error
            if not (place / _LOCK).exists():
                continue
            is_new, made = False, [place]
        except OSError as error:
            _remove_empty(made)
            raise _unwritable(place, error) from error
        try:
            reserved = _claimed(place, made, must_hold=not is_new)
        except OSError as error:
            _remove_empty(made)
            raise _unwritable(place, error) from error
        if reserved is None:
            continue
        if any(not path.name.startswith(_DRAFTS) for path in place.iterdir()):
            reserved.release()
            continue
        return reserved
    raise AssertionError("there is always another number")


def _claimed(folder: Path, made: Sequence[Path], must_hold: bool = False) -> ReservedFolder | None:
    """The folder for this process alone, or None where another one has it.

    Where locks are unknown nobody can tell, and one that the lock `must_hold` is left alone.
    """
    lock = try_lock(folder / _LOCK)
    if lock is None:
        return None
    if must_hold and not lock.holds:
        lock.release()
        return None
    reserved = ReservedFolder(folder, lock, made)
    try:
        carry_over(reserved.drafts, folder)
        # What a killed call did not get ready.
        shutil.rmtree(reserved.drafts, ignore_errors=True)
        reserved.drafts.mkdir()
    except OSError:
        reserved.release()
        raise
    return reserved


def _absent(folder: Path) -> list[Path]:
    return [each for each in (folder, *folder.parents) if not os.path.lexists(each)]


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, up to one that somebody has put something into."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _unwritable(folder: Path, error: OSError) -> UserError:
    place = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    what = f"cannot be written to ({error.strerror})" if place.is_dir() else "is no folder"
    return UserError(f"--output {folder}: {place} {what}; name another folder")
