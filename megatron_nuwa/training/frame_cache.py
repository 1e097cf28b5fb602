"""All frames of some media, decoded once into a file; goes on where it was stopped or killed.

While it is written, `.NAME.part` holds the frames so far, and `.NAME.part.json` says of how many
items: what lies behind them is written anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from megatron_nuwa.errors import MachineError, UserError
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.training.frames import MediaFrames
from megatron_nuwa.training.progress import track

# A kill loses the work of so long.
_NOTE_SECONDS = 30.0


class CacheReport(NamedTuple):
    """What a frame cache holds; `begun` items of it had been decoded by an earlier start."""

    frames: int
    items: int
    failures: list[str]
    key: str
    reused: bool
    begun: int = 0


def cache_frames(
    media: MediaFrames,
    path: Path,
    description: str = "decoding frames",
    go_on: Callable[[], None] = lambda: None,
) -> CacheReport:
    """Decode all items into `path` (.npy, uint8 (frames, size, size[, 3])), or keep what is there.

    A description beside it (`.json`) names the settings that it was made with, and appears last.
    `go_on` is called often; what it raises ends the work, and the next call goes on from there, as
    after an `OSError` or a `MachineError`. Broken items are left out and reported. Raises
    `UserError` when no item can be decoded.
    """
    kind = "maps" if media.are_maps else "frames"
    key = hashlib.sha256(f"{kind}/2 {media.size} {media.key(go_on)}".encode()).hexdigest()
    known = known_cache(path)
    if known is not None and known.key == key:
        return known
    record = path.with_suffix(".json")
    record.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(path, media.shape, key)
    begun = part.items
    try:
        _decode(media, part, description, go_on)
        if part.frames == 0:
            raise UserError(
                f"{media.name}: none of the {len(media.items)} items can be decoded; the first: "
                f"{part.failures[0]}"
            )
        part.finish()
    except MachineError:
        part.leave()
        raise
    except UserError:
        part.discard()
        raise
    except BaseException:
        part.leave()
        raise
    report = CacheReport(part.frames, part.items, part.failures, key, reused=False, begun=begun)
    noted = {name: getattr(report, name) for name in ("key", "frames", "items", "failures")}
    write_text_atomically(record, json.dumps(noted, indent=2))
    return report


def known_cache(path: Path) -> CacheReport | None:
    """What a finished cache holds; None without one."""
    try:
        noted = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        report = CacheReport(
            noted["frames"], noted["items"], noted["failures"], noted["key"], reused=True
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return report if path.is_file() else None


def _decode(media: MediaFrames, part: _Part, description: str, go_on: Callable[[], None]) -> None:
    """Decode the items that `part` does not hold yet into it."""
    items = islice(media.items, part.items, None)
    for item in track(items, description, total=len(media.items), done=part.items):
        try:
            frames = media.decode(item)
        except MachineError:
            raise
        except UserError as error:
            part.skip(str(error))
        else:
            part.add(frames)
        go_on()


class _Part:
    """An .npy file of frames whose number is known only at the end."""

    def __init__(self, path: Path, shape: tuple[int, ...], key: str) -> None:
        self.items, self.frames = 0, 0
        self.failures: list[str] = []
        self._path, self._shape, self._key = path, shape, key
        self._part = path.with_name(f".{path.name}.part")
        self._note = path.with_name(f".{path.name}.part.json")
        stream = self._reopened()
        if stream is None:
            self._note.unlink(missing_ok=True)
            stream = self._part.open("wb")
        self._stream = stream
        self._header_end = _write_header(self._stream, 0, shape)
        end = self._header_end + self.frames * int(np.prod(shape))
        self._stream.truncate(end)
        self._stream.seek(end)
        self._noted = time.monotonic()

    def _reopened(self) -> IO[bytes] | None:
        """What an earlier call has left of the same frames."""
        try:
            noted: dict[str, Any] = json.loads(self._note.read_text(encoding="utf-8"))
            stream = self._part.open("r+b")
            if noted["key"] != self._key or os.fstat(stream.fileno()).st_size < noted["bytes"]:
                stream.close()
                return None
        except (OSError, ValueError, TypeError, KeyError):
            return None
        self.items, self.frames, self.failures = noted["items"], noted["frames"], noted["failures"]
        return stream

    def add(self, frames: np.ndarray) -> None:
        """Take in an item's frames."""
        self._stream.write(np.ascontiguousarray(frames, np.uint8).tobytes())
        self.frames += len(frames)
        self._has_item()

    def skip(self, failure: str) -> None:
        """Leave an item out."""
        self.failures.append(failure)
        self._has_item()

    def _has_item(self) -> None:
        self.items += 1
        if time.monotonic() - self._noted > _NOTE_SECONDS:
            self._write_note()

    def _write_note(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        noted = {
            **{"key": self._key, "items": self.items, "frames": self.frames},
            **{"failures": self.failures, "bytes": self._stream.tell()},
        }
        write_text_atomically(self._note, json.dumps(noted))
        self._noted = time.monotonic()

    def leave(self) -> None:
        """Keep what is there for another call."""
        if not self._stream.closed:
            with self._stream:
                self._write_note()

    def discard(self) -> None:
        """Leave nothing behind."""
        self._stream.close()
        self._part.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the file its number of frames and its name."""
        with self._stream as stream:
            stream.seek(0)
            # NumPy leaves room in the header for the first axis to grow, so both have one length.
            if _write_header(stream, self.frames, self._shape) != self._header_end:
                raise AssertionError("the .npy header changed its length")
            stream.flush()
            os.fsync(stream.fileno())
        self._part.replace(self._path)
        self._note.unlink(missing_ok=True)


def _write_header(stream: IO[bytes], count: int, shape: tuple[int, ...]) -> int:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    stream.seek(0)
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.tell()
