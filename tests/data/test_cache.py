"""The cache of shards from afar: bounded, whole, shared by processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import permutations
from pathlib import Path
from typing import IO, Any

import pytest
from filelock import FileLock
from power import Disk

from megatron_nuwa.data import cache_index
from megatron_nuwa.data.cache import BYTES_VARIABLE, FOLDER_VARIABLE, ShardCache
from megatron_nuwa.errors import UserError


def content(number: int, size: int = 1000) -> bytes:
    return bytes([number]) * size


def name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Far:
    """A far place that counts what is fetched from it."""

    def __init__(self) -> None:
        self.fetched = 0

    def read(self, cache: ShardCache, data: bytes) -> bytes:
        def fetch() -> IO[bytes]:
            self.fetched += 1
            return io.BytesIO(data)

        with cache.open(name(data), len(data), "far/shard.tar", fetch) as stream:
            return stream.read()


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def test_second_reading_fetches_nothing(tmp_path: Path) -> None:
    far, cache = Far(), ShardCache(tmp_path, 10_000)
    for _ in range(3):
        assert far.read(cache, content(1)) == content(1)
    assert far.fetched == 1


def test_a_shard_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    Far().read(ShardCache(tmp_path, 10_000), content(1))
    assert disk.of(tmp_path / name(content(1))).lost == []


@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
def test_least_recently_opened_leaves_first_and_the_bound_holds(
    tmp_path: Path, order: tuple[int, int, int]
) -> None:
    far, cache = Far(), ShardCache(tmp_path, 3000)
    first, second, third = order
    for number in order:
        far.read(cache, content(number))
        time.sleep(0.01)
    far.read(cache, content(first))
    far.read(cache, content(4))
    assert stored(tmp_path) == 3000
    assert far.fetched == 4
    for number in (first, third):
        far.read(cache, content(number))
        assert far.fetched == 4
    far.read(cache, content(second))
    assert far.fetched == 5


def test_an_arrival_waits_for_the_room_of_another(tmp_path: Path) -> None:
    may_end, cache, seen = threading.Event(), ShardCache(tmp_path, 1500), []

    class Slow(io.BytesIO):
        def read(self, *size: Any) -> bytes:
            may_end.wait(30)
            return super().read(*size)

    def read(number: int) -> None:
        data = content(number)
        with cache.open(name(data), 1000, "far", lambda: Slow(data)) as stream:
            seen.append(stream.read())

    threads = [threading.Thread(target=read, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    assert taken(tmp_path) == 1000
    may_end.set()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [content(1), content(2)]
    assert stored(tmp_path) == 1000


def test_what_a_killed_process_left_of_a_shard_does_not_keep_it_out(tmp_path: Path) -> None:
    far, cache = Far(), ShardCache(tmp_path, 1500)
    # Another process was killed amid this very shard, and there is no room for two.
    (tmp_path / f"{name(content(1))}.1000.part").write_bytes(b"half")
    reader = threading.Thread(target=far.read, args=(cache, content(1)), daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive()
    assert far.fetched == 1
    assert not list(tmp_path.glob("*.part"))


def test_what_was_read_from_afar_is_closed(tmp_path: Path) -> None:
    streams = [io.BytesIO(content(1)), io.BytesIO(b"damaged")]
    for number, stream in enumerate(streams, start=1):
        with contextlib.suppress(UserError):
            ShardCache(tmp_path, 5000).open(
                name(content(number)), 1000, "far", lambda stream=stream: stream
            ).close()
    assert all(stream.closed for stream in streams)


@pytest.mark.parametrize("damage", [b"", content(9), content(1)[:-1], content(1) + b"x"])
def test_what_arrives_damaged_is_refused_and_not_kept(tmp_path: Path, damage: bytes) -> None:
    good = content(1)
    with pytest.raises(UserError, match=r"far/shard\.tar has other bytes than were written"):
        ShardCache(tmp_path, 9000).open(
            name(good), 1000, "far/shard.tar", lambda: io.BytesIO(damage)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]


def test_no_more_is_fetched_than_was_announced(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        sent = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.sent += len(buffer)
            return len(buffer) if self.sent < 1 << 28 else 0

    far = Endless()
    with pytest.raises(UserError, match="has other bytes than were written"):
        ShardCache(tmp_path, 10_000).open(name(b""), 1000, "far/shard.tar", lambda: far)
    assert far.sent < 1 << 22
    assert stored(tmp_path) == 0


def test_failing_reads_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    def fails() -> IO[bytes]:
        raise ConnectionError("no route\nto host")

    with pytest.raises(UserError, match=r"^far/shard\.tar cannot be read: no route to host$"):
        ShardCache(tmp_path, 9000).open("ab" * 32, 1000, "far/shard.tar", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]


def test_shard_larger_than_the_cache_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than the 999 of the cache .* set " + BYTES_VARIABLE):
        Far().read(ShardCache(tmp_path, 999), content(1))


def test_settings_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "shards"))
    monkeypatch.setenv(BYTES_VARIABLE, "12345")
    cache = ShardCache.default()
    assert (cache.folder, cache.max_bytes) == (tmp_path / "shards", 12345)
    monkeypatch.setenv(BYTES_VARIABLE, "64 GB")
    with pytest.raises(UserError, match=BYTES_VARIABLE):
        ShardCache.default()


READER = """
import hashlib, io, random, sys, time
from pathlib import Path
from megatron_nuwa.data.cache import ShardCache
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
cache, order, fetched = ShardCache(folder, 5000), random.Random(seed), 0
class Slow(io.BytesIO):
    def read(self, *size):
        time.sleep(0.002)
        return super().read(min(100, *size))
def fetch(data):
    global fetched
    fetched += 1
    return Slow(data)
for _ in range(60):
    data = bytes([order.randrange(12)]) * 1000
    name = hashlib.sha256(data).hexdigest()
    with cache.open(name, 1000, "far", lambda: fetch(data)) as stream:
        assert stream.read() == data
print(fetched)
"""


def start_reader(folder: Path, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READER, str(folder), str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_processes_share_it_within_the_bound_though_one_is_killed(tmp_path: Path) -> None:
    readers = [start_reader(tmp_path, seed) for seed in range(4)]
    largest, killed = 0, False
    while any(reader.poll() is None for reader in readers):
        if not killed and list(tmp_path.glob("*.part")):
            readers[0].send_signal(signal.SIGKILL)
            killed = True
        largest = max(largest, taken(tmp_path))
    assert killed
    assert largest <= 5000
    for reader in readers[1:]:
        output, errors = reader.communicate()
        assert reader.returncode == 0, errors
        assert 1 <= int(output) <= 60
    readers[0].communicate()
    # What the killed one left goes with the next arrival, and the cache still works.
    Far().read(ShardCache(tmp_path, 5000), content(99))
    assert not list(tmp_path.glob("*.part"))


def taken(folder: Path) -> int:
    """Bytes of whole files and of the room that arriving ones will take.

    While nobody can make room, so that the sum is that of one moment.
    """
    total = 0
    (folder / "locks").mkdir(exist_ok=True)
    with FileLock(folder / "locks" / "room"):
        for path in list(folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size if path.is_file() else 0
                total += int(path.name.split(".")[1]) if path.suffix == ".part" else size
    return total


def test_threads_that_want_the_same_shard_fetch_it_once(tmp_path: Path) -> None:
    far, cache, seen = Far(), ShardCache(tmp_path, 5000), []
    threads = [
        threading.Thread(target=lambda: seen.append(far.read(cache, content(1)))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [content(1)] * 8
    assert far.fetched == 1


def test_an_arrival_lists_no_folder_however_full_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(200):
        (tmp_path / name(content(number, 10))).write_bytes(content(number, 10))
    far, cache = Far(), ShardCache(tmp_path, 2000)
    far.read(cache, content(200, 10))
    looked: list[object] = []
    for function in (os.scandir, os.listdir):

        def noted(*where: object, function: Any = function) -> object:
            looked.extend(where)
            return function(*where)

        monkeypatch.setattr(os, function.__name__, noted)
    for number in (201, 202, 0, 1):
        far.read(ShardCache(tmp_path, 2000), content(number, 10))
    assert looked == []
    monkeypatch.undo()
    assert stored(tmp_path) == 2000


@pytest.mark.parametrize("damage", ["removed", "torn", "foreign", "files", "moment", "power"])
def test_the_bound_holds_whatever_became_of_the_index(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, cache = Far(), ShardCache(tmp_path, 3000)
    index = tmp_path / "locks" / "index"
    for number in (1, 2, 3):
        far.read(cache, content(number))
    if damage == "removed":
        index.unlink()
    elif damage == "torn":
        index.write_bytes(index.read_bytes()[:5000])
    elif damage == "foreign":
        index.write_bytes(b"nothing of ours" * 1000)
    elif damage == "files":
        (tmp_path / name(content(1))).unlink()
        (tmp_path / name(content(7))).write_bytes(content(7))
        (tmp_path / name(content(8))).write_bytes(content(8))
        (tmp_path / f"{name(content(9))}.2500.part").touch()
    else:
        # As if a process had been killed in the moment after the folder was changed.
        before, times = index.read_bytes(), tmp_path.stat()
        far.read(cache, content(5))
        (tmp_path / name(content(8))).write_bytes(content(8))
        index.write_bytes(before)
        if damage == "power":
            # As if an older index had come back with the machine, and the folder's old time.
            os.utime(tmp_path, ns=(times.st_atime_ns, times.st_mtime_ns))
            (tmp_path / "locks" / "boot").write_text("another")
            monkeypatch.setattr(cache_index, "_BOOT", tmp_path / "locks" / "boot")
    for number in (4, 5, 6):
        assert far.read(cache, content(number)) == content(number)
        assert taken(tmp_path) <= 3000
    assert stored(tmp_path) == 3000
    assert not list(tmp_path.glob("*.part"))


def test_files_of_others_in_the_folder_stay_while_shards_come_and_go(tmp_path: Path) -> None:
    others = ["thesis.tex", "x.iso.part", "a.1000.part", "ab" * 32 + ".tar", "AB" * 32]
    for other in others:
        (tmp_path / other).write_bytes(b"theirs" * 500)
    far, cache = Far(), ShardCache(tmp_path, 3000)
    for number in range(7):
        assert far.read(cache, content(number)) == content(number)
        # Somebody works in the folder, which is listed anew.
        (tmp_path / "notes").write_bytes(b"")
        (tmp_path / "notes").unlink()
    assert far.fetched == 7
    shards = {path.name for path in tmp_path.iterdir() if path.is_file()} - set(others)
    assert len(shards) == 3
    assert shards < {name(content(number)) for number in range(7)}
    assert all((tmp_path / other).read_bytes() == b"theirs" * 500 for other in others)


def test_an_index_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "locks" / "index").mkdir(parents=True)
    with pytest.raises(UserError, match=r"far/shard\.tar cannot be brought into .*index"):
        Far().read(ShardCache(tmp_path, 3000), content(1))
