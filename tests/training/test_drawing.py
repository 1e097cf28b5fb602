"""A drawing or an evaluation that fails costs neither the run nor the checkpoint of its step."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from helpers import SmallWorld, lone_process

import megatron_nuwa.generation.show as showing
from megatron_nuwa.errors import FailedProcessError
from megatron_nuwa.generation.show import make_sample_shower
from megatron_nuwa.training import pretrain as pretraining
from megatron_nuwa.training.checkpoint import Checkpoints, read_manifest, tag_of
from megatron_nuwa.training.drawing import ShowSamples
from megatron_nuwa.training.engine import Engine
from megatron_nuwa.training.launcher import free_port
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.processes import join_processes
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.snapshot import Part

PICTURES = ("samples.every=2", "samples.prompts=[a red square moves left]")


def train(
    world: SmallWorld, run: Path, *overrides: str, show: ShowSamples | None = None
) -> Checkpoints:
    recipe = load_recipe(
        world.recipe, [f"run={run}", "evaluation=null", "training.checkpoint_every=2", *overrides]
    )
    show = show or make_sample_shower(recipe)
    pretrain(recipe, recipe.training.deepspeed_config, lone_process(), show)
    return Checkpoints(run / "checkpoints", keep=9)


def tags(run: Path) -> list[str]:
    return [path.name for path in Checkpoints(run / "checkpoints", keep=9).all()]


def weights(checkpoint: Path) -> str:
    digest: str = read_manifest(checkpoint)["model.safetensors"]["sha256"]
    return digest


@pytest.fixture
def slow_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save takes longer than the steps after it."""
    write = Part.write

    def slowly(part: Part, folder: Path) -> Any:
        time.sleep(0.1)
        return write(part, folder)

    monkeypatch.setattr(Part, "write", slowly)


def test_a_failure_to_draw_is_one_line_and_training_goes_on_unchanged(
    small_world: SmallWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends = "training.stop_at_step=4"
    undisturbed = train(small_world, tmp_path / "undisturbed", ends)
    capsys.readouterr()
    errors = [
        RuntimeError("CUDA error: out of graphs\nand what that means"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "picture.png"),
    ]

    def fails(*_: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(showing, "write_png", fails)
    disturbed = train(small_world, tmp_path / "disturbed", ends, *PICTURES)
    told = [line for line in capsys.readouterr().out.splitlines() if "not drawn" in line]
    assert len(told) == 2
    assert told[0].startswith(
        "warning: the samples of step 2 are not drawn (RuntimeError: CUDA error: out of graphs, "
    )
    assert "step 4 are not drawn (OSError: [Errno 28] No space left on device: 'pict" in told[1]
    assert [weights(path) for path in disturbed.all()] == [weights(p) for p in undisturbed.all()]


@pytest.mark.usefixtures("slow_writes")
def test_the_checkpoint_of_a_step_is_whole_before_anything_is_drawn(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    """So that the process may even die of it."""
    run, seen = tmp_path / "run", []

    def show(_model: object, step: int, *_: object) -> None:
        seen.append((step, tags(run)))

    train(small_world, run, *PICTURES, "training.stop_at_step=4", show=show)
    assert seen == [(2, [tag_of(2)]), (4, [tag_of(2), tag_of(4)])]


@pytest.mark.usefixtures("slow_writes")
def test_an_evaluation_that_fails_leaves_the_checkpoint_of_its_step(
    small_world: SmallWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle and at the end; the next start goes on behind it."""
    run, corpora = tmp_path / "run", f"{{t2i: [{small_world.images}]}}"
    arguments = (f"evaluation={{every: 2, corpora: {corpora}}}", "training.stop_at_step=3")

    def fails(*_: object) -> None:
        raise RuntimeError("disturbed")

    monkeypatch.setattr(pretraining, "evaluate", fails)
    for expected in ([tag_of(2)], [tag_of(2), tag_of(3)]):
        with pytest.raises(FailedProcessError, match="RuntimeError: disturbed"):
            train(small_world, run, *arguments)
        assert tags(run) == expected
    assert "continuing after step 2" in capsys.readouterr().out


class _Full:
    """A weight for which the first process has no memory."""

    def cpu(self) -> None:
        raise MemoryError("no room for it")


gathered: Callable[[Engine], Iterator[tuple[str, Any]]] = Engine.gathered_weights


def _third_does_not_fit(engine: Engine) -> Iterator[tuple[str, Any]]:
    """Once."""
    Engine.gathered_weights = gathered  # type: ignore[method-assign]
    for number, (name, weight) in enumerate(gathered(engine)):
        yield name, _Full() if number == 2 else weight


def one_of_two(rank: int, port: int, recipe_path: Path, folder: Path) -> None:
    """A model split over both processes, so that drawing begins by gathering it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    layout = folder / "layout.json"

    def show(_model: object, step: int, *_: object) -> None:
        (folder / f"drawn_{step}").touch()
        if step == 1:
            raise ValueError("disturbed")

    overrides = [f"run={folder / 'run'}", "evaluation=null", *PICTURES, "samples.every=1"]
    with join_processes() as processes:
        if processes.is_first:
            parallel = {"parallel": {"tensor": 2}, "zero_optimization": {"stage": 1}}
            layout.write_text(json.dumps(parallel))
        processes.barrier()
        recipe = load_recipe(recipe_path, [*overrides, "training.stop_at_step=2"])
        pretrain(recipe, layout, processes, show)
        processes.barrier()
        Engine.gathered_weights = _third_does_not_fit  # type: ignore[method-assign]
        recipe = load_recipe(recipe_path, [*overrides, "training.stop_at_step=4"])
        pretrain(recipe, layout, processes, show)


def test_nobody_waits_for_a_first_process_that_cannot_draw(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    """Neither where it fails to draw nor where it fails to keep the weights that it is sent."""
    mp.spawn(one_of_two, (free_port(), small_world.recipe, tmp_path), 2)
    assert tags(tmp_path / "run")[-1] == tag_of(4)
    drawn = sorted(path.name for path in tmp_path.glob("drawn_*"))
    assert drawn == ["drawn_1", "drawn_2", "drawn_4"]
