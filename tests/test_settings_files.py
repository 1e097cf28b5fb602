"""Settings files that cannot be read: one sentence that says which, and what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_nuwa.config import load_settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.training.recipe import load_recipe
from preprocessing.filters import FilterSettings


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("name: für\n".encode("latin-1"), r"recipe .*a\.yaml is no text in UTF-8 \(.*save it as"),
        (b"- 1\n- 2\n", r"recipe .*a\.yaml must hold fields at its top level, such as 'name: …'"),
        (b"name: [\n", r"recipe .*a\.yaml is not valid YAML"),
        (b"name: ' '\n", r"recipe .*a\.yaml: name: must not be empty"),
    ],
)
def test_a_broken_recipe_is_named(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "a.yaml")


def test_other_files_are_not_called_recipes(tmp_path: Path) -> None:
    (tmp_path / "filters.yaml").write_text("just words")
    with pytest.raises(UserError, match=r"--filters .*filters\.yaml must hold.*'filters: …'"):
        load_settings(FilterSettings, tmp_path / "filters.yaml", noun="--filters")
    with pytest.raises(UserError, match=r"--filters .*absent\.yaml cannot be read: No such file"):
        load_settings(FilterSettings, tmp_path / "absent.yaml", noun="--filters")
