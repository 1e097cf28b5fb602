"""Programs that decode are read while they write, limited, and never left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import psutil
import pytest

from megatron_nuwa.decoders import DecodeError, DecodeLimits, ffmpeg_process, ffmpeg_program
from megatron_nuwa.decoders.ffmpeg_process import BrokenVideoError, written_by
from megatron_nuwa.errors import MachineError

FILM = Path("film.mp4")
GENEROUS = DecodeLimits(seconds=100)


def shell(text: str) -> list[str]:
    return ["sh", "-c", text]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


@pytest.fixture(autouse=True)
def others() -> Iterator[set[int]]:
    """Processes that are there before a test; there must be no more of them after it."""
    before = children()
    yield before
    assert children() <= before


def test_a_program_that_complains_at_length_is_not_waited_for_in_vain() -> None:
    flood = shell("head -c 3000000 /dev/zero >&2; echo frames; head -c 3000000 /dev/zero >&2")
    assert b"".join(written_by(FILM, flood, GENEROUS)) == b"frames\n"
    ends = shell("echo '[h264 @ 0x1] no frame!' >&2; head -c 3000000 /dev/zero >&2; exit 3")
    with pytest.raises(BrokenVideoError, match=r"film\.mp4 cannot be decoded .*: no frame!$"):
        list(written_by(FILM, ends, GENEROUS))


def leaves(reader: Callable[[], None]) -> None:
    with closing(written_by(FILM, ["yes"], GENEROUS)) as pieces:
        for _ in pieces:
            reader()


@pytest.mark.parametrize("reason", [KeyboardInterrupt, MemoryError, DecodeError])
def test_a_reader_that_leaves_takes_the_program_with_it(
    reason: type[BaseException], others: set[int]
) -> None:
    def fails() -> None:
        assert len(children() - others) == 1
        raise reason

    with pytest.raises(reason):
        leaves(fails)


def test_an_interrupt_while_it_is_waited_for_ends_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ffmpeg_process.selectors.PollSelector, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(written_by(FILM, shell("exec sleep 1000"), GENEROUS))


@pytest.mark.parametrize("closes", ["", "exec >&- 2>&-; "])
def test_a_program_that_hangs_is_ended(closes: str) -> None:
    hangs = shell(f"{closes}exec sleep 1000")
    with pytest.raises(DecodeError, match=r"film\.mp4 took longer than 0\.2 s to decode$"):
        list(written_by(FILM, hangs, DecodeLimits(seconds=0.2)))


def test_each_minute_of_a_film_has_the_time_that_a_clip_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A clock that counts how often it is asked, so each piece takes a second.
    asked = iter(range(10**9))
    monkeypatch.setattr(ffmpeg_process, "time", SimpleNamespace(monotonic=lambda: next(asked)))
    limits = DecodeLimits(seconds=500)
    minute = 1 << 16
    hours = shell(f"head -c {1000 * minute} /dev/zero")
    assert sum(map(len, written_by(FILM, hours, limits, minute))) == 1000 * minute
    with pytest.raises(DecodeError, match=r"took longer than 500 s to decode$"):
        list(written_by(FILM, hours, limits))
    with pytest.raises(DecodeError, match=r"took longer than 500 s to decode a minute of it$"):
        list(written_by(FILM, hours, limits, 1000 * minute))


def test_the_time_that_its_reader_takes_is_not_the_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(ffmpeg_process, "time", SimpleNamespace(monotonic=lambda: now))
    for _ in written_by(FILM, shell("head -c 10000000 /dev/zero"), DecodeLimits(seconds=1)):
        now += 1000


# Waits until the limits are set, which happens while it runs already.
LIMITS = """
while [ "$(ulimit -v)" = unlimited ] || [ "$(ulimit -St)" = unlimited ]; do :; done
echo $(ulimit -v) $(ulimit -St) $(ulimit -Ht)
"""


def test_limits_hold_for_the_program_itself() -> None:
    resource = pytest.importorskip("resource")
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
        if resource.getrlimit(limit) != (resource.RLIM_INFINITY,) * 2:
            pytest.skip("this process is limited itself")
    limits = DecodeLimits(seconds=90, memory_gib=3)
    said = b"".join(written_by(FILM, shell(LIMITS), limits))
    assert said.decode().split() == [str(3 * 2**20), "95", "100"]
    # Of a film, each minute gets as much on top of what the ones before it took.
    busy = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"
    waits = 'while [ "$(ulimit -St)" = 95 ]; do :; done; ulimit -St; ulimit -Ht'
    pieces = written_by(FILM, shell(f"{LIMITS}{busy}\necho {'x' * 100}\n{waits}"), limits, 100)
    said = b"".join(pieces)
    first, _, soft, hard = said.decode().splitlines()
    assert first.split() == [str(3 * 2**20), "95", "unlimited"]
    assert 95 < int(soft) < 300
    assert hard == "unlimited"


# Under hard limits (ulimit -H) of its own, which only root could exceed.
LIMITED = """
import os, resource
from pathlib import Path
from megatron_nuwa.decoders import DecodeLimits
from megatron_nuwa.decoders.ffmpeg_process import written_by

resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (50, 100))
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
waits = 'while [ "$(ulimit -Sv)" = 2097152 ] || [ "$(ulimit -St)" = 50 ]; do :; done; '
shown = 'echo $(ulimit -Sv) $(ulimit -Hv) $(ulimit -St) $(ulimit -Ht)'
for minute in (None, 1):
    command = ["sh", "-c", waits + shown]
    print(b"".join(written_by(Path("film.mp4"), command, DecodeLimits(), minute)).decode(), end="")
"""


def test_limits_lie_within_those_of_this_process() -> None:
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.splitlines() == ["3145728 3145728 100 100"] * 2, done.stderr


def test_program_is_found_without_a_child_that_could_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    packaged = imageio_ffmpeg.get_ffmpeg_exe()

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    ffmpeg_program._packaged.cache_clear()
    assert ffmpeg_program.ffmpeg_program() == packaged
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/opt/my/ffmpeg")
    assert ffmpeg_program.ffmpeg_program() == "/opt/my/ffmpeg"
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    monkeypatch.setattr(ffmpeg_program, "_packaged", lambda: None)
    system = tmp_path / "ffmpeg"
    system.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ffmpeg_program.ffmpeg_program() == str(system)
    system.unlink()
    with pytest.raises(MachineError, match=r"no ffmpeg here: .*IMAGEIO_FFMPEG_EXE"):
        ffmpeg_program.ffmpeg_program()
