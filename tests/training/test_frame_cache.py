"""Decoding all frames of a data set at first: it may take hours, be stopped, and be killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from ranks import Ranks

from megatron_nuwa.errors import MachineError, UserError
from megatron_nuwa.training import frame_cache
from megatron_nuwa.training.frame_cache import cache_frames, known_cache
from megatron_nuwa.training.frames import MediaFrames

DECODING = ROOT / "tests/training/disturbed/decoding.py"
WHOLE = [item for item in range(30) if item != 3 for _ in range(1 + item % 2)]


class Decoder:
    """Item n has n % 2 + 1 frames of the value n; item 3 is broken; writes down what it decodes."""

    def __init__(
        self, fails_at: int | None = None, failure: type[BaseException] = KeyboardInterrupt
    ) -> None:
        self.fails_at, self.failure = fails_at, failure
        self.decoded: list[int] = []

    def __call__(self, item: object) -> np.ndarray:
        assert isinstance(item, int)
        if item == self.fails_at:
            raise self.failure
        self.decoded.append(item)
        if item == 3:
            raise UserError("item 3 cannot be decoded")
        return np.full((1 + item % 2, 8, 8, 3), item, np.uint8)

    def media(self, key: str = "k") -> MediaFrames:
        return MediaFrames(range(30), self, 8, lambda go_on: key, "test frames")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_decode_longer_than_the_backend_waits_is_stopped_and_continued(tmp_path: Path) -> None:
    """The signal reaches the process that only waits."""
    with Ranks(2, tmp_path / "logs", tmp_path / "run", script=DECODING) as ranks:
        assert ranks.wait_for(lambda: "item decoded" in ranks.output()), ranks.output()
        time.sleep(5.5)
        assert [process.poll() for process in ranks.processes] == [None, None], ranks.output()
        ranks.processes[1].send_signal(signal.SIGUSR1)
        assert ranks.wait(20) == [0, 0], ranks.output()
        assert ranks.output().count("stopped by SIGUSR1") == 2
        done = 1 + ranks.output().count("item decoded")
    assert done > 12
    assert known_cache(tmp_path / "run/f.npy") is None
    second = Decoder()
    report = cache_frames(second.media(), tmp_path / "run/f.npy")
    assert second.decoded == list(range(done, 30))
    assert (report.begun, report.frames) == (done, len(WHOLE))
    assert np.load(tmp_path / "run/f.npy")[:, 0, 0, 0].tolist() == WHOLE
    assert names(tmp_path / "run") == ["f.json", "f.npy"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MachineError])
@pytest.mark.parametrize("note_seconds", [-1.0, 1000.0], ids=["noted each", "noted at the end"])
def test_what_was_decoded_before_an_interruption_is_kept(
    note_seconds: float,
    failure: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault of the machine is one, too: its item is not to blame."""
    monkeypatch.setattr(frame_cache, "_NOTE_SECONDS", note_seconds)
    path = tmp_path / "f.npy"
    with pytest.raises(failure):
        cache_frames(Decoder(20, failure).media(), path)
    assert names(tmp_path) == [".f.npy.part", ".f.npy.part.json"]
    second = Decoder()
    report = cache_frames(second.media(), path)
    assert second.decoded == list(range(20, 30))
    assert (report.begun, report.failures) == (20, ["item 3 cannot be decoded"])
    assert np.load(path)[:, 0, 0, 0].tolist() == WHOLE
    assert names(tmp_path) == ["f.json", "f.npy"]


def test_a_kill_loses_only_what_was_not_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is longer by then than its note says, or ends in the middle of a frame."""
    path = tmp_path / "f.npy"
    monkeypatch.setattr(frame_cache, "_NOTE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        cache_frames(Decoder(fails_at=20).media(), path)
    with (tmp_path / ".f.npy.part").open("ab") as stream:
        stream.write(b"\7" * 100)
    second = Decoder()
    cache_frames(second.media(), path)
    assert second.decoded == list(range(20, 30))
    assert np.load(path)[:, 0, 0, 0].tolist() == WHOLE


@pytest.mark.parametrize("change", ["key", "cut short", "no note", "damaged note"])
def test_what_does_not_fit_is_decoded_anew(change: str, tmp_path: Path) -> None:
    path, part, note = (tmp_path / name for name in ("f.npy", ".f.npy.part", ".f.npy.part.json"))
    with pytest.raises(KeyboardInterrupt):
        cache_frames(Decoder(fails_at=20).media(), path)
    if change == "cut short":
        part.write_bytes(part.read_bytes()[:-1])
    elif change == "no note":
        note.unlink()
    elif change == "damaged note":
        note.write_text("{")
    second = Decoder()
    report = cache_frames(second.media("other" if change == "key" else "k"), path)
    assert second.decoded == list(range(30))
    assert report.begun == 0
    assert np.load(path)[:, 0, 0, 0].tolist() == WHOLE
    assert names(tmp_path) == ["f.json", "f.npy"]


def test_a_full_disk_costs_what_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, add = tmp_path / "f.npy", frame_cache._Part.add

    def fails(part: frame_cache._Part, frames: np.ndarray) -> None:
        if part.items == 20:
            raise OSError(28, "No space left on device")
        add(part, frames)

    with monkeypatch.context() as patch:
        patch.setattr(frame_cache._Part, "add", fails)
        with pytest.raises(OSError, match="No space left"):
            cache_frames(Decoder().media(), path)
    second = Decoder()
    cache_frames(second.media(), path)
    assert second.decoded == list(range(20, 30))
    assert np.load(path)[:, 0, 0, 0].tolist() == WHOLE
