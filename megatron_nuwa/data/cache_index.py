"""What lies in a cache's folder, in a file beside it, so that no arrival has to list the folder."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

PART = ".part"
# A whole file by its sha256, or an arriving one by its bytes, too. All others are somebody else's.
_OURS = re.compile(rf"[0-9a-f]{{64}}(?:\.([0-9]+){re.escape(PART)})?")
_TABLES = (
    "CREATE TABLE files (name TEXT PRIMARY KEY, bytes INTEGER, opened INTEGER) WITHOUT ROWID",
    "CREATE INDEX files_by_age ON files (opened)",
    "CREATE TABLE arrivals (name TEXT PRIMARY KEY, bytes INTEGER) WITHOUT ROWID",
    "CREATE TABLE state (taken INTEGER, stamp TEXT)",
)
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class CacheIndex:
    """Sizes of whole and of arriving shards, and when each was opened, at the earliest.

    Whoever calls anything here holds the lock of the cache's room. Every change of the folder's
    entries changes its time: where that is not the one noted at the last change (a process was
    killed amid one, somebody removed a file, the machine was started anew), the folder is listed.
    Files of others in it are passed over.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self._folder, self._file = folder, file
        self._rows: sqlite3.Connection

    @contextlib.contextmanager
    def opened(self) -> Iterator[CacheIndex]:
        """The index, for a block that may change the folder's entries. Raises `OSError`."""
        try:
            self._connect()
            try:
                yield self
                self._rows.execute("UPDATE state SET stamp = ?", (self._stamp(),))
                self._rows.commit()
            finally:
                self._rows.close()
        except sqlite3.Error as error:
            self._remove()
            raise OSError(f"its index {self._file} fails: {error}") from error

    @property
    def taken(self) -> int:
        """Bytes of all files, with the room that arriving ones will take."""
        return int(self._rows.execute("SELECT taken FROM state").fetchone()[0])

    def oldest(self) -> str | None:
        """The name of the file that was opened longest ago, or None where there is none."""
        while row := self._rows.execute(
            "SELECT name, opened FROM files ORDER BY opened LIMIT 1"
        ).fetchone():
            name, opened = row
            try:
                now = (self._folder / name).stat().st_mtime_ns
            except FileNotFoundError:
                self.forget(name)
                continue
            if now == opened:
                return str(name)
            # Opening a file is noted in its own time only, which no process waits for.
            self._rows.execute("UPDATE files SET opened = ? WHERE name = ?", (now, name))
        return None

    def arrivals(self) -> list[str]:
        """Names of the files that are on their way, or were when a process died."""
        return [name for (name,) in self._rows.execute("SELECT name FROM arrivals")]

    def add_arrival(self, name: str, size: int) -> None:
        """Note that a file is on its way."""
        self._rows.execute("INSERT INTO arrivals VALUES (?, ?)", (name, size))
        self._take(size)

    def add(self, name: str) -> None:
        """Note that a file is there."""
        self.forget(name)
        status = (self._folder / name).stat()
        row = (name, status.st_size, status.st_mtime_ns)
        self._rows.execute("INSERT INTO files VALUES (?, ?, ?)", row)
        self._take(status.st_size)

    def forget(self, name: str) -> None:
        """Note that a file, whole or arriving, is not there."""
        table = "arrivals" if name.endswith(PART) else "files"
        row = self._rows.execute(f"SELECT bytes FROM {table} WHERE name = ?", (name,)).fetchone()
        if row is not None:
            self._rows.execute(f"DELETE FROM {table} WHERE name = ?", (name,))
            self._take(-row[0])

    def _take(self, size: int) -> None:
        self._rows.execute("UPDATE state SET taken = taken + ?", (size,))

    def _connect(self) -> None:
        self._rows = sqlite3.connect(self._file)
        try:
            row = self._rows.execute("SELECT stamp FROM state").fetchone()
            is_true = row is not None and row[0] == self._stamp()
        except sqlite3.Error:
            # There is none yet, or what a machine that lost its power has left of it.
            is_true = False
        if not is_true:
            self._rows.close()
            self._remove()
            self._rows = sqlite3.connect(self._file)
        # What a killed process leaves is undone all the same, and a restarted machine is noticed.
        self._rows.execute("PRAGMA synchronous = OFF")
        if not is_true:
            self._list()

    def _list(self) -> None:
        for table in _TABLES:
            self._rows.execute(table)
        self._rows.execute("INSERT INTO state VALUES (0, '')")
        with os.scandir(self._folder) as entries:
            for entry in entries:
                ours = _OURS.fullmatch(entry.name)
                with contextlib.suppress(FileNotFoundError):
                    if ours and ours[1]:
                        self.add_arrival(entry.name, int(ours[1]))
                    elif ours and entry.is_file():
                        self.add(entry.name)

    def _remove(self) -> None:
        for name in (self._file.name, f"{self._file.name}-journal"):
            self._file.with_name(name).unlink(missing_ok=True)

    def _stamp(self) -> str:
        boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        return f"{boot} {self._folder.stat().st_mtime_ns}"
