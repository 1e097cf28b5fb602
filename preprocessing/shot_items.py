"""The shots of one item, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from typing import Any

import torch
from pydantic import Field

from megatron_nuwa.config import Settings
from megatron_nuwa.decoders import DecodeError, DecodeLimits, media_kind
from megatron_nuwa.decoders.ffmpeg_process import KilledError
from megatron_nuwa.decoders.restarts import STARTS
from megatron_nuwa.errors import MachineError
from preprocessing.item_json import item_of_tree, tree_of_item
from preprocessing.lone_process import ask_alone, read_request
from preprocessing.shots import Network, find_shots, load_network
from preprocessing.sources import SourceItem, local_copy, named_as_source

# `start` and `end` in seconds; None where the medium's own beginning or end is meant.
Window = tuple[float | None, float | None]


class ShotDemands(Settings):
    """What decides the shots of an item, and what they may cost."""

    threshold: float = Field(gt=0, lt=1)
    limits: DecodeLimits


def shots_of_item(item: SourceItem, network: Network, demands: ShotDemands) -> list[Window]:
    """The windows of an item's shots; its own where it is an image.

    Raises `DecodeError` naming its medium, `MachineError` where there is no room for a copy of it
    or no decoder can be started.
    """
    with local_copy(item.media, demands.limits) as path, named_as_source(item.media, path):
        if media_kind(path) == "image":
            return [(item.start, item.end)]
        find = partial(
            find_shots, network, path, item.start, item.end, demands.threshold, demands.limits
        )
        for _ in range(STARTS - 1):
            with contextlib.suppress(KilledError):
                return find()
        return find()


def shots_alone(item: SourceItem, device: torch.device, demands: ShotDemands) -> list[Window]:
    """The same in a process of its own; `DecodeError` also where that dies."""
    request = {
        "item": tree_of_item(item),
        "device": str(device),
        "demands": demands.model_dump(mode="json"),
    }
    # As long as it takes: what it waits for is limited in there.
    answer = json.loads(ask_alone("preprocessing.shot_items", request, item.media, timeout=None))
    if "machine" in answer:
        raise MachineError(answer["machine"])
    if "reason" in answer:
        failed = DecodeError(answer["reason"])
        failed.permanent = answer["permanent"]
        raise failed
    return [(start, end) for start, end in answer["shots"]]


def main() -> int:
    """Find the shots of the item that stands on the standard input as JSON."""
    request = read_request()
    # A library that prints must not garble the answer.
    with contextlib.redirect_stdout(sys.stderr):
        answer = _answer(request)
    json.dump(answer, sys.stdout)
    return 0


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    network = load_network(torch.device(request["device"]))
    demands = ShotDemands.model_validate(request["demands"])
    try:
        return {"shots": shots_of_item(item_of_tree(request["item"]), network, demands)}
    except MachineError as error:
        return {"machine": str(error)}
    except DecodeError as error:
        return {"reason": str(error), "permanent": error.permanent}


if __name__ == "__main__":
    sys.exit(main())
