"""Batches are cut by a token budget, and mean the same however they are cut and spread."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import SmallWorld
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_nuwa.data.batches import TEXT_GRID, TaskBatches, TaskName, TokenBatch, interleave
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.sampling import even_sizes
from megatron_nuwa.data.text import TextTokenizer, text_mask
from megatron_nuwa.models.nuwa import Context, Nuwa
from megatron_nuwa.training.recipe import load_recipe


def batches_of(
    world: SmallWorld,
    task: TaskName,
    batch_size: int,
    *,
    tokens: int | None = None,
    accumulation: int = 1,
    weights: list[float] | None = None,
    dropout: float = 0.3,
) -> TaskBatches:
    folders = {
        "t2i": [world.images],
        "s2i": [world.sketched_images],
        "s2v": [world.sketched_clips],
    }.get(task, [world.clips])
    return TaskBatches(
        task,
        [Corpus(folder) for folder in folders * len(weights or [1])],
        TextTokenizer.load(world.bpe),
        seed=5,
        batch_size=batch_size,
        caption_dropout=dropout,
        corpus_weights=weights,
        micro_batch_tokens=tokens,
        accumulation=accumulation,
    )


def joined(batches: list[TokenBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([b.context.tokens for b in batches]), torch.cat([b.target for b in batches])


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
@pytest.mark.parametrize("tokens", [1, 16, 50, 80, 100, 10_000])
def test_every_cut_and_every_replica_count_gives_the_same_global_batch(
    small_world: SmallWorld, tokens: int, weights: list[float] | None
) -> None:
    # Of 24 samples, 80 tokens make parts of 5 and one of 4.
    whole = batches_of(small_world, "t2i", 24, weights=weights)
    cut = batches_of(small_world, "t2i", 24, tokens=tokens, weights=weights)
    expected = joined(whole.micro_batches(7, 0, 1))
    for ranks in (1, 2, 3, 4, 6, 12):
        parts = [cut.micro_batches(7, rank, ranks) for rank in range(ranks)]
        text, target = joined([batch for part in parts for batch in part])
        assert text.equal(expected[0])
        assert target.equal(expected[1])
        for part in parts:
            assert len(part) == cut.micro_batch_count(ranks)
            sizes = [len(batch.target) for batch in part]
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) == 1 or max(sizes) * 16 <= tokens
            assert [batch.share for batch in part] == [size / sum(sizes) for size in sizes]


@pytest.mark.parametrize(("task", "dropout"), [("t2i", 0.3), ("t2v", 0.0), ("v2v", 0.3)])
def test_texts_and_targets_are_those_of_the_same_items(
    small_world: SmallWorld, task: TaskName, dropout: float
) -> None:
    batches = batches_of(small_world, task, 120, weights=[2.0, 1.0], dropout=dropout)
    corpus = Corpus(small_world.images if task == "t2i" else small_world.clips)
    none = TextTokenizer.load(small_world.bpe).encode("None").tolist()
    [batch] = batches.micro_batches(2, 0, 1)
    picks = batches.order.batch(2)
    read: dict[int, set[int]] = {}
    for pick, text, target in zip(picks, batch.context.tokens, batch.target, strict=True):
        assert target.tolist() == corpus.visual(pick.item).tolist()
        captions = corpus.texts(pick.item).tolist()
        if task == "v2v" or pick.dropout_draw < dropout:
            assert text.tolist() == none
        else:
            chosen = captions.index(text.tolist())
            assert chosen == int(pick.caption_draw * len(captions))
            read.setdefault(len(captions), set()).add(chosen)
    if task != "v2v":
        assert read == {1: {0}, 2: {0, 1}}


def test_without_a_budget_a_share_is_cut_into_equal_parts(small_world: SmallWorld) -> None:
    batches = batches_of(small_world, "t2i", 12, accumulation=3)
    assert batches.micro_batch_count(2) == 3
    parts = batches.micro_batches(0, 1, 2)
    assert [(len(batch.target), batch.share) for batch in parts] == [(2, 1 / 3)] * 3


def test_budget_makes_images_and_clips_weigh_the_same(small_world: SmallWorld) -> None:
    images = batches_of(small_world, "t2i", 12, tokens=48).micro_batches(0, 0, 1)
    clips = batches_of(small_world, "t2v", 4, tokens=48).micro_batches(0, 0, 1)
    assert {batch.target.numel() for batch in images + clips} == {48}


def test_batch_that_does_not_divide_is_refused(small_world: SmallWorld) -> None:
    with pytest.raises(ValueError, match="does not divide by 3 ranks"):
        batches_of(small_world, "t2i", 4).micro_batches(0, 0, 3)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 1000), parts=st.integers(1, 50))
def test_even_sizes_add_up_and_differ_by_one_at_most(count: int, parts: int) -> None:
    sizes = even_sizes(count, parts)
    assert sum(sizes) == count
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_interleaving_keeps_each_order_and_spreads_every_task(counts: list[int]) -> None:
    names: list[TaskName] = ["t2i", "v2v", "t2v"]
    batches = {name: stub_batches(name, count) for name, count in zip(names, counts, strict=False)}
    mixed = interleave(batches)
    assert len(mixed) == sum(counts)
    for name, own in batches.items():
        places = [place for place, batch in enumerate(mixed) if batch.task == name]
        assert [mixed[place] for place in places] == own
        for number, place in enumerate(places):
            # Whoever cuts the step anywhere finds each task's part of it, to one micro-batch each.
            assert abs(number / len(own) - place / len(mixed)) * len(own) <= len(counts)


def stub_batches(task: TaskName, count: int) -> list[TokenBatch]:
    empty = torch.empty(0)
    return [
        TokenBatch(task, Context("text", empty, TEXT_GRID), empty, TEXT_GRID, float(number))
        for number in range(count)
    ]


def test_equal_counts_take_turns(small_world: SmallWorld) -> None:
    mixed = interleave({"t2i": stub_batches("t2i", 2), "t2v": stub_batches("t2v", 2)})
    assert [batch.task for batch in mixed] == ["t2i", "t2v", "t2i", "t2v"]


def test_mask_is_made_with_the_batch_and_travels_with_it(small_world: SmallWorld) -> None:
    [batch] = batches_of(small_world, "t2v", 4).micro_batches(0, 0, 1)
    assert batch.context.mask is not None
    assert batch.context.mask.equal(torch.from_numpy(text_mask(batch.context.tokens.numpy())))
    moved = batch.to(torch.device("meta"))
    assert moved.context.mask is not None
    parts = (moved.context.tokens, moved.target, moved.context.mask)
    assert {tensor.device.type for tensor in parts} == {"meta"}
    assert replace(batch, share=0.5).to(torch.device("cpu")).share == 0.5


def test_item_names_say_which_items_a_replica_read(small_world: SmallWorld) -> None:
    batches = batches_of(small_world, "t2i", 12, weights=[1, 1])
    corpus = Corpus(small_world.images)
    names = [name for rank in range(3) for name in batches.item_names(3, rank, 3)]
    [whole] = batches.micro_batches(3, 0, 1)
    assert len(names) == 12
    for name, target in zip(names, whole.target, strict=True):
        folder, item = name.rsplit(":item-", 1)
        assert folder == str(small_world.images)
        assert target.tolist() == corpus.visual(int(item)).tolist()


@pytest.mark.parametrize("task", ["s2i", "s2v"])
def test_sketches_are_those_of_the_items_whoever_reads_them(
    small_world: SmallWorld, task: TaskName
) -> None:
    corpus = Corpus(small_world.sketched_images if task == "s2i" else small_world.sketched_clips)
    whole = batches_of(small_world, task, 12, dropout=0)
    [batch] = whole.micro_batches(3, 0, 1)
    assert (batch.context.kind, batch.context.grid, batch.context.mask) == (
        "sketch",
        corpus.grid,
        None,
    )
    for name, sketch in zip(whole.item_names(3, 0, 1), batch.context.tokens, strict=True):
        assert sketch.tolist() == corpus.sketch(int(name.rsplit("-", 1)[1])).tolist()
    cut = batches_of(small_world, task, 12, dropout=0, tokens=100)
    parts = [batch for rank in range(3) for batch in cut.micro_batches(3, rank, 3)]
    assert len(parts) >= 3
    tokens, target = joined(parts)
    assert tokens.equal(batch.context.tokens)
    assert target.equal(batch.target)


def test_dropped_sketches_are_dropped_by_all_in_the_same_steps(small_world: SmallWorld) -> None:
    """Else micro-batches had two kinds of context, and processes would wait for each other."""
    batches, cut = (batches_of(small_world, "s2v", 12, tokens=n) for n in (None, 48))
    same = batches_of(small_world, "s2v", 12, dropout=0)
    kinds = []
    for step in range(200):
        parts = [part for rank in range(4) for part in cut.micro_batches(step, rank, 4)]
        [whole] = batches.micro_batches(step, 0, 1)
        found = {part.context.kind for part in [*parts, whole]}
        assert found == {"sketch" if batches.reads_sketches(step) else "text"}
        assert joined(parts)[1].equal(same.micro_batches(step, 0, 1)[0].target)
        kinds += found
        if whole.context.kind == "text":
            none = TextTokenizer.load(small_world.bpe).encode("None").astype("int64")
            assert whole.context.tokens.equal(torch.from_numpy(none).expand(12, -1))
    assert 0.2 < kinds.count("text") / 200 < 0.4
    other = batches_of(small_world, "s2i", 12)
    assert [other.reads_sketches(s) for s in range(200)] != [kind == "sketch" for kind in kinds]


def test_a_pure_sketch_batch_trains_the_sketch_side(small_world: SmallWorld) -> None:
    recipe = load_recipe(small_world.recipe, small_world.sketch_overrides())
    assert recipe.model is not None
    torch.manual_seed(0)
    model = Nuwa(recipe.model)
    [batch] = batches_of(small_world, "s2v", 2, dropout=0).micro_batches(0, 0, 1)
    model.loss(batch.context, batch.target, batch.grid).backward()
    moved = {
        name.split(".")[0]: float(p.grad.abs().max())
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    # What has no part in it has a gradient of zero: see `Nuwa.embed_context`.
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == moved.keys()
    still = {name for name, most in moved.items() if most == 0}
    assert still == {"text_embedding", "text_positions"}


def test_pure_v2v_batch_leaves_no_parameter_of_the_text_side_without_gradient(
    small_world: SmallWorld,
) -> None:
    """Else a process with only such batches would leave a gradient's collective to the others."""
    recipe = load_recipe(small_world.recipe)
    assert recipe.model is not None
    torch.manual_seed(0)
    model = Nuwa(recipe.model)
    [batch] = batches_of(small_world, "v2v", 2).micro_batches(0, 0, 1)
    model.loss(batch.context, batch.target, batch.grid).backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    # Only the positions of a visual context have no part in reading a text.
    assert all(name.startswith("context_positions.") for name in unused)
    for part in ("text_embedding.", "text_positions.", "encoder.", "decoder.0.cross"):
        grads = [p.grad for name, p in model.named_parameters() if name.startswith(part)]
        assert grads
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        assert any(grad is not None and grad.abs().max() > 0 for grad in grads), part
