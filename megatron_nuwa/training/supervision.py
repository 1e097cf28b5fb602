"""Starting a run again when it ends in a fault, as long as that helps."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import FrameType

import psutil

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import write_text_atomically
from megatron_nuwa.training.checkpoint import Checkpoints
from megatron_nuwa.training.faults import FAULTS_FOLDER, cause, clear_faults, read_faults
from megatron_nuwa.training.recipe import load_recipe
from megatron_nuwa.training.stopping import STOP_SIGNALS

_SCRIPT = "pretrain.py"
_MISTAKE = 2
_SSH_SECONDS = 5
# Else an ssh to a node that has gone silent never ends, and pdsh waits for it.
_KEEP_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"


class Supervisor:
    """Runs a launcher's command, and again after a fault, up to `restarts` times.

    A restart needs a checkpoint that the start before has added, but for the first; a mistake of
    the user is not tried again. Stop signals are handed to the run's processes. Commands that do
    not pretrain run once.
    """

    def __init__(self, command: Sequence[str], *, restarts: int, pause_seconds: float) -> None:
        self._command = list(command)
        self._restarts, self._pause_seconds = restarts, pause_seconds
        self._run = run_of(command)
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def supervise(self) -> int:
        """Run to the end; returns the exit code of the last start, 128 + N for a signal N."""
        usual = {number: signal.signal(number, self._hand_on) for number in STOP_SIGNALS}
        try:
            return self._starts()
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def _starts(self) -> int:
        for restart in range(self._restarts + 1):
            before = self._checkpoints()
            code = self._start()
            if self._run is None or code == 0:
                return code
            reason = self._why_not_again(code, restart, bool(self._checkpoints() - before))
            said = f"the run in {self._run} ended with code {code}: {cause(read_faults(self._run))}"
            if reason is not None:
                # The last line of the console.
                print(f"{said}\n{reason}", file=sys.stderr, flush=True)
                return code
            print(
                f"{said}\nstart {restart + 2} of at most {self._restarts + 1}, "
                f"in {self._pause_seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(self._pause_seconds)
            self._command = self._on_nodes_left()
        raise AssertionError("the last start has a reason to be the last")

    def _start(self) -> int:
        if self._run is not None:
            clear_faults(self._run)
        try:
            self._child = subprocess.Popen(self._command, env=environment(os.environ))
        except OSError as error:
            raise UserError(f"{self._command[0]} cannot be started: {error.strerror}") from error
        code = self._child.wait()
        return code if code >= 0 else 128 - code

    def _why_not_again(self, code: int, restart: int, progress: bool) -> str | None:
        assert self._run is not None
        faults = read_faults(self._run)
        if self._stopping:
            return "it was asked to stop and is not started again"
        if code == _MISTAKE or (faults and faults[0].kind == "mistake"):
            return "that has to be mended first, so it is not started again"
        if restart > 0 and not progress:
            return "this start added no checkpoint, so it is not started again"
        if restart == self._restarts:
            return f"it was started again {restart} times, which is the limit (--restarts)"
        return None

    def _checkpoints(self) -> set[tuple[str, int]]:
        if self._run is None:
            return set()
        folder = Checkpoints(self._run / "checkpoints", keep=1)
        return {(path.name, path.stat().st_ino) for path in folder.all()}

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._child is None:
            return
        # One process is enough: they agree. Launchers, however, would die of the signal.
        for process in _training_processes(self._child.pid) or [psutil.Process(self._child.pid)]:
            process.send_signal(number)

    def _on_nodes_left(self) -> list[str]:
        """The command without the nodes of its hostfile that do not answer any more."""
        assert self._run is not None
        command = list(self._command)
        place = next((n for n, word in enumerate(command) if word in ("--hostfile", "-H")), None)
        if place is None or "deepspeed" not in Path(command[0]).name:
            return command
        lines = Path(command[place + 1]).read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        left = [line for line in lines if _answers(line.split()[0])]
        lost = [line.split()[0] for line in lines if line not in left]
        if not lost or not left:
            return command
        hostfile = self._run / FAULTS_FOLDER / "hostfile"
        write_text_atomically(hostfile, "\n".join(left) + "\n")
        print(f"without {', '.join(lost)}, which no longer answers", file=sys.stderr, flush=True)
        command[place + 1] = str(hostfile)
        if "--master_addr" in command and command[command.index("--master_addr") + 1] in lost:
            command[command.index("--master_addr") + 1] = left[0].split()[0]
        return command


def run_of(command: Sequence[str]) -> Path | None:
    """The run folder of a command that pretrains; None for others.

    Raises `UserError` where its recipe cannot be read.
    """
    place = next((n for n, word in enumerate(command) if Path(word).name == _SCRIPT), None)
    if place is None:
        return None
    words = [
        word
        for before, word in pairwise(command[place:])
        if not word.startswith("-") and before != "--deepspeed_config"
    ]
    recipe = [word for word in words if "=" not in word]
    if not recipe:
        raise UserError(
            f"{_SCRIPT} is given no recipe; example: {_SCRIPT} launch/recipes/demo.yaml"
        )
    overrides = [word for word in words if "=" in word]
    return load_recipe(recipe[0], overrides).run


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a launcher whose ssh connections notice that a node is gone."""
    name = "PDSH_SSH_ARGS_APPEND"
    given = inherited.get(name, "")
    extra = "" if "ServerAlive" in given else _KEEP_ALIVE
    return {**inherited, name: f"{given} {extra}".strip()}


def _training_processes(launcher: int) -> list[psutil.Process]:
    """The run's processes on this node, as far as the launcher started them."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        script = next((word for word in words[1:] if not word.startswith("-")), "")
        if words and "python" in Path(words[0]).name and Path(script).name == _SCRIPT:
            found.append(process)
    return found


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
