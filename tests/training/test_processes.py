"""Which device a process takes, and how long its groups may wait."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, SmallWorld, run_command_line
from ranks import Ranks

from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.parallel import accelerator
from megatron_nuwa.parallel.accelerator import (
    check_accelerator,
    deepspeeds_choice,
    default_device,
    on_gpu,
)
from megatron_nuwa.training import meeting, processes
from megatron_nuwa.training.processes import Processes, join_processes

DISTURBED = ROOT / "tests/training/disturbed/pretrain.py"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Sets what a machine has and what was chosen."""

    def set_up(cuda: bool, driver: bool, choice: str | None, hidden: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        place = tmp_path / "nvidiactl"
        place.touch() if driver else place.unlink(missing_ok=True)
        monkeypatch.setattr(accelerator, "_NVIDIA_DRIVER", place)
        for name, value in (("DS_ACCELERATOR", choice), ("CUDA_VISIBLE_DEVICES", hidden)):
            # delenv alone would not take away afterwards what the code sets.
            monkeypatch.setenv(name, value or "")
            if value is None:
                monkeypatch.delenv(name)

    return set_up


@pytest.mark.parametrize(
    ("cuda", "driver", "choice", "on"),
    [
        (False, False, None, False),
        (False, False, "cpu", False),
        (False, True, "cpu", False),
        (True, True, None, True),
        (True, True, "cuda", True),
        (True, True, "cpu", False),
    ],
)
def test_a_process_computes_where_the_machine_and_the_user_say(
    machine: Any, cuda: bool, driver: bool, choice: str | None, on: bool
) -> None:
    machine(cuda, driver, choice)
    check_accelerator()
    assert on_gpu() == on
    assert default_device() == torch.device("cuda" if on else "cpu")


@pytest.mark.parametrize(
    ("driver", "choice", "hidden", "sign"),
    [
        (True, None, None, r"an NVIDIA driver is here \(\S+\), but CUDA does not work: "),
        (True, "cuda", None, "DS_ACCELERATOR=cuda asks for a GPU, but CUDA does not work: "),
        (False, "cuda", None, "DS_ACCELERATOR=cuda asks for a GPU, but CUDA does not work: "),
        (True, None, "", "CUDA_VISIBLE_DEVICES is ''"),
        (False, "tpu", None, "DS_ACCELERATOR is 'tpu'"),
    ],
)
def test_no_process_falls_back_to_the_cpu_where_a_gpu_is_meant(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    driver: bool,
    choice: str | None,
    hidden: str | None,
    sign: str,
) -> None:
    machine(False, driver, choice, hidden)
    if hidden is not None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=sign):
        check_accelerator()
    with pytest.raises(UserError, match=sign):
        default_device()


def test_the_users_choice_stays_what_it_was(machine: Any) -> None:
    machine(False, True, None)
    with deepspeeds_choice():
        assert os.environ["DS_ACCELERATOR"] == "cpu"
    # Else the next check would take it for the user's.
    assert "DS_ACCELERATOR" not in os.environ


def test_importing_the_trainer_chooses_nothing() -> None:
    program = (
        "import os; os.environ.pop('DS_ACCELERATOR', None); import megatron_nuwa.training.pretrain;"
        "from deepspeed.accelerator import get_accelerator;"
        "print(get_accelerator().device_name(), 'DS_ACCELERATOR' in os.environ)"
    )
    done = run_command_line("python", "-c", program)
    assert done.stdout.split()[-2:] == [
        "cuda" if torch.cuda.is_available() else "cpu",
        "False",
    ], done.stderr


def join_two(monkeypatch: pytest.MonkeyPatch, found: list[Any]) -> list[Any]:
    """What two processes get that find these devices, or fail to: as threads over one store."""
    store, outcomes = dist.HashStore(), [None, None]

    def play(rank: int) -> None:
        try:
            outcomes[rank] = meeting.choose_device_together(
                store, rank, 2, rank, timedelta(seconds=30)
            )
        except UserError as error:
            outcomes[rank] = error

    def choose(local_rank: int) -> torch.device:
        if isinstance(found[local_rank], UserError):
            raise found[local_rank]
        return torch.device(found[local_rank])

    monkeypatch.setattr(meeting, "choose_device", choose)
    players = [threading.Thread(target=play, args=(rank,)) for rank in range(2)]
    for player in players:
        player.start()
    for player in players:
        player.join(60)
    return outcomes


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (["cpu", "cpu"], None),
        (["cuda", "cuda"], None),
        (
            ["cuda", "cpu"],
            "{host}, process 0 computes on a GPU, but {host}, process 1 on the CPU: mend that node",
        ),
        ([UserError("no GPU"), UserError("no GPU")], "{host}, process 0: no GPU"),
        (["cuda", UserError("no GPU")], "{host}, process 1: no GPU"),
    ],
)
def test_processes_that_differ_in_their_device_end_and_the_first_says_which(
    monkeypatch: pytest.MonkeyPatch, found: list[Any], told: str | None
) -> None:
    """With other backends they would wait for each other for ever."""
    outcomes = join_two(monkeypatch, found)
    if told is None:
        assert outcomes == [torch.device(name) for name in found]
        return
    assert [type(outcome) for outcome in outcomes] == [UserError, ReportedElsewhereError]
    assert str(outcomes[0]).startswith(told.format(host=socket.gethostname()))


def test_a_node_without_its_gpu_is_named_before_anything_begins(
    small_world: SmallWorld, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine whose CUDA does not work")
    run = f"run={tmp_path / 'run'}"
    with Ranks(2, tmp_path, small_world.recipe, run, DS_ACCELERATOR="cuda") as ranks:
        assert ranks.wait(120) == [2, 2]
        told = ranks.output().splitlines()
        # PyTorch built for CUDA may add that it finds none.
        [line] = [line for line in told if "torch/utils/cpp_extension.py" not in line]
        assert line.startswith(f"error: {socket.gethostname()}, process 0: DS_ACCELERATOR=cuda ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("world_size", "device", "words"),
    [(1, "cpu", "1 process on the CPU"), (64, "cuda:3", "64 processes, each on a GPU (H100)")],
)
def test_the_first_line_names_number_and_device(
    monkeypatch: pytest.MonkeyPatch, world_size: int, device: str, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert str(Processes(0, world_size, 0, torch.device(device))) == words


def test_no_backend_ends_a_run_before_its_watchdog(small_world: SmallWorld, tmp_path: Path) -> None:
    """In every group that DeepSpeed and the trainer make, with a raised limit."""
    layout = json.loads((ROOT / "ds_configs/pp2_tp2_zero1_fp32.json").read_text())
    layout["parallel"] = {"pipeline": 2}
    (tmp_path / "layout.json").write_text(json.dumps(layout))
    words = [small_world.recipe, f"run={tmp_path / 'run'}", "training.hang_seconds=4000"]
    words += ["--deepspeed_config", tmp_path / "layout.json"]
    with Ranks(2, tmp_path, *words, script=DISTURBED, DISTURB="groups") as ranks:
        assert ranks.wait(120) == [0, 0], ranks.output()
        assert ranks.logs[0].read_text().splitlines()[0] == "2 processes on the CPU"
        found = re.findall(r"(\d+) groups, seconds (.*), monitor (.*)", ranks.output())
    assert len(found) == 2
    assert all(int(number) > 3 for number, _, _ in found)
    assert {(seconds, monitor) for _, seconds, monitor in found} == {("{8000.0}", "8000")}


@pytest.mark.parametrize("fails", [False, True])
def test_nccl_gets_the_time_out_and_does_not_hold_a_failed_process(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Taking its groups down would wait for collectives that the others may never join."""
    given: dict[str, Any] = {}
    ended: list[None] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(int(name == "WORLD_SIZE")))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(processes, "choose_device", lambda rank: torch.device("cuda", rank))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **more: given.update(more, backend=backend)
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(None))
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "5")
    hour = timedelta(hours=1)
    usual = dist.distributed_c10d.default_pg_timeout
    try:
        with join_processes(timeout=hour):
            assert dist.distributed_c10d.default_pg_nccl_timeout == hour
            if fails:
                raise KeyError("a defect")
    except KeyError:
        pass
    assert (given["backend"], given["timeout"]) == ("nccl", hour)
    assert len(ended) == (0 if fails else 1)
    assert dist.distributed_c10d.default_pg_timeout == usual
    # What the user has set stays.
    assert os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "5"
