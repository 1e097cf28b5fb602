"""The ffmpeg program as a process: bounded, read while it writes, and never left behind."""

from __future__ import annotations

import contextlib
import math
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import psutil

from megatron_nuwa.decoders.ffmpeg_program import not_started
from megatron_nuwa.decoders.restarts import was_killed
from megatron_nuwa.decoders.settings import LONGEST_WAIT, DecodeError, DecodeLimits

_CHUNK = 1 << 16
# Only the first line is told.
_MOST_SAID = 1 << 16
_GRACE_SECONDS = 5


class BrokenVideoError(DecodeError):
    """ffmpeg has met something that it cannot decode."""


class KilledError(DecodeError):
    """Something outside has ended ffmpeg, which says nothing of the file."""


def written_by(
    path: Path, command: Sequence[str], limits: DecodeLimits, minute: int | None = None
) -> Generator[bytes, None, None]:
    """What a command that decodes a file writes, piece by piece as it comes.

    A reader may wait `limits.seconds` for it, in all or, where `minute` says how many bytes a
    minute of film has, for each minute; what the reader does between the pieces does not count.
    One that leaves before the end must close the iterator, which ends the process. Raises
    `DecodeError`, at the end `BrokenVideoError` or `KilledError`; `MachineError` where no process
    can be started.
    """
    said = bytearray()
    with _started(command) as process:
        try:
            _limit(process.pid, limits, minute is not None)
            yield from _pieces(path, process, limits, minute, said)
        finally:
            process.kill()
            process.wait()
    if was_killed(process.returncode):
        name = signal.Signals(-process.returncode).name
        raise KilledError(f"{path} cannot be decoded as a video: ffmpeg was killed ({name})")
    if process.returncode:
        complaint = _complaint(process.returncode, bytes(said))
        raise BrokenVideoError(f"{path} cannot be decoded as a video: {complaint}")


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise not_started(command, error) from error


def _pieces(
    path: Path,
    process: subprocess.Popen[bytes],
    limits: DecodeLimits,
    minute: int | None,
    said: bytearray,
) -> Iterator[bytes]:
    """The output of a process until it ends; its complaints are added to `said` meanwhile."""
    left, written = limits.seconds, 0
    late = DecodeError(
        f"{path} took longer than {limits.seconds:g} s to decode"
        + ("" if minute is None else " a minute of it")
    )
    # Both streams at once: a process that waits until its complaints are read writes nothing else.
    # Not select(), which fails at descriptors from 1,024 on.
    with selectors.PollSelector() as streams:
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            streams.register(stream, selectors.EVENT_READ)
        while streams.get_map():
            began = time.monotonic()
            ready = streams.select(min(left, LONGEST_WAIT))
            left -= time.monotonic() - began
            if left <= 0:
                raise late
            for key, _ in ready:
                piece = os.read(key.fd, _CHUNK)
                if not piece:
                    streams.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    said += piece[: _MOST_SAID - len(said)]
                else:
                    written += len(piece)
                    if minute is not None and written >= minute:
                        written %= minute
                        left = limits.seconds
                        _allow_more(process.pid, limits)
                    yield piece
    try:
        process.wait(left)
    except subprocess.TimeoutExpired as error:
        raise late from error


def _limit(process: int, limits: DecodeLimits, renewable: bool) -> None:
    """Bound a process that has just started; a no-op where the system has no prlimit."""
    with contextlib.suppress(ImportError, AttributeError, ProcessLookupError):
        # Set from outside: a function run between fork and exec would forbid the cheap vfork,
        # and copying the page tables of a process that holds a VQ-GAN costs milliseconds.
        import resource

        _set_limit(process, resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes)
        # For an ffmpeg whose parent was killed and cannot end it. The soft limit ffmpeg keeps by
        # itself; of the hard one, which cannot be raised again, the system kills it, as if
        # something outside had.
        seconds = _cpu_seconds(limits)
        hard = None if renewable else seconds + _GRACE_SECONDS
        _set_limit(process, resource.RLIMIT_CPU, seconds, hard)


def _allow_more(process: int, limits: DecodeLimits) -> None:
    """Let a process work for as long again."""
    with contextlib.suppress(ImportError, AttributeError, ProcessLookupError, psutil.Error):
        import resource

        spent = psutil.Process(process).cpu_times()
        seconds = math.ceil(spent.user + spent.system) + _cpu_seconds(limits)
        _set_limit(process, resource.RLIMIT_CPU, seconds, None)


def _set_limit(process: int, kind: int, soft: int, hard: int | None) -> None:
    """Limit a process, within the hard limit that it has; None leaves that as it is."""
    import resource

    most = resource.prlimit(process, kind)[1]
    hard = most if hard is None else hard
    if most != resource.RLIM_INFINITY:
        # Only root may exceed it.
        soft, hard = min(soft, most), min(hard, most)
    resource.prlimit(process, kind, (soft, hard))


def _cpu_seconds(limits: DecodeLimits) -> int:
    return math.ceil(limits.seconds) + 5


def _complaint(code: int, said: bytes) -> str:
    """What ffmpeg said first, in words that are the same in every run."""
    lines = said.decode(errors="replace").strip().splitlines()
    if any("Cannot allocate memory" in line or "get_buffer() failed" in line for line in lines):
        return "it needs more memory than is allowed"
    if not lines:
        return f"ffmpeg ended with code {code}"
    if "matches no streams" in lines[0]:
        return "it holds no video stream"
    # In front stands the part of ffmpeg that speaks, with its address in memory.
    return re.sub(r"^(\[[^]]*\] )+", "", lines[0]).rstrip(".")
