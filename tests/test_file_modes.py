"""The modes of files, and what is said of those that may not be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import without_privileges
from safetensors.torch import save_file

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import replaced_atomically, write_text_atomically
from megatron_nuwa.generation.ranking import ClipRanker
from megatron_nuwa.models.foreign_weights import read_tensors
from megatron_nuwa.models.vqgan import load_vqgan
from megatron_nuwa.training.trained_model import open_trained


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write_weights(path: Path) -> None:
    with replaced_atomically(path) as temporary:
        save_file({"x": torch.zeros(1)}, temporary)


def write_text(path: Path) -> None:
    write_text_atomically(path, "text")


@pytest.mark.parametrize("write", [write_weights, write_text])
def test_a_file_has_the_mode_that_the_umask_gives(
    umask: int, write: Callable[[Path], None], tmp_path: Path
) -> None:
    for _ in range(2):
        write(tmp_path / "file")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_private_file_that_a_killed_process_left_does_not_matter(
    umask: int, tmp_path: Path
) -> None:
    # Processes of containers often have the same number.
    left = tmp_path / f".file.{os.getpid()}"
    left.touch(mode=0o600)
    write_weights(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "read",
    [load_vqgan, read_tensors, ClipRanker.load, lambda path: open_trained(path, "--model")],
    ids=["vqgan", "foreign", "clip", "model"],
)
def test_a_file_that_may_not_be_read_says_so(
    open_folder: Path, read: Callable[[Path], object]
) -> None:
    file = open_folder / "weights.safetensors"
    write_weights(file)
    file.chmod(0)
    with (
        without_privileges(),
        pytest.raises(UserError, match=r"weights\.safetensors cannot be read: Permission denied"),
    ):
        read(file)
