"""The calls that are timed: the paper's grids, in both readings of its extent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_nuwa.grid import Extent, Grid
from megatron_nuwa.ops.tables import Geometry, key_table


@dataclass(frozen=True)
class Case:
    """One geometry and its name on the command line."""

    name: str
    title: str
    geometry: Geometry

    @property
    def pairs(self) -> int:
        """(query, key) pairs a head."""
        return key_table(self.geometry, torch.device("cpu")).pairs


@dataclass(frozen=True)
class Load:
    """How large a call is apart from its geometry, and where it runs."""

    batch: int
    heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Load:
        """The published load of a device; a tiny one to try the benchmark itself."""
        if quick:
            return cls(1, 2, 32, torch.float32, device)
        if device.type == "cuda":
            return cls(8, 20, 64, torch.bfloat16, device)
        return cls(1, 4, 64, torch.float32, device)

    def random(self, cells: int, seed: int) -> Tensor:
        """(batch, cells, heads, head size), the same numbers on every device."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, cells, self.heads, self.head_size)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def bytes_moved(self, geometry: Geometry) -> tuple[int, int]:
        """Bytes that forward and backward cannot avoid: each input read and output written once.

        Forward reads q, k, v and writes o; backward reads those four and o's gradient, and writes
        three gradients.
        """
        row = self.batch * self.heads * self.head_size * self.dtype.itemsize
        queries, keys = geometry.grid.cells * row, geometry.context_grid.cells * row
        return 2 * queries + 2 * keys, 4 * queries + 4 * keys


def cases(quick: bool) -> list[Case]:
    """All cases; `quick` shrinks the grids and keeps their kind."""
    video = Grid(6, 6, 3) if quick else Grid(21, 21, 10)
    image = video._replace(s=1)
    text = Grid(1, 1, 77)
    size = "×".join(map(str, video))
    flat = "×".join(map(str, image))

    def window(width: int, frames: int) -> Extent:
        return Extent(width, width, frames)

    def case(
        name: str, title: str, grid: Grid, context: Grid, extent: Extent, causal: bool
    ) -> Case:
        return Case(name, title, Geometry(grid, context, extent, causal))

    return [
        case("video-3-causal", f"{size} causal, 3³", video, video, window(3, 3), True),
        case("video-7-causal", f"{size} causal, 7³", video, video, window(7, 7), True),
        case("video-3", f"{size}, 3³", video, video, window(3, 3), False),
        case("video-7", f"{size}, 7³", video, video, window(7, 7), False),
        case("image-3-causal", f"{flat} causal, 3²", image, image, window(3, 1), True),
        case("image-7-causal", f"{flat} causal, 7²", image, image, window(7, 1), True),
        case("sketch-3", f"{size} ← sketch {flat}, 3²", video, image, window(3, 1), False),
        case("sketch-7", f"{size} ← sketch {flat}, 7²", video, image, window(7, 1), False),
        case("text", f"{size} ← text 77", video, text, Extent(1, 1, None), False),
    ]
