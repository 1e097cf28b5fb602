"""What is wrong with a run's nodes is said once, every process ends, and nothing is left."""

from __future__ import annotations

import json
import multiprocessing
import queue
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, SmallWorld, lone_process
from preflight_scenes import HOSTS, SCENES, Outcome, play

from launch import preflight
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.plan.__main__ import main as plan
from megatron_nuwa.training.launcher import free_port
from megatron_nuwa.training.preparing import read_whole_layout
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.speed_probe import Speeds, link_rounds, slow_parts

Outcomes = dict[str, list[Outcome]]


@pytest.fixture(scope="module")
def outcomes(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Every scene's outcomes by rank; a process that hangs fails here."""
    folder = tmp_path_factory.mktemp("preflight")
    shutil.copytree(small_world.images, folder / "corpora/images")
    shutil.copytree(small_world.clips, folder / "corpora/clips")
    own = folder / "node-with-its-own-disk"
    shutil.copytree(folder / "corpora", own / "corpora")
    manifest = own / "corpora/images/corpus.json"
    manifest.write_text(manifest.read_text() + "\n")
    recipe = yaml.safe_load(small_world.recipe.read_text())
    text = yaml.safe_dump({**recipe, "run": "runs/mine"})
    text = text.replace(str(small_world.folder), "corpora")
    for place in (folder, own):
        (place / "relative.yaml").write_text(text)

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = free_port()
    players = [
        context.Process(target=play, args=(rank, port, str(folder), results))
        for rank in range(len(HOSTS))
    ]
    for player in players:
        player.start()
    by_rank: dict[int, dict[str, Outcome]] = {}
    try:
        while len(by_rank) < len(HOSTS):
            rank, found = results.get(timeout=120)
            by_rank[rank] = found
    except queue.Empty:
        pytest.fail(f"only the processes {sorted(by_rank)} of {len(HOSTS)} came to an end")
    finally:
        for player in players:
            player.join(10)
            player.kill()
    return {name: [by_rank[rank][name] for rank in range(len(HOSTS))] for name in SCENES}


def told_once(outcomes: list[Outcome]) -> str:
    assert [kind for kind, _ in outcomes] == [
        "UserError",
        "ReportedElsewhereError",
        "ReportedElsewhereError",
    ], outcomes
    text = str(outcomes[0][1])
    assert "\n" not in text
    return text


@pytest.mark.parametrize("scene", ["everything right", "still together"])
def test_nothing_is_said_and_nothing_is_left_where_all_is_right(
    outcomes: Outcomes, scene: str
) -> None:
    expected: Any = ("returned", ([], ["corpora", "node-with-its-own-disk", "relative.yaml"]))
    assert outcomes[scene] == [expected] * 3


def test_every_device_and_link_is_measured(outcomes: Outcomes) -> None:
    # alpha's own link, and the first places of both nodes.
    assert outcomes["really measured"] == [("returned", (3, [(0, 1), (0, 2)], True))] * 3


@pytest.mark.parametrize(
    ("scene", "parts"),
    [
        ("another torch", ["torch is 2.", "alpha (process 0)", "2.12.0 on beta (process 2)"]),
        ("run folder of its own", ["runs/mine is not shared", "beta (process 2)", "run=FOLDER"]),
        ("run folder of a file", ["cannot be written", "run=FOLDER"]),
        ("corpus missing", ["corpora/images has no corpus.json", "beta (process 2)"]),
        ("another corpus", ["corpora/images is another one on beta (process 2)"]),
        ("little memory", ["alpha has 5 GiB", "2 processes need 3 GiB each"]),
        (
            "kernels missing on one node",
            [
                "runs on the backend 'cpu' on alpha (process 0) but on 'reference' on beta (proc",
                "on beta (process 2), _native_cpu.so was not built: no C++ compiler",
            ],
        ),
        ("layout for four", ["pp2_tp1_dp2_zero1_fp32 is for 4 processes, but 3 were started"]),
        ("mistake of the last", ["beta, process 2: tokenizers.bpe bpe.json cannot be read"]),
    ],
)
def test_a_mistake_is_told_once_and_ends_every_process(
    outcomes: Outcomes, scene: str, parts: list[str]
) -> None:
    text = told_once(outcomes[scene])
    assert all(part in text for part in parts), text


def test_a_slow_device_is_a_warning_that_names_it(outcomes: Outcomes) -> None:
    warning = "the device of process 1 on alpha is slow: 0.1 TFLOP/s, the median is 1"
    assert outcomes["slow device"] == [("returned", [warning])] * 3


def test_that_no_node_has_kernels_is_a_warning(outcomes: Outcomes) -> None:
    warning = (
        "nearby attention runs on the backend 'reference', many times slower than the kernels: "
        "_native_cpu.so was not built: no C++ compiler"
    )
    assert outcomes["kernels missing"] == [("returned", [warning])] * 3


def test_gpus_without_their_fast_network_are_warned_of() -> None:
    hosts = ["a", "a", "b", "b"]
    links = {(0, 1): 100e9, (2, 3): 100e9, (0, 2): 1.2e9, (1, 3): 1.1e9}
    speeds = Speeds([1e12] * 4, [1e9] * 4, links)
    assert slow_parts(speeds, hosts, on_gpus=False) == []
    assert slow_parts(speeds, hosts, on_gpus=True) == [
        "the links between the nodes are slow, 1.15 GB/s at the median: see with "
        "NCCL_DEBUG=INFO whether NCCL finds faster ones, if there are any"
    ]


@pytest.mark.parametrize(
    ("inside", "outside", "told"),
    [(6e9, 4e9, []), (4e9, 4e9, ["inside"]), (6e9, 2e9, ["between"]), (4e9, 2e9, None)],
)
def test_what_is_slow_for_gpus_depends_on_where_the_link_lies(
    inside: float, outside: float, told: list[str] | None
) -> None:
    hosts = ["a", "a", "a", "b", "b", "b"]
    links = {(0, 1): inside, (1, 2): inside, (0, 2): inside * 1.9, (3, 4): inside * 0.4}
    links |= {(0, 3): outside, (1, 4): outside, (2, 5): outside * 1.9}
    speeds = Speeds([1e12] * 6, [1e9] * 6, links)
    found = [sentence.split()[2:5] for sentence in slow_parts(speeds, hosts, on_gpus=True)]
    expected = ["inside", "between"] if told is None else told
    assert found == [[where, "the", "nodes"] for where in expected]


def test_devices_are_compared_with_the_median_and_two_links_with_nothing() -> None:
    uneven = Speeds([1e12, 2e12, 2e12, 10e12], [1e9] * 4, {})
    assert slow_parts(uneven, ["a"] * 4, on_gpus=True) == []
    two = {(0, 1): 1e9, (0, 2): 9e9}
    assert slow_parts(Speeds([1e12] * 3, [1e9] * 3, two), ["a", "b", "c"], on_gpus=False) == []


def test_a_slow_link_is_compared_with_links_of_its_kind() -> None:
    hosts = ["a", "a", "b", "b", "c", "c", "d", "d"]
    pairs = [pair for pairs in link_rounds(hosts) for pair in pairs]
    inside = {pair: 100e9 for pair in pairs if hosts[pair[0]] == hosts[pair[1]]}
    outside = {pair: 10e9 for pair in pairs if pair not in inside}
    equal = Speeds([1e12] * 8, [1e9] * 8, {**inside, **outside})
    assert slow_parts(equal, hosts, on_gpus=True) == []
    slow = Speeds([1e12] * 8, [1e9] * 8, {**inside, **outside, (3, 5): 2e9, (4, 5): 20e9})
    assert slow_parts(slow, hosts, on_gpus=True) == [
        "the link of process 4 on c and process 5 on c is slow: 20 GB/s, the median is 100",
        "the link of process 3 on b and process 5 on c is slow: 2 GB/s, the median is 10",
    ]


@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
@pytest.mark.parametrize("slots", [1, 2, 8])
def test_rounds_give_every_process_one_partner_at_a_time(nodes: int, slots: int) -> None:
    hosts = [f"node-{node}" for node in range(nodes) for _ in range(slots)]
    rounds = link_rounds(hosts)
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(set(ranks)) == len(ranks)
    joined = {pair for pairs in rounds for pair in pairs}
    for rank, host in enumerate(hosts):
        partners = [sum(pair) - rank for pair in joined if rank in pair]
        assert slots == 1 or any(hosts[partner] == host for partner in partners)
        assert nodes == 1 or any(hosts[partner] != host for partner in partners)
    assert len(rounds) <= 6


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({"zero_optimization": {"stage": 3}}, ["training.compile=true"]),
        ({"zero_optimization": {"stage": 1}}, ["data.accumulation=3"]),
        ({"zero_optimization": {"stage": 1}, "bf61": {"enabled": True}}, []),
    ],
    ids=["compile", "batch", "misspelt"],
)
def test_preflight_and_plan_refuse_what_the_run_refuses(
    small_world: SmallWorld,
    layout: dict[str, Any],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(layout))
    recipe = load_recipe(small_world.recipe, options)
    with pytest.raises(UserError) as refusal:
        read_whole_layout(recipe, path, lone_process())
    arguments = [str(small_world.recipe), *options, "--deepspeed_config", str(path)]

    monkeypatch.setattr(preflight, "join_processes", lambda: nullcontext(lone_process()))
    monkeypatch.setattr(sys, "argv", ["launch/preflight.py", *arguments])
    assert run_command(preflight.main) == 2
    assert capsys.readouterr().err == f"error: {refusal.value}\n"
    machine = ["--gpus", "1", "--device", "cpu"]
    assert run_command(lambda: plan([*arguments, *machine])) == 2
    assert capsys.readouterr().err == f"error: {refusal.value}\n"


def test_a_taken_port_and_a_missing_process_are_named(tmp_path: Path) -> None:
    script = tmp_path / "join.py"
    script.write_text(
        "import os, sys\n"
        "from datetime import timedelta\n"
        "from megatron_nuwa.errors import run_command\n"
        "from megatron_nuwa.training.processes import join_processes\n"
        "def main():\n"
        "    with join_processes(timedelta(seconds=2)):\n"
        "        pass\n"
        "taken, free = sys.argv[1:]\n"
        "for rank, port in ((0, taken), (0, free), (1, free)):\n"
        "    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_PORT=port)\n"
        "    print(run_command(main))\n"
    )
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        taken = str(holder.getsockname()[1])
        free = str(free_port())
        done = subprocess.run(
            [sys.executable, script, taken, free],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timedelta(minutes=2).total_seconds(),
            check=False,
        )
    assert done.stdout.split() == ["2", "2", "2"], done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert f"127.0.0.1:{taken} (MASTER_ADDR:MASTER_PORT) is in use" in errors[0]
    assert "--master_port" in errors[0]
    for error in errors[1:]:
        assert f"did not meet at 127.0.0.1:{free} (MASTER_ADDR:MASTER_PORT) within 2 s" in error
