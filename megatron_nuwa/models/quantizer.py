"""The codebook: nearest-code lookup, its gradient estimators and losses, k-means."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_nuwa.models.compiled import is_compiled_for_gpus

GradientEstimator = Literal["straight_through", "rotation"]

# Distances are computed in slices of at most this many entries, 128 MiB in float32.
_DISTANCES_AT_ONCE = 2**25
# Up to this many dimensions a compiler writes out the sums of a distance.
_MOST_WRITTEN_OUT = 16


class Quantised(NamedTuple):
    """What a lookup yields; `rows` counts the vectors, `rows = batch·h·w`."""

    codes: Tensor  # (batch, code_dim, h, w), what the decoder receives
    tokens: Tensor  # (batch, h, w) int64
    codebook_loss: Tensor  # scalar, moves the codes towards the encoder's vectors
    commitment_loss: Tensor  # scalar, moves the encoder's vectors towards the codes
    vectors: Tensor  # (rows, lookup_dim), the encoder's vectors in the lookup space, detached


class VectorQuantizer(nn.Module):
    """Replaces vectors by their nearest of `codebook_size` codes (`z = argmin_j ‖E(I) − B_j‖`).

    With `lookup_dim` the search happens in a low-dimensional projection of the encoder's vectors
    and the found code is projected back to `code_dim`; with `normalise_codes` both sides of the
    search lie on the unit sphere. Neither, with the straight-through gradient, is the paper's form.
    """

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        *,
        lookup_dim: int | None = None,
        normalise_codes: bool = False,
        gradient: GradientEstimator = "straight_through",
    ) -> None:
        super().__init__()
        self.normalise_codes = normalise_codes
        self.gradient = gradient
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if lookup_dim is not None:
            self.project_in = nn.Linear(code_dim, lookup_dim)
            self.project_out = nn.Linear(lookup_dim, code_dim)
        self.table = nn.Parameter(torch.empty(codebook_size, lookup_dim or code_dim))
        if normalise_codes:
            nn.init.normal_(self.table)
        else:
            nn.init.uniform_(self.table, -1 / codebook_size, 1 / codebook_size)

    def lookup_codes(self) -> Tensor:
        """The codes in the space of the search: (codebook_size, lookup_dim or code_dim)."""
        return F.normalize(self.table, dim=-1) if self.normalise_codes else self.table

    def codebook(self) -> Tensor:
        """The codes as the decoder receives them: (codebook_size, code_dim)."""
        codes: Tensor = self.project_out(self.lookup_codes())
        return codes

    def to_lookup(self, encoded: Tensor) -> Tensor:
        """Encoder output (batch, code_dim, h, w) as rows of the search (batch·h·w, lookup_dim)."""
        rows = encoded.movedim(1, -1).flatten(0, 2).float()
        vectors: Tensor = self.project_in(rows)
        return F.normalize(vectors, dim=-1) if self.normalise_codes else vectors

    def forward(self, encoded: Tensor, quantise: bool = True) -> Quantised:
        """Quantise encoder output (batch, code_dim, h, w).

        With `quantise=False` the decoder receives the vectors themselves, while tokens and losses
        are still computed: the autoencoder can be trained before its codebook is started.
        """
        batch, _, h, w = encoded.shape
        # Rounding to bfloat16 would merge neighbouring codes of a large codebook.
        with torch.autocast(encoded.device.type, enabled=False):
            vectors = self.to_lookup(encoded)
            table = self.lookup_codes()
            tokens = nearest_codes(vectors.detach(), table.detach())
            chosen = F.embedding(tokens, table)
            codebook_loss = F.mse_loss(chosen, vectors.detach())
            commitment_loss = F.mse_loss(vectors, chosen.detach())
            passed = vectors
            if quantise:
                estimator = rotate if self.gradient == "rotation" else pass_straight_through
                passed = estimator(vectors, chosen.detach())
            codes = self.project_out(passed)
        return Quantised(
            codes.view(batch, h, w, -1).movedim(-1, 1),
            tokens.view(batch, h, w),
            codebook_loss,
            commitment_loss,
            vectors.detach(),
        )

    def tokens_of(self, encoded: Tensor) -> Tensor:
        """Tokens (batch, h, w) int64 of encoder output (batch, code_dim, h, w)."""
        batch, _, h, w = encoded.shape
        with torch.autocast(encoded.device.type, enabled=False):
            return nearest_codes(self.to_lookup(encoded), self.lookup_codes()).view(batch, h, w)

    def codes_of(self, tokens: Tensor) -> Tensor:
        """Codes (batch, code_dim, h, w) of tokens (batch, h, w)."""
        return F.embedding(tokens, self.codebook()).movedim(-1, 1)

    @torch.no_grad()
    def replace_codes(self, places: Tensor, vectors: Tensor) -> None:
        """Set codes `places` (count,) to lookup-space vectors (count, lookup_dim)."""
        self.table[places] = vectors.to(self.table)


def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index (rows,) int64 of the code (codes, dim) nearest to each vector (rows, dim)."""
    offsets = codes.square().sum(dim=1)
    rows_at_once = max(1, _DISTANCES_AT_ONCE // codes.shape[0])
    # The vector's own norm is the same for all codes and cannot change the minimum.
    if is_compiled_for_gpus(vectors) and codes.shape[1] <= _MOST_WRITTEN_OUT:
        return _distances_written_out(offsets, vectors, codes).argmin(dim=1)
    found = [
        torch.addmm(offsets, part, codes.T, alpha=-2).argmin(dim=1)
        for part in vectors.split(rows_at_once)
    ]
    return torch.cat(found)


def _distances_written_out(offsets: Tensor, vectors: Tensor, codes: Tensor) -> Tensor:
    """`offsets − 2·vectors·codesᵀ` without a product, so that a compiler joins it to the minimum.

    A product would write all distances to memory and have them read again, and in few dimensions
    that takes far longer than the sums themselves.
    """
    distances = offsets.expand(vectors.shape[0], -1)
    for axis, column in enumerate(codes.T.contiguous()):
        distances = distances - 2 * vectors[:, axis, None] * column
    return distances


def pass_straight_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """The codes, with the gradient passed to the vectors unchanged."""
    return vectors + (codes - vectors).detach()


def rotate(vectors: Tensor, codes: Tensor) -> Tensor:
    """The codes, reached by rotating and scaling each vector, so that the gradient turns along.

    The rotation trick (arXiv 2410.06424, Eq. 4): `q̃ = λ·(e − 2·r·rᵀe + 2·q̂·êᵀe)` with
    `r = (ê + q̂)/‖ê + q̂‖` and `λ = ‖q‖/‖e‖`, all factors held constant. Shapes (rows, dim).
    """
    norms = vectors.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
    source = vectors.detach() / norms
    target = F.normalize(codes, dim=-1, eps=1e-6)
    middle = F.normalize(source + target, dim=-1, eps=1e-6)
    scale = codes.norm(dim=-1, keepdim=True) / norms
    along_middle = (vectors * middle).sum(dim=-1, keepdim=True) * middle
    along_source = (vectors * source).sum(dim=-1, keepdim=True) * target
    rotated = scale * (vectors - 2 * along_middle + 2 * along_source)
    # The value is the code to the last bit, as the decoder will see it after training.
    return rotated + (codes - rotated).detach()


def kmeans(
    vectors: Tensor,
    count: int,
    *,
    iterations: int = 10,
    spherical: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Centres (count, dim) of `vectors` (rows, dim) by Lloyd's iterations from random rows.

    A centre that loses all its vectors restarts at a random one. `spherical` keeps the centres on
    the unit sphere. Raises `ValueError` when there are fewer rows than centres.
    """
    rows = vectors.shape[0]
    if rows < count:
        raise ValueError(
            f"vectors must have at least {count} rows to form {count} centres, not {rows}"
        )
    centres = vectors[_random_places(rows, count, generator, vectors.device)].clone()
    for _ in range(iterations):
        owners = nearest_codes(vectors, centres)
        sizes = torch.bincount(owners, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, owners, vectors)
        centres = sums / sizes.clamp_min(1).unsqueeze(1)
        empty = (sizes == 0).nonzero().flatten()
        centres[empty] = vectors[_random_places(rows, empty.numel(), generator, vectors.device)]
        if spherical:
            centres = F.normalize(centres, dim=-1)
    return centres


def _random_places(
    rows: int, count: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    return torch.randperm(rows, generator=generator)[:count].to(device)
