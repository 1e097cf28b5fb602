"""Weights that a recipe names by patterns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from megatron_nuwa.errors import UserError
from megatron_nuwa.models.nuwa import Nuwa, NuwaConfig


def matching(patterns: Sequence[str], names: Iterable[str], field: str) -> set[str]:
    """The names that fit at least one pattern, with `*` and `?` as in file names.

    Raises `UserError` naming the first pattern that fits none.
    """
    names = list(names)
    found = set()
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)
            raise UserError(f"{field}: '{pattern}' fits no weight; the nearest is '{near[0]}'")
        found |= fitting
    return found


def check_frozen(patterns: Sequence[str], config: NuwaConfig) -> None:
    """`UserError` where a pattern fits no weight of the model, or all together fit every one."""
    with torch.device("meta"):
        names = [name for name, p in Nuwa(config).named_parameters() if p.requires_grad]
    if len(matching(patterns, names, "optimizer.frozen")) == len(names):
        raise UserError("optimizer.frozen leaves nothing to train in the model; freeze less")
