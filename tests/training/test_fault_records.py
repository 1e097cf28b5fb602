"""What processes write down of their end, and which of it is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_nuwa.errors import (
    FailedProcessError,
    MachineError,
    ReportedElsewhereError,
    UnreadableError,
    UserError,
)
from megatron_nuwa.training import faults
from megatron_nuwa.training.faults import (
    cause,
    clear_faults,
    read_faults,
    write_fault,
    written_down,
)
from megatron_nuwa.training.stopping import StopRequested


def process(rank: int) -> Any:
    return SimpleNamespace(rank=rank, world_size=5)


def write(run: Path, monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """One fault a process, each a second later than the one before."""
    for rank, kind in enumerate(kinds):
        monkeypatch.setattr(faults.time, "time", lambda rank=rank: 100.0 + rank)
        write_fault(run, process(rank), 7, kind, f"sentence {rank}", "details")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "first"),
    [
        (("lost", "hang", "error", "mistake"), 3),
        (("lost", "lost", "hang", "error"), 3),
        (("lost", "hang"), 1),
        (("lost", "error", "error"), 1),
    ],
)
def test_the_fault_that_counts_most_and_came_first_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], first: int
) -> None:
    write(tmp_path, monkeypatch, *kinds)
    assert read_faults(tmp_path)[0].rank == first
    assert f"process {first} on " in cause(read_faults(tmp_path))
    assert f"after step 7: sentence {first}" in cause(read_faults(tmp_path))


def test_the_first_of_equal_faults_is_told_whatever_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for time, rank in ((9.0, 0), (8.0, 1)):
        monkeypatch.setattr(faults.time, "time", lambda time=time: time)
        write_fault(tmp_path, process(rank), 1, "error", "sentence", "")
    assert [fault.rank for fault in read_faults(tmp_path)] == [1, 0]


def test_processes_that_lost_another_name_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cause(read_faults(tmp_path)).startswith("no process said why")
    write(tmp_path, monkeypatch, "lost", "lost")
    assert "the others (process 0, 1) lost it after step 7" in cause(read_faults(tmp_path))


def test_where_all_have_waited_none_is_called_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, monkeypatch, *["lost"] * 4)
    assert "a process was killed" in cause(read_faults(tmp_path))
    write(tmp_path, monkeypatch, *["lost"] * 5)
    said = cause(read_faults(tmp_path))
    assert said.startswith("no process was lost: each waited for the others, or what connects")
    assert said.endswith("after step 7: sentence 0")


def test_torn_and_earlier_records_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, monkeypatch, "error", "error", "error")
    for rank, text in ((0, '{"rank": 0'), (1, "[]"), (2, '{"rank": 2}')):
        (tmp_path / "faults" / f"rank_{rank:05d}.json").write_text(text)
    assert read_faults(tmp_path) == []
    write(tmp_path, monkeypatch, "error")
    assert len(read_faults(tmp_path)) == 1
    clear_faults(tmp_path)
    assert read_faults(tmp_path) == []
    assert list((tmp_path / "faults").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "raised"),
    [
        (UserError("a field"), "mistake", UserError),
        (UnreadableError("a shard"), "error", FailedProcessError),
        (MachineError("no ffmpeg"), "error", FailedProcessError),
        (RuntimeError("a defect"), "error", FailedProcessError),
        (RuntimeError("Connection closed by peer [127.0.0.1]"), "lost", FailedProcessError),
        (dist.DistBackendError("NCCL"), "lost", FailedProcessError),
        (dist.DistBackendError("without a word"), "lost", FailedProcessError),
        (dist.DistNetworkError("NCCL error: remote process exited"), "lost", FailedProcessError),
        (
            dist.DistBackendError("NCCL error: unhandled cuda error 'out of memory'"),
            "error",
            FailedProcessError,
        ),
        (
            dist.DistBackendError("NCCL error: Bootstrap : no socket interface found"),
            "error",
            FailedProcessError,
        ),
        *(
            (dist.DistBackendError(f"NCCL error in: a.cpp:1, {own}"), "error", FailedProcessError)
            for own in (
                "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                "invalid usage (run with NCCL_DEBUG=WARN for details)",
                "invalid argument (run with NCCL_DEBUG=WARN for details)",
                "system error. Last error: Out of memory",
            )
        ),
        *(
            (RuntimeError(gone), "lost", FailedProcessError)
            for gone in (
                "[gloo/transport/tcp/pair.cc:1] a sentence",
                "NCCL communicator was aborted on rank 3.",
                "writev: Connection reset by peer",
                "write: Broken pipe",
            )
        ),
        # A file's name may hold anything.
        (ValueError("gloo/no such file"), "error", FailedProcessError),
    ],
)
def test_an_end_is_written_down_by_its_kind(
    tmp_path: Path, error: Exception, kind: str, raised: type[Exception]
) -> None:
    with pytest.raises(raised), written_down(tmp_path, process(4), lambda: 12):
        raise error
    [fault] = read_faults(tmp_path)
    assert (fault.rank, fault.step, fault.kind) == (4, 12, kind)
    assert str(error) in fault.sentence


@pytest.mark.parametrize("error", [ReportedElsewhereError("elsewhere"), StopRequested(15)])
def test_an_end_that_another_process_tells_or_a_signal_asks_for_is_no_fault(
    tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)), written_down(tmp_path, process(0), lambda: 1):
        raise error
    assert read_faults(tmp_path) == []


def test_a_defect_shows_its_traceback_and_a_loss_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (RuntimeError("a defect"), RuntimeError("Broken pipe")):
        with pytest.raises(FailedProcessError), written_down(tmp_path, process(2), lambda: 9):
            raise error
        shown = capsys.readouterr()
        if "defect" in str(error):
            assert shown.out == ""
            assert "Traceback (most recent call last)" in shown.err
            assert shown.err.endswith("RuntimeError: a defect\n")
        else:
            assert shown.err == ""
            assert shown.out.endswith("ends after step 9: another one is gone\n")
    assert "Traceback" in read_faults(tmp_path)[0].details


def test_a_fault_that_cannot_be_written_down_is_still_the_one_that_is_raised(
    tmp_path: Path,
) -> None:
    (tmp_path / "faults").write_text("no folder")
    said = "after step 9: RuntimeError: a defect"
    with (
        pytest.raises(FailedProcessError, match=said),
        written_down(tmp_path, process(2), lambda: 9),
    ):
        raise RuntimeError("a defect")
