"""Disks of a test's own: small ones that become full, and others that become read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = 4096


def mount(*arguments: str | Path) -> None:
    """`mount`; the test is skipped where that is forbidden."""
    done = _run("mount", *arguments)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {' '.join(done.stderr.split())}")


def unmount(folder: Path) -> None:
    """Take a disk out that nobody uses any more."""
    subprocess.run(["umount", str(folder)], check=True)


class MemoryDisk:
    """A file system in memory that holds so many pages of files, and folders besides."""

    def __init__(self, folder: Path, pages: int) -> None:
        self.folder = folder
        folder.mkdir()
        mount("-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", folder)

    def change(self, option: str) -> None:
        """Mount it anew: `size=8m`, `ro`, `rw`."""
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.folder)], check=True)


# Makes a disk of so many pages.
MakeDisk = Callable[[int], MemoryDisk]


class FailingDisk:
    """An ext4 file system that becomes read-only amid the work, as after an error of the disk.

    Nothing else makes a disk read-only on which files are open for writing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._image = folder.with_name(f"{folder.name}.ext4")
        with self._image.open("wb") as stream:
            stream.truncate(32 << 20)
        done = _run("mkfs.ext4", "-q", self._image)
        if done.returncode:
            pytest.skip(f"no ext4 can be made here: {' '.join(done.stderr.split())}")
        folder.mkdir()
        self._mount()
        if not self._fault.exists():
            unmount(folder)
            pytest.skip("this kernel's ext4 cannot be told to fail")

    def fail(self) -> None:
        """Have it become read-only at once, for those who write to it, too."""
        self._fault.write_text("1")

    def mend(self) -> None:
        """Have it writable again, with what had reached it; nobody may use it any more."""
        unmount(self.folder)
        self._mount()

    def _mount(self) -> None:
        mount("-o", "loop,errors=remount-ro", self._image, self.folder)

    @property
    def _fault(self) -> Path:
        source = _run("findmnt", "-no", "SOURCE", self.folder).stdout.strip()
        return Path("/sys/fs/ext4", Path(source).name, "trigger_fs_error")


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", f"there is no {error.filename}")
