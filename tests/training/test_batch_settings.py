"""How a batch is drawn and cut is the recipe's choice, and the cut changes no number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import SmallWorld, lone_process

from megatron_nuwa.errors import UserError
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.recipe import load_recipe

TAGS = ("train/loss", "train/loss/t2i", "train/loss/v2v", "train/loss/t2v", "train/grad_norm")


def train(world: SmallWorld, run: Path, *overrides: str) -> list[list[float]]:
    fixed = [f"run={run}", "evaluation=null", "training.stop_at_step=4"]
    recipe = load_recipe(world.recipe, [*fixed, *overrides])
    pretrain(recipe, recipe.training.deepspeed_config, lone_process())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[line[tag] for tag in TAGS] for line in lines]


def test_micro_batches_of_any_size_train_alike(small_world: SmallWorld, tmp_path: Path) -> None:
    weighted = (
        f"data.tasks.t2i.corpora=[{small_world.images}, {small_world.images}]",
        "data.tasks.t2i.corpus_weights=[1, 3]",
        "data.tasks.t2i.batch_size=7",
        "data.tasks.t2v.weight=0.5",
    )
    whole = train(small_world, tmp_path / "whole", *weighted)
    # Seven images in micro-batches of three, two and two, and one clip each.
    cut = train(small_world, tmp_path / "cut", *weighted, "data.micro_batch_tokens=48")
    config = json.loads((tmp_path / "cut/ds_config.json").read_text())
    assert config["gradient_accumulation_steps"] == 3 + 2 + 2
    for one, other in zip(whole, cut, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    assert whole[-1][0] < whole[0][0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tasks.t2i.corpus_weights=[1, 2]", "corpus_weights has 2 numbers for 1 corpora"),
        ("data.tasks.t2i.corpus_weights=[0]", "must be above 0, not 0"),
        ("data.tasks.t2i.corpus_weights=[.nan]", "finite number"),
        ("data.micro_batch_tokens=0", "must be at least 1, not 0"),
        ("training.guard.spike_factor=1", "must be above 1, not 1"),
        ("training.guard.patients=1", "did you mean 'patience'?"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    small_world: SmallWorld, override: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(small_world.recipe, [override])
    assert message in str(caught.value)
    with pytest.raises(UserError, match="leave one out"):
        load_recipe(small_world.recipe, ["data.accumulation=2", "data.micro_batch_tokens=9"])
