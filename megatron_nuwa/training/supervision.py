"""Starting a run again when it ends in a fault, as long as that helps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from megatron_nuwa.errors import UserError
from megatron_nuwa.files import try_to_write, write_text_atomically
from megatron_nuwa.training.checkpoint import Checkpoints, step_of
from megatron_nuwa.training.faults import FAULTS_FOLDER, cause, clear_faults, read_faults
from megatron_nuwa.training.nodes import on_nodes_left
from megatron_nuwa.training.stopping import StopSignals
from megatron_nuwa.training.supervised import run_of, training_processes

_MISTAKE = 2
_LOOK_SECONDS = 0.2
# A launcher that has started no process here by then has them all on other nodes.
_LAUNCHER_SECONDS = 20.0
# So many stops in a row may come before a run's next checkpoint; preemptions can be quick.
_STOPS_FILE, _STOPS = "stops.json", 5
# Else an ssh to a node that has gone silent never ends, and pdsh waits for it.
_KEEP_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"


class Supervisor:
    """Runs a launcher's command, and again after a fault, up to `restarts` times.

    A restart needs a checkpoint that the start before has added, but for the first; a mistake of
    the user is not tried again. Stop signals are handed to the run's processes. Commands that do
    train nothing run once. `unfinished` is the exit code for a run that ended in order before its
    last step, so that whoever started it can queue it again (default: 0).
    """

    def __init__(
        self,
        command: Sequence[str],
        stop: StopSignals,
        *,
        restarts: int,
        pause_seconds: float,
        unfinished: int = 0,
    ) -> None:
        self._given = self._command = list(command)
        self._stop = stop
        self._restarts, self._pause_seconds = restarts, pause_seconds
        self._unfinished = unfinished
        self._supervised = run_of(command)
        self._run = None if self._supervised is None else self._supervised.folder

    def supervise(self) -> int:
        """Run to the end; returns the exit code of the last start, 128 + N for a signal N."""
        for restart in range(self._restarts + 1):
            if self._stop.received:
                return self._stopped_between(restart)
            before = self._checkpoints()
            code = self._start()
            if self._run is None or code == 0:
                return self._in_order() if code == 0 else code
            reason = self._why_not_again(code, restart, bool(self._checkpoints() - before))
            said = f"the run in {self._run} ended with code {code}: {cause(read_faults(self._run))}"
            if reason is not None:
                # The last line of the console.
                _say(f"{said}\n{reason}")
                return code
            _say(
                f"{said}\nstart {restart + 2} of at most {self._restarts + 1}, "
                f"in {self._pause_seconds:.0f} s"
            )
            end = time.monotonic() + self._pause_seconds
            while time.monotonic() < end and not self._stop.received:
                time.sleep(_LOOK_SECONDS)
            if not self._stop.received:
                self._command = self._on_nodes_left()
        return self._stopped_between(self._restarts)

    def _start(self) -> int:
        if self._run is not None:
            clear_faults(self._run)
        try:
            child = subprocess.Popen(self._command, env=environment(os.environ))
        except OSError as error:
            raise UserError(f"{self._command[0]} cannot be started: {error.strerror}") from error
        code, handed_on, looks = None, False, 0
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(_LOOK_SECONDS)
            if code is None and self._stop.received and not handed_on:
                looks += 1
                handed_on = self._hand_on(child, looks * _LOOK_SECONDS > _LAUNCHER_SECONDS)
        return code if code >= 0 else 128 - code

    def _why_not_again(self, code: int, restart: int, progress: bool) -> str | None:
        assert self._run is not None
        faults = read_faults(self._run)
        if self._stop.received:
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
        return {(path.name, path.stat().st_ino) for path in self._checkpoint_folders()}

    def _checkpoint_folders(self) -> list[Path]:
        assert self._run is not None
        return Checkpoints(self._run / "checkpoints", keep=1).all()

    def _hand_on(self, child: subprocess.Popen[bytes], to_launcher: bool) -> bool:
        """Hand the stop signal to the run's processes; False while none would survive it."""
        number = self._stop.received
        ready = [process for process in training_processes(child.pid) if takes(process, number)]
        # One process is enough: they agree. Launchers, however, would die of the signal.
        for process in ready:
            with suppress(psutil.Error):
                process.send_signal(number)
        if ready:
            return True
        if Path(self._command[0]).name == "srun":
            # Its tasks are no children of it. It hands on SIGUSR1; of SIGTERM it kills them.
            child.send_signal(signal.SIGUSR1)
        elif self._run is None or to_launcher:
            child.send_signal(number)
        else:
            return False
        return True

    def _stopped_between(self, restart: int) -> int:
        _say(f"asked to stop before start {restart + 1}, which is left out")
        return self._in_order()

    def _in_order(self) -> int:
        """The exit code of a run that ended in order: whether it reached its last step counts."""
        if self._unfinished == 0 or self._supervised is None or self._run is None:
            return 0
        note = self._run / FAULTS_FOLDER / _STOPS_FILE
        folders = self._checkpoint_folders()
        newest = folders[-1].name if folders else None
        if folders and step_of(folders[-1]) >= self._supervised.last_step:
            note.unlink(missing_ok=True)
            return 0
        stops = 1 + _stops_noted(note, newest)
        if stops > _STOPS:
            note.unlink(missing_ok=True)
            _say(
                f"the run in {self._run} was stopped {stops} times without a new checkpoint, so it "
                "is not queued again: give it more time, or see what takes it so long to begin"
            )
            return 1
        text = json.dumps({"checkpoint": newest, "stops": stops})
        try_to_write(lambda: write_text_atomically(note, text))
        return self._unfinished

    def _on_nodes_left(self) -> list[str]:
        assert self._supervised is not None
        # Of all nodes that were given: one that answers again is taken again.
        hostfile = self._supervised.folder / FAULTS_FOLDER / "hostfile"
        return on_nodes_left(self._given, hostfile, self._supervised.why_not)


def takes(process: psutil.Process, number: int) -> bool:
    """Whether a process has a handler for a signal by now; else it would die of it."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except OSError:
        # Gone, or no Linux.
        return bool(process.is_running()) and not Path("/proc/self").exists()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _stops_noted(note: Path, newest: str | None) -> int:
    """How often the run was stopped in a row with this newest checkpoint."""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        return int(noted["stops"]) if noted["checkpoint"] == newest else 0
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a launcher whose ssh connections notice that a node is gone."""
    name = "PDSH_SSH_ARGS_APPEND"
    given = inherited.get(name, "")
    extra = "" if "ServerAlive" in given else _KEEP_ALIVE
    return {**inherited, name: f"{given} {extra}".strip()}
