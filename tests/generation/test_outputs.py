"""The folder of one call: what it holds, who may write to it, and what is never replaced."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT, without_privileges

from megatron_nuwa.errors import UserError
from megatron_nuwa.generation.outputs import check_free
from megatron_nuwa.generation.reserved import reserve, reserve_new
from megatron_nuwa.training.checkpoint import Checkpoints

PROMPT, OTHER = "a red square moves left", "a blue circle stays"


def listed(*names: str, software: str = "megatron_nuwa") -> str:
    """A samples.json of one sample a file."""
    return json.dumps([{"software": software, "files": [name]} for name in names])


def test_a_folder_holds_the_samples_of_one_call(
    generate, command: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate("t2i", "--prompt", PROMPT, "--samples", 2)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    generate("t2i", "--prompt", OTHER)
    pictures = {path.name for path in (tmp_path / "out").iterdir()}
    assert pictures == {"0000.png", "index.html", "notes.txt", "samples.json", "sheet.png"}
    # Where no folder is named, nothing is replaced.
    own = tmp_path / "run"
    shutil.copytree(run, own)
    for _ in range(3):
        monkeypatch.setattr(sys, "argv", ["generate", "t2i", "--prompt", PROMPT, "--run", str(own)])
        command.main()
    assert {path.name for path in (own / "generated").iterdir()} == {"t2i", "t2i-2", "t2i-3"}


def test_samples_of_a_checkpoint_lie_with_its_run_which_outlives_it(
    call, run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    checkpoint, _ = Checkpoints(own / "checkpoints", keep=1).newest()
    assert checkpoint is not None
    (tmp_path / "link").symlink_to(checkpoint)
    before = contents(checkpoint)
    for source in (checkpoint, tmp_path / "link", own):
        call("t2i", "--prompt", PROMPT, run=source)
    assert contents(checkpoint) == before
    assert contents(own / "generated") == {"t2i", "t2i-2", "t2i-3"}
    assert (own / "generated/t2i/0000.png").is_file()


def test_a_place_that_cannot_be_written_to_is_named_before_anything_is_sampled(
    command: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.png"
    place.write_text("a picture")
    monkeypatch.setattr(command, "open_generator", None)
    for output in (place, place / "deeper"):
        words = ["generate", "t2i", "--prompt", PROMPT, "--run", str(run), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(UserError, match=r"a\.png is no folder; name another folder"):
            command.main()


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_calls_at_the_same_time_get_a_folder_each(
    call, command: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    opened = command.open_generator
    inner = iter([OTHER])

    def open_generator(*arguments: object) -> object:
        # Another call comes and goes while this one has not written anything yet.
        for prompt in inner:
            call("t2i", "--prompt", prompt, "--samples", 2, run=own)
        return opened(*arguments)

    monkeypatch.setattr(command, "open_generator", open_generator)
    call("t2i", "--prompt", PROMPT, run=own)
    generated = own / "generated"
    assert contents(generated) == {"t2i", "t2i-2"}
    prompts = [
        [entry["prompt"] for entry in json.loads((generated / name / "samples.json").read_text())]
        for name in ("t2i", "t2i-2")
    ]
    assert prompts == [[PROMPT], [OTHER, OTHER]]


def test_a_call_that_fails_before_it_writes_anything_leaves_no_folder(
    call, command: ModuleType, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    monkeypatch.setattr(command, "generate", None)
    for output in ((), ("--output", tmp_path / "new/deep")):
        with pytest.raises(TypeError):
            call("t2i", "--prompt", PROMPT, *output, run=own)
    assert contents(tmp_path) == {"run"}
    assert contents(own) == contents(run)


def test_a_folder_that_another_call_writes_to_is_refused(call, tmp_path: Path) -> None:
    with (
        reserve(tmp_path / "out"),
        pytest.raises(UserError, match="out: another call is writing to it; name another folder"),
    ):
        call("t2i", "--prompt", PROMPT, "--output", tmp_path / "out")
    call("t2i", "--prompt", PROMPT, "--output", tmp_path / "out")
    assert contents(tmp_path / "out") == {"0000.png", "index.html", "samples.json", "sheet.png"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_locks_are_unknown_that_is_said_and_new_folders_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with reserve(tmp_path / "out") as place:
        (place.folder / "0000.png").write_text("whole")
    with reserve_new(tmp_path / "t2i") as one, reserve_new(tmp_path / "t2i") as two:
        assert [one.folder.name, two.folder.name] == ["t2i", "t2i-2"]
        assert one.drafts.is_dir()
    assert contents(tmp_path) == {"out"}
    assert contents(tmp_path / "out") == {"0000.png"}
    told = capsys.readouterr().out
    assert f"out cannot be locked ({os.strerror(code)}): take care that no other command" in told


def test_what_a_killed_call_left_is_swept_and_its_empty_folder_used(tmp_path: Path) -> None:
    killed = (
        "import os, sys; from pathlib import Path\n"
        "from megatron_nuwa.generation.reserved import reserve_new\n"
        "place = reserve_new(Path(sys.argv[1]))\n"
        "(place.drafts / '0000.png').write_text('half'); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", killed, tmp_path / "t2i"], cwd=ROOT, check=False)
    assert done.returncode == 9
    assert contents(tmp_path / "t2i") != set()
    with reserve_new(tmp_path / "t2i") as place, reserve_new(tmp_path / "t2i") as other:
        assert place.folder == tmp_path / "t2i"
        assert contents(place.drafts) == set()
        assert other.folder == tmp_path / "t2i-2"
        (other.folder / "0000.png").write_text("whole")
    assert contents(tmp_path) == {"t2i-2"}
    assert contents(tmp_path / "t2i-2") == {"0000.png"}


def test_samples_are_written_where_it_was_tried_before(call, open_folder: Path, run: Path) -> None:
    shutil.copytree(run, open_folder / "run")
    mine = open_folder / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    with without_privileges():
        # The folder above is somebody else's.
        call("t2i", "--prompt", PROMPT, "--output", mine, run=open_folder / "run")
        where = rf"{open_folder} cannot be written to \(Permission denied\); name another folder"
        with pytest.raises(UserError, match=where):
            call("t2i", "--prompt", PROMPT, "--output", open_folder / "other", run=open_folder)
    assert contents(mine) == {"0000.png", "index.html", "samples.json", "sheet.png"}
    assert contents(open_folder) == {"mine", "run"}


@pytest.mark.parametrize("other", [None, '{"kept": "for later"}', '[{"files": ["0000.gif"]}]'])
def test_files_that_no_call_has_written_are_never_replaced(
    call,
    command: ModuleType,
    media: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: str | None,
) -> None:
    """`other`: the content of a file of the user's that has the name of the list."""
    output = tmp_path / "site"
    output.mkdir()
    clips = ("v2v", "--clip", media / "clip.mp4", "--samples", 2, "--output", output)
    call(*clips)
    call(*clips, "--samples", 1)
    # The earlier call's may be replaced, this one not, for only one clip was listed.
    (output / "0001.mp4").write_text("mine")
    with monkeypatch.context() as context:
        context.setattr(command, "open_generator", None)
        with pytest.raises(UserError, match=r"site holds 0001\.mp4, which no earlier call has wr"):
            call(*clips)
        # A clip of one frame is written as a picture.
        (output / "0000.png").write_text("mine")
        with pytest.raises(UserError, match=r"site holds 0000\.png, which no earlier call has wr"):
            call("t2v", "--prompt", PROMPT, "--frames", 1, "--output", output)
        (output / "samples.json").unlink()
        if other is not None:
            (output / "samples.json").write_text(other)
        with pytest.raises(UserError, match=r"site holds 0000\.png and [56] more, which"):
            call(*clips)
    assert (output / "0001.mp4").read_text() == "mine"
    assert (output / "0000.gif").read_bytes()[:3] == b"GIF"
    assert not (output / "0001.gif").exists()


@pytest.mark.parametrize("moves", range(5))
def test_a_call_killed_while_it_puts_files_in_their_place_is_made_good_by_the_next(
    tmp_path: Path, moves: int
) -> None:
    """Killed after each of its moves: of two samples, a page and a sheet, then of the list."""
    folder = tmp_path / "out"
    killed = (
        "import os, sys; from pathlib import Path\n"
        "from megatron_nuwa.generation import drafts\n"
        "from megatron_nuwa.generation.reserved import reserve\n"
        "place = reserve(Path(sys.argv[1])); left, move = int(sys.argv[2]), os.replace\n"
        "def replace(*paths):\n"
        "    global left\n"
        "    if not left: os._exit(9)\n"
        "    left -= 1; move(*paths)\n"
        "os.replace = replace\n"
        "for name in ('0000.png', '0001.png', 'index.html', 'sheet.png'):\n"
        "    (place.drafts / name).write_text('new')\n"
        "(place.drafts / 'samples.json').write_text(sys.argv[3])\n"
        "drafts.carry_over(place.drafts, place.folder)\n"
    )
    folder.mkdir()
    for name in ("0000.png", "0002.png", "index.html", "mine.txt"):
        (folder / name).write_text("old")
    (folder / "samples.json").write_text(listed("0000.png", "0002.png"))
    new = listed("0000.png", "0001.png")
    command = [sys.executable, "-c", killed, str(folder), str(moves), new]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    with reserve(folder) as place:
        check_free(folder, 2)
        assert contents(place.drafts) == set()
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    made = dict.fromkeys(("0000.png", "0001.png", "index.html", "sheet.png"), "new")
    assert texts == {**made, "samples.json": new, "mine.txt": "old"}


def test_a_folder_above_that_is_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "generated").symlink_to(tmp_path / "gone")
    (tmp_path / "t2i").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="generated is no folder; name another folder"):
        reserve_new(tmp_path / "generated" / "t2i")
    with reserve_new(tmp_path / "t2i") as place:
        assert place.folder == tmp_path / "t2i-2"


def test_a_run_that_is_not_there_is_named_and_no_folder_made_for_it(call, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--run: {tmp_path}/gone does not exist$"):
        call("t2i", "--prompt", PROMPT, run=tmp_path / "gone")
    assert contents(tmp_path) == set()
