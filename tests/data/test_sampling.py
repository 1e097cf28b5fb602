"""The sampling order is a pure function that shows every item once an epoch, on any rank count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.data.permutation import permuted
from megatron_nuwa.data.sampling import (
    SHARE_PERIOD,
    SamplingOrder,
    dealt,
    rank_slice,
    whole_shares,
)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permutation_is_one(count: int, key: int) -> None:
    assert sorted(permuted(p, count, key) for p in range(count)) == list(range(count))


def test_permutation_of_a_billion_needs_no_memory_and_differs_by_key() -> None:
    count = 10**9
    places = [permuted(p, count, 1) for p in range(1000)]
    assert len(set(places)) == 1000
    assert max(places) > count * 0.98
    assert places != [permuted(p, count, 2) for p in range(1000)]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    share=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_an_epoch_shows_every_item_once_whatever_the_ranks(
    sizes: list[int], ranks: int, share: int, seed: int
) -> None:
    order = SamplingOrder(seed, "t2v", sizes, ranks * share)
    steps = 2 * -(-order.items // order.batch_size)
    stream = []
    for step in range(steps):
        batch = order.batch(step)
        slices = [rank_slice(batch, rank, ranks) for rank in range(ranks)]
        assert [pick for part in slices for pick in part] == batch
        stream += batch
    everything = {(c, i) for c, size in enumerate(sizes) for i in range(size)}
    for epoch in range(len(stream) // order.items):
        seen = stream[epoch * order.items : (epoch + 1) * order.items]
        assert {(pick.corpus, pick.item) for pick in seen} == everything
    # The same position gives the same sample in a fresh object: nothing is remembered.
    assert SamplingOrder(seed, "t2v", sizes, ranks * share).batch(steps - 1) == order.batch(
        steps - 1
    )


def test_epochs_tasks_and_seeds_differ() -> None:
    def first_items(seed: int, task: str, epoch: int) -> list[int]:
        order = SamplingOrder(seed, task, [100], 100)
        return [pick.item for pick in order.batch(epoch)]

    base = first_items(0, "t2v", 0)
    assert base != first_items(0, "t2v", 1)
    assert base != first_items(0, "v2v", 0)
    assert base != first_items(1, "t2v", 0)


def test_draws_are_uniform_enough() -> None:
    order = SamplingOrder(0, "t2i", [50], 4000)
    draws = [pick.caption_draw for pick in order.batch(0)]
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02
    assert min(draws) >= 0
    assert max(draws) < 1


def test_uneven_share_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        rank_slice(SamplingOrder(0, "t2i", [5], 5).batch(0), 0, 2)


sizes_and_weights = st.integers(1, 4).flatmap(
    lambda corpora: st.tuples(
        st.lists(st.integers(1, 40), min_size=corpora, max_size=corpora),
        st.lists(st.floats(0.01, 100), min_size=corpora, max_size=corpora),
    )
)


@settings(max_examples=100, deadline=None)
@given(shares=st.lists(st.integers(1, 60), min_size=1, max_size=5), first=st.integers(0, 10**15))
def test_positions_are_dealt_out_exactly_evenly_and_without_gaps(
    shares: list[int], first: int
) -> None:
    period = sum(shares)
    start = first * period
    taken = {owner: first * share for owner, share in enumerate(shares)}
    for position in range(start, start + period):
        owner, before = dealt(position, shares)
        assert before == taken[owner]
        taken[owner] += 1
        if position == start + period // 2:
            done = position + 1 - start
            for other, share in enumerate(shares):
                got = taken[other] - first * share
                assert abs(got - done * share / period) < len(shares)
    assert taken == {owner: (first + 1) * share for owner, share in enumerate(shares)}


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(1e-12, 1e300), min_size=1, max_size=8))
def test_whole_shares_add_up_and_stay_near_the_weights(weights: list[float]) -> None:
    shares = whole_shares(weights, SHARE_PERIOD)
    assert sum(shares) == SHARE_PERIOD
    assert min(shares) >= 1
    largest = max(weights)
    total = sum(weight / largest for weight in weights)
    for weight, share in zip(weights, shares, strict=True):
        exact = weight / largest / total * SHARE_PERIOD
        assert share <= max(exact, 1) + 1
        # The smallest corpora may take up to one position each from the others.
        assert share >= exact - len(weights)


def test_weights_whose_sum_is_no_number_are_shared_all_the_same() -> None:
    assert whole_shares([1e308] * 4, 8) == [2, 2, 2, 2]


@pytest.mark.parametrize("sizes", [[], [3, 0]])
def test_empty_corpora_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="corpus_sizes must be at least 1 each"):
        SamplingOrder(0, "t2i", sizes, 1)


def test_weights_are_exact_over_a_period_wherever_it_starts() -> None:
    order = SamplingOrder(0, "t2i", [7, 100, 3], 1, weights=[1, 2, 5])
    # 65,536 is a multiple of 8, so that every eight positions hold exactly these shares.
    for start in (0, 8 * 12345, 8 * 10**12):
        picks = [order.pick(position).corpus for position in range(start, start + 8)]
        assert sorted(picks) == [0, 1, 1, 2, 2, 2, 2, 2]


@settings(max_examples=40, deadline=None)
@given(
    corpora=sizes_and_weights,
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    share=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_weighted_corpora_show_every_item_once_an_epoch_of_their_own(
    corpora: tuple[list[int], list[float]], ranks: int, share: int, seed: int
) -> None:
    sizes, weights = corpora
    order = SamplingOrder(seed, "t2v", sizes, ranks * share, weights)
    seen: list[list[int]] = [[] for _ in sizes]
    for step in range(200 // (ranks * share) + 1):
        batch = order.batch(step)
        assert [p for rank in range(ranks) for p in rank_slice(batch, rank, ranks)] == batch
        # A fresh object, at any step, with the batch cut for other ranks: nothing is remembered.
        again = SamplingOrder(seed, "t2v", sizes, 1, weights)
        first = step * len(batch)
        assert [again.pick(first + offset) for offset in range(len(batch))] == batch
        for pick in batch:
            seen[pick.corpus].append(pick.item)
    for items, size in zip(seen, sizes, strict=True):
        for start in range(0, len(items), size):
            epoch = items[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(size))
            if len(epoch) == size:
                assert sorted(epoch) == list(range(size))


def test_corpora_of_equal_size_have_orders_of_their_own() -> None:
    order = SamplingOrder(0, "t2i", [50, 50], 100, weights=[1, 1])
    picks = order.batch(0)
    assert [p.item for p in picks if p.corpus == 0] != [p.item for p in picks if p.corpus == 1]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        SamplingOrder(0, "t2i", [5, 5], 2, weights)


def test_order_without_weights_is_the_one_that_runs_were_trained_with() -> None:
    picks = SamplingOrder(3, "t2v", [10, 7], 6).batch(2)
    assert [(pick.corpus, pick.item) for pick in picks] == [
        (1, 4),
        (0, 4),
        (0, 9),
        (1, 1),
        (1, 2),
        (0, 2),
    ]
