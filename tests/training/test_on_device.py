"""NCCL takes no tensors of the CPU: what is sent to others lies on the process's own device.

The device "meta" stands for a GPU here. It computes nothing, so a function is followed until it
reads a number.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT
from torch import Tensor

from megatron_nuwa.models.quantizer import VectorQuantizer
from megatron_nuwa.parallel.pipeline import Traffic
from megatron_nuwa.training import codebook_upkeep, evaluation, speed_probe
from megatron_nuwa.training.codebook_upkeep import CodebookKeeper
from megatron_nuwa.training.engine import Loss, StageEngine, WholeEngine
from megatron_nuwa.training.figures import StepFigures
from megatron_nuwa.training.own_time import Stragglers
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.replicas import largest_difference
from megatron_nuwa.training.vqgan_evaluation import evaluate_vqgan
from megatron_nuwa.training.vqgan_figures import FigureWindow
from megatron_nuwa.training.vqgan_recipe import CodebookUpkeep
from megatron_nuwa.training.vqgan_step import VqganStep

GPU = torch.device("meta")
# The second of two, to which the first tells what it alone computes.
PROCESSES = Processes(1, 2, 1, GPU)
SENDING = (
    "all_reduce",
    "all_gather",
    "all_gather_single",
    "all_gather_into_tensor",
    "broadcast",
    "reduce",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "send",
    "recv",
    "isend",
    "irecv",
)
# Sends what it is given, by a model that lies on the device.
GIVEN = {"parallel/collectives.py"}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices of all that is sent."""
    devices: list[torch.device] = []

    def note(*arguments: Any, **_: Any) -> None:
        for argument in arguments:
            for tensor in argument if isinstance(argument, list) else [argument]:
                if isinstance(tensor, Tensor):
                    devices.append(tensor.device)

    for name in SENDING:
        if hasattr(dist, name):
            monkeypatch.setattr(dist, name, note)
    monkeypatch.setattr(dist, "all_gather_object", lambda *_: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    return devices


def _losses() -> list[Loss]:
    return [Loss("t2i", torch.zeros((), device=GPU), 1.0)]


def _mean_losses() -> None:
    figures = object.__new__(StepFigures)
    figures._processes, figures._weights = PROCESSES, {"t2i": 1.0}
    figures.mean_losses([])
    figures.mean_losses(_losses())


def _largest() -> None:
    figures = object.__new__(StepFigures)
    figures._processes = PROCESSES
    figures._largest(1.0, 2.0)


def _window() -> None:
    window = FigureWindow(8, PROCESSES)
    window.add({"train/loss": torch.zeros(())}, torch.zeros(8, device=GPU), 0)
    window.close(4)


def _keeper() -> CodebookKeeper:
    quantizer = VectorQuantizer(8, 4).to(GPU)
    keeper = CodebookKeeper(quantizer, CodebookUpkeep(restart_every=1, kmeans_vectors=8), 0)
    # Which codes are dead is read.
    keeper._is_dead = lambda: torch.ones(8, dtype=torch.bool)  # type: ignore[method-assign]
    return keeper


def _restart() -> None:
    _keeper().restart_dead(0, torch.zeros(8, 4, device=GPU))


def _start() -> None:
    _keeper().start(0, iter([torch.zeros(8, 4, device=GPU)]))


def _count() -> None:
    # How long a count is depends on what is counted.
    with mock.patch.object(torch, "bincount", lambda t, minlength: t.new_zeros(minlength)):
        _keeper().count(torch.zeros(3, dtype=torch.int64, device=GPU))


def _vqgan() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(classes=None, codebook_size=8))
    evaluate_vqgan(model, [], 1, GPU, 0)  # type: ignore[arg-type]


def _step_mean() -> None:
    VqganStep._mean(SimpleNamespace(processes=PROCESSES), torch.zeros((), device=GPU))  # type: ignore[arg-type]


def _evaluate_stage() -> None:
    engine = object.__new__(StageEngine)
    engine.device, engine.between = GPU, lambda: None
    engine.evaluate([])


def _announce(first: bool) -> None:
    grid = SimpleNamespace(stage_to_global=lambda _: 0, get_pipe_parallel_group=lambda: None)
    engine = SimpleNamespace(
        grid=grid,
        is_first_stage=lambda: first,
        _send_tensor_meta=None,
        _recv_tensor_meta=None,
    )
    flow: Any = SimpleNamespace(notes=[0] * 10)
    Traffic(engine, GPU).announce([flow], 1)


def _fetch() -> None:
    engine = object.__new__(WholeEngine)
    engine.place = SimpleNamespace(tensor=None)  # type: ignore[assignment]
    engine._fetch(torch.zeros(2, 2, device=GPU), is_here=True, leader=1)


def _probe() -> None:
    with mock.patch.dict(speed_probe._BYTES, {GPU.type: 16}):
        speed_probe._all_reduce_speed(PROCESSES)


CASES: dict[str, list[Callable[[], object]]] = {
    "training/processes.py agree": [lambda: PROCESSES.agree([1, 2])],
    "training/figures.py mean_losses": [_mean_losses],
    "training/figures.py _largest": [_largest],
    "training/own_time.py compare": [lambda: Stragglers(PROCESSES).compare(1.0)],
    "training/evaluation.py _mean": [lambda: evaluation._mean([], GPU)],
    "training/vqgan_figures.py close": [_window],
    "training/vqgan_evaluation.py evaluate_vqgan": [_vqgan],
    "training/vqgan_step.py _mean": [_step_mean],
    "training/codebook_upkeep.py start": [_start],
    "training/codebook_upkeep.py count": [_count],
    "training/codebook_upkeep.py restart_dead": [_restart],
    "training/codebook_upkeep.py _gather": [
        lambda: codebook_upkeep._gather(torch.zeros(8, 4, device=GPU))
    ],
    "training/engine.py evaluate": [_evaluate_stage],
    "training/engine.py _fetch": [_fetch],
    "training/replicas.py largest_difference": [
        # Its weights are offloaded.
        lambda: largest_difference({"weight": torch.zeros(2, 2)}, None, GPU)  # type: ignore[arg-type]
    ],
    "parallel/pipeline.py announce": [lambda: _announce(True), lambda: _announce(False)],
    "training/speed_probe.py _all_reduce_speed": [_probe],
}


@pytest.mark.parametrize("place", CASES)
def test_what_is_sent_lies_on_the_device(place: str, sent: list[torch.device]) -> None:
    for call in CASES[place]:
        before = len(sent)
        # Where it reads a number.
        with suppress(NotImplementedError, RuntimeError):
            call()
        assert len(sent) > before
    assert {*sent} == {GPU}


def test_every_place_that_sends_tensors_is_held_to_it() -> None:
    found = set()
    for path in sorted((ROOT / "megatron_nuwa").rglob("*.py")):
        name = str(path.relative_to(ROOT / "megatron_nuwa"))
        if name not in GIVEN:
            found |= {f"{name} {function}" for function in _senders(path)}
    assert found == {*CASES}


def _senders(path: Path) -> set[str]:
    """Functions that call `dist.all_reduce` and the like themselves."""
    functions = (
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    )
    return {
        function.name
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "dist"
        and node.func.attr in SENDING
    }
