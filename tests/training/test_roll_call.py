"""What processes tell each other in a roll call, as threads over one store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_nuwa.training import roll_call
from megatron_nuwa.training.roll_call import RollCall
from megatron_nuwa.training.stopping import StopRequested


class Store:
    """Where all meet; when its process is gone, every use of it is an error or `hangs`."""

    def __init__(self) -> None:
        self._store = dist.HashStore()
        self.fail = self.hangs = False
        self.end = threading.Event()

    def __getattr__(self, name: str) -> Any:
        if self.hangs:
            self.end.wait(60)
        if self.fail or self.hangs:
            raise dist.DistNetworkError("gone")
        return getattr(self._store, name)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Of all roll calls, whose turns are short and whose threads never end with an error."""
    store = Store()
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setattr(roll_call, "_connect", lambda _: store)
    monkeypatch.setattr(dist, "PrefixStore", lambda _prefix, store: store)
    monkeypatch.setattr(roll_call, "_TURN_SECONDS", 0.02)
    monkeypatch.setattr(roll_call, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(roll_call, "_FAREWELL_SECONDS", 0.3)
    yield store
    assert raised == []


def call(rank: int, world_size: int = 2) -> RollCall:
    processes: Any = SimpleNamespace(
        rank=rank, world_size=world_size, first_tells=lambda _: "prefix"
    )
    return RollCall(processes)


def comes(true: Callable[[], object], seconds: float = 20) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(true())


@contextmanager
def failing() -> Iterator[None]:
    """What ends a process with an error."""
    with pytest.raises(ValueError, match="a defect"):
        yield


def test_all_are_told_who_has_failed_and_the_store_waits_for_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A failure has a farewell of its own.
    monkeypatch.setattr(roll_call, "_FAREWELL_SECONDS", 0.0)
    monkeypatch.setattr(roll_call, "_FAREWELL_TURNS", 500)
    others = [call(rank, 3) for rank in (1, 2)]
    for other in others:
        other.__enter__()
    with failing(), call(0, 3) as first:
        assert comes(lambda: all(one._answered > 2 for one in (first, *others)))
        raise ValueError("a defect")
    # Process 0 left when it knew that all know.
    assert store.add("all know", 0) == 3
    assert comes(lambda: all(other.gone for other in others))
    # What is noticed later follows from it.
    others[0]._gone_for("process 0, which holds the store, no longer answers")
    assert {other.gone for other in others} == {"process 0 has failed"}
    for other in others:
        other.__exit__(None)
    assert store.add("all know", 0) == 3


def test_a_process_is_told_of_only_after_a_while(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_call, "_GRACE_SECONDS", 60.0)
    with call(1) as other:
        with failing(), call(0):
            raise ValueError("a defect")
        assert comes(lambda: other._is_counted)
        assert other.gone is None


@pytest.mark.parametrize("stopped", [False, True])
def test_who_leaves_in_order_is_missed_by_nobody(
    store: Store, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    monkeypatch.setattr(roll_call, "_SILENCE_SECONDS", 0.1)
    with call(0) as first:
        other = call(1).__enter__()
        assert comes(lambda: first._answered > 2 and other._answered > 2)
        other.__exit__(StopRequested if stopped else None)
        before = first._answered
        assert comes(lambda: first._answered > before + 20)
        assert first.gone is None
    assert not store.check(["gone"])


def test_silence_is_told_of_by_who_listens(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "_SILENCE_SECONDS", 0.1)
    store.set("2", "7")
    with call(1, 3) as first:
        assert comes(lambda: first.gone)
        assert first.gone == "process 2 no longer answers"
    assert store.check(["gone"])
    assert store.get("gone").decode() == first.gone


def test_process_0_waits_for_those_who_still_need_its_store(store: Store) -> None:
    with call(0, 2):
        began = time.monotonic()
    # The other one never came; it is waited for, and not for ever.
    assert 0.3 <= time.monotonic() - began < 10


def test_process_0_leaves_with_the_last_of_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_call, "_FAREWELL_SECONDS", 10.0)
    began = time.monotonic()
    with call(0), call(1):
        pass
    assert time.monotonic() - began < 5


def test_others_than_process_0_wait_for_nobody(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_call, "_FAREWELL_SECONDS", 10.0)
    began = time.monotonic()
    with call(1, 2):
        pass
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("how", ["fail", "hangs"])
def test_a_store_that_is_gone_is_process_0_s_end(
    store: Store, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(roll_call, "_SILENCE_SECONDS", 0.1 if how == "hangs" else 180.0)
    with call(1) as other:
        assert comes(lambda: other._answered > 2)
        setattr(store, how, True)
        assert comes(lambda: other.gone)
        assert other.gone.startswith("process 0, which holds the store")  # type: ignore[union-attr]
        store.end.set()


def test_a_store_that_is_reached_late_is_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All nodes of a large run at once may keep it busy."""
    monkeypatch.setattr(roll_call, "_SILENCE_SECONDS", 0.1)
    connect, begin = roll_call._connect, threading.Event()

    def later(world_size: int) -> dist.Store:
        begin.wait(60)
        return connect(world_size)

    monkeypatch.setattr(roll_call, "_connect", later)
    with call(1) as other:
        assert not comes(lambda: other.gone, 0.5)
        begin.set()


def test_a_store_that_was_never_reached_is_nobody_s_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise dist.DistNetworkError("refused")

    monkeypatch.setattr(roll_call, "_connect", refuse)
    with call(1) as other:
        other._speaker.join(10)
        # Longer than it takes to notice and to tell.
        assert not comes(lambda: other.gone, 0.5)


def test_a_lone_process_calls_nobody(store: Store) -> None:
    with call(0, 1) as lone:
        assert lone._speaker.ident is None
    assert store.num_keys() == 0
