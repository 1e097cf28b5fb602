"""The sequence of global batches is the same, whoever reads it, from any step on."""

from __future__ import annotations

import pickle
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.data.permutation import mix, mixed, permuted, permuted_all
from megatron_nuwa.data.sampling import SHARE_PERIOD, Pick, SamplingOrder, dealt, whole_shares

RANKS = [1, 2, 3, 4, 8]


@st.composite
def orders(draw: st.DrawFn, weighted: bool | None = None) -> dict[str, Any]:
    """Random corpora of random shards, weights, windows; the batch divides by every rank count."""
    shards = draw(
        st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=3)
    )
    weights = None
    if weighted if weighted is not None else draw(st.booleans()):
        number = st.floats(0.01, 100)
        weights = draw(st.lists(number, min_size=len(shards), max_size=len(shards)))
    return {
        "seed": draw(st.integers(0, 2**31)),
        "task": draw(st.sampled_from(["t2i", "v2v", "t2v"])),
        "corpus_sizes": [sum(own) for own in shards],
        "batch_size": 24 * draw(st.integers(1, 2)),
        "weights": weights,
        "shuffle_window": draw(st.sampled_from([None, 1, 2, 3, 100])),
        "shard_sizes": shards,
    }


@settings(max_examples=25, deadline=None)
@given(order=orders(), data=st.data())
def test_resumes_on_other_ranks_give_the_same_global_batches(
    order: dict[str, Any], data: st.DataObject
) -> None:
    whole = SamplingOrder(**order)
    steps = 6
    expected = [whole.batch(step) for step in range(steps)]
    step = 0
    while step < steps:
        # A new process each time, with another number of ranks, from the step alone.
        ranks = data.draw(st.sampled_from(RANKS))
        until = data.draw(st.integers(step + 1, steps))
        resumed = [SamplingOrder(**order) for _ in range(ranks)]
        for now in range(step, until):
            parts = [own.rank_picks(now, rank, ranks) for rank, own in enumerate(resumed)]
            assert [pick for part in parts for pick in part] == expected[now]
        step = until


@settings(max_examples=40, deadline=None)
@given(order=orders(), first_epoch=st.integers(0, 10**6))
def test_no_item_is_lost_or_repeated_within_an_epoch(
    order: dict[str, Any], first_epoch: int
) -> None:
    sampling = SamplingOrder(**order)
    if order["weights"] is None:
        stream = list(sampling.picks(first_epoch * sampling.items, 2 * sampling.items))
        everything = {(c, i) for c, size in enumerate(order["corpus_sizes"]) for i in range(size)}
        for epoch in (stream[: sampling.items], stream[sampling.items :]):
            assert {(pick.corpus, pick.item) for pick in epoch} == everything
        return
    seen: list[list[int]] = [[] for _ in order["corpus_sizes"]]
    for pick in sampling.picks(0, 400):
        seen[pick.corpus].append(pick.item)
    for items, size in zip(seen, order["corpus_sizes"], strict=True):
        for start in range(0, len(items) - size + 1, size):
            assert sorted(items[start : start + size]) == list(range(size))
        rest = items[len(items) // size * size :]
        assert len(set(rest)) == len(rest)


@settings(max_examples=40, deadline=None)
@given(order=orders(weighted=False))
def test_a_window_holds_few_shards_and_visits_each_once(order: dict[str, Any]) -> None:
    window = order["shuffle_window"]
    if window is None:
        return
    sampling = SamplingOrder(**order)
    owner = [
        [(c, s) for s, size in enumerate(own) for _ in range(size)]
        for c, own in enumerate(order["shard_sizes"])
    ]
    total = sum(len(own) for own in order["shard_sizes"])
    visits = [owner[pick.corpus][pick.item] for pick in sampling.picks(0, sampling.items)]
    first, last = {}, {}
    for place, shard in enumerate(visits):
        first.setdefault(shard, place)
        last[shard] = place
    for place in range(len(visits)):
        # Shards that have begun and not ended are those of one window.
        assert sum(first[s] <= place <= last[s] for s in first) <= window
    assert len(first) == total


def scalar_pick(order: dict[str, Any], position: int) -> Pick:
    """The order without windows as the first releases computed it, one position at a time."""
    key = mix(order["seed"], zlib.crc32(order["task"].encode()))
    sizes = order["corpus_sizes"]
    if order["weights"] is None:
        epoch, place = divmod(position, sum(sizes))
        item, corpus = permuted(place, sum(sizes), mix(key, epoch)), 0
        while item >= sizes[corpus]:
            item -= sizes[corpus]
            corpus += 1
    else:
        corpus, occurrence = dealt(position, whole_shares(order["weights"], SHARE_PERIOD))
        epoch, place = divmod(occurrence, sizes[corpus])
        item = permuted(place, sizes[corpus], mix(key, epoch, corpus))
    return Pick(corpus, item, *(mix(key, position, salt) / (1 << 64) for salt in (1, 2)))


@settings(max_examples=60, deadline=None)
@given(order=orders(), first=st.integers(0, 10**12), count=st.integers(0, 90))
def test_arrays_give_the_order_that_runs_were_trained_with(
    order: dict[str, Any], first: int, count: int
) -> None:
    order = {**order, "shuffle_window": None}
    expected = [scalar_pick(order, place) for place in range(first, first + count)]
    assert list(SamplingOrder(**order).picks(first, count)) == expected


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(1, 10**12), st.floats(0, 1, exclude_max=True), st.integers(0, 2**64 - 1)
        ),
        min_size=1,
        max_size=30,
    )
)
def test_permutations_over_arrays_are_the_scalar_ones(rows: list[tuple[int, float, int]]) -> None:
    positions = [min(int(part * count), count - 1) for count, part, _ in rows]
    found = permuted_all(
        np.array(positions),
        np.array([count for count, _, _ in rows]),
        np.array([key for _, _, key in rows], np.uint64),
    )
    pairs = zip(positions, rows, strict=True)
    assert found.tolist() == [permuted(place, count, key) for place, (count, _, key) in pairs]
    assert mixed(mix(7), np.array(positions)).tolist() == [mix(7, place) for place in positions]


def test_order_travels_to_worker_processes() -> None:
    # Both before it is used and after, when it remembers some of the stream.
    order = SamplingOrder(1, "t2i", [9, 4], 6, None, 2, [[4, 5], [4]])
    unused = pickle.loads(pickle.dumps(order))
    expected = [order.batch(step) for step in (3, 1000)]
    used = pickle.loads(pickle.dumps(order))
    for copy in (unused, used):
        assert [copy.batch(step) for step in (3, 1000)] == expected


def test_a_long_run_remembers_little_of_the_stream() -> None:
    order = SamplingOrder(1, "t2i", [10_000], 4096)
    for step in range(12):
        order.batch(step)
    assert len(order._blocks) <= 4


@pytest.mark.parametrize(
    ("window", "shards", "message"),
    [
        (0, [[9], [4]], "shuffle_window must be at least 1"),
        (2, None, "shard_sizes that add up"),
        (2, [[9], [5]], "shard_sizes that add up"),
        (2, [[9], [4, 0]], "at least 1 each"),
    ],
)
def test_windows_that_do_not_fit_are_refused(
    window: int, shards: list[list[int]] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOrder(1, "t2i", [9, 4], 6, None, window, shards)


def test_windowed_epochs_differ_and_mix_the_items_of_a_window() -> None:
    order = SamplingOrder(1, "t2i", [400], 400, None, 4, [[50] * 8])
    first, second = ([pick.item for pick in order.batch(epoch)] for epoch in (0, 1))
    assert first != second
    assert len({item // 50 for item in first[:200]}) == 4
    # A stretch of a window holds items of all of its shards.
    assert len({item // 50 for item in first[:40]}) == 4


def test_windows_and_steps_draw_what_runs_were_trained_with() -> None:
    order = SamplingOrder(3, "s2i", [8, 4], 12, None, 2, [[3, 3, 2], [4]])
    assert [(pick.corpus, pick.item) for pick in order.batch(1)] == [
        *((1, 3), (0, 7), (1, 0), (0, 6), (1, 2), (1, 1)),
        *((0, 1), (0, 2), (0, 0), (0, 5), (0, 4), (0, 3)),
    ]
    draws = [order.step_draw(step) for step in range(3)]
    assert draws == [0.803574604290364, 0.6923831422894922, 0.16606549282327077]
    # Not the draws of the samples at the same places.
    assert not {order.step_draw(step) for step in range(24)} & {
        draw for pick in order.picks(0, 24) for draw in (pick.caption_draw, pick.dropout_draw)
    }
