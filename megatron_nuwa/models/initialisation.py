"""Starting weights: each a function of the seed and the weight's name, whoever builds it.

A process that holds one pipeline stage, or a slice of a matrix, so starts from the very numbers
that a process with the whole model has.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """The part of a weight that a process holds: part `index` of `count` along `dim`.

    A weight that is split carries it as its attribute `shard`. `full` is the length of the whole
    along `dim`; parts are ⌈full/count⌉ long, and the last ones may hold padding.
    """

    dim: int
    index: int
    count: int
    full: int

    @property
    def length(self) -> int:
        """Length of every part."""
        return -(-self.full // self.count)

    def of(self, whole: Tensor) -> Tensor:
        """This part of a whole weight; padding is zero."""
        start = min(self.index * self.length, self.full)
        stop = min(start + self.length, self.full)
        part = whole.narrow(self.dim, start, stop - start)
        if stop - start == self.length:
            return part
        shape = list(part.shape)
        shape[self.dim] = self.length - (stop - start)
        return torch.cat([part, part.new_zeros(shape)], self.dim)


def shard_of(parameter: Tensor) -> Shard | None:
    """How a weight is split over processes; None for one that is whole."""
    return getattr(parameter, "shard", None)


def assign(parameter: Tensor, whole: Tensor) -> None:
    """Set a weight, or the part of it that lies here, from the whole one."""
    shard = shard_of(parameter)
    with torch.no_grad():
        parameter.copy_(whole if shard is None else shard.of(whole))


def initialise(
    parameters: Iterable[tuple[str, nn.Parameter]], seed: int, depth: int, deviation: float
) -> None:
    """Normal of `deviation`, smaller where a branch joins the residual stream (GPT-2's rule).

    `depth` is the number of branches that are added one after the other. Weights on the meta
    device are left alone.
    """

    def draw(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        if name.endswith("bias"):
            assign(parameter, torch.zeros(whole_shape(parameter)))
        elif "norm" in name:
            assign(parameter, torch.ones(whole_shape(parameter)))
        else:
            joins = name.endswith(("output.weight", "contract.weight"))
            spread = deviation / depth**0.5 if joins else deviation
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            whole = torch.empty(whole_shape(parameter))
            assign(parameter, whole.normal_(0.0, spread, generator=generator))

    here = [named for named in parameters if not named[1].is_meta]
    # One thread draws one weight, however many there are: a billion numbers take 10 s on one.
    with ThreadPoolExecutor(_own_cores()) as pool:
        list(pool.map(draw, here))


def _own_cores() -> int | None:
    """Cores that this process may run on; launchers bind the processes of a node to some each."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def whole_shape(parameter: Tensor) -> list[int]:
    """Shape of the whole weight that a parameter is a part of."""
    shape, shard = list(parameter.shape), shard_of(parameter)
    if shard is not None:
        shape[shard.dim] = shard.full
    return shape
