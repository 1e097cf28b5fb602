"""The codebook: which code is taken, what gradient the encoder gets, where codes begin."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.models import quantizer as quantizer_module
from megatron_nuwa.models.quantizer import (
    GradientEstimator,
    VectorQuantizer,
    kmeans,
    nearest_codes,
    rotate,
)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    codes=st.integers(1, 60),
    dim=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_nearest_code_equals_brute_force(rows: int, codes: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    table = torch.randn(codes, dim, generator=generator, dtype=torch.float64)
    expected = [
        min(range(codes), key=lambda j: math.dist(v, table[j].tolist())) for v in vectors.tolist()
    ]
    assert nearest_codes(vectors, table).tolist() == expected


def test_slicing_the_distances_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, table = torch.randn(50, 6), torch.randn(20, 6)
    whole = nearest_codes(vectors, table)
    monkeypatch.setattr(quantizer_module, "_DISTANCES_AT_ONCE", 60)
    assert torch.equal(nearest_codes(vectors, table), whole)


def test_straight_through_passes_the_gradient_unchanged_and_the_codes_exactly() -> None:
    torch.manual_seed(0)
    layer = VectorQuantizer(16, 5)
    torch.nn.init.normal_(layer.table)
    encoded = torch.randn(2, 5, 3, 4, requires_grad=True)
    found = layer(encoded)
    weights = torch.randn_like(found.codes)
    (gradient,) = torch.autograd.grad((found.codes * weights).sum(), encoded)
    torch.testing.assert_close(gradient, weights, rtol=0, atol=0)
    torch.testing.assert_close(found.codes, layer.codes_of(found.tokens))


def test_rotation_turns_and_scales_the_gradient_with_the_code() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(7, 4, dtype=torch.float64)
    passed = rotate(vectors, codes)
    torch.testing.assert_close(passed, codes, rtol=0, atol=1e-12)
    for row in range(7):
        source = F.normalize(vectors[row].detach(), dim=0)
        target = F.normalize(codes[row], dim=0)
        middle = F.normalize(source + target, dim=0)
        rotation = (
            torch.eye(4, dtype=torch.float64)
            - 2 * torch.outer(middle, middle)
            + 2 * torch.outer(target, source)
        )
        scaled = rotation * codes[row].norm() / vectors[row].detach().norm()
        torch.testing.assert_close(scaled @ vectors[row].detach(), codes[row])
        for axis in range(4):
            (gradient,) = torch.autograd.grad(passed[row, axis], vectors, retain_graph=True)
            torch.testing.assert_close(gradient[row], scaled[axis])


def test_rotation_survives_zero_and_opposite_vectors() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    passed = rotate(vectors, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    passed.sum().backward()
    assert torch.equal(passed.detach(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert vectors.grad is not None
    assert torch.isfinite(vectors.grad).all()


def test_losses_are_the_paper_s_two_terms() -> None:
    torch.manual_seed(0)
    layer = VectorQuantizer(8, 3)
    torch.nn.init.normal_(layer.table)
    encoded = torch.randn(1, 3, 2, 2, requires_grad=True)
    found = layer(encoded)
    rows = encoded.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    codes = layer.table.detach()[found.tokens.flatten()]
    expected = float(((rows - codes) ** 2).mean())
    assert found.codebook_loss.item() == pytest.approx(expected, rel=1e-6)
    assert found.commitment_loss.item() == pytest.approx(expected, rel=1e-6)
    # The codebook term moves codes only, the commitment term the encoder only.
    assert torch.autograd.grad(
        found.codebook_loss, encoded, allow_unused=True, retain_graph=True
    ) == (None,)
    assert torch.autograd.grad(found.commitment_loss, layer.table, allow_unused=True) == (None,)


@pytest.mark.parametrize("lookup_dim", [None, 4])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_codebook_holds_what_the_decoder_receives(lookup_dim, normalise, gradient) -> None:
    torch.manual_seed(0)
    layer = VectorQuantizer(
        32, 6, lookup_dim=lookup_dim, normalise_codes=normalise, gradient=gradient
    )
    found = layer(torch.randn(2, 6, 4, 4))
    assert layer.codebook().shape == (32, 6)
    received = found.codes.movedim(1, -1)
    torch.testing.assert_close(received, layer.codebook()[found.tokens], rtol=1e-5, atol=1e-6)
    assert found.vectors.shape == (32, lookup_dim or 6)


def test_unquantised_vectors_reach_the_decoder_before_the_codebook_starts() -> None:
    layer = VectorQuantizer(8, 5)
    encoded = torch.randn(1, 5, 2, 2)
    assert torch.equal(layer(encoded, quantise=False).codes, encoded)
    assert not torch.equal(layer(encoded).codes, encoded)


def test_kmeans_finds_separate_clusters_and_gives_every_centre_vectors() -> None:
    generator = torch.Generator().manual_seed(1)
    true = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    rows = true.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 2, generator=generator)
    centres = kmeans(rows, 12, iterations=20, generator=generator)
    owners = nearest_codes(rows, centres)
    assert len(owners.unique()) == 12
    # Squared error at most that of the true centres' noise.
    assert float((rows - centres[owners]).square().sum(1).mean()) < 0.02
    assert torch.cdist(true, centres).min(dim=1).values.max() < 0.5


def test_spherical_kmeans_stays_on_the_sphere_and_too_few_rows_are_refused() -> None:
    rows = F.normalize(torch.randn(100, 3), dim=1)
    assert torch.allclose(kmeans(rows, 10, spherical=True).norm(dim=1), torch.ones(10))
    with pytest.raises(ValueError, match="vectors must have at least 101 rows"):
        kmeans(rows, 101)


@pytest.mark.parametrize("dim", [4, 8, 16, 17])
def test_the_search_compiled_for_gpus_finds_the_same_codes(
    monkeypatch: pytest.MonkeyPatch, dim: int
) -> None:
    generator = torch.Generator().manual_seed(dim)
    vectors, codes = (torch.randn(rows, dim, generator=generator) for rows in (301, 97))
    expected = torch.cdist(vectors.double(), codes.double()).argmin(dim=1)
    monkeypatch.setattr(quantizer_module, "_DISTANCES_AT_ONCE", 97 * 40)
    monkeypatch.setattr(quantizer_module, "is_compiled_for_gpus", lambda tensor: True)
    compiled = torch.compile(nearest_codes, backend="aot_eager", fullgraph=True, dynamic=False)
    for search in (nearest_codes, compiled):
        assert torch.equal(search(vectors, codes), expected)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_codes_learn_from_their_loss_alone(gradient: GradientEstimator) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, gradient=gradient)
    found = quantizer(torch.randn(2, 4, 3, 3, requires_grad=True))
    (found.codes.square().sum() + found.commitment_loss).backward(retain_graph=True)
    assert quantizer.table.grad is None or not quantizer.table.grad.any()
    found.codebook_loss.backward()
    assert quantizer.table.grad is not None
    assert quantizer.table.grad.any()


def test_half_precision_is_searched_in_full() -> None:
    torch.manual_seed(0)
    quantizer, encoded = VectorQuantizer(256, 4), torch.randn(1, 4, 8, 8).bfloat16()
    torch.nn.init.normal_(quantizer.table)
    for half, whole in (
        (quantizer(encoded).tokens, quantizer(encoded.float()).tokens),
        (quantizer.tokens_of(encoded), quantizer.tokens_of(encoded.float())),
    ):
        assert half.equal(whole)
    assert quantizer(encoded).vectors.dtype == torch.float32


def test_a_centre_that_no_vector_belongs_to_restarts_at_one() -> None:
    # More centres than different vectors: some lose all of theirs.
    vectors = torch.tensor([[5.0, 5.0], [9.0, 5.0]]).repeat(20, 1)
    centres = kmeans(vectors, 6, generator=torch.Generator().manual_seed(0))
    assert {tuple(centre) for centre in centres.tolist()} == {(5.0, 5.0), (9.0, 5.0)}
