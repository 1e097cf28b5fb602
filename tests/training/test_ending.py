"""A process of a run ends with its own exit code."""

from __future__ import annotations

import sys

import pytest
from helpers import run_command_line

# A thread that is still running when the main function is over, as those of process groups are.
PROGRAM = """
import atexit, sys, threading, time
from megatron_nuwa.errors import ReportedElsewhereError, UserError
from megatron_nuwa.training.ending import run_process
def main():
    threading.Thread(target=time.sleep, args=(120,)).start()
    atexit.register(print, "exit handlers ran")
    print("before", end="")
    {ending}
run_process(main)
"""


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("pass", 0, ""),
        ("raise UserError('set the field')", 2, "error: set the field\n"),
        ("raise ReportedElsewhereError('set the field')", 2, ""),
        ("sys.exit(3)", 3, ""),
        ("raise KeyError('defect')", 1, "KeyError: 'defect'\n"),
    ],
)
def test_a_process_ends_with_its_code_though_threads_are_left(
    ending: str, code: int, told: str
) -> None:
    done = run_command_line(sys.executable, "-c", PROGRAM.format(ending=ending), timeout=60)
    assert done.returncode == code
    assert done.stdout == "beforeexit handlers ran\n"
    assert done.stderr.endswith(told)
    assert ("Traceback" in done.stderr) == (code == 1)


def test_a_stop_signal_at_the_very_end_changes_no_exit_code() -> None:
    """A launcher would take the process for one that was killed."""
    late = "import os, signal; atexit.register(os.kill, os.getpid(), signal.SIGTERM)"
    done = run_command_line(sys.executable, "-c", PROGRAM.format(ending=late), timeout=60)
    assert (done.returncode, done.stdout) == (0, "beforeexit handlers ran\n")
