"""Fixtures of all rooms."""

from __future__ import annotations

import pytest
from helpers import SmallWorld, make_small_world


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """Tokenizers, corpora and a recipe of seconds."""
    return make_small_world(tmp_path_factory.mktemp("small_world"))
