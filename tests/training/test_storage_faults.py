"""Storage that fails while a run trains is a fault, after which it may be started again."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import SmallWorld, lone_process

from megatron_nuwa.data import retry
from megatron_nuwa.errors import FailedProcessError, UserError
from megatron_nuwa.training.faults import read_faults
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.recipe import load_recipe


def train(world: SmallWorld, run: Path) -> None:
    overrides = [f"run={run}", "evaluation=null", "training.stop_at_step=2"]
    recipe = load_recipe(world.recipe, overrides)
    pretrain(recipe, recipe.training.deepspeed_config, lone_process())


def failing(monkeypatch: pytest.MonkeyPatch, method: str, ending: str, times: int) -> None:
    """The method of paths fails so many times where they end so."""
    act, left = getattr(Path, method), [times]

    def stumble(path: Path, *arguments: Any, **more: Any) -> Any:
        if left[0] and path.name.endswith(ending):
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return act(path, *arguments, **more)

    monkeypatch.setattr(retry, "PAUSES", (0.01,) * 3)
    monkeypatch.setattr(Path, method, stumble)


def test_a_run_outlasts_storage_that_stumbles(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "open", ".tar", 3)
    train(small_world, tmp_path / "run")
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == "step_00000002"


def test_storage_that_fails_for_good_ends_the_run_with_a_fault(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "open", ".tar", 1000)
    with pytest.raises(FailedProcessError, match=r"\.tar cannot be read: Input/output error"):
        train(small_world, tmp_path / "run")
    [fault] = read_faults(tmp_path / "run")
    assert fault.kind == "error"


def test_storage_that_fails_when_a_run_begins_is_one_sentence(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "read_bytes", "corpus.json", 1000)
    with pytest.raises(UserError, match=r"^[^\n]*corpus\.json cannot be read: Input/output error$"):
        train(small_world, tmp_path / "run")
    assert not (tmp_path / "run").exists()
