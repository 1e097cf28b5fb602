"""Files are whole or absent, also after a power loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from power import Disk

from megatron_nuwa.files import (
    replaced_atomically,
    try_to_write,
    write_text_atomically,
    written_atomically,
)


def through_stream(path: Path, text: str) -> None:
    with written_atomically(path) as stream:
        stream.write(text.encode())


def through_name(path: Path, text: str) -> None:
    with replaced_atomically(path) as temporary:
        temporary.write_text(text)


WAYS = [through_stream, through_name, write_text_atomically]


@pytest.mark.parametrize("write", WAYS)
def test_a_file_is_on_the_disk_before_it_has_its_name(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, path = Disk(monkeypatch), tmp_path / "file"
    for text in ("first", "second"):
        write(path, text)
        assert path.read_text() == text
        assert disk.of(path).lost == []


@pytest.mark.parametrize("way", [written_atomically, replaced_atomically])
def test_a_failed_block_leaves_the_old_file_and_no_other(
    way: Callable[[Path], AbstractContextManager[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_amid() -> None:
        with way(path) as place:
            (place.write_bytes if isinstance(place, Path) else place.write)(b"half")
            raise RuntimeError("amid")

    with pytest.raises(RuntimeError, match="amid"):
        fail_amid()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13)])
def test_what_a_run_can_do_without_is_told_and_not_raised(
    error: OSError, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    try_to_write(fails)
    assert capsys.readouterr().out.startswith("warning: not written: ")
