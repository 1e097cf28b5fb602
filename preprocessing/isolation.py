"""Decoding in a process of its own, for items during which a rank has died before.

The parent learns that the item is to blame, and goes on.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.decoders import Decoded, DecodeError, DecodeLimits, DecodeSettings
from megatron_nuwa.errors import MachineError, UserError
from preprocessing.filters import Candidate, FilteredError, FilterSettings, apply_filters
from preprocessing.item_json import item_of_tree, tree_of_item
from preprocessing.lone_process import ask_alone, read_request
from preprocessing.sources import SourceItem, decode_copy, decode_item_sketch

# Far above a decoder's own limit: it only ends what no limit of a decoder's ends.
TIMEOUT_SECONDS = 600.0
TIMEOUT_LIMITS = 4


class SketchSettings(Settings):
    """What sketches must be to become tokens: maps of `image_size`², classes 0 … `classes` − 1.

    Pixels of the value `unlabelled` become the last class.
    """

    image_size: int = Field(ge=1)
    classes: int = Field(ge=2)
    codebook_size: int = Field(ge=1)
    unlabelled: int | None = None


@dataclass(frozen=True)
class Demands:
    """What is asked of every item: its frames, what they may cost, and the filters before them.

    With `sketch` every item must have one.
    """

    settings: DecodeSettings
    limits: DecodeLimits
    filters: FilterSettings
    sketch: SketchSettings | None = None


class Frames(NamedTuple):
    """Frames uint8 (frames, H, W, 3) of an item, and how many are real.

    `maps` are those of its sketch, uint8 (frames, H, W), where sketches are asked for. `rate`, in
    frames a second, is there where it is not the one that was asked for.
    """

    frames: np.ndarray
    real: int
    maps: np.ndarray | None
    rate: float | None


def decode_item(item: SourceItem, demands: Demands) -> Frames:
    """Frames of an item, and the maps of its sketch.

    Raises `FilteredError` where a filter leaves the item out, `MachineError` where the disk has no
    room for a copy or no decoder can be started, another `UserError` for bad items.
    """
    with ExitStack() as copies:
        candidate = Candidate(item, copies, demands.limits)
        apply_filters(demands.filters.filters, candidate)
        if demands.sketch is not None and item.sketch is None:
            raise UserError(f"item {item.id!r} has no sketch, which --sketch-vqgan asks for")
        decoded = decode_copy(item, candidate.path, demands.settings, demands.limits)
        maps = None if demands.sketch is None else _maps(item, demands, demands.sketch, decoded)
        rate = decoded.frames_per_second
        own = None if rate == demands.settings.frames_per_second else rate
        return Frames(decoded.frames, decoded.real, maps, own)


def _maps(
    item: SourceItem, demands: Demands, wanted: SketchSettings, decoded: Decoded
) -> np.ndarray:
    settings = demands.settings.model_copy(update={"image_size": wanted.image_size})
    maps, there = decode_item_sketch(
        item, settings, wanted.classes, wanted.unlabelled, demands.limits
    )
    if there < decoded.real:
        raise DecodeError(f"{item.sketch} has {there} maps, and its clip has {decoded.real} frames")
    # Where the clip is padded, the sketch is, with the map of the same frame.
    return maps[np.minimum(np.arange(len(maps)), decoded.real - 1)]


def decode_alone(item: SourceItem, demands: Demands) -> Frames:
    """The same in a child process; `DecodeError` also where the child dies."""
    request = {
        "item": tree_of_item(item),
        "settings": demands.settings.model_dump(mode="json"),
        "limits": demands.limits.model_dump(mode="json"),
        "filters": demands.filters.model_dump(mode="json"),
        "sketch": None if demands.sketch is None else demands.sketch.model_dump(mode="json"),
    }
    timeout = max(TIMEOUT_SECONDS, TIMEOUT_LIMITS * demands.limits.seconds)
    stream = io.BytesIO(ask_alone("preprocessing.isolation", request, item.media, timeout))
    answer = json.loads(stream.readline())
    if "filter" in answer:
        raise FilteredError(answer["filter"], answer["reason"])
    if "machine" in answer:
        raise MachineError(answer["machine"])
    if "reason" in answer:
        raise DecodeError(answer["reason"])
    frames, *maps = (np.load(stream, allow_pickle=False) for _ in range(answer["arrays"]))
    return Frames(frames, int(answer["real"]), maps[0] if maps else None, answer["rate"])


def main() -> int:
    """Decode the item that stands on the standard input as JSON."""
    request = read_request()
    item = item_of_tree(request["item"])
    demands = Demands(
        DecodeSettings.model_validate(request["settings"]),
        DecodeLimits.model_validate(request["limits"]),
        FilterSettings.model_validate(request["filters"]),
        None if request["sketch"] is None else SketchSettings.model_validate(request["sketch"]),
    )
    out = sys.stdout.buffer
    try:
        frames, real, maps, rate = decode_item(item, demands)
    except FilteredError as error:
        answer = {"filter": error.filter, "reason": error.reason}
        out.write(json.dumps(answer).encode() + b"\n")
        return 0
    except MachineError as error:
        out.write(json.dumps({"machine": str(error)}).encode() + b"\n")
        return 0
    except UserError as error:
        out.write(json.dumps({"reason": str(error)}).encode() + b"\n")
        return 0
    arrays = [frames] if maps is None else [frames, maps]
    out.write(json.dumps({"real": real, "rate": rate, "arrays": len(arrays)}).encode() + b"\n")
    for array in arrays:
        # Not to the pipe itself, in which numpy would look for its place.
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        out.write(content.getbuffer())
    return 0


if __name__ == "__main__":
    sys.exit(main())
