"""Files that are written aside and carried over to their folder together, killed or not.

`samples.json` among the drafts is the commit: it is written when all others are whole, and whoever
finds it there, this call or the next one, carries over what is left.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_nuwa.files import sync

LIST_FILE = "samples.json"
SOFTWARE = "megatron_nuwa"


def carry_over(drafts: Path, folder: Path) -> None:
    """Put finished drafts into the folder, the list last; does nothing where they are not finished.

    Files that the folder's list names, and the new one does not, are removed.
    """
    listed = listed_files(drafts)
    if listed is None:
        return
    for path in drafts.iterdir():
        if path.name != LIST_FILE and not path.name.startswith("."):
            sync(path)
            os.replace(path, folder / path.name)
    for name in (listed_files(folder) or set()) - listed:
        (folder / name).unlink(missing_ok=True)
    os.replace(drafts / LIST_FILE, folder / LIST_FILE)
    sync(folder)


def listed_files(folder: Path) -> set[str] | None:
    """Names of the samples that a folder's samples.json lists; None where there is no such list.

    A list that another program has written is none.
    """
    try:
        entries = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))
        # Names, not paths: nothing outside the folder is meant.
        ours = [entry for entry in entries if entry["software"] == SOFTWARE]
        return {Path(str(name)).name for entry in ours for name in entry["files"]} if ours else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
