"""On which nodes of its hostfile a run of the deepspeed launcher is started again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.parallel.layout import check_layout, read_layout
from megatron_nuwa.training.inputs import check_batches
from megatron_nuwa.training.recipe import Recipe

_SSH_SECONDS = 5
_HOSTFILE, _MASTER = ("--hostfile", "-H"), ("--master_addr",)
_NODES_USED, _SLOTS_USED = ("--num_nodes",), ("--num_gpus", "--num_accelerators")
# Which of a node's slots they leave is DeepSpeed's to say.
_INCLUDE, _EXCLUDE = ("--include", "-i"), ("--exclude", "-e")
_OPTIONS = (*_HOSTFILE, *_MASTER, *_NODES_USED, *_SLOTS_USED, *_INCLUDE, *_EXCLUDE)
# Why a number of processes cannot train; None where it can.
WhyNot = Callable[[int], "str | None"]


@dataclass(frozen=True)
class _Node:
    line: str

    @property
    def name(self) -> str:
        return self.line.split()[0]

    @property
    def slots(self) -> int:
        counts = [word.split("=")[1] for word in self.line.split()[1:] if word.startswith("slots=")]
        return int(counts[0]) if counts and counts[0].isdecimal() else 1


def why_not_with(recipe: Recipe, layout_file: Path) -> WhyNot:
    """Why a number of processes cannot train a recipe: its layout, or a batch that has no shares.

    Every replica takes as many items of a batch, so that its mean stays the plain one.
    """

    def why_not(processes: int) -> str | None:
        if recipe.model is None or recipe.data is None:
            return None
        try:
            settings, config = read_layout(layout_file)
            layout = check_layout(settings, config, recipe.model, processes)
            check_batches(recipe.data, layout.data)
        except UserError as error:
            return str(error)
        return None

    return why_not


def on_nodes_left(command: Sequence[str], hostfile: Path, why_not: WhyNot) -> list[str]:
    """A deepspeed command without the nodes that it uses and that do not answer any more.

    Where the nodes left cannot train together, it takes the most of them, from the top, that can.
    `hostfile` is where the shorter list is written. Other launchers' commands stay as they are.
    """
    words = _apart(command)
    place = _option(words, _HOSTFILE)
    if place is None or "deepspeed" not in Path(words[0]).name:
        return list(command)
    lines = Path(words[place]).read_text(encoding="utf-8").splitlines()
    nodes = [_Node(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    used = [node for node in nodes if _is_used(words, node.name)]
    left = [node for node in used if _answers(node.name)]
    lost = [node.name for node in used if node not in left]
    if not lost or not left:
        return list(command)
    _say(f"without {', '.join(lost)}, which no longer answer{'s' if len(lost) == 1 else ''}")
    taken = _most_that_fit(words, left, why_not)
    # DeepSpeed refuses a filter with a node that its hostfile lacks.
    listed = [node.line for node in nodes if node in taken or node not in used]
    write_text_atomically(hostfile, "\n".join(listed) + "\n")
    words[place] = str(hostfile)
    for names in (_INCLUDE, _EXCLUDE):
        chosen = _option(words, names)
        if chosen is not None:
            kept = [part for part in words[chosen].split("@") if part.split(":")[0] not in lost]
            words[chosen] = "@".join(kept)
    master = _option(words, _MASTER)
    # The processes meet on the first node.
    if master is not None and taken[0] != used[0]:
        words[master] = taken[0].name
    return words


def _most_that_fit(words: Sequence[str], left: list[_Node], why_not: WhyNot) -> list[_Node]:
    if _option(words, (*_INCLUDE, *_EXCLUDE)) is not None:
        return left
    most = _number(words, _SLOTS_USED)
    usable = left[: _number(words, _NODES_USED)]

    def reason(nodes: Sequence[_Node]) -> str | None:
        return why_not(sum(node.slots if most is None else min(node.slots, most) for node in nodes))

    first = reason(usable)
    if first is None:
        return left
    for count in range(len(usable) - 1, 0, -1):
        if reason(usable[:count]) is None:
            _say(
                f"on {count} of the {len(usable)} nodes left "
                f"({', '.join(node.name for node in usable[:count])}), because {first}"
            )
            return usable[:count]
    # The run says why it cannot start.
    return left


def _apart(command: Sequence[str]) -> list[str]:
    """A command's words, the launcher's `--name=value` as two."""
    words: list[str] = []
    for place, word in enumerate(command):
        if word.endswith(".py"):
            return [*words, *command[place:]]
        name, equals, value = word.partition("=")
        words += [name, value] if equals and name in _OPTIONS else [word]
    return words


def _is_used(words: Sequence[str], name: str) -> bool:
    """Whether the launcher's filters leave a node at least some of its slots."""
    include, exclude = _option(words, _INCLUDE), _option(words, _EXCLUDE)
    if include is not None:
        return name in [part.split(":")[0] for part in words[include].split("@")]
    return exclude is None or name not in words[exclude].split("@")


def _option(words: Sequence[str], names: Sequence[str]) -> int | None:
    """Where the value of one of the launcher's options stands."""
    for place, word in enumerate(words[:-1]):
        if word.endswith(".py"):
            return None
        if word in names:
            return place + 1
    return None


def _number(words: Sequence[str], names: Sequence[str]) -> int | None:
    place = _option(words, names)
    number = int(words[place]) if place is not None and words[place].isdecimal() else 0
    return number or None


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _answers(host: str) -> bool:
    options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    options += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SSH_SECONDS}"]
    try:
        done = subprocess.run(
            ["ssh", *options, host, "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=3 * _SSH_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
