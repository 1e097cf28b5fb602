"""Two million items on the loader of a node take little memory, and no more as reading goes on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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

READER = """
import json, sys
from megatron_nuwa.data.batches import TaskBatches
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.text import train_bpe

def resident(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

bpe = train_bpe(["a cat"], 520)
anonymous, before = resident("RssAnon"), resident("VmRSS")
batches = TaskBatches("t2i", [Corpus(sys.argv[1])], bpe, seed=0, batch_size=512)
opened = resident("RssAnon") - anonymous
steps, marks = batches.order.items // 512, []
for step in range(steps):
    batches.micro_batches(step, 0, 1)
    if step % (steps // 8) == 0:
        marks.append(resident("RssAnon") - anonymous)
print(json.dumps({
    "opened": opened, "marks": marks, "all": resident("VmRSS"), "own": resident("RssAnon"),
    "peak": resident("VmHWM"), "before": before, "items": batches.order.items,
}))
"""


@pytest.mark.slow
def test_two_million_items_stay_under_a_gibibyte(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    items = []
    for number in range(ITEMS):
        captions = 1 + number % 2
        items.append(
            ShardItem(
                id=f"item-{number:08d}",
                visual=random.integers(0, 8, 4, np.uint16),
                text=random.integers(0, 500, (captions, 77), np.uint16),
                captions=("a caption of the usual length, about sixty characters long.",)
                * captions,
                frames=1,
                media=f"folder/{number:08d}.jpg",
            )
        )
    first = write_shard(tmp_path, 0, items)
    sidecars = [first]
    for number in range(1, SHARDS):
        # Links to one tar: the loader maps and reads each as a file of its own name.
        os.link(tmp_path / "shard-000000.tar", tmp_path / f"{shard_name(number)}.tar")
        sidecars.append(first.model_copy(update={"shard": shard_name(number)}))
        write_settings(tmp_path / f"{shard_name(number)}.json", sidecars[-1])
    manifest = CorpusManifest(
        format_version=1,
        grid=(2, 2, 1),
        frames_per_second=None,
        codebook_size=8,
        text_vocabulary_size=520,
        fingerprints=Fingerprints(vqgan="v", bpe=hashlib.sha256(b"").hexdigest(), decode="d"),
        counts=Counts(items=SHARDS * ITEMS, captions=SHARDS * first.captions, failed=0),
        shards=tuple(sidecar.entry() for sidecar in sidecars),
    )
    write_settings(tmp_path / "corpus.json", manifest)
    result = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    print(found)
    assert found["items"] == SHARDS * ITEMS
    mebibyte = 1 << 20
    assert found["opened"] < 8 * mebibyte
    # The whole epoch, in a process's own memory, of which a node has eight or more.
    assert max(found["marks"]) < 16 * mebibyte
    assert found["marks"][-1] - found["marks"][2] < 2 * mebibyte
    # With PyTorch and every mapped page that was touched, which processes of a node share.
    assert found["peak"] < 1024 * mebibyte
