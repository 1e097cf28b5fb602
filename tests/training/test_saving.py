"""Saving beside the training: the state of its step, bounded memory, a full disk, stop signals."""

from __future__ import annotations

import errno
import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SmallWorld, lone_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from megatron_nuwa.errors import UserError
from megatron_nuwa.training import pretrain as pretraining
from megatron_nuwa.training import saving
from megatron_nuwa.training.checkpoint import MANIFEST_FILE, Checkpoints, read_manifest, tag_of
from megatron_nuwa.training.engine import WholeEngine
from megatron_nuwa.training.monitor import Monitor
from megatron_nuwa.training.pretrain import pretrain
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.saving import Saver
from megatron_nuwa.training.snapshot import Part

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "bf16": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
}


def train(world: SmallWorld, run: Path, *overrides: str, layout: str = "zero1") -> Checkpoints:
    path = run.parent / f"{layout}.json"
    path.write_text(json.dumps(LAYOUTS[layout]))
    recipe = load_recipe(
        world.recipe, [f"run={run}", "evaluation=null", "training.keep_checkpoints=9", *overrides]
    )
    pretrain(recipe, path, lone_process())
    return Checkpoints(run / "checkpoints", keep=9)


def states(checkpoint: Path) -> dict[str, Any]:
    """sha256 of the files with weights and optimizer states, and the random states themselves."""
    files = read_manifest(checkpoint)
    random = torch.load(checkpoint / "random/rank_00000.pt", weights_only=True)
    return {
        **{name: files[name]["sha256"] for name in files if name.endswith("_states.pt")},
        "weights": files["model.safetensors"]["sha256"],
        "random": {**random, "torch": random["torch"].tolist()},
    }


def tensors_of(item: Any) -> list[torch.Tensor]:
    """All tensors in nested containers."""
    if isinstance(item, torch.Tensor):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, list | tuple):
        return [tensor for value in item for tensor in tensors_of(value)]
    return []


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies begin long after the next step did."""
    on_host = Part.on_host

    def slowly(part: Part, copies: dict[Any, torch.Tensor]) -> Part:
        time.sleep(0.1)
        return on_host(part, copies)

    monkeypatch.setattr(Part, "on_host", slowly)


@pytest.mark.usefixtures("slow_copies")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_save_holds_the_state_of_its_step_though_training_goes_on(
    small_world: SmallWorld, tmp_path: Path, layout: str
) -> None:
    every = ("training.checkpoint_every=2", "training.stop_at_step=5")
    beside = train(small_world, tmp_path / "beside", *every, layout=layout)
    alone = train(small_world, tmp_path / "alone", "training.stop_at_step=2", layout=layout)
    two, four, five = beside.all()
    assert states(two) == states(alone.folder / tag_of(2))
    assert len({states(path)["weights"] for path in (two, four, five)}) == 3


def test_less_memory_than_the_state_changes_nothing_but_the_time(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = ("training.checkpoint_every=1", "training.stop_at_step=2")
    plenty = train(small_world, tmp_path / "plenty", *ends)
    sizes = {file["bytes"] for file in read_manifest(plenty.all()[0]).values()}
    copied: list[int] = []
    on_host = Part.on_host

    def noted(part: Part, copies: dict[Any, torch.Tensor]) -> Part:
        copied.append(part.bytes)
        return on_host(part, copies)

    monkeypatch.setattr(Part, "on_host", noted)
    for gib in (0.0, 4e-4):
        assert min(sizes) < gib * 2**30 + 1000 < max(sizes)
        little = train(small_world, tmp_path / str(gib), *ends, f"training.copy_gib={gib}")
        assert max(copied) <= gib * 2**30
        for one, other in zip(plenty.all(), little.all(), strict=True):
            # What was not copied is written as parts of a larger storage.
            for path in one.glob("*_states.pt"):
                first, second = (
                    torch.load(folder / path.name, weights_only=False) for folder in (one, other)
                )
                torch.testing.assert_close(
                    tensors_of(first), tensors_of(second), rtol=0, atol=0, equal_nan=True
                )
            assert states(one)["weights"] == states(other)["weights"]


def test_a_save_that_is_still_running_is_waited_for_and_that_is_said(
    small_world: SmallWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Part.write

    def slowly(part: Part, folder: Path) -> Any:
        time.sleep(0.2)
        return write(part, folder)

    monkeypatch.setattr(Part, "write", slowly)
    ends = ("training.checkpoint_every=1", "training.stop_at_step=3")
    checkpoints = train(small_world, tmp_path / "run", *ends)
    output = capsys.readouterr().out
    assert "the save of step 1 was still running when the next was due" in output
    assert [path.name for path in checkpoints.all()] == [tag_of(step) for step in (1, 2, 3)]
    assert checkpoints.newest() == (checkpoints.folder / tag_of(3), [])


def test_replicas_are_compared_before_every_save(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards a sentence about them would come too late for the checkpoint."""
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(
        pretraining,
        "warn_where_replicas_differ",
        lambda _engine, _processes, step: done.append(("compared", step)),
    )
    save = Saver.save

    def noted(saver: Saver, step: int, texts: Any) -> None:
        done.append(("saved", step))
        save(saver, step, texts)

    monkeypatch.setattr(Saver, "save", noted)
    train(small_world, tmp_path / "run", "training.checkpoint_every=2", "training.stop_at_step=3")
    assert done == [(what, step) for step in (2, 3) for what in ("compared", "saved")]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond: as on a full disk, the first bytes are written and the rest not."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_full_disk_leaves_the_checkpoint_before_whole_and_the_run_alive(
    small_world: SmallWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Part.write

    def on_full_disk(part: Part, folder: Path) -> Any:
        if folder.name != tag_of(2) or not part.name.startswith("zero_"):
            return write(part, folder)
        with largest_file(100_000):
            return write(part, folder)

    monkeypatch.setattr(Part, "write", on_full_disk)
    ends = ("training.checkpoint_every=1", "training.stop_at_step=4")
    checkpoints = train(small_world, tmp_path / "run", *ends)
    output = capsys.readouterr().out
    assert "warning: step 2 could not be saved (File too large: " in output
    assert [path.name for path in checkpoints.all()] == [tag_of(step) for step in (1, 3, 4)]
    for path in checkpoints.all():
        assert (path / MANIFEST_FILE).exists()
        read_manifest(path)
    assert not (checkpoints.folder / ".partial").exists()


def test_a_last_state_that_cannot_be_saved_ends_with_one_sentence(
    small_world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_world, tmp_path / "run", "training.stop_at_step=1")
    write = Part.write

    def on_full_disk(part: Part, folder: Path) -> Any:
        with largest_file(1000):
            return write(part, folder)

    monkeypatch.setattr(Part, "write", on_full_disk)
    with pytest.raises(
        UserError, match=r"the state after step 2 could not be saved in .*make room"
    ):
        train(small_world, tmp_path / "run", "training.stop_at_step=2")
    checkpoints = Checkpoints(tmp_path / "run/checkpoints", keep=1)
    assert checkpoints.newest() == (checkpoints.folder / tag_of(1), [])


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def until_the_next_second() -> None:
    """TensorBoard orders files of one second by their names: the tenth stands before the ninth."""
    time.sleep(1.01 - time.time() % 1)


# TensorBoard's thread says so in its own way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_figures_that_cannot_be_written_are_told_once_and_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Monitor(tmp_path, enabled=True, samples_a_step=1) as monitor:
        monitor.scalars(1, {"x": 1.0})
        with largest_file(10):
            for step in range(2, 30):
                monitor.scalars(step, {"x": 1.0})
        monitor.scalars(30, {"x": 2.0})
        assert capsys.readouterr().out.count("figures are lost") == 1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["x"] == 2.0


def test_a_torn_last_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds": 7.0}\n{"step": 2, "sec')
    with Monitor(tmp_path, enabled=True, samples_a_step=1, step=1) as monitor:
        monitor.scalars(2, {"x": 1.0})
    first, last = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 1, "seconds": 7.0}
    assert json.loads(last)["seconds"] >= 7.0


def test_figures_before_a_stumble_of_the_disk_stay_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Monitor(tmp_path, enabled=True, samples_a_step=10, step=3) as monitor:
        for step in range(4, 7):
            monitor.scalars(step, {"x": 1.0})
        with monkeypatch.context() as stumbling:
            stumbling.setattr(SummaryWriter, "add_scalar", refuse)
            monitor.scalars(7, {"x": 1.0})
        until_the_next_second()
        monitor.scalars(8, {"x": 1.0})
    for folder, scale in ((tmp_path / "tensorboard", 1), (tmp_path / "tensorboard/by_samples", 10)):
        board = EventAccumulator(str(folder)).Reload()
        assert [event.step for event in board.Scalars("x")] == [scale * n for n in (4, 5, 6, 8)]


def test_a_run_that_continues_tells_every_step_once(tmp_path: Path) -> None:
    with Monitor(tmp_path, enabled=True, samples_a_step=10) as monitor:
        for step in range(1, 6):
            monitor.scalars(step, {"x": 0.0})
    until_the_next_second()
    with Monitor(tmp_path, enabled=True, samples_a_step=10, step=3) as monitor:
        for step in range(4, 7):
            monitor.scalars(step, {"x": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [(line["step"], line["x"]) for line in lines]
    assert told == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0), (5, 1.0), (6, 1.0)]
    for folder, scale in ((tmp_path / "tensorboard", 1), (tmp_path / "tensorboard/by_samples", 10)):
        board = EventAccumulator(str(folder)).Reload()
        shown = [(event.step, event.value) for event in board.Scalars("x")]
        assert shown == [(scale * step, value) for step, value in told]


def test_a_save_stays_on_the_gpu_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's device is the first of the node until it says otherwise."""
    chosen: list[tuple[int, torch.device]] = []

    def choose(device: torch.device) -> None:
        chosen.append((threading.get_ident(), device))

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    for device in (torch.device("cpu"), torch.device("cuda", 3)):
        processes = Processes(0, 1, 3, device)
        saver = Saver(Checkpoints(tmp_path, keep=1), None, processes)  # type: ignore[arg-type]
        thread = saver._thread.submit(threading.get_ident).result()
        saver._thread.shutdown()
    assert chosen == [(thread, torch.device("cuda", 3))]


def test_copies_run_on_one_lasting_stream_that_nccl_does_not_work_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch hands out the same few streams of a priority again and again."""
    made: list[tuple[torch.device, int]] = []
    used: list[int] = []

    class Stream:
        def __init__(self, device: torch.device, priority: int = 0) -> None:
            made.append((device, priority))
            self.number = len(made)

    def use(stream: Stream) -> nullcontext[None]:
        used.append(stream.number)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    device = torch.device("cuda", 3)
    processes = Processes(0, 1, 3, device)
    saver = Saver(Checkpoints(tmp_path, keep=1), None, processes)  # type: ignore[arg-type]
    for step in (1, 2):
        parts = [Part.capture(f"step_{step}", {"weight": torch.zeros(3)})]
        assert saver._write(tmp_path, parts, threading.Event()).keys() == {f"step_{step}"}  # type: ignore[union-attr]
    saver._thread.shutdown()
    assert used == [1, 1]
    assert made == [(device, -1)]


@pytest.mark.parametrize(("copy_bytes", "bound"), [(100, 50), (None, 75)])
def test_memory_for_copies_is_shared_by_the_processes_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy_bytes: int | None, bound: int
) -> None:
    """Without a number it is half of what the node has free."""
    processes: Any = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda host: [host, "another node", host]
    )
    monkeypatch.setattr(saving, "free_host_bytes", lambda: 300)
    saver = Saver(Checkpoints(tmp_path, keep=1), None, processes, copy_bytes)  # type: ignore[arg-type]
    saver._thread.shutdown()
    assert saver._bound() == bound


def test_a_save_begins_when_the_gpu_has_computed_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies run on another stream than the step did."""
    awaited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", awaited.append)
    monkeypatch.setattr(saving, "deepspeed_parts", lambda _: [])
    monkeypatch.setattr(saving, "random_state", dict)
    engine = SimpleNamespace(deepspeed=None, is_whole=True, model=torch.nn.Linear(1, 1))
    for device in (torch.device("cpu"), torch.device("cuda", 3)):
        processes = SimpleNamespace(rank=3, is_first=False, device=device)
        saver: Any = SimpleNamespace(_processes=processes, _engine=engine)
        assert [part.name for part in Saver._parts(saver, {})] == ["random/rank_00003.pt"]
    assert awaited == [torch.device("cuda", 3)]


def evaluating(world: SmallWorld) -> tuple[str, str]:
    """Six steps, with an evaluation after the third."""
    corpora = f"evaluation={{every: 3, corpora: {{t2i: [{world.images}]}}}}"
    return corpora, "training.stop_at_step=6"


@pytest.fixture(scope="module")
def six(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run's last checkpoint."""
    run = tmp_path_factory.mktemp("six") / "run"
    return train(small_world, run, *evaluating(small_world)).folder / tag_of(6)


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, "train_step"), (signal.SIGUSR1, "evaluate")],
    ids=["SIGTERM in a step", "SIGUSR1 in an evaluation"],
)
def test_a_signal_saves_the_last_finished_step_and_the_run_goes_on_from_there(
    small_world: SmallWorld,
    six: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    moment: str,
) -> None:
    """In the middle of a step the step is given up."""
    monkeypatch.setattr(pretraining, "LONG_STEP_SECONDS", 0.0)
    act, calls = getattr(WholeEngine, moment), []

    def disturbed(engine: WholeEngine, *arguments: Any) -> Any:
        calls.append(moment)
        between = engine.between

        def raise_signal() -> None:
            signal.raise_signal(number)
            between()

        # At the end of the evaluation after step 3, or within step 4.
        if len(calls) == (1 if moment == "evaluate" else 4):
            engine.between = raise_signal
        return act(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(WholeEngine, moment, disturbed)
        stopped = train(small_world, tmp_path / "run", *evaluating(small_world))
    assert f"{number.name} received: saving step 3 and ending" in capsys.readouterr().out
    assert [path.name for path in stopped.all()] == [tag_of(3)]
    assert signal.getsignal(number) is signal.SIG_DFL
    train(small_world, tmp_path / "run", *evaluating(small_world))
    assert states(stopped.folder / tag_of(6)) == states(six)
