"""The process behind `guard`: reads requests from stdin, writes answers to stdout."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import signal
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from megatron_nuwa.decoders import pyav_reader
from megatron_nuwa.decoders.images import decode_image, image_size
from megatron_nuwa.decoders.settings import DecodeError, DecodeLimits, DecodeSettings
from megatron_nuwa.decoders.sketches import map_size, read_sketch

# A worker that keeps more than this after a request is replaced.
KEPT_BYTES = 1 << 26
_WITHOUT_AV = ("image", "image-size", "sketch", "sketch-size")


def main() -> None:
    """Answer requests, one JSON line each, until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    # A library that prints must not garble the answers.
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _answer(answers, {})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        path = Path(request["path"])
        limits = DecodeLimits(**request["limits"])
        _limit(limits, request["task"])
        try:
            result = _do(request, path)
        except DecodeError as error:
            _answer(answers, {"error": str(error)})
        except MemoryError:
            _answer(answers, {"error": f"{path} needs more memory to decode than is allowed"})
        else:
            if isinstance(result, np.ndarray):
                header = {"shape": result.shape, "bytes": result.nbytes}
                _answer(answers, header, np.ascontiguousarray(result).data)
            else:
                _answer(answers, {"value": result})
        signal.setitimer(signal.ITIMER_REAL, 0)
        if request["task"] not in _WITHOUT_AV:
            # A filter graph refers to itself, and Python, which does not see how large it is,
            # would let the graphs of thousands of clips gather.
            gc.collect()


def _do(request: dict[str, Any], path: Path) -> Any:
    settings = DecodeSettings(**request["settings"])
    arguments = request["arguments"]
    if request["task"] == "image":
        return decode_image(path, settings)
    if request["task"] == "image-size":
        return image_size(path)
    if request["task"] == "sketch-size":
        return map_size(path)
    if request["task"] == "sketch":
        return read_sketch(path, settings, arguments["classes"], arguments["unlabelled"])
    if request["task"] == "frames":
        rate = Fraction(arguments["rate"])
        start, wanted = arguments["start"], arguments["wanted"]
        return pyav_reader.frames(path, settings, start, wanted, rate)
    shown = pyav_reader.shown(path, arguments["start"], arguments["seconds"])
    return [(str(frame.time), str(frame.duration)) for frame in shown]


def _limit(limits: DecodeLimits, task: str) -> None:
    # Ends this process even inside a library, and even where its parent was killed.
    signal.setitimer(signal.ITIMER_REAL, limits.seconds + 5)
    try:
        import resource
    except ImportError:
        return
    memory = _own_memory(task not in _WITHOUT_AV) + limits.memory_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        memory = min(memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, hard))


@functools.cache
def _own_memory(with_av: bool) -> int:
    """Bytes of address space that this process takes before it decodes anything."""
    if with_av:
        importlib.import_module("av")
    # What stays for ever need not be looked through after every clip.
    gc.freeze()
    return _memory()


def _memory() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def _answer(answers: Any, header: dict[str, Any], content: Any = b"") -> None:
    # What a large file left behind would count against the limit of the next one.
    header["ends"] = _memory() - _own_memory("av" in sys.modules) > KEPT_BYTES
    answers.write(json.dumps(header).encode() + b"\n")
    answers.write(content)
    answers.flush()


if __name__ == "__main__":
    main()
