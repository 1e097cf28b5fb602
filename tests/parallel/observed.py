"""What a run does that its figures do not show: what its processes say to each other, and hoard."""

from __future__ import annotations

import pickle
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any
from unittest import mock

from torch import Tensor

from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.training.engine import Engine, StageEngine, WholeEngine
from megatron_nuwa.training.processes import Processes

# The first steps make what is kept; then nothing may grow.
_MEASURED_STEPS = (4, 6, 8)
# What waits for a GPU until it has come so far.
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@dataclass
class Observed:
    """What one process has noted.

    `lengths` of all collections of its engine, at three steps; `reads`, where the CPU would wait
    for the device's numbers, by step (from 1) and instruction of a pipeline's schedule.
    """

    lengths: list[dict[str, int]] = field(default_factory=list)
    reads: Counter[tuple[int, str]] = field(default_factory=Counter)
    step: int = 0


@contextmanager
def observed(run: Path, processes: Processes) -> Iterator[None]:
    """Note what this process does in the block; `read_observed` finds it."""
    notes = Observed()
    with ExitStack() as stack:
        _count_reads(stack, notes)
        for kind in (WholeEngine, StageEngine):
            step = _measuring(kind.train_step, notes, processes)
            stack.enter_context(mock.patch.object(kind, "train_step", step))
        yield
    (run / f"observed_{processes.rank}.pickle").write_bytes(pickle.dumps(notes))


def read_observed(run: Path) -> list[Observed]:
    """What all processes have noted, by rank."""
    count = len(list(run.glob("observed_*.pickle")))
    return [pickle.loads((run / f"observed_{rank}.pickle").read_bytes()) for rank in range(count)]


def grown(notes: Observed) -> dict[str, list[int]]:
    """The collections that are longer at each step they were measured at."""
    first, *_, last = notes.lengths
    lengths = {way: [at.get(way, 0) for at in notes.lengths] for way in first.keys() | last.keys()}
    return {way: found for way, found in lengths.items() if found == sorted(set(found))}


def _measuring(
    train_step: Callable[..., None], notes: Observed, processes: Processes
) -> Callable[..., None]:
    def step(engine: Engine, *arguments: Any) -> None:
        notes.step += 1
        train_step(engine, *arguments)
        # Eight processes would show nothing else.
        if notes.step in _MEASURED_STEPS and processes.world_size == 2:
            # What the engine calls leads to the whole run.
            run = engine.between.__self__  # type: ignore[attr-defined]
            notes.lengths.append(_lengths(engine, besides=run))

    return step


def _count_reads(stack: ExitStack, notes: Observed) -> None:
    running: list[str] = []

    def counting(read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **settings: Any) -> Any:
            if running:
                notes.reads[notes.step, running[-1]] += 1
            return read(*arguments, **settings)

        return counted

    def named(name: str, carry_out: Callable[..., Any]) -> Callable[..., Any]:
        def instruction(*arguments: Any, **settings: Any) -> None:
            running.append(name)
            carry_out(*arguments, **settings)
            running.pop()

        return instruction

    for read in _READS:
        counted = counting(getattr(Tensor, read))
        stack.enter_context(mock.patch.object(Tensor, read, counted))
    import_deepspeed()
    from deepspeed.runtime.pipe.engine import PipelineEngine

    instructions = PipelineEngine._INSTRUCTION_MAP
    noted = {kind: named(kind.__name__, method) for kind, method in instructions.items()}
    stack.enter_context(mock.patch.object(PipelineEngine, "_INSTRUCTION_MAP", noted))


def _lengths(root: object, besides: object) -> dict[str, int]:
    """Length of every collection that can be reached from an object, by the way there."""
    found: dict[str, int] = {}
    seen = {id(besides)}
    waiting: deque[tuple[str, object]] = deque([("", root)])
    while waiting:
        way, thing = waiting.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (list, tuple, set, frozenset, deque, dict)):
            found[way] = len(thing)
        waiting.extend((f"{way}{name}", part) for name, part in _parts(thing))
    return found


def _parts(thing: object) -> Iterator[tuple[str, object]]:
    if isinstance(thing, dict):
        yield from ((f"[{_name(key)}]", value) for key, value in list(thing.items()))
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        yield from ((f"[{number}]", part) for number, part in enumerate(list(thing)))
    elif isinstance(thing, MethodType):
        yield "()", thing.__self__
    elif isinstance(thing, FunctionType):
        yield "", thing.__closure__ or ()
    elif isinstance(thing, CellType):
        with suppress(ValueError):
            yield "", thing.cell_contents
    elif not isinstance(thing, (type, ModuleType, BuiltinFunctionType)):
        yield from ((f".{name}", part) for name, part in getattr(thing, "__dict__", {}).items())


def _name(key: object) -> str:
    return f"tensor of {key.numel()}" if isinstance(key, Tensor) else str(key)[:40]
