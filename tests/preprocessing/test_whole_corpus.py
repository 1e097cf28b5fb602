"""Where `merge` and `split` put their corpora."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from disks import MakeDisk

from megatron_nuwa.errors import UserError
from preprocessing.whole_corpus import check_output, made_whole


@pytest.mark.parametrize("is_there", [True, False])
def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path: Path, is_there: bool) -> None:
    scratch, link = tmp_path / "scratch" / "corpus", tmp_path / "corpus"
    if is_there:
        scratch.mkdir(parents=True)
    link.symlink_to(scratch)
    check_output(link, "--output")
    with made_whole([link]) as [draft]:
        # On the disk of the link's target, so that it can take its place.
        assert draft.parent == scratch.parent
        (draft / "file").write_text("whole")
        assert not link.exists() or not list(link.iterdir())
    assert link.is_symlink()
    assert (scratch / "file").read_text() == "whole"
    assert list(scratch.parent.iterdir()) == [scratch]
    with pytest.raises(UserError, match=rf"--output {re.escape(str(link))} exists already"):
        check_output(link, "--output")


def test_a_mount_point_is_refused_at_once(tmp_path: Path, memory_disk: MakeDisk) -> None:
    folder = memory_disk(16).folder
    (tmp_path / "link").symlink_to(folder)
    for output in (folder, tmp_path / "link"):
        with pytest.raises(UserError, match="is where a disk is mounted"):
            check_output(output, "--output")
    check_output(folder / "corpus", "--output")
