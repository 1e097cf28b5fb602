"""Checkpoints on disk: found whole or not at all, kept as long as the recipe says."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from power import Disk
from safetensors.torch import load_file

from megatron_nuwa.errors import UserError
from megatron_nuwa.training import checkpoint, snapshot
from megatron_nuwa.training.checkpoint import (
    MANIFEST_FILE,
    Checkpoints,
    DamagedCheckpointError,
    check,
    step_of,
    tag_of,
)
from megatron_nuwa.training.resume import find_newest
from megatron_nuwa.training.snapshot import Part, Weights

PARTS = {
    "state.json": '{"step": 1}',
    "optimizer.pt": {"moments": [torch.arange(40.0), torch.ones(3, dtype=torch.bfloat16)]},
    "random/rank_00000.pt": {"torch": torch.get_rng_state()},
    "model.safetensors": Weights({"weight": torch.randn(5, 7)}, {"config": "{}"}),
}


def save(checkpoints: Checkpoints, step: int) -> Path:
    folder = checkpoints.begin(step)
    files = {name: Part.capture(name, content).write(folder) for name, content in PARTS.items()}
    return checkpoints.commit(step, files)


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """Two whole checkpoints, of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path, keep=5)
    save(checkpoints, 1)
    save(checkpoints, 2)
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    checkpoints.remove_retired()
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_a_saved_file_holds_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {
        "a": torch.randn(3, 4),
        "empty": torch.zeros(0, 2),
        "half": torch.randn(9).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "turned": torch.randn(4, 6).t(),
        "trained": torch.nn.Parameter(torch.randn(2)),
    }
    # In pieces, as tensors are that are larger than what is written at once.
    monkeypatch.setattr(snapshot, "_CHUNK", 10)
    for config in ("§", "§§", "§§§"):
        Part.capture("w.safetensors", Weights(weights, {"config": config})).write(tmp_path)
        header = int.from_bytes((tmp_path / "w.safetensors").read_bytes()[:8], "little")
        assert header % 8 == 0
    read = load_file(tmp_path / "w.safetensors")
    assert read.keys() == weights.keys()
    assert all(read[name].equal(value) for name, value in weights.items())
    Part.capture("deep/er/t.pt", {"x": (weights["turned"], 3)}).write(tmp_path)
    turned, three = torch.load(tmp_path / "deep/er/t.pt", weights_only=True)["x"]
    assert turned.equal(weights["turned"])
    assert three == 3


def test_a_copy_does_not_follow_the_original() -> None:
    weight, settings = torch.ones(4), {"rate": [1.0]}
    live = Part.capture("a", {"weight": weight, "again": weight, "settings": settings})
    settings["rate"][0] = 2.0
    copied = live.on_host({})
    weight.zero_()
    assert live.bytes == 32
    assert copied.content["weight"].equal(torch.ones(4))
    assert copied.content["again"] is copied.content["weight"]
    assert copied.content["settings"] == {"rate": [1.0]}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("content", ["text", {"tensor": torch.ones(3)}])
def test_a_full_disk_is_an_error_when_the_file_is_closed(tmp_path: Path, content: object) -> None:
    (tmp_path / "file").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        Part.capture("file", content).write(tmp_path)


def test_a_checkpoint_is_whole_though_people_cannot_be_told_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    write = checkpoint.write_text_atomically

    def refuses(path: Path, text: str) -> None:
        if path.name == "latest":
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text_atomically", refuses)
    assert save(checkpoints, 2) == tmp_path / tag_of(2)
    assert "No space left on device" in capsys.readouterr().out
    assert checkpoints.newest() == (tmp_path / tag_of(2), [])
    # What the new one replaces goes all the same.
    assert names(checkpoints) == ["latest", tag_of(2)]


def damaged_copies(content: bytes) -> list[bytes]:
    """Cut short, longer, empty, and with a bit flipped at the beginning, the middle and the end."""
    copies = [content[:-1], content[: len(content) // 2], b"", content + b"\0"]
    for place in (0, len(content) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        copies.append(bytes(flipped))
    return copies


@pytest.mark.parametrize("name", [*PARTS, MANIFEST_FILE])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    two: Checkpoints, name: str
) -> None:
    path = two.folder / tag_of(2) / name
    content = path.read_bytes()
    for damaged in damaged_copies(content):
        path.write_bytes(damaged)
        newest, [complaint] = two.newest()
        assert newest == two.folder / tag_of(1)
        assert f"{tag_of(2)} is damaged ({name} " in complaint
    path.unlink()
    assert two.newest()[0] == two.folder / tag_of(1)
    path.write_bytes(content)
    assert two.newest() == (two.folder / tag_of(2), [])


def test_a_file_that_the_disk_does_not_read_is_named_and_the_checkpoint_before_is_used(
    two: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = two.folder / tag_of(2) / "optimizer.pt"
    read = checkpoint.sha256_of

    def refuses(path: Path) -> str:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(checkpoint, "sha256_of", refuses)
    newest, [complaint] = two.newest()
    assert newest == two.folder / tag_of(1)
    assert "is damaged (optimizer.pt cannot be read: Input/output error)" in complaint


def test_a_file_that_may_not_be_read_is_no_damage_and_ends_the_start_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    save(Checkpoints(tmp_path / "checkpoints", keep=5), 1)
    monkeypatch.setattr(checkpoint, "sha256_of", refuses)
    recipe: Any = SimpleNamespace(run=tmp_path, training=SimpleNamespace(keep_checkpoints=5))
    with pytest.raises(UserError, match=r"\.json cannot be read: Permission denied; let this user"):
        find_newest(recipe)


def test_every_bit_of_the_manifest_counts(two: Checkpoints) -> None:
    path = two.folder / tag_of(2) / MANIFEST_FILE
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(bytes(flipped))
        with pytest.raises(DamagedCheckpointError):
            check(path.parent)


def test_another_format_version_is_said(two: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_nuwa.training.checkpoint.FORMAT_VERSION", 7)
    save(two, 3)
    monkeypatch.undo()
    newest, [complaint] = two.newest()
    assert newest == two.folder / tag_of(2)
    assert "has format version 7, this program reads 1" in complaint


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"), [(1, None, [9]), (3, None, [7, 8, 9]), (2, 4, [4, 8, 9])]
)
def test_the_newest_and_every_so_many_steps_are_kept(
    tmp_path: Path, keep: int, keep_every: int | None, kept: list[int]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep, keep_every)
    for step in range(1, 10):
        save(checkpoints, step)
    assert names(checkpoints) == ["latest", *map(tag_of, kept)]
    assert (tmp_path / "latest").read_text() == f"{tag_of(9)}\n"


def test_a_damaged_later_checkpoint_costs_no_whole_one_and_is_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (1, 3):
        save(checkpoints, step)
    (tmp_path / tag_of(3) / "state.json").write_text("")
    save(checkpoints, 2)
    assert [step_of(path) for path in checkpoints.all()] == [2, 3]
    assert checkpoints.newest()[0] == tmp_path / tag_of(2)
    save(checkpoints, 3)
    assert checkpoints.newest() == (tmp_path / tag_of(3), [])
    assert names(checkpoints) == ["latest", tag_of(3)]


def test_a_checkpoint_outlasts_a_power_loss_as_soon_as_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    path = save(Checkpoints(tmp_path, keep=1), 1)
    assert disk.of(path).lost == []
    assert path.name in disk.names(tmp_path)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_save_killed_at_any_call_leaves_the_checkpoint_before_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes a folder, and every fsync, is once the last one."""
    calls = ("mkdir", "replace", "rename", "fsync", "unlink", "rmdir")
    real = {name: getattr(os, name) for name in calls}
    ended = False
    deadline = 0
    while not ended:
        folder = tmp_path / str(deadline)
        checkpoints = Checkpoints(folder, keep=1)
        save(checkpoints, 1)
        left = [deadline]

        def doomed(name: str, left: list[int] = left) -> object:
            def call(*arguments: object, **options: object) -> object:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real[name](*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, doomed(name))
            try:
                save(checkpoints, 2)
                checkpoints.remove_retired()
                ended = True
            except Killed:
                pass
        newest, complaints = checkpoints.newest()
        assert newest in (folder / tag_of(1), folder / tag_of(2)), deadline
        assert complaints == []
        save(checkpoints, 3)
        assert names(checkpoints) == ["latest", tag_of(3)]
        shutil.rmtree(folder)
        deadline += 1
    assert deadline > 10


def test_the_manifest_lists_every_file(two: Checkpoints) -> None:
    folder = two.folder / tag_of(2)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert files == {*manifest["files"], MANIFEST_FILE}
    assert manifest["step"] == 2
