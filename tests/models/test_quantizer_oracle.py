"""The codebook against `vector-quantize-pytorch`, an implementation by others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import kmeans as their_kmeans

from megatron_nuwa.models.quantizer import VectorQuantizer, kmeans
from megatron_nuwa.training.codebook_upkeep import CodebookKeeper
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.vqgan_recipe import CodebookUpkeep

SIZE, DIM = 300, 24


def pair(
    lookup_dim: int | None, normalise: bool, gradient: str, **theirs: object
) -> tuple[VectorQuantizer, VectorQuantize]:
    """Both implementations with the same codes and projections."""
    torch.manual_seed(0)
    ours = VectorQuantizer(
        SIZE, DIM, lookup_dim=lookup_dim, normalise_codes=normalise, gradient=gradient
    )
    torch.nn.init.normal_(ours.table)
    settings: dict[str, object] = {"ema_update": False}
    their = VectorQuantize(
        dim=DIM,
        codebook_size=SIZE,
        codebook_dim=lookup_dim,
        use_cosine_sim=normalise,
        rotation_trick=gradient == "rotation",
        commitment_weight=1.0,
        accept_image_fmap=True,
        **(settings | theirs),
    )
    with torch.no_grad():
        their._codebook.embed.copy_(ours.lookup_codes()[None])
        if lookup_dim is not None:
            for name in ("project_in", "project_out"):
                mine, other = getattr(ours, name), getattr(their, name)
                layer = other if isinstance(other, torch.nn.Linear) else other[0]
                layer.load_state_dict(mine.state_dict())
    return ours, their.train()


def encoded() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, DIM, 5, 7, generator=generator).requires_grad_()


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("lookup_dim", [None, 6])
def test_lookup_commitment_loss_and_gradients_are_theirs(
    lookup_dim: int | None, normalise: bool, gradient: str
) -> None:
    ours, their = pair(lookup_dim, normalise, gradient)
    mine, other = encoded(), encoded()
    found = ours(mine)
    codes, tokens, commitment = their(other)
    assert torch.equal(found.tokens, tokens)
    assert len(tokens.unique()) > 20
    torch.testing.assert_close(found.codes, codes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.commitment_loss, commitment)
    weights = torch.randn(codes.shape, generator=torch.Generator().manual_seed(2))
    for value, source, output in (
        (found.commitment_loss, mine, other),
        ((found.codes * weights).sum(), mine, other),
    ):
        theirs = commitment if value is found.commitment_loss else (codes * weights).sum()
        (gradient_of_ours,) = torch.autograd.grad(value, source, retain_graph=True)
        (gradient_of_theirs,) = torch.autograd.grad(theirs, output, retain_graph=True)
        assert gradient_of_ours.abs().max() > 0
        torch.testing.assert_close(gradient_of_ours, gradient_of_theirs, rtol=1e-4, atol=1e-5)


def test_a_learned_codebook_gets_the_gradient_of_theirs() -> None:
    ours, their = pair(None, False, "straight_through", learnable_codebook=True)
    found = ours(encoded())
    _, _, loss = their(encoded())
    (of_ours,) = torch.autograd.grad(found.codebook_loss, ours.table)
    (of_theirs,) = torch.autograd.grad(loss, their._codebook.embed)
    torch.testing.assert_close(of_ours, of_theirs[0])


@pytest.mark.parametrize("spherical", [False, True])
def test_kmeans_comes_to_their_centres_from_the_same_start(spherical: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(2000, 5, generator=generator)
    if spherical:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    start = torch.Generator().manual_seed(4)
    first = rows[torch.randperm(len(rows), generator=start)[:20]]
    theirs, sizes = their_kmeans(
        rows[None], 20, 8, spherical, sample_fn=lambda samples, count: first[None].clone()
    )
    # Empty centres are where the two differ on purpose.
    assert int(sizes.min()) > 0
    again = torch.Generator().manual_seed(4)
    ours = kmeans(rows, 20, iterations=8, spherical=spherical, generator=again)
    torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-5)


def test_the_memory_of_which_codes_are_taken_is_theirs() -> None:
    # A threshold that no code falls below: they keep count, and replace nothing.
    ours, their = pair(None, False, "rotation", decay=0.9, threshold_ema_dead_code=1e-30)
    rows = 3 * 5 * 7
    their._codebook.cluster_size.fill_(rows / SIZE)
    with join_processes():
        settings = CodebookUpkeep(usage_decay=0.9, restart_below=0.5)
        keeper = CodebookKeeper(ours, settings, seed=0)
        for step in range(12):
            batch = torch.randn(3, DIM, 5, 7, generator=torch.Generator().manual_seed(step))
            keeper.count(ours(batch).tokens)
            their(batch)
        usage = their._codebook.cluster_size[0] / rows
        torch.testing.assert_close(keeper.usage, usage, rtol=1e-5, atol=1e-8)
        dead = float((usage < 0.5 / SIZE).float().mean())
        assert 0 < float(keeper.dead_fraction()) == dead < 1
