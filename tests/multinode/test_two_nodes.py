"""Two nodes with addresses of their own, pdsh over ssh, a hostfile: trained like one node."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, SmallWorld, deepspeed_command, run_command_line
from two_nodes import TwoNodes, reason_against, two_nodes

from megatron_nuwa.training.checkpoint import Checkpoints, step_of

SCRIPT = ROOT / "launch/pretrain.py"
TAGS = ("train/loss", "train/loss/t2i", "train/loss/v2v", "train/loss/t2v", "train/grad_norm")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """Both nodes, up."""
    reason = reason_against()
    if reason is not None:
        pytest.skip(f"two nodes on one machine: {reason}")
    with two_nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


def losses(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[line[tag] for tag in TAGS] for line in lines if "train/loss" in line]


def arguments(world: SmallWorld, run: Path, steps: int) -> list[str | Path]:
    return [SCRIPT, world.recipe, f"run={run}", f"schedule.steps={steps}", "evaluation=null"]


def compare(world: SmallWorld, nodes: TwoNodes, folder: Path, slots: int) -> None:
    """Train on both nodes and on one, with as many processes, and compare what was logged."""
    steps = 5
    apart = nodes.run(0, nodes.deepspeed(slots, *arguments(world, folder / "apart", steps)))
    assert apart.returncode == 0, apart.stdout + apart.stderr
    for node, address in enumerate(nodes.addresses):
        assert re.search(rf"^{address}: .*nnodes=2.*node_rank={node}", apart.stdout, re.MULTILINE)
    together = run_command_line(
        *deepspeed_command(2 * slots, *arguments(world, folder / "together", steps))
    )
    assert together.returncode == 0, together.stdout + together.stderr
    assert len(losses(folder / "apart")) == steps
    assert losses(folder / "apart") == losses(folder / "together")


def test_two_nodes_train_like_one_node_with_as_many_processes(
    small_world: SmallWorld, nodes: TwoNodes, tmp_path: Path
) -> None:
    compare(small_world, nodes, tmp_path, slots=1)


@pytest.mark.slow
def test_two_nodes_of_two_processes_train_like_one_of_four(
    small_world: SmallWorld, nodes: TwoNodes, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = small_world.recipe.read_text().replace("batch_size: 2", "batch_size: 4")
    recipe.write_text(text)
    world = SmallWorld(**{**vars(small_world), "recipe": recipe})
    compare(world, nodes, tmp_path, slots=2)


def training(nodes: TwoNodes, node: int) -> list[int]:
    """Ids of the run's processes on a node."""
    found = []
    for number in nodes.processes(node):
        with suppress(psutil.Error):
            words = psutil.Process(number).cmdline()
            if str(SCRIPT) in words[1:3]:
                found.append(number)
    return found


def wait_until(happened: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_whose_second_node_is_cut_off_ends_on_both_and_goes_on_on_the_first(
    small_world: SmallWorld, nodes: TwoNodes, tmp_path: Path
) -> None:
    """By itself, under launch/supervise.py, as another layout."""
    run = tmp_path / "run"
    saving = ("training.checkpoint_every=2", "training.hang_seconds=15")
    supervised = [sys.executable, ROOT / "launch/supervise.py", "--restarts", "2", "--pause", "0"]
    endless = [*arguments(small_world, run, 100_000), *saving]
    launcher = nodes.start(0, [*supervised, *nodes.deepspeed(1, *endless)])
    latest = run / "checkpoints/latest"
    try:
        wait_until(lambda: latest.exists() or launcher.poll() is not None, 120)
        assert launcher.poll() is None, launcher.communicate()
        assert len(training(nodes, 0)) == len(training(nodes, 1)) == 1
        nodes.cut(1)
        for node in (0, 1):
            wait_until(lambda node=node: not training(nodes, node), 90)  # type: ignore[misc]
        whole, complaints = Checkpoints(run / "checkpoints", keep=1).newest()
        assert whole is not None
        assert complaints == []
        wait_until(lambda: latest.read_text().strip() > whole.name or launcher.poll(), 180)
        launcher.send_signal(signal.SIGTERM)
        output, errors = launcher.communicate(timeout=120)
    finally:
        nodes.mend(1)
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, output + errors
    assert "Traceback" not in output + errors
    # Both nodes still see the run's folder.
    waited = r"no process was lost: each waited .* was process [01] on .*, after step \d+: waited"
    assert re.search(waited, errors)
    assert f"without {nodes.addresses[1]}, which no longer answers" in errors
    assert f"continuing after step {step_of(whole)}; " in output
    assert "SIGTERM received: saving step" in output


def test_a_cut_node_is_silent_and_nothing_is_left_after_a_failure(
    nodes: TwoNodes, tmp_path: Path
) -> None:
    """Beside the module's nodes: two pairs do not meet."""
    started: list[subprocess.Popen[str]] = []

    def fail_on(doomed: TwoNodes) -> None:
        assert doomed.run(0, [*doomed.ssh(1), "echo", "here"]).stdout == "here\n"
        doomed.cut(1)
        assert doomed.run(0, [*doomed.ssh(1), "true"]).returncode == 255
        doomed.mend(1)
        assert doomed.run(1, [*doomed.ssh(0), "true"]).returncode == 0
        started.append(doomed.start(1, ["sleep", "600"]))
        raise ZeroDivisionError(*doomed.namespaces)

    with pytest.raises(ZeroDivisionError) as caught, two_nodes(tmp_path) as doomed:
        fail_on(doomed)
    assert started[0].wait(10) != 0
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not any(name in left for name in caught.value.args)
    assert all(name in left for name in nodes.namespaces)
