"""A run is started again on nodes that answer, are not left out and share every batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT, SmallWorld

from megatron_nuwa.training import nodes
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.stopping import StopSignals
from megatron_nuwa.training.supervision import Supervisor


def nodes_of_starts(
    world: SmallWorld, folder: Path, answers: list[str], *words: str
) -> tuple[list[list[str]], list[str]]:
    """The hostfiles and the arguments of two starts, between which only some of n1 to n4 answer.

    The launcher is a program of deepspeed's name which fails, with what it was given written down.
    """
    (folder / "hosts").write_text("# all\n" + "".join(f"n{n} slots=2\n" for n in (1, 2, 3, 4)))
    launcher = folder / "deepspeed"
    launcher.write_text(
        f'#!/usr/bin/env bash\necho "$@" >> {folder}/given\n'
        f"echo $(cut -s -d' ' -f1 \"$2\") >> {folder}/hosts_given\nexit 1\n"
    )
    launcher.chmod(0o755)
    command = [str(launcher), "--hostfile", str(folder / "hosts"), "--master_addr", "n1"]
    command += ["launch/pretrain.py", str(world.recipe), f"run={folder / 'run'}", *words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "_answers", lambda host: host in answers)
        assert Supervisor(command, StopSignals(), restarts=5, pause_seconds=0).supervise() == 1
    hosts = [line.split() for line in (folder / "hosts_given").read_text().splitlines()]
    return hosts, (folder / "given").read_text().splitlines()


def test_a_restart_leaves_out_nodes_that_do_not_answer(
    small_world: SmallWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = [f"data.tasks.{task}.batch_size=24" for task in ("t2i", "v2v", "t2v")]
    left = ["n2", "n3", "n4"]
    (_, hosts), (first, second) = nodes_of_starts(small_world, tmp_path, left, *sizes)
    assert hosts == left
    assert "--master_addr n1" in first
    assert "--master_addr n2" in second
    errors = capfd.readouterr().err
    assert "without n1, which no longer answers" in errors
    assert "nodes left" not in errors


def test_of_the_nodes_left_the_most_that_share_every_batch_are_taken(
    small_world: SmallWorld, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A batch of 8 has no equal shares for the six processes of three nodes."""
    sizes = [f"data.tasks.{task}.batch_size=8" for task in ("t2i", "v2v", "t2v")]
    (_, hosts), (_, second) = nodes_of_starts(small_world, tmp_path, ["n1", "n2", "n4"], *sizes)
    assert hosts == ["n1", "n2"]
    assert "--master_addr n1" in second
    assert (
        "on 2 of the 3 nodes left (n1, n2), because data.tasks.t2i.batch_size 8 does not divide by "
        "6 data-parallel replicas" in capfd.readouterr().err
    )


def test_the_870m_recipe_goes_on_on_four_of_seven_nodes() -> None:
    recipe = load_recipe(ROOT / "launch/recipes/nuwa_870m.yaml")
    layout = ROOT / recipe.training.deepspeed_config
    why_not = nodes.why_not_with(recipe, layout)
    assert [count for count in range(1, 9) if why_not(8 * count) is None] == [1, 2, 4, 8]
    left = [nodes._Node(f"n{number} slots=8") for number in range(7)]
    command = ["deepspeed", "--hostfile", "h", "launch/pretrain.py", "r"]
    assert nodes._most_that_fit(command, left, why_not) == left[:4]
    # What is trained by the launcher's own choice of slots and nodes counts.
    some = ["deepspeed", "--num_nodes", "6", "--num_gpus", "4", "launch/pretrain.py", "r"]
    assert nodes._most_that_fit(some, left, why_not) == left[:4]
    two = ["deepspeed", "--num_nodes", "2", "launch/pretrain.py", "r"]
    assert nodes._most_that_fit(two, left, why_not) == left
    chosen = ["deepspeed", "--exclude", "n0:1", "launch/pretrain.py", "r"]
    assert nodes._most_that_fit(chosen, left, why_not) == left


def test_a_node_that_answers_again_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    given = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "launch/pretrain.py", "r"]
    answering = ["n2"]
    monkeypatch.setattr(nodes, "_answers", lambda host: host in answering)
    shorter = nodes.on_nodes_left(given, tmp_path / "shorter", lambda processes: None)
    assert Path(shorter[2]).read_text() == "n2 slots=1\n"
    answering.append("n1")
    assert nodes.on_nodes_left(given, tmp_path / "shorter", lambda processes: None) == given


@pytest.mark.parametrize(
    ("filters", "left", "taken"),
    [
        (["--exclude", "n4"], ["n1", "n2", "n3"], None),
        (["--exclude", "n4"], ["n1", "n2"], {"n1": 2, "n2": 2}),
        (["--exclude=n4@n2:1"], ["n1", "n3"], {"n1": 2, "n3": 2}),
        (["-e", "n2:0"], ["n2", "n4"], {"n2": 1, "n4": 2}),
        (["--include", "n2@n3:0@n4"], ["n2", "n3"], {"n2": 2, "n3": 1}),
        (["--include=n2@n3"], ["n1", "n4"], None),
    ],
)
def test_filters_of_the_launcher_and_lost_nodes_go_together(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    filters: list[str],
    left: list[str],
    taken: dict[str, int] | None,
) -> None:
    """None: the command stays as it is, because nothing that it uses is lost, or all is."""
    from deepspeed.launcher import runner

    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"n{n} slots=2\n" for n in (1, 2, 3, 4)))
    master = "n2" if "include" in filters[0] else "n1"
    given = ["deepspeed", f"--hostfile={hostfile}", *filters, f"--master_addr={master}"]
    given += ["launch/pretrain.py", "--hostfile=another"]
    monkeypatch.setattr(nodes, "_answers", lambda host: host in left)
    command = nodes.on_nodes_left(given, tmp_path / "shorter", lambda processes: None)
    if taken is None:
        assert command == given
        return
    options = runner.parse_args(command[1:])
    assert options.user_args == ["--hostfile=another"]
    pool = runner.fetch_hostfile(options.hostfile)
    active = runner.parse_inclusion_exclusion(pool, options.include, options.exclude)
    assert {name: len(slots) for name, slots in active.items()} == taken
    assert options.master_addr == next(iter(taken))


def test_options_that_are_one_word_are_seen(tmp_path: Path) -> None:
    left = [nodes._Node(f"n{number} slots=8") for number in range(3)]
    words = nodes._apart(["deepspeed", "--num_nodes=2", "--num_gpus=4", "launch/pretrain.py", "r"])
    asked: list[int] = []
    nodes._most_that_fit(words, left, lambda processes: asked.append(processes))
    assert asked == [8]
