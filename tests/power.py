"""What a disk holds for certain when the power goes: what was synced, and nothing else."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Inode = tuple[int, int]


@dataclass(frozen=True)
class Renamed:
    """What a power loss right after a rename would cost.

    `lost` names files whose bytes, and folders whose entries, had not reached the disk under the
    new name; `neighbours` are the names that the new name's folder had on the disk for certain.
    """

    target: Path
    lost: list[str]
    neighbours: frozenset[str]


class Disk:
    """Watches `os.fsync`, `os.fdatasync` and `os.replace` until the test ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.renames: list[Renamed] = []
        self._synced: dict[Inode, Any] = {}
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._noting(getattr(os, name)))
        self._replace = os.replace
        monkeypatch.setattr(os, "replace", self._noted_replace)

    def of(self, target: Path) -> Renamed:
        """The last rename to this name."""
        return next(renamed for renamed in reversed(self.renames) if renamed.target == target)

    def lost(self, path: Path) -> list[str]:
        """The file, or of a folder it and all in it, that is not on the disk as it is now."""
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        return [str(each) for each in (path, *inside) if not self._is_synced(each)]

    def names(self, folder: Path) -> frozenset[str]:
        """The names that a folder has on the disk for certain."""
        entries = self._synced.get(_inode(folder), {})
        return frozenset(name for name in entries if entries[name] == _state_of_name(folder / name))

    def _is_synced(self, path: Path) -> bool:
        return self._synced.get(_inode(path)) == _state(path)

    def _noting(self, real: Any) -> Any:
        def call(handle: int) -> None:
            real(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            if path.exists():
                self._synced[_inode(path)] = _state(path)

        return call

    def _noted_replace(self, source: Any, target: Any, **options: Any) -> None:
        lost = self.lost(Path(source))
        self._replace(source, target, **options)
        target = Path(target)
        self.renames.append(Renamed(target, lost, self.names(target.parent)))


def _inode(path: Path) -> Inode:
    status = path.stat()
    return status.st_dev, status.st_ino


def _state(path: Path) -> Any:
    if path.is_dir():
        return {entry.name: _state_of_name(entry) for entry in path.iterdir()}
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _state_of_name(path: Path) -> Inode | None:
    return _inode(path) if path.exists() else None
