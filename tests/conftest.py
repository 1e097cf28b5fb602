"""Fixtures of all rooms."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import SmallWorld, make_small_world

# What child processes print shall wait in buffers as it does elsewhere, whoever runs the tests.
os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    """Tokenizers, corpora and a recipe of seconds."""
    return make_small_world(tmp_path_factory.mktemp("small_world"))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user of the machine may look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
