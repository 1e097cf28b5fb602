"""What the processes of the tensor-parallel tests do: the whole model beside the split one."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_nuwa.grid import Grid
from megatron_nuwa.models.initialisation import shard_of
from megatron_nuwa.models.nuwa import Context, Nuwa, NuwaConfig
from megatron_nuwa.parallel.collectives import (
    TensorGroup,
    copy_all_to_group,
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    scatter_reduce_sequence,
    spread_sequence,
)
from megatron_nuwa.parallel.tensor import joined, split_model, whole_weight

T = TypeVar("T")
PROCESSES = 4
STEPS = 3
SMALL: dict[str, Any] = {
    "width": 32,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    # Neither vocabulary divides by 2 or 4.
    "codebook_size": 53,
    "code_dim": 8,
    "text_vocabulary": 41,
    "position_grid": (5, 3, 3),
}


@dataclass(frozen=True)
class Scenario:
    """A model and how it is split."""

    name: str
    size: int
    sequence_parallel: bool
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    checkpointed: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.size}{'-sequence' if self.sequence_parallel else ''}"


# Every setting of the model that the split layers meet, in few models: they take the time.
_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"sketch_codebook_size": 37, "sketch_code_dim": 6},
    "tied": {"tie_head": True, "encoder_attention": "axial", "decoder_attention": "full"},
    "direct_post": {
        "visual_embedding": "direct",
        "sketch_codebook_size": 37,
        "tie_head": True,
        "norm": "post",
        "encoder_attention": "block_sparse",
        "decoder_attention": "axial",
    },
    "sequential": {
        "cross_attention": "sequential",
        "encoder_attention": "full",
        "decoder_attention": "block_sparse",
    },
    "post_sequential": {"norm": "post", "cross_attention": "sequential", "train_codebook": False},
}
_PAIRS = [(2, False), (2, True)]
SCENARIOS = [
    *(Scenario(name, *way, changes) for name, changes in _VARIANTS.items() for way in _PAIRS),
    *(
        Scenario(f"{name}_exact", *way, changes, torch.float64)
        for name, changes in _VARIANTS.items()
        for way in _PAIRS
    ),
    *(Scenario("bfloat16", *way, dtype=torch.bfloat16, checkpointed=True) for way in _PAIRS),
    Scenario("float16", 2, True, dtype=torch.float16),
    # Random numbers as the whole model draws them; with spread tokens they are others.
    Scenario("dropout", 2, False, {"dropout": 0.3}, checkpointed=True),
    Scenario("tied", 4, True, {"tie_head": True}, checkpointed=True),
    # The last of four processes has padding only.
    Scenario("few_codes", 4, False, {"codebook_size": 5}),
]


@dataclass
class Outcome:
    """What a process saw of a scenario: largest differences from the whole model."""

    losses: list[float]
    gradients: dict[str, float]
    same_names: bool
    # Parameters whose joined starting weights are not the whole model's, bit for bit.
    other_start: list[str]
    # Parameters that are neither marked as split nor the same on every process after all steps.
    unmarked: list[str]
    same_loss_everywhere: bool


def work(rank: int, folder: str) -> None:
    """One process: runs every scenario of its groups and writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {
        2: TensorGroup(pairs[rank // 2], rank % 2, 2),
        4: TensorGroup(dist.group.WORLD, rank, PROCESSES),
    }
    outcomes: dict[str, Any] = {}
    halves = [s for s in SCENARIOS if s.size == 2]
    # The two pairs share the scenarios of size 2.
    for scenario in halves[rank // 2 :: 2] + [s for s in SCENARIOS if s.size == 4]:
        outcomes[str(scenario)] = run_scenario(scenario, groups[scenario.size])
    for size, group in groups.items():
        outcomes[f"collectives-{size}"] = transposition_errors(group)
    outcomes["all-reduces"] = all_reduces_of_a_decoder_layer(groups[2])
    torch.save(outcomes, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_scenario(scenario: Scenario, tensor: TensorGroup) -> Outcome:
    """Train the whole model and the split one side by side."""
    config = NuwaConfig(**{**SMALL, **scenario.changes})
    torch.manual_seed(1)
    whole = Nuwa(config)
    whole.initialise(7)
    with torch.device("meta"):
        built = Nuwa(config)
    split_model(built, tensor, scenario.sequence_parallel)
    built.to_empty(device="cpu")
    built.initialise(7)
    other_start = _differing(whole, built, tensor)

    # Larger weights than at the start, so that no gradient is lost in rounding.
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    whole.to(scenario.dtype)
    split = copy.deepcopy(whole)
    split_model(split, tensor, scenario.sequence_parallel)
    other_start += _differing(whole, split, tensor)

    batches = [_batch(config, step) for step in range(STEPS)]
    losses, gradients = [], []
    for model in (whole, split):
        trained = [p for p in model.parameters() if p.requires_grad]
        # A smaller epsilon is zero in fp16.
        optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4)
        seen = []
        for step, batch in enumerate(batches):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = sum(_loss(model, scenario.checkpointed, *part) for part in batch)
            assert isinstance(loss, Tensor)
            loss.backward()
            if step == 0:
                gradients.append(_gradients(model, tensor))
            optimizer.step()
            seen.append(float(loss.detach()))
        losses.append(seen)
    unmarked = _everywhere(
        {n: p.detach() for n, p in split.named_parameters() if not _is_marked(p)}, tensor
    )
    return Outcome(
        losses=[abs(a - b) / abs(a) for a, b in zip(*losses, strict=True)],
        gradients=_relative_errors(*gradients),
        same_names=[*split.state_dict()] == [*whole.state_dict()] == [*built.state_dict()],
        other_start=other_start,
        unmarked=[
            name
            for name, value in unmarked[0].items()
            if not all(torch.equal(value, other[name]) for other in unmarked)
        ],
        same_loss_everywhere=len(set(_everywhere(tuple(losses[1]), tensor))) == 1,
    )


def _batch(config: NuwaConfig, step: int) -> list[tuple[Context, Tensor, Grid]]:
    """Images from texts of different length, and a clip from a still; 9, 77, 15 and 45 tokens.

    A model that reads sketches gets the sketch of a still.
    """
    random = torch.Generator().manual_seed(step)

    def tokens(most: int, count: int, cells: int) -> Tensor:
        return torch.randint(0, most, (count, cells), generator=random)

    mask = torch.arange(77) < torch.tensor([[5], [77]])
    text = Context("text", tokens(config.text_vocabulary, 2, 77), config.text_grid, mask)
    codes, image, clip = config.codebook_size, Grid(3, 3, 1), Grid(5, 3, 3)
    still = Grid(5, 3, 1)
    if config.sketch_codebook_size is None:
        seen = Context("visual", tokens(codes, 1, still.cells), still)
    else:
        seen = Context("sketch", tokens(config.sketch_codebook_size, 1, still.cells), still)
    return [(text, tokens(codes, 2, image.cells), image), (seen, tokens(codes, 1, 45), clip)]


def _loss(model: Nuwa, checkpointed: bool, context: Context, target: Tensor, grid: Grid) -> Tensor:
    if not checkpointed:
        return model.loss(context, target, grid)

    def again(layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        result = checkpoint(layer, *inputs, use_reentrant=False)
        assert isinstance(result, Tensor)
        return result

    encoded, geometry = model.embed_context(context), model.encoder_geometry(context)
    for layer in model.encoder:
        encoded = again(layer, encoded, geometry, context.mask)
    encoded = model.encoder_norm(encoded)
    x = model.embed_target(target, grid)
    for layer in model.decoder:
        x = again(layer, x, encoded, *model.decoder_geometries(grid, context), context.mask)
    return model.cross_entropy(model.predict(x), target)


def _is_marked(parameter: Tensor) -> bool:
    assert hasattr(parameter, "shard") == hasattr(parameter, "tensor_model_parallel")
    return getattr(parameter, "tensor_model_parallel", False)


def _everywhere(value: T, tensor: TensorGroup) -> list[T]:
    values: list[Any] = [None] * tensor.size
    dist.all_gather_object(values, value, group=tensor.group)
    return values


def _differing(whole: Nuwa, split: Nuwa, tensor: TensorGroup) -> list[str]:
    parts = dict(split.named_parameters())
    return [
        name
        for name, parameter in whole.named_parameters()
        if not torch.equal(whole_weight(parts[name], tensor), parameter)
        or parts[name].requires_grad != parameter.requires_grad
    ]


def _gradients(model: Nuwa, tensor: TensorGroup) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        gradients[name] = joined(parameter.grad, shard_of(parameter), tensor).clone()
    return gradients


def _relative_errors(whole: dict[str, Tensor], split: dict[str, Tensor]) -> dict[str, float]:
    """By weight, against its largest gradient.

    A key's bias moves all scores of a query alike: its gradient is zero but for rounding, and is
    held against that of the key's weight.
    """

    def largest(name: str) -> float:
        return float(whole[name.replace("key.bias", "key.weight")].abs().max())

    return {
        name: float((split[name] - gradient).abs().max()) / largest(name)
        for name, gradient in whole.items()
    }


def transposition_errors(tensor: TensorGroup) -> dict[str, float]:
    """How far `⟨A x, y⟩ = ⟨x, Aᵀ y⟩` fails for every collective, summed over the group."""
    errors = {}
    for tokens in (1, 7, 8):
        part = -(-tokens // tensor.size)
        collectives: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
            "gather": (lambda x, n=tokens: gather_sequence(x, tensor, n), part),
            "gather_padded": (lambda x: gather_sequence(x, tensor), part),
            "scatter": (lambda x: scatter_reduce_sequence(x, tensor), tokens),
        }
        for name, (collective, length) in collectives.items():
            torch.manual_seed(tensor.rank)
            x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
            output = collective(x)
            y = torch.randn_like(output)
            output.backward(y)
            assert x.grad is not None
            both = torch.stack([(output.detach() * y).sum(), (x.detach() * x.grad).sum()])
            dist.all_reduce(both, group=tensor.group)
            errors[f"{name}_{tokens}"] = float((both[0] - both[1]).abs())
        torch.manual_seed(0)
        same = torch.randn(2, tokens, 3, dtype=torch.float64)
        again = gather_sequence(spread_sequence(same, tensor), tensor, tokens)
        errors[f"spread_{tokens}"] = float((again - same).abs().max())
    return errors | _conjugate_errors(tensor)


def _conjugate_errors(tensor: TensorGroup) -> dict[str, float]:
    """Copy and reduce, where what all have counts once: f(x) = Σ ranks (rank + 1)·x."""
    total = tensor.size * (tensor.size + 1) / 2
    x = torch.ones(2, 3, requires_grad=True)
    result = reduce_from_group(copy_to_group(x, tensor) * (tensor.rank + 1), tensor)
    result.sum().backward()
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    first, second = copy_all_to_group((a, b), tensor)
    ((first.sum() + 2 * second.sum()) * (tensor.rank + 1)).backward()
    assert x.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    return {
        "reduce": float((result.detach() - total).abs().max()),
        "copy": float((x.grad - total).abs().max()),
        "copy_all": float((a.grad - total).abs().max() + (b.grad - 2 * total).abs().max()),
    }


def all_reduces_of_a_decoder_layer(tensor: TensorGroup) -> tuple[int, int]:
    """How many the forward pass does, and the backward pass."""
    model = Nuwa(NuwaConfig(**SMALL))
    split_model(model, tensor)
    context, _, grid = _batch(model.config, 0)[0]
    x = torch.randn(2, grid.cells, 32, requires_grad=True)
    encoded = torch.randn(2, 77, 32, requires_grad=True)
    geometries = model.decoder_geometries(grid, context)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as counted:
        result = model.decoder[0](x, encoded, *geometries, context.mask)
        forward = counted.call_count
        result.sum().backward()
        return forward, counted.call_count - forward
