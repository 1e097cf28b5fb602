"""Two nodes with addresses of their own, pdsh over ssh, a hostfile: trained like one node."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, SmallWorld, deepspeed_command, run_command_line
from two_nodes import TwoNodes, reason_against, two_nodes

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
