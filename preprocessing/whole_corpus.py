"""Corpora made from others: a folder that is absent until it is whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_nuwa.data.shard_list import ShardEntry, ShardList
from megatron_nuwa.data.shards import CorpusManifest, Counts, commit_corpus, read_manifest
from megatron_nuwa.errors import UserError
from megatron_nuwa.files import sync, written_atomically
from preprocessing.ledger import FAILURES_FILE
from preprocessing.verify import find_damage


def sound_manifest(folder: Path) -> CorpusManifest:
    """A corpus's manifest; `UserError` where the corpus is unfinished or plainly damaged."""
    manifest = read_manifest(folder)
    damage = find_damage(folder)
    if damage:
        raise UserError(f"corpus {folder} is damaged: {damage[0]}")
    return manifest


def check_output(output: Path, option: str) -> None:
    """`UserError` naming the option where no corpus can take the place of what is there already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{option} {output} exists already; name another folder")
    if output.resolve().is_mount():
        raise UserError(
            f"{option} {output} is where a disk is mounted, and a corpus appears there by taking a "
            "folder's place; name a folder on the disk"
        )


@contextmanager
def made_whole(outputs: Sequence[Path]) -> Iterator[list[Path]]:
    """Folders to write into, which take the outputs' places together when the block ends.

    A link stays, and what it leads to is written. Nothing stays behind where it fails. Raises
    `UserError` where an output cannot be written.
    """
    drafts: list[Path] = []
    placed: list[Path] = []
    places = [output.resolve() for output in outputs]
    try:
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            drafts.append(Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.")))
        yield drafts
        for draft, place in zip(drafts, places, strict=True):
            # A temporary folder is private; a corpus is as readable as its neighbours.
            draft.chmod(0o755)
            sync(draft)
            draft.replace(place)
            placed.append(place)
            sync(place.parent)
    except BaseException as error:
        for folder in (*drafts, *placed):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            names = ", ".join(map(str, outputs))
            reason = error.strerror or error
            raise UserError(f"output {names} cannot be written: {reason}") from error
        raise


def commit(
    folder: Path,
    like: CorpusManifest,
    entries: Iterable[ShardEntry],
    failures: Iterable[str] = (),
) -> CorpusManifest:
    """Write `failures.jsonl`, of these lines, and `corpus.json`, with the settings of another.

    The entries, of which there may be very many, are asked for one by one and first.
    """
    shards = ShardList.of(entries)
    left_out: Counter[str | None] = Counter()
    with written_atomically(folder / FAILURES_FILE) as stream:
        for line in failures:
            stream.write(line.encode() + b"\n")
            left_out[json.loads(line).get("filter")] += 1
    counts = Counts(
        items=shards.total("items"),
        captions=shards.total("captions"),
        failed=left_out.pop(None, 0),
        left_out={name: count for name, count in sorted(left_out.items()) if name},
    )
    manifest = like.model_copy(update={"counts": counts, "shards": shards})
    return commit_corpus(folder, manifest, [FAILURES_FILE])
