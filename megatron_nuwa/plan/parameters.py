"""Parameters of the model by part and by pipeline unit, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_nuwa.models.flops import unit_names
from megatron_nuwa.models.nuwa import Nuwa, NuwaConfig

# Weights that tensor parallelism splits; all others every process of the group holds whole.
_SPLIT = (
    "query.weight",
    "query.bias",
    "key.weight",
    "key.bias",
    "value.weight",
    "value.bias",
    "output.weight",
    "expand.weight",
    "expand.bias",
    "contract.weight",
    "text_embedding.weight",
    "codes.weight",
    "head.weight",
)


@dataclass(frozen=True)
class UnitParameters:
    """Parameters of one unit: those that tensor parallelism splits, and the others.

    `largest` is the largest single tensor.
    """

    split: int
    whole: int
    largest: int

    def local(self, tensor: int) -> int:
        """Parameters in one of `tensor` processes."""
        return -(-self.split // tensor) + self.whole


@lru_cache
def _meta_model(config: NuwaConfig) -> Nuwa:
    with torch.device("meta"):
        return Nuwa(config)


def parameter_counts(config: NuwaConfig) -> dict[str, int]:
    """`Nuwa.parameter_counts` without the memory of the weights."""
    return _meta_model(config).parameter_counts()


@lru_cache
def unit_parameters(config: NuwaConfig, tied_copy: bool = False) -> tuple[UnitParameters, ...]:
    """The parameters of each unit of `unit_names`.

    `tied_copy` gives the head of a tied model its own copy of the visual embedding, which it has
    in a pipeline whose last stage is not its first.
    """
    model = _meta_model(config)
    names = unit_names(config)
    sizes: dict[str, list[tuple[str, int]]] = {name: [] for name in names}
    for name, parameter in model.named_parameters():
        sizes[_unit_of(name)].append((name, parameter.numel()))
        if tied_copy and config.tie_head and name.startswith("visual_embedding."):
            sizes["head"].append((name, parameter.numel()))
    return tuple(_sum_of(sizes[name]) for name in names)


def _unit_of(name: str) -> str:
    first, _, rest = name.partition(".")
    if first in ("encoder", "decoder"):
        return f"{first}.{rest.partition('.')[0]}"
    if first == "encoder_norm":
        return "encoder_norm"
    return "head" if first in ("decoder_norm", "head") else "embedding"


def _sum_of(sizes: list[tuple[str, int]]) -> UnitParameters:
    split = sum(size for name, size in sizes if name.endswith(_SPLIT))
    total = sum(size for _, size in sizes)
    return UnitParameters(split, total - split, max((size for _, size in sizes), default=0))
