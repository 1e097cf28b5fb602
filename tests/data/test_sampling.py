"""The sampling order is a pure function that shows every item once an epoch, on any rank count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.data.sampling import SamplingOrder, permuted, rank_slice


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
