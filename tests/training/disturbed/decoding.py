"""Two processes whose first one decodes for longer than their backend waits.

Argument: the run's folder. An item takes 0.3 s, and there are thirty.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_nuwa.errors import UserError
from megatron_nuwa.training import processes as processes_file
from megatron_nuwa.training.frames import MediaFrames
from megatron_nuwa.training.processes import Processes
from megatron_nuwa.training.stopping import StopRequested, StopSignals
from megatron_nuwa.training.vqgan_inputs import open_dataset
from megatron_nuwa.training.vqgan_recipe import VqganRecipe

BACKEND_SECONDS = 4
processes_file._TURN_SECONDS = 0.5


def main() -> None:
    """Open the dataset and show what every item became, or say what ended it."""
    run = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=BACKEND_SECONDS))
    here = Processes(rank, 2, rank, torch.device("cpu"))

    def decode(item: object) -> np.ndarray:
        assert isinstance(item, int)
        time.sleep(0.3)
        if item == 3:
            raise UserError("item 3 cannot be decoded")
        print("item decoded", flush=True)
        return np.full((1 + item % 2, 8, 8, 3), item, np.uint8)

    media = MediaFrames(range(30), decode, 8, lambda go_on: "k", "test frames")
    data = {"train": ["x"], "cache_frames": True}
    recipe = VqganRecipe(run=run, data=data, steps=1, batch_size=2)  # type: ignore[arg-type]
    with StopSignals() as stop:
        try:
            open_dataset(recipe, media, run / "f.npy", here, lambda: stop.check(here))
        except StopRequested as request:
            print(f"stopped by {request}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
