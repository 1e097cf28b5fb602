"""Settings files that cannot be read: one sentence that says which, and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from helpers import ROOT

from megatron_nuwa.config import Settings, dump_settings, load_settings, parse_settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.recipe import load_recipe
from preprocessing.filters import FilterSettings

DEMO = ROOT / "launch/recipes/demo.yaml"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name: für\n".encode("latin-1"), r"recipe .*a\.yaml is no text in UTF-8 \(.*save it as"),
        (b"- 1\n- 2\n", r"recipe .*a\.yaml must hold fields at its top level, such as 'name: …'"),
        (b"name: [\n", r"recipe .*a\.yaml is not valid YAML"),
        (b"name: ' '\n", r"recipe .*a\.yaml: name: must not be empty"),
        (
            b"name: a\nschedule:\n  steps: 1\n  warmup: 2\n  steps: 3\n",
            r"recipe .*a\.yaml .*'steps' stands in lines 3 and 5 of the same group; leave one out",
        ),
    ],
)
def test_a_broken_recipe_is_named(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "a.yaml")


def test_groups_may_share_names_and_anchors(tmp_path: Path) -> None:
    class Pair(Settings):
        left: dict[str, int]
        right: dict[str, int]

    (tmp_path / "a.yaml").write_text(
        "left: &l\n  <<: &k {a: 0, c: 4}\n  a: 1\n  b: 2\nright:\n  <<: *l\n  a: 3\n"
    )
    pair = load_settings(Pair, tmp_path / "a.yaml")
    assert pair.left == {"a": 1, "b": 2, "c": 4}
    assert pair.right == {"a": 3, "b": 2, "c": 4}


@pytest.mark.parametrize("alias", ["*l", "{<<: *l}", "{<<: *l, x: 0}"])
def test_an_override_changes_no_group_that_shares_the_anchor(alias: str, tmp_path: Path) -> None:
    class Group(Settings):
        x: int
        deep: dict[str, dict[str, int]]

    class Pair(Settings):
        left: Group
        right: Group

    path = tmp_path / "a.yaml"
    path.write_text(f"left: &l\n  x: 0\n  deep: {{a: &d {{y: 0, z: 0}}, b: *d}}\nright: {alias}\n")
    overrides = ["left.x=1", "left.deep.a.y=1", "left.deep.a.z=2", "left.deep.c.y=3"]
    pair = load_settings(Pair, path, overrides)
    shared = {"y": 0, "z": 0}
    assert pair.left == Group(x=1, deep={"a": {"y": 1, "z": 2}, "b": shared, "c": {"y": 3}})
    assert pair.right == Group(x=0, deep={"a": shared, "b": shared})


def test_a_corpus_address_keeps_its_slashes() -> None:
    address = "hdfs:///folder/corpus"
    given = (f"data.tasks.t2i.corpora=['{address}']", f"evaluation.corpora.t2i=['{address}']")
    recipe = load_recipe(DEMO, given)
    assert recipe.data is not None
    assert recipe.evaluation is not None
    assert recipe.data.tasks["t2i"].corpora == recipe.evaluation.corpora["t2i"] == [address]
    assert dump_settings(recipe).count(f"- {address}\n") == 2


def test_other_files_are_not_called_recipes(tmp_path: Path) -> None:
    (tmp_path / "filters.yaml").write_text("just words")
    with pytest.raises(UserError, match=r"--filters .*filters\.yaml must hold.*'filters: …'"):
        load_settings(FilterSettings, tmp_path / "filters.yaml", noun="--filters")
    with pytest.raises(UserError, match=r"--filters .*absent\.yaml cannot be read: No such file"):
        load_settings(FilterSettings, tmp_path / "absent.yaml", noun="--filters")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("schedule.steps=-1", "schedule.steps must be at least 1, not -1"),
        ("schedule.steps=many", "schedule.steps must be a whole number, not 'many'"),
        ("schedule.steps=1.5", "schedule.steps must be a whole number, not 1.5"),
        ("schedule.steps=", "schedule.steps must be a whole number, but is empty"),
        ("optimizer.learning_rate=[1]", "optimizer.learning_rate must be a number, not [1]"),
        ("optimizer.learning_rate=.inf", "learning_rate must be a finite number, not inf"),
        ("optimizer.name=sgd", "optimizer.name must be 'adam' or 'adamw', not 'sgd'"),
        ("optimizer.betas=[0.9]", "optimizer.betas has too few entries: [0.9]"),
        ("optimizer.frozen=text", "optimizer.frozen must be a list such as [a, b], not 'text'"),
        ("training.compile=maybe", "training.compile must be true or false, not 'maybe'"),
        ("training.guard=3", "training.guard must be a group of fields, not 3"),
        ("model.position_grid=[1,2,3,4]", "must hold at most 3, not [1, 2, 3, 4]"),
        ("model.position_grid=[1,a,3]", "model.position_grid.1 must be a whole number, not 'a'"),
        ("data.tasks={}", "data.tasks must hold at least 1, not {}"),
        ("data.tasks.t2x={}", "the key 't2x' of data.tasks must be 't2i', 'v2v', "),
        ("data.tasks.t2i.corpora=a", "must be a list such as [a, b], not 'a'"),
        ("vqgan.stepz=3", "unknown key 'vqgan.stepz'; did you mean 'steps'?"),
        ("vqgan.data=null", "vqgan.data must be a group of fields, but is empty"),
        ("vqgan.loss.adversarial=gan", "must be 'hinge', 'log' or 'log_non_saturating', not 'gan'"),
        ("run=4", "run must be a path, not 4"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence_in_its_own_words(
    override: str, sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(DEMO, [override])
    assert str(caught.value).startswith(f"recipe {DEMO}: ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        ("3", "filters must be a list such as [a, b], not 3"),
        ("[minimum_size]", "filters.0 must be a group of fields, not 'minimum_size'"),
        ("[{pixels: 3}]", "the field 'filters.0.name' is missing"),
        ("[{name: x}]", "filters.0.name must be one of 'minimum_size', "),
        ("[{name: minimum_size}]", "the field 'filters.0.pixels' is missing"),
        ("[{name: minimum_size, pixels: a}]", "filters.0.pixels must be a whole number, not 'a'"),
        ("[{name: duration, shortset: 1}]", "'filters.0.shortset'; did you mean 'shortest'?"),
    ],
)
def test_a_mistake_in_one_of_several_kinds_of_filter_is_found(
    filters: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "filters.yaml").write_text(f"filters: {filters}\n")
    with pytest.raises(UserError) as caught:
        load_settings(FilterSettings, tmp_path / "filters.yaml", noun="--filters")
    assert sentence in str(caught.value)


def test_a_misspelt_key_is_told_before_the_key_that_it_leaves_missing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("nam: demo\n")
    with pytest.raises(UserError, match=r"unknown key 'nam'; did you mean 'name'\?"):
        load_recipe(tmp_path / "a.yaml")


def test_branches_of_a_union_are_told_together() -> None:
    class Either(Settings):
        seconds: float | Literal["never"]

    with pytest.raises(UserError, match=r"^here: seconds must be a number or be 'never', not 'x'$"):
        parse_settings(Either, {"seconds": "x"}, "here")
