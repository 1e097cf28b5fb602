"""Where the ffmpeg program is."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg

from megatron_nuwa.errors import MachineError

_GIVEN = "IMAGEIO_FFMPEG_EXE"


def ffmpeg_program() -> str:
    """The ffmpeg that IMAGEIO_FFMPEG_EXE names, or imageio-ffmpeg's own, or else the system's.

    imageio-ffmpeg's function looks in the same places, but tries each program in a child process:
    where something kills that one, ranks of one farm would decode with two versions. Raises
    `MachineError` where there is none.
    """
    program = os.environ.get(_GIVEN) or _packaged() or shutil.which("ffmpeg")
    if program is None:
        raise MachineError(
            "there is no ffmpeg here: install imageio-ffmpeg from a wheel, or name a program with "
            f"{_GIVEN}"
        )
    return program


def not_started(command: Sequence[str], error: OSError) -> MachineError:
    """What to raise where a command of ffmpeg's cannot be started."""
    return MachineError(f"ffmpeg ({command[0]}) cannot be started: {error.strerror}")


@functools.cache
def _packaged() -> str | None:
    folder = Path(imageio_ffmpeg.__file__).with_name("binaries")
    found = sorted(path for path in folder.glob("ffmpeg-*") if os.access(path, os.X_OK))
    return str(found[-1]) if found else None
