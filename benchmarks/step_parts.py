"""What the parts of a decoder layer cost one by one, at the size of a micro-batch. Example:

python -m benchmarks.step_parts --clips 8

Matrix products alone, also with weights of several layers side by side; a video's attention to its
text by each of PyTorch's kernels; nearby attention; a norm and GELU. Their sum is what a step can
reach, and the gap to the measured step what lies between them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.harness.options import add_recipe, benchmark_parser, positive
from benchmarks.harness.report import device_name
from benchmarks.harness.timing import clock_of, time_forward, time_training
from megatron_nuwa.data.batches import TEXT_GRID
from megatron_nuwa.errors import run_command
from megatron_nuwa.grid import Grid
from megatron_nuwa.models.nuwa import NuwaConfig
from megatron_nuwa.ops import nearby_attention
from megatron_nuwa.parallel.accelerator import default_device
from megatron_nuwa.training.recipe import load_recipe

PACKED = "text attention, flash, packed"
_WORDS = 12
_MOST_SAID = 160
_KERNELS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
}


@dataclass(frozen=True)
class Part:
    """A call, the tensors it is differentiated by, and its forward FLOPs (0: not counted)."""

    name: str
    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    flops: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = _parser().parse_intermixed_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    recipe.require("model")
    assert recipe.model is not None
    device = default_device()
    clock = clock_of(device)
    table = Table(title=f"Parts of a layer, {options.clips} clips, {device_name(device)}")
    for column in ("part", "forward ms", "backward ms", "TFLOP/s forward", "backward"):
        table.add_column(column, justify="left" if column == "part" else "right")
    failures = []
    parts = _parts(recipe.model, options.clips, device)
    for part in parts:
        try:
            forward = time_forward(clock, part.call, options.repeats)["forward_ms"]
            training = time_training(clock, part.call, part.leaves, options.repeats)
        except RuntimeError as error:
            failures.append(f"{part.name}: {str(error).strip().splitlines()[0][:_MOST_SAID]}")
            continue
        backward = training["backward_ms"]
        speeds = (part.flops / forward / 1e9, 2 * part.flops / backward / 1e9)
        shown = (f"{speed:.0f}" if part.flops else "" for speed in speeds)
        table.add_row(part.name, f"{forward:.3f}", f"{backward:.3f}", *shown)
    Console(width=120).print(table)
    if not any(failure.startswith(PACKED) for failure in failures):
        print(f"packed text attention is within {_packed_error(parts):.1e} of the plain one")
    for failure in failures:
        print(f"not timed: {failure}")
    return 0


def _parts(config: NuwaConfig, clips: int, device: torch.device) -> list[Part]:
    grid = Grid(*config.position_grid)
    dtype = torch.bfloat16
    tokens, width = clips * grid.cells, config.width
    inner = int(width * config.feed_forward_ratio)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    def product(name: str, inputs: int, outputs: int, bias: bool = True) -> Part:
        layer = nn.Linear(inputs, outputs, bias, device=device, dtype=dtype)
        x = tensor(tokens, inputs)
        leaves = [x, *layer.parameters()]
        return Part(name, partial(layer, x), leaves, 2 * tokens * inputs * outputs)

    def heads(cells: int) -> Tensor:
        return tensor(clips, cells, config.heads, width // config.heads)

    x, wide = tensor(clips, grid.cells, width), tensor(clips, grid.cells, inner)
    norm = nn.LayerNorm(width, device=device, dtype=dtype)
    query, key, value = heads(grid.cells), heads(grid.cells), heads(grid.cells)
    nearby = partial(
        nearby_attention,
        *(query, key, value),
        grid=grid,
        extent=config.visual_extent(grid),
        causal=True,
    )
    parts = [
        product("product, width to width", width, width),
        product("3 of them at once", width, 3 * width),
        product("4 of them at once", width, 4 * width),
        product("feed-forward, first", width, inner),
        product("feed-forward, second", inner, width),
        product("head", width, config.codebook_size, bias=False),
        Part("nearby attention", nearby, (query, key, value)),
        Part("layer norm", partial(norm, x), (x, *norm.parameters())),
        Part("GELU", partial(F.gelu, wide), (wide,)),
    ]
    text = (query, heads(TEXT_GRID.cells), heads(TEXT_GRID.cells))
    words = torch.arange(TEXT_GRID.cells, device=device).expand(clips, -1) < _WORDS
    flops = 4 * tokens * TEXT_GRID.cells * width
    for name, kernel in _KERNELS.items():
        # Flash attention takes no mask: what it costs is a lower bound.
        mask = None if name == "flash" else words
        call = partial(_text_attention, kernel, *text, mask)
        label = f"text attention, {name}{'' if mask is not None else ' without mask'}"
        parts.append(Part(label, call, text, flops))
    packed = partial(_packed_text_attention, *text, _Packing.of(words))
    parts.append(Part(PACKED, packed, text, flops))
    return parts


@dataclass(frozen=True)
class _Packing:
    """Where the keys that a mask leaves lie, one sample after the other and padding last.

    `order` (all keys,), `absent` (all keys, 1, 1) True at padding, `starts` int32 (samples + 1).
    Made without reading anything back from the device.
    """

    order: Tensor
    absent: Tensor
    starts: Tensor

    @staticmethod
    def of(mask: Tensor) -> _Packing:
        starts = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        places = torch.arange(mask.numel(), device=mask.device)
        order = torch.argsort((~mask).flatten().byte(), stable=True)
        return _Packing(order, (places >= starts[-1])[:, None, None], starts)

    def pack(self, x: Tensor) -> Tensor:
        # Kernels do not write the gradients of padding.
        return x.flatten(0, 1)[self.order].masked_fill(self.absent, 0)


def _packed_text_attention(query: Tensor, key: Tensor, value: Tensor, packing: _Packing) -> Tensor:
    """Flash attention that is told how many keys each sample has, and needs no mask."""
    samples, tokens = query.shape[:2]
    starts = torch.arange(0, (samples + 1) * tokens, tokens, device=query.device).int()
    key, value = packing.pack(key), packing.pack(value)
    settings = (starts, packing.starts, tokens, TEXT_GRID.cells)
    output = varlen_attn(query.flatten(0, 1), key, value, *settings)
    assert isinstance(output, Tensor)
    return output.view_as(query)


def _packed_error(parts: Sequence[Part]) -> float:
    """Largest relative distance of the packed form from the plain one: output and gradients."""
    plain, packed = (
        next(part for part in parts if part.name == name)
        for name in ("text attention, math", PACKED)
    )
    grad = torch.randn_like(plain.leaves[0])
    results = []
    for part in (plain, packed):
        output = part.call()
        results.append([output, *torch.autograd.grad(output, part.leaves, grad)])
    pairs = zip(*results, strict=True)
    return max(float((a - b).float().norm() / a.float().norm()) for a, b in pairs)


def _text_attention(
    kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    with sdpa_kernel(kernel):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        allowed = None if mask is None else mask[:, None, None, :]
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return output.transpose(1, 2)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("step_parts", __doc__)
    add_recipe(parser, overrides=True)
    parser.add_argument(
        "--clips", type=positive, default=8, metavar="N", help="a micro-batch (default: 8)"
    )
    parser.add_argument(
        "--repeats", type=positive, default=20, metavar="N", help="times (default: 20)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
