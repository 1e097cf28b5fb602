"""One process of a node: reads its share of an epoch as a training does, and can be measured.

Arguments: CORPUS RANK RANKS BATCH_SIZE STOPS. At every stop it writes a line, and goes on when it
reads one.
"""

from __future__ import annotations

import sys

from megatron_nuwa.data.batches import TaskBatches, TokenBatch
from megatron_nuwa.data.corpus import Corpus
from megatron_nuwa.data.text import train_bpe
from megatron_nuwa.training.prefetch import prefetched


class NoClock:
    """Nobody asks how long the reading waits."""

    def add_wait(self, seconds: float) -> None:
        return None


def stop(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()


def main() -> None:
    folder = sys.argv[1]
    rank, ranks, batch_size, stops = map(int, sys.argv[2:])
    bpe = train_bpe(["a cat"], 520)
    stop("imported")
    batches = TaskBatches("t2i", [Corpus(folder)], bpe, seed=0, batch_size=batch_size)
    stop(f"opened {batches.order.items}")
    steps = batches.order.items // batch_size

    def read(step: int) -> list[TokenBatch]:
        return batches.micro_batches(step, rank, ranks)

    samples = 0
    for step, step_batches in enumerate(prefetched(read, range(steps), NoClock())):
        samples += sum(len(batch.target) for batch in step_batches)
        # While this step's batches and the next one's are held.
        if (step + 1) % (steps // stops) == 0:
            stop(f"read {samples}")


if __name__ == "__main__":
    main()
