"""What the preflight finds in the reports of processes, among them what only GPUs report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers import SmallWorld, without_privileges

from megatron_nuwa.parallel.layout import Layout
from megatron_nuwa.training import preflight as room
from megatron_nuwa.training.preflight import Findings, ProcessReport, examine, free_host_bytes
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.recipe import Recipe, load_recipe
from megatron_nuwa.training.speed_probe import Speeds

GIB = 2**30


def report(rank: int, **changes: Any) -> ProcessReport:
    """Of one of two processes a node."""
    usual: dict[str, Any] = {
        "rank": rank,
        "host": "ab"[rank // 2],
        "device": "H100",
        "versions": {"python": "3.11", "apex": "0.1"},
        "attention": "cuda",
        "attention_reason": None,
        "free_device_bytes": 70 * GIB,
        "free_host_bytes": 100 * GIB,
        "corpora": {"corpus": "abc"},
        "sees_run_folder": True,
    }
    return ProcessReport(**{**usual, **changes})


def found(
    monkeypatch: pytest.MonkeyPatch,
    *reports: ProcessReport,
    device: str = "cuda",
    link: float = 100e9,
    **needed: Any,
) -> Findings:
    """Of the process with the first report."""
    world_size = len(reports)
    processes: Any = SimpleNamespace(
        device=torch.device(device), world_size=world_size, gather=lambda own: [*reports]
    )
    links = {(0, 1): link} if world_size > 1 else {}
    speeds = Speeds([1e12] * world_size, [1e9] * world_size, links)
    monkeypatch.setattr(room, "measure_speeds", lambda *_: speeds)
    monkeypatch.setattr(room, "_report", lambda *_: reports[0])
    recipe: Any = SimpleNamespace(run="run")
    layout = Layout(1, 1, world_size, 1, "bf16", False, False, "flops")
    return examine(recipe, layout, processes, **needed)


def test_a_gpu_with_too_little_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [report(0), report(1, free_device_bytes=60 * GIB)]
    assert found(monkeypatch, *reports, bytes_needed=60 * GIB).problems == []
    [problem] = found(monkeypatch, *reports, bytes_needed=60 * GIB + 1).problems
    assert problem.startswith("a (process 1) has 60 GiB free on its H100, but the run needs 60 GiB")


def test_what_gpus_need_of_their_node_is_for_all_its_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports = [report(0), report(1, free_host_bytes=90 * GIB), report(2)]
    enough = found(monkeypatch, *reports, bytes_needed=60 * GIB, host_bytes_needed=45 * GIB)
    assert enough.problems == []
    [problem] = found(monkeypatch, *reports, host_bytes_needed=46 * GIB).problems
    assert problem.startswith("a has 90 GiB of memory free, but its 2 processes need 46 GiB each")


def test_what_cpus_need_is_their_node_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [report(rank, free_device_bytes=None) for rank in (0, 1)]
    needed = {"device": "cpu", "bytes_needed": 51 * GIB, "host_bytes_needed": 1}
    [problem] = found(monkeypatch, *reports, **needed).problems
    assert problem.startswith("a has 100 GiB of memory free")


def test_one_node_without_apex_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other = report(2, versions={"python": "3.11", "apex": "not installed"})
    [problem] = found(monkeypatch, report(0), report(1), other).problems
    assert problem.startswith("apex is 0.1 on a (process 0) but not installed on b (process 2)")


def test_apex_counts_where_it_may_be_taken_and_is_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(name="any")
    monkeypatch.setattr(room, "_version", lambda package: f"{package}'s")
    assert room._versions(recipe)["apex"] == "not installed"
    monkeypatch.setattr(room, "find_apex", lambda part, name: object())
    assert room._versions(recipe)["apex"] == "apex's"
    plain = Recipe(name="any", optimizer={"implementation": "torch"}, training={"norm": "torch"})
    assert "apex" not in room._versions(plain)


@pytest.mark.parametrize("slow", [0, 2])
def test_the_slower_attention_is_explained_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    changes = {"attention": "reference", "attention_reason": "no kernel for it"}
    reports = [report(rank, **(changes if rank == slow else {})) for rank in range(3)]
    [problem] = found(monkeypatch, *reports).problems
    place = f"{'ab'[slow // 2]} (process {slow})"
    assert problem.endswith(f"wait for the slower one: on {place}, no kernel for it")
    assert f"'reference' on {place}" in problem


def test_slow_links_are_a_warning_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = [report(0), report(1)]
    assert found(monkeypatch, *reports).warnings == []
    [warning] = found(monkeypatch, *reports, link=1e9).warnings
    assert warning.startswith("the links inside the nodes are slow, 1 GB/s")
    assert found(monkeypatch, *reports, link=1e9, device="cpu").warnings == []


def test_a_lone_process_is_measured_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert found(monkeypatch, report(0)).speeds is None
    assert found(monkeypatch, report(0), measure_alone=True).speeds is not None


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_attention_is_asked_for_as_training_will_call_it(
    monkeypatch: pytest.MonkeyPatch, precision: Any, dtype: torch.dtype
) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(room, "explain_auto", asked.append)
    recipe: Any = SimpleNamespace(model=SimpleNamespace(width=96, heads=4))
    layout = Layout(1, 1, 1, 1, precision, False, False, "flops")
    room._attention(recipe, layout, torch.device("cpu"))
    assert [(query.dtype, query.shape[-1]) for query in asked] == [(dtype, 24)]


def test_a_run_folder_that_is_there_needs_no_rights_to_its_parent(
    small_world: SmallWorld, open_folder: Path
) -> None:
    """As where a volume is mounted at run=/output."""
    run = open_folder / "output"
    run.mkdir()
    run.chmod(0o777)
    recipe = load_recipe(small_world.recipe, [f"run={run}"])
    open_folder.chmod(0o555)
    with without_privileges():
        assert room._sees_run_folder(recipe, Processes(0, 2, 0, torch.device("cpu")))
    assert list(run.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", 8, 20), (str(10 * GIB), 8, 5), (str(90 * GIB), 8, 20), (str(4 * GIB), 8, 0)],
)
def test_free_memory_is_the_container_s_share_of_the_node_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, used: int, expected: int
) -> None:
    """Its cached files do not count."""
    node = SimpleNamespace(available=20 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: node)
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert free_host_bytes() == 20 * GIB
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used * GIB}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon 1\ninactive_file {3 * GIB}\nactive_file {GIB}\nworkingset_inactive_file_x 7\n"
    )
    assert free_host_bytes() == expected * GIB
