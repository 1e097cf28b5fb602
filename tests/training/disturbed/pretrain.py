"""launch/pretrain.py whose process 1 fails in step 3, as DISTURB says: raise, sleep."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from launch.pretrain import main
from megatron_nuwa.training.ending import run_process
from megatron_nuwa.training.pretrain import Pretraining

train_step = Pretraining._train_step


def disturbed(training: Pretraining, batches: Any) -> None:
    """Step 3 does not end well."""
    if training.processes.rank == 1 and training.step == 2:
        if os.environ["DISTURB"] == "raise":
            raise ValueError("disturbed")
        time.sleep(600)
    train_step(training, batches)


if __name__ == "__main__":
    Pretraining._train_step = disturbed  # type: ignore[method-assign]
    run_process(main)
