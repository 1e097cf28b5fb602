"""The paper's recipe and layout."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import ROOT

from megatron_nuwa.parallel.layout import read_layout
from megatron_nuwa.training.recipe import Recipe, load_recipe


@pytest.fixture(scope="session")
def paper() -> Recipe:
    """launch/recipes/nuwa_870m.yaml."""
    return load_recipe(ROOT / "launch/recipes/nuwa_870m.yaml")


@pytest.fixture(scope="session")
def deepspeed() -> dict[str, Any]:
    """DeepSpeed's part of ds_configs/zero1_bf16.json."""
    return read_layout(ROOT / "ds_configs/zero1_bf16.json")[1]
