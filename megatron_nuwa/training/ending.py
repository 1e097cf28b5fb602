"""How a process of a run ends: its own exit code, whatever threads are left."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from megatron_nuwa.errors import FailedProcessError, run_command
from megatron_nuwa.training.stopping import STOP_SIGNALS


def run_process(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of one of a run's processes, and end the process with its exit code.

    The code is that of `run_command`; 1 after a traceback.
    """
    code = 1
    try:
        code = run_command(main)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except FailedProcessError:
        pass
    except BaseException:
        traceback.print_exc()
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process now, after the exit handlers of its modules.

    DeepSpeed and PyTorch keep process groups in globals, so threads of gloo and NCCL still run
    when the interpreter would be taken down; one that comes for Python's lock then aborts the
    process, and its launcher sees that instead of the exit code.
    """
    # Whoever still asks it to stop must not change its exit code.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            # Whoever read it may be gone.
            with suppress(OSError):
                stream.flush()
    finally:
        os._exit(code)
