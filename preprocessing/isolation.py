"""Decoding in a process of its own, for items during which a rank has died before.

The parent learns that the item is to blame, and goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_nuwa.errors import UserError
from preprocessing import sources
from preprocessing.decoders import DecodeError, DecodeSettings
from preprocessing.item_json import item_of_tree, tree_of_item
from preprocessing.sources import SourceItem

# Far above any decoder's own limit: it only ends what no limit of a decoder's ends.
TIMEOUT_SECONDS = 600.0


def decode_item(item: SourceItem, settings: DecodeSettings) -> tuple[np.ndarray, int]:
    """Frames uint8 (frames, H, W, 3) of an item, and how many are real; `UserError` for bad ones"""
    decoded = sources.decode_item(item, settings)
    return decoded.frames, decoded.real


def decode_alone(item: SourceItem, settings: DecodeSettings) -> tuple[np.ndarray, int]:
    """The same in a child process; `DecodeError` also where the child dies."""
    request = {
        "item": tree_of_item(item),
        "settings": settings.model_dump(mode="json"),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "preprocessing.isolation"],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DecodeError(
            f"{item.media} took longer than {TIMEOUT_SECONDS:g} s to decode"
        ) from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise DecodeError(f"{item.media} ends the process that decodes it ({name})")
    if done.returncode == 0:
        stream = io.BytesIO(done.stdout)
        answer = json.loads(stream.readline())
        if "reason" in answer:
            raise DecodeError(answer["reason"])
        return np.load(stream, allow_pickle=False), int(answer["real"])
    raise DecodeError(
        f"{item.media} ends the process that decodes it (exit code {done.returncode})"
    )


def main() -> int:
    """Decode the item that stands on the standard input as JSON."""
    # Where memory runs out, the system should end this process and not the farm.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    request = json.load(sys.stdin)
    item = item_of_tree(request["item"])
    out = sys.stdout.buffer
    try:
        frames, real = decode_item(item, DecodeSettings.model_validate(request["settings"]))
    except UserError as error:
        out.write(json.dumps({"reason": str(error)}).encode() + b"\n")
        return 0
    out.write(json.dumps({"real": real}).encode() + b"\n")
    np.save(out, frames, allow_pickle=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
