"""What a run does that its figures do not show: what its processes say to each other, and hoard."""

from __future__ import annotations

import io
import pickle
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_nuwa.parallel.groups import import_deepspeed
from megatron_nuwa.training.engine import Engine, StageEngine, WholeEngine
from megatron_nuwa.training.processes import Processes

# The first steps make what is kept; then nothing may grow.
_MEASURED_STEPS = (4, 6, 8)
# Before its save; another step would undo what is changed.
_LAST_STEP = 10
# What waits for a GPU until it has come so far.
_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
# All that a group can be asked for.
_OPERATIONS = [
    name
    for name in dir(dist.ProcessGroup)
    if re.match("_?(all|reduce|broadcast|gather|scatter|send|recv|(monitored_)?barrier)", name)
    and not name.startswith("_register")
]
_MIRRORED = {"send": "recv", "recv": "send"}


class Call(NamedTuple):
    """One process's part in a communication: `ranks` of the group, of its peer for a message."""

    ranks: tuple[int, ...]
    operation: str
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    reduction: str
    is_in_main_thread: bool


@dataclass
class Observed:
    """What one process has noted.

    `calls`, all it took part in; `tensor_group`, the ranks that share its layers; `said`, all it
    printed; `lengths` of all collections of its engine, at three steps; `reads`, where the CPU
    would wait for the device's numbers, by step (from 1) and instruction of a pipeline's schedule.
    """

    calls: list[Call] = field(default_factory=list)
    tensor_group: tuple[int, ...] = ()
    lengths: list[dict[str, int]] = field(default_factory=list)
    said: str = ""
    reads: Counter[tuple[int, str]] = field(default_factory=Counter)
    step: int = 0


@contextmanager
def observed(run: Path, processes: Processes, disturb: str | None = None) -> Iterator[None]:
    """Note what this process does in the block; `read_observed` finds it.

    `disturb` is the weight that the last process changes after the tenth step.
    """
    notes, said = Observed(), io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(said))
        _count_reads(stack, notes)
        _note_calls(stack, notes)
        for kind in (WholeEngine, StageEngine):
            step = _measuring(kind.train_step, notes, processes, disturb)
            stack.enter_context(mock.patch.object(kind, "train_step", step))
        yield
    notes.said = said.getvalue()
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


def rehearse(observed: Sequence[Observed]) -> str:
    """Go through all calls as if each waited for all it concerns; what they come to a halt at.

    Empty where all get to the end. NCCL's calls wait so, on the device; gloo's sends do not, and
    it pairs what is not alike.
    """
    waiting = [deque(notes.calls) for notes in observed]
    moves = True
    while moves:
        moves = False
        for rank, calls in enumerate(waiting):
            while calls and (partners := _partners(rank, calls[0], waiting)):
                for partner in partners:
                    waiting[partner].popleft()
                moves = True
    heads = [f"{rank}: {calls[0]}" for rank, calls in enumerate(waiting) if calls]
    return "\n".join(heads)


def _partners(rank: int, call: Call, waiting: Sequence[deque[Call]]) -> list[int]:
    """Whom a process's next call goes on with; none where one of them is elsewhere."""
    if call.operation in _MIRRORED:
        [peer] = call.ranks
        answer = call._replace(ranks=(rank,), operation=_MIRRORED[call.operation])
        return [rank, peer] if waiting[peer] and waiting[peer][0] == answer else []
    ready = all(waiting[member] and waiting[member][0] == call for member in call.ranks)
    return [*call.ranks] if ready else []


def half_sums(notes: Observed) -> set[Call]:
    """Sums of numbers in half precision over others than the tensor group."""
    return {
        call
        for call in notes.calls
        if call.reduction in ("SUM", "AVG")
        and set(call.dtypes) & {"torch.float16", "torch.bfloat16"}
        and call.ranks != notes.tensor_group
        and len(call.ranks) > 1
    }


def _note_calls(stack: ExitStack, notes: Observed) -> None:
    def noting(operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(group: dist.ProcessGroup, *arguments: Any, **settings: Any) -> Any:
            ranks = dist.get_process_group_ranks(group)
            if not notes.step:
                # Before the first step things are tried out in ways of their own.
                return call(group, *arguments, **settings)
            concerned = [ranks[arguments[1]]] if operation in _MIRRORED else ranks
            found = [*_tensors([*arguments, *settings.values()])]
            options = [getattr(option, "reduceOp", None) for option in arguments]
            reductions = [_reduction(option) for option in options if option is not None]
            notes.calls.append(
                Call(
                    tuple(concerned),
                    operation,
                    tuple(str(tensor.dtype) for tensor in found),
                    tuple(tensor.numel() for tensor in found),
                    *(reductions or [""]),
                    threading.current_thread() is threading.main_thread(),
                )
            )
            return call(group, *arguments, **settings)

        return noted

    for operation in _OPERATIONS:
        noted = noting(operation, getattr(dist.ProcessGroup, operation))
        stack.enter_context(mock.patch.object(dist.ProcessGroup, operation, noted))


def _tensors(things: Iterable[Any]) -> Iterator[Tensor]:
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, (list, tuple)):
            yield from _tensors(thing)


def _reduction(operation: Any) -> str:
    return str(getattr(operation, "op", operation)).rsplit(".", 1)[-1]


def _measuring(
    train_step: Callable[..., None], notes: Observed, processes: Processes, disturb: str | None
) -> Callable[..., None]:
    def step(engine: Engine, *arguments: Any) -> None:
        notes.step += 1
        group = engine.place.tensor.group
        notes.tensor_group = () if group is None else tuple(dist.get_process_group_ranks(group))
        train_step(engine, *arguments)
        # Eight processes would show nothing else.
        if notes.step in _MEASURED_STEPS and processes.world_size == 2:
            # What the engine calls leads to the whole run.
            run = engine.between.__self__  # type: ignore[attr-defined]
            notes.lengths.append(_lengths(engine, besides=run))
        if disturb and notes.step == _LAST_STEP and processes.rank == processes.world_size - 1:
            with torch.no_grad():
                dict(engine.model.named_parameters())[disturb].add_(0.1)

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
