"""A loader's worker processes: what ends them, and what does not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from megatron_nuwa.training.stopping import STOP_SIGNALS

# A process whose loader's worker is busy for a minute after the first batch.
BUSY = """
import time
import numpy as np
from torch.utils.data import Dataset
from megatron_nuwa.training.frames import Sample, batches

class Slow(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, draw):
        time.sleep(60 * (draw.number > 0))
        return Sample(np.zeros((8, 8, 3), np.uint8), 0)

if __name__ == "__main__":
    found = batches(
        Slow(), image_size=8, flip=False, seed=0, batch_size=1, rank=0, world_size=1,
        first_step=0, steps=9, workers=1,
    )
    next(found)
    print("begun", flush=True)
    time.sleep(60)
"""


# A process whose loader gives nine batches; it says how many came, and which signal.
STARTING = """
import numpy as np
from torch.utils.data import Dataset
from megatron_nuwa.training.frames import Sample, batches
from megatron_nuwa.training.stopping import StopSignals

class Quick(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, draw):
        return Sample(np.zeros((8, 8, 3), np.uint8), 0)

if __name__ == "__main__":
    with StopSignals() as stop:
        found = batches(
            Quick(), image_size=8, flip=False, seed=0, batch_size=1, rank=0, world_size=1,
            first_step=0, steps=9, workers=2,
        )
        print(sum(1 for _ in found), stop.received)
"""


@contextmanager
def busy_worker(folder: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process and its loader's worker, in the middle of an item."""
    script = folder / "busy.py"
    script.write_text(BUSY)
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        children = psutil.Process(process.pid).children()
        [worker] = [each for each in children if "spawn_main" in " ".join(each.cmdline())]
        yield process, worker
    finally:
        process.kill()
        process.communicate()


def ignored(worker: psutil.Process) -> int:
    status = Path(f"/proc/{worker.pid}/status").read_text()
    return int(status.split("SigIgn:")[1].split()[0], 16)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_workers_ignore_stop_signals_and_end_with_their_parent(tmp_path: Path) -> None:
    """However long the save takes; and a killed parent leaves no decoder behind."""
    with busy_worker(tmp_path) as (process, worker):
        for number in STOP_SIGNALS:
            assert ignored(worker) >> (number - 1) & 1, number
            worker.send_signal(number)
        process.send_signal(signal.SIGKILL)
        end = time.monotonic() + 20
        while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, "the worker outlives its parent"
            time.sleep(0.05)


def test_stop_signals_while_workers_start_cost_no_batch(tmp_path: Path) -> None:
    """Each gets them as soon as it exists, seconds before it can ignore them."""
    script = tmp_path / "starting.py"
    script.write_text(STARTING)
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    told: set[int] = set()
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                # Before it has a command line of its own, it is its parent still.
                if child.pid not in told and "multiprocessing" in " ".join(child.cmdline()):
                    told.add(child.pid)
                    for number in STOP_SIGNALS:
                        child.send_signal(number)
                    process.send_signal(signal.SIGUSR1)
        time.sleep(0.005)
    output, errors = process.communicate()
    assert output == f"9 {int(signal.SIGUSR1)}\n", errors
    # Two workers, and what tracks their semaphores.
    assert len(told) == 3
    assert "resource_tracker" not in errors
