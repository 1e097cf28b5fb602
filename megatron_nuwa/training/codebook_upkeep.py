"""Starting a codebook and keeping its codes in use, in step over all processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nuwa.models.quantizer import VectorQuantizer, kmeans
from megatron_nuwa.training.vqgan_recipe import CodebookUpkeep


class CodebookKeeper:
    """Counts how often each code is taken and replaces the codes that nobody takes.

    Every method is called by all processes together; the codebooks stay equal, since new codes
    are chosen by the first process and broadcast. The codes of `average`, which follows the
    quantizer at a distance, are replaced along with the quantizer's.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        settings: CodebookUpkeep,
        seed: int,
        average: VectorQuantizer | None = None,
    ) -> None:
        self._quantizer = quantizer
        self._average = average
        self._settings = settings
        self._seed = seed
        size = quantizer.table.shape[0]
        # Shares of the recent vectors; they begin equal, so that no code is dead from the start.
        self.usage = torch.full((size,), 1 / size, device=quantizer.table.device)

    def start(self, step: int, vectors: Iterator[Tensor]) -> None:
        """Place the codes at the k-means centres of encoder outputs.

        `vectors` yields this process's (rows, lookup_dim), batch by batch; as many batches are
        taken as are needed for `kmeans_vectors` rows over all processes.
        """
        size = self._quantizer.table.shape[0]
        wanted = max(self._settings.kmeans_vectors, size)
        gathered: list[Tensor] = []
        while sum(part.shape[0] for part in gathered) < wanted:
            gathered.append(_gather(next(vectors)))
        rows = torch.cat(gathered)[:wanted]
        centres = torch.empty_like(self._quantizer.table)
        if dist.get_rank() == 0:
            centres = kmeans(
                rows,
                size,
                iterations=self._settings.kmeans_iterations,
                spherical=self._quantizer.normalise_codes,
                generator=torch.Generator().manual_seed(self._seed + step),
            )
        dist.broadcast(centres, 0)
        self._replace(torch.arange(size, device=centres.device), centres)
        self.usage.fill_(1 / size)

    def count(self, tokens: Tensor) -> Tensor:
        """Add this step's tokens of all processes to the usage; returns their counts."""
        counts = torch.bincount(tokens.flatten(), minlength=self.usage.shape[0]).float()
        dist.all_reduce(counts)
        decay = self._settings.usage_decay
        self.usage.mul_(decay).add_(counts / counts.sum(), alpha=1 - decay)
        return counts

    def restart_dead(self, step: int, vectors: Tensor) -> int:
        """Move rarely taken codes to this step's encoder outputs (rows, lookup_dim), when due.

        Returns the number of codes moved.
        """
        every, until = self._settings.restart_every, self._settings.restart_until
        if not every or (step + 1) % every or (until is not None and step >= until):
            return 0
        size = self.usage.shape[0]
        dead = self._is_dead().nonzero().flatten()
        rows = _gather(vectors)
        dead = dead[: rows.shape[0]]
        if not dead.numel():
            return 0
        chosen = torch.empty(dead.numel(), rows.shape[1], device=rows.device)
        if dist.get_rank() == 0:
            generator = torch.Generator().manual_seed(self._seed + step)
            order = torch.randperm(rows.shape[0], generator=generator)[: dead.numel()]
            chosen = rows[order.to(rows.device)].contiguous()
        dist.broadcast(chosen, 0)
        self._replace(dead, chosen)
        self.usage[dead] = 1 / size
        return int(dead.numel())

    def dead_fraction(self) -> Tensor:
        """Share of the codes (scalar) that are rarely taken now."""
        return self._is_dead().float().mean()

    def _is_dead(self) -> Tensor:
        return self.usage < self._settings.restart_below / self.usage.shape[0]

    def _replace(self, places: Tensor, vectors: Tensor) -> None:
        for quantizer in (self._quantizer, self._average):
            if quantizer is not None:
                quantizer.replace_codes(places, vectors)


def perplexity(counts: Tensor) -> float:
    """`exp` of the entropy of the codes' shares: the number of codes in effective use."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _gather(vectors: Tensor) -> Tensor:
    """The rows of all processes, in order of rank; every process gives equally many."""
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts)
