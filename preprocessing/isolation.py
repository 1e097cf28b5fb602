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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_nuwa.errors import UserError
from preprocessing.decoders import DecodeError, DecodeLimits, DecodeSettings
from preprocessing.filters import Candidate, FilteredError, FilterSettings, apply_filters
from preprocessing.item_json import item_of_tree, tree_of_item
from preprocessing.sources import SourceItem, decode_copy

# Far above a decoder's own limit: it only ends what no limit of a decoder's ends.
TIMEOUT_SECONDS = 600.0
TIMEOUT_LIMITS = 4


@dataclass(frozen=True)
class Demands:
    """What is asked of every item: its frames, what they may cost, and the filters before them."""

    settings: DecodeSettings
    limits: DecodeLimits
    filters: FilterSettings


def decode_item(item: SourceItem, demands: Demands) -> tuple[np.ndarray, int]:
    """Frames uint8 (frames, H, W, 3) of an item, and how many are real.

    Raises `FilteredError` where a filter leaves the item out, another `UserError` for bad ones.
    """
    with ExitStack() as copies:
        candidate = Candidate(item, copies, demands.limits)
        apply_filters(demands.filters.filters, candidate)
        decoded = decode_copy(item, candidate.path, demands.settings, demands.limits)
        return decoded.frames, decoded.real


def decode_alone(item: SourceItem, demands: Demands) -> tuple[np.ndarray, int]:
    """The same in a child process; `DecodeError` also where the child dies."""
    request = {
        "item": tree_of_item(item),
        "settings": demands.settings.model_dump(mode="json"),
        "limits": demands.limits.model_dump(mode="json"),
        "filters": demands.filters.model_dump(mode="json"),
    }
    timeout = max(TIMEOUT_SECONDS, TIMEOUT_LIMITS * demands.limits.seconds)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "preprocessing.isolation"],
            input=json.dumps(request).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DecodeError(f"{item.media} took longer than {timeout:g} s to decode") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise DecodeError(f"{item.media} ends the process that decodes it ({name})")
    if done.returncode == 0:
        stream = io.BytesIO(done.stdout)
        answer = json.loads(stream.readline())
        if "filter" in answer:
            raise FilteredError(answer["filter"], answer["reason"])
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
    demands = Demands(
        DecodeSettings.model_validate(request["settings"]),
        DecodeLimits.model_validate(request["limits"]),
        FilterSettings.model_validate(request["filters"]),
    )
    out = sys.stdout.buffer
    try:
        frames, real = decode_item(item, demands)
    except FilteredError as error:
        answer = {"filter": error.filter, "reason": error.reason}
        out.write(json.dumps(answer).encode() + b"\n")
        return 0
    except UserError as error:
        out.write(json.dumps({"reason": str(error)}).encode() + b"\n")
        return 0
    out.write(json.dumps({"real": real}).encode() + b"\n")
    np.save(out, frames, allow_pickle=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
