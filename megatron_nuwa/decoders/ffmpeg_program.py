"""Where the ffmpeg program is."""

from __future__ import annotations

import functools
import os
import shutil
from importlib import resources
from pathlib import Path

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


@functools.cache
def _packaged() -> str | None:
    folder = resources.files("imageio_ffmpeg") / "binaries"
    with resources.as_file(folder) as place:
        found = sorted(path for path in Path(place).glob("ffmpeg-*") if os.access(path, os.X_OK))
    return str(found[-1]) if found else None
