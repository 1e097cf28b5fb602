"""Runs stages: one process a command, a log, a record of what was done, visible progress."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import psutil

from launch.workflow.display import Display
from launch.workflow.stage import Stage
from megatron_nuwa.config import Settings
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import Lock, try_lock, write_text_atomically
from megatron_nuwa.training.launcher import free_port

_POLL_SECONDS = 0.25
_MEMORY_POLL_SECONDS = 0.5
_TAIL_LINES = 25
_TAIL_BYTES = 16_384
_STOP_SECONDS = 20
# deepspeed.constants.TORCH_DISTRIBUTED_DEFAULT_PORT, without importing deepspeed.
_DEEPSPEED_PORT = 29500

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class StageError(Exception):
    """A command of a stage ended with a non-zero code; the text shows its log's end."""


class StageRecord(Settings):
    """What is remembered of a stage: its key says from which commands and inputs it came.

    `seconds` and `peak_memory_bytes` are of all attempts with that key until it is done.
    """

    name: str
    title: str
    state: Literal["running", "failed", "done"]
    key: str
    commands: list[str]
    log: str
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    finished: str = ""


class Runner:
    """Runs stages into one output folder and skips those that are done.

    Paths are relative to the working folder, where the commands run too.
    """

    def __init__(self, output: Path, display: Display) -> None:
        self._output = output
        self._display = display
        self._peak_memory = 0

    def run(self, stages: Sequence[Stage]) -> None:
        """Run every stage that is not done; `StageError` at the first that does not succeed.

        `UserError` where the folder cannot be written, or another runner or its stage is at work.
        """
        with self._locked() as lock:
            self._display.begin(stages)
            for stage in stages:
                key = self.key(stage)
                record = read_record(self._output, stage.name)
                if self.is_done(stage, record, key):
                    assert record is not None
                    self._display.skip(stage, record.seconds)
                    continue
                if record is None or record.key != key:
                    self._clear(stage)
                self._run_stage(stage, key, lock)

    def key(self, stage: Stage) -> str:
        """Hash of a stage's commands, environment, inputs and the runs it follows."""
        inputs = {str(path): self._digest(path) for path in stage.inputs}
        records = {name: read_record(self._output, name) for name in stage.after}
        runs = {name: record.finished if record else "" for name, record in records.items()}
        tree = [stage.commands, stage.environment, inputs, runs]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def is_done(self, stage: Stage, record: StageRecord | None, key: str) -> bool:
        """Whether a stage need not run again."""
        if record is None or record.state != "done" or record.key != key:
            return False
        return all(path.exists() for path in stage.outputs)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Lock]:
        path = self._output / ".lock"
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            lock = try_lock(path)
        except OSError as error:
            raise UserError(
                f"--output {self._output} cannot be written: {error.strerror}; name a folder"
            ) from error
        if lock is None:
            raise UserError(
                f"--output {self._output}: another command is at work there, or a stage of one "
                f"that was killed (it holds {path}); wait for it, or end it"
            )
        try:
            yield lock
        finally:
            lock.release()

    def _digest(self, path: Path) -> str:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            return "absent"

    def _clear(self, stage: Stage) -> None:
        for path in stage.clears:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _run_stage(self, stage: Stage, key: str, lock: Lock) -> None:
        log = self._output / "logs" / f"{stage.name}.log"
        log.parent.mkdir(exist_ok=True)
        spent = read_record(self._output, stage.name)
        if spent is not None and (spent.key != key or spent.state == "done"):
            spent = None
        record = StageRecord(
            name=stage.name,
            title=stage.title,
            state="running",
            key=key,
            commands=[command_text(command, stage.environment) for command in stage.commands],
            log=str(log),
            seconds=spent.seconds if spent else 0.0,
            peak_memory_bytes=spent.peak_memory_bytes if spent else 0,
        )
        self._write(record)
        self._display.start(stage, log)
        with self._ending(stage, record), log.open("wb") as stream:
            for command, text in zip(stage.commands, record.commands, strict=True):
                stream.write(f"$ {text}\n".encode())
                stream.flush()
                code = self._run_command(command, stage.environment, stream.fileno(), lock)
                if code != 0:
                    raise StageError(self._explain(stage, text, code, log))
            missing = [path for path in stage.outputs if not path.exists()]
            if missing:
                raise StageError(
                    f"stage '{stage.name}' ended well but did not write {missing[0]}; its log is "
                    f"{log}"
                )

    @contextlib.contextmanager
    def _ending(self, stage: Stage, record: StageRecord) -> Iterator[None]:
        """Have the record say how a stage ended, and what it took until then, however it ends."""
        began = time.monotonic() - record.seconds
        self._peak_memory = record.peak_memory_bytes
        result = {"state": "failed"}
        try:
            yield
            result = {"state": "done", "finished": datetime.now(timezone.utc).isoformat()}
        finally:
            seconds, peak = round(time.monotonic() - began, 2), self._peak_memory
            took = {"seconds": seconds, "peak_memory_bytes": peak}
            self._write(record.model_copy(update=result | took))
        self._display.finish(stage, seconds, peak)

    def _run_command(
        self, command: Sequence[str], environment: Mapping[str, str], log: int, lock: Lock
    ) -> int:
        """Exit code of one command; `_peak_memory` grows to what it and its children held."""
        try:
            process = subprocess.Popen(
                with_free_port(command),
                env=child_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A command that outlives a killed runner keeps the next one out.
                pass_fds=(lock.handle,),
            )
        except FileNotFoundError as error:
            raise UserError(
                f"the command '{command[0]}' was not found; install the project with 'make install'"
            ) from error
        memory = _PeakMemory(process.pid)
        memory.start()
        try:
            while process.poll() is None:
                self._display.refresh()
                time.sleep(_POLL_SECONDS)
        except BaseException:
            _stop_tree(process)
            raise
        finally:
            memory.stop()
            self._peak_memory = max(self._peak_memory, memory.peak)
        return process.returncode

    def _explain(self, stage: Stage, command: str, code: int, log: Path) -> str:
        tail = "\n".join(f"  {line}" for line in log_tail(log))
        return (
            f"stage '{stage.name}' failed with exit code {code}\n  $ {command}\n"
            f"the last lines of its log:\n{tail}\nthe whole log: {log}"
        )

    def _write(self, record: StageRecord) -> None:
        path = record_path(self._output, record.name)
        write_text_atomically(path, record.model_dump_json(indent=2) + "\n")


def record_path(output: Path, name: str) -> Path:
    """Where the record of a stage lies."""
    return output / "stages" / f"{name}.json"


def read_record(output: Path, name: str) -> StageRecord | None:
    """The record of a stage, or None where there is none that can be read."""
    try:
        text = record_path(output, name).read_text(encoding="utf-8")
        return StageRecord.model_validate_json(text)
    except (OSError, ValueError):
        return None


def command_text(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command as one would type it, with the variables it needs in front."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, shlex.join(command)])


def with_free_port(command: Sequence[str]) -> list[str]:
    """A command of the deepspeed launcher with another port where its usual one is taken.

    Two runs on one machine, such as the demo beside a training, would want the same.
    """
    if command[0] != "deepspeed" or "--master_port" in command or _is_free(_DEEPSPEED_PORT):
        return list(command)
    return [command[0], "--master_port", str(free_port()), *command[1:]]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with this interpreter's commands first on the path."""
    environment = {**os.environ, **extra, "PYTHONUNBUFFERED": "1"}
    # A cache that other environments share can hold a stale lock, on which a run waits for ever.
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    return environment


def log_tail(path: Path, lines: int = _TAIL_LINES) -> list[str]:
    """The last lines of a log that are not empty, without terminal control codes."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    cleaned = (_CONTROL.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text))
    return [line for line in cleaned if line][-lines:]


class _PeakMemory(threading.Thread):
    """Watches the memory of a process and all its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self.peak = max(self.peak, _tree_memory(self._pid))
            self._ended.wait(_MEMORY_POLL_SECONDS)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _tree_memory(pid: int) -> int:
    """Bytes in use by a process tree; pages that processes share count once where Linux tells."""
    total = 0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            information = process.memory_full_info()
            total += getattr(information, "pss", 0) or information.rss
        except psutil.Error:
            continue
    return total


def _stop_tree(process: subprocess.Popen[bytes]) -> None:
    """End a command and every process that it started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        family = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    for child in family:
        with contextlib.suppress(psutil.Error):
            child.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()
