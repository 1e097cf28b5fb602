"""Two million items on a node's loaders take little memory, and no more as reading goes on.

A process's own memory is counted, beyond what Python and PyTorch take: the pages of mapped shards
are the page cache's, which all processes share and which the system takes back when it needs them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from process_memory import MIB, own_memory

from megatron_nuwa.data.shards import (
    CorpusManifest,
    Counts,
    Fingerprints,
    ShardItem,
    shard_name,
    write_settings,
    write_shard,
)

SHARDS, ITEMS = 500, 4096
SIDE, CODES = 21, 8192
PROCESSES, BATCH, STOPS = 8, 4096, 10


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two million images of 441 tokens; their shards are links to one tar."""
    random = np.random.default_rng(0)
    caption = "a caption of the usual length, about sixty characters long."
    items = [
        ShardItem(
            id=f"item-{number:08d}",
            visual=random.integers(0, CODES, SIDE * SIDE, np.uint16),
            text=random.integers(0, 500, (1 + number % 2, 77), np.uint16),
            captions=(caption,) * (1 + number % 2),
            frames=1,
            media=f"folder/{number:08d}.jpg",
        )
        for number in range(ITEMS)
    ]
    first = write_shard(tmp_path, 0, items)
    sidecars = [first]
    for number in range(1, SHARDS):
        # Links to one tar: the loader maps and reads each as a file of its own name.
        os.link(tmp_path / "shard-000000.tar", tmp_path / f"{shard_name(number)}.tar")
        sidecars.append(first.model_copy(update={"shard": shard_name(number)}))
        write_settings(tmp_path / f"{shard_name(number)}.json", sidecars[-1])
    manifest = CorpusManifest(
        format_version=1,
        grid=(SIDE, SIDE, 1),
        frames_per_second=None,
        codebook_size=CODES,
        text_vocabulary_size=520,
        fingerprints=Fingerprints(vqgan="v", bpe=hashlib.sha256(b"").hexdigest(), decode="d"),
        counts=Counts(items=SHARDS * ITEMS, captions=SHARDS * first.captions, failed=0),
        shards=tuple(sidecar.entry() for sidecar in sidecars),
    )
    write_settings(tmp_path / "corpus.json", manifest)
    return tmp_path


class Node:
    """The loader processes of a node, which all stop wherever they are measured."""

    def __init__(self, corpus: Path) -> None:
        script = Path(__file__).with_name("node_loader.py")
        self._processes = [
            subprocess.Popen(
                [
                    *(sys.executable, str(script), str(corpus)),
                    *map(str, (rank, PROCESSES, BATCH, STOPS)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(PROCESSES)
        ]

    def next_stop(self) -> tuple[set[str], np.ndarray]:
        """What the processes say at their next stop, and the own memory of each there, in bytes."""
        said = set()
        for process in self._processes:
            assert process.stdout is not None
            said.add(process.stdout.readline().strip())
        own = np.array([own_memory(process.pid) for process in self._processes])
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        return said, own

    def wait(self) -> Sequence[int]:
        """Their exit codes."""
        return [process.wait(60) for process in self._processes]

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_million_items_stay_under_a_gibibyte_on_a_node_of_eight_processes(corpus: Path) -> None:
    with Node(corpus) as node:
        said, imported = node.next_stop()
        assert said == {"imported"}
        said, opened = node.next_stop()
        assert said == {f"opened {SHARDS * ITEMS}"}
        marks = []
        for stop in range(1, STOPS + 1):
            said, own = node.next_stop()
            assert said == {f"read {SHARDS * ITEMS // PROCESSES // STOPS * stop}"}
            marks.append((own - imported).sum())
        assert node.wait() == [0] * PROCESSES
    print(f"{imported.sum() / MIB:.0f} MiB before a corpus is opened")
    print(f"{(opened - imported).sum() / MIB:.1f} MiB more for the opened corpus")
    print("MiB more in the course of an epoch:", [round(float(mark) / MIB, 1) for mark in marks])
    assert (opened - imported).sum() < 32 * MIB
    # A quarter of the gibibyte that is promised.
    assert max(marks) < 256 * MIB
    assert marks[-1] - marks[2] < PROCESSES * 2 * MIB
