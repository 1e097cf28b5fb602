"""Noticing that another process of the run is gone, where its backend does not tell.

gloo does, when a connection closes; NCCL's collectives may wait for a dead process for ever. The
launcher ends the others of the same node, Slurm and mpirun all of them, but pdsh nobody.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.stopping import StopRequested

_TURN_SECONDS = 5.0
# Python may be held up for minutes, by a library that comes over a slow file system.
_SILENCE_SECONDS = 180.0
# So long the others have to find out and end by themselves, with more to say.
_GRACE_SECONDS = 30.0
# So long process 0 keeps the store for those who leave after it; after a failure, for as many turns
# as all need to read of it.
_FAREWELL_SECONDS = 3.0
_FAREWELL_TURNS = 2
_LEFT = "left"


class RollCall:
    """Each process answers in the store where they met, and listens to the next one.

    A context manager in which a thread does so. Turns are counted, not hours: a job that was
    suspended as a whole has lost nobody.
    """

    def __init__(self, processes: Processes) -> None:
        self._rank, self._world_size = processes.rank, processes.world_size
        self._over = threading.Event()
        # The name of one start: the store may outlive it.
        self._prefix = processes.first_tells(lambda: f"roll_call/{secrets.token_hex(8)}")
        self._gone: str | None = None
        self._answered = 0
        self._in_order = True
        self._is_counted = False
        self._speaker = threading.Thread(target=self._speak, name="roll call", daemon=True)

    def __enter__(self) -> RollCall:
        if self._world_size > 1:
            self._speaker.start()
            threading.Thread(target=self._watch, name="roll call's watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, StopRequested):
            self._in_order = False
        self._over.set()
        if self._world_size > 1:
            self._speaker.join(self._farewell() + _FAREWELL_SECONDS)

    @property
    def gone(self) -> str | None:
        """A sentence once a process has been gone for a while; None before."""
        return self._gone

    def _speak(self) -> None:
        # Without its store, or where it cannot be reached, there is no roll call.
        with suppress(RuntimeError, KeyError, ValueError):
            store = dist.PrefixStore(self._prefix, _connect(self._world_size))
            self._answer_and_listen(store)
            if self._in_order:
                store.set(str(self._rank), _LEFT)
            else:
                store.set("gone", f"process {self._rank} has failed")
            self._count_in(store)
            # Its end would be an error to those that are still here, and they would not know of
            # which process.
            end = time.monotonic() + self._farewell()
            while self._rank == 0 and time.monotonic() < end:
                if store.add("all know", 0) >= self._world_size:
                    break
                time.sleep(0.02)

    def _farewell(self) -> float:
        return _FAREWELL_SECONDS if self._in_order else _FAREWELL_TURNS * _TURN_SECONDS

    def _count_in(self, store: dist.Store) -> None:
        """This process needs no store any more: it leaves, or knows of the end."""
        if not self._is_counted:
            self._is_counted = True
            store.add("all know", 1)

    def _answer_and_listen(self, store: dist.Store) -> None:
        """Until the end; raises an error, or hangs, when the store is gone."""
        other = str((self._rank + 1) % self._world_size)
        last, silent = b"", 0.0
        while not self._over.is_set():
            self._answered += 1
            store.set(str(self._rank), str(self._answered))
            answer = store.get(other) if store.check([other]) else b""
            silent = 0.0 if answer != last or answer == _LEFT.encode() else silent + _TURN_SECONDS
            last = answer
            if silent > _SILENCE_SECONDS:
                store.set("gone", f"process {other} no longer answers")
            if store.check(["gone"]):
                sentence = store.get("gone").decode()
                self._count_in(store)
                self._gone_for(sentence)
            self._over.wait(_TURN_SECONDS)

    def _watch(self) -> None:
        """Notice that the store is gone, which ends the other thread or holds it up for ever."""
        last, silent = 0, 0.0
        while not self._over.wait(_TURN_SECONDS) and silent <= _SILENCE_SECONDS:
            if not self._speaker.is_alive():
                if not self._answered:
                    return
                break
            silent = 0.0 if self._answered != last or last == 0 else silent + _TURN_SECONDS
            last = self._answered
        self._gone_for("process 0, which holds the store where all met, no longer answers")

    def _gone_for(self, sentence: str) -> None:
        if not self._over.wait(_GRACE_SECONDS):
            self._gone = self._gone or sentence


def _connect(world_size: int) -> dist.Store:
    """A connection of its own: the trainer's may be busy waiting."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=False,
        timeout=timedelta(seconds=_SILENCE_SECONDS),
        wait_for_workers=False,
    )
