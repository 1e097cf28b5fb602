"""Run a launcher's command, and start it again after a fault. Example:

python launch/supervise.py deepspeed --hostfile HOSTFILE launch/pretrain.py RECIPE
"""

from __future__ import annotations

import argparse
import sys

from megatron_nuwa.command_line import CommandParser, example_in, number, whole_number
from megatron_nuwa.errors import UserError, run_command
from megatron_nuwa.training.stopping import StopSignals


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python launch/supervise.py",
        description="Run a launcher's command, and start it again after a fault: up to a limit, "
        "while starts add checkpoints, and on nodes of the hostfile that still answer. Its "
        "last lines say which process failed, and why.",
        example=example_in(__doc__),
    )
    parser.add_argument(
        "--restarts", type=whole_number(0), default=10, help="at most so many (default: 10)"
    )
    parser.add_argument(
        "--pause",
        type=number(least=0),
        default=10.0,
        metavar="SECONDS",
        help="before each (default: 10)",
    )
    parser.add_argument(
        "--unfinished",
        type=whole_number(0),
        default=0,
        metavar="CODE",
        help="exit code of a run that ended in order before its last step (default: 0)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the launcher and its arguments")
    return parser.parse_args()


def main() -> int:
    """Supervise one command."""
    arguments = parse_arguments()
    if not arguments.command:
        raise UserError("no command to supervise; python launch/supervise.py --help shows one")
    with StopSignals() as stop:
        # Here, because importing it takes seconds, in which signals are taken already.
        from megatron_nuwa.training.supervision import Supervisor

        supervisor = Supervisor(
            arguments.command,
            stop,
            restarts=arguments.restarts,
            pause_seconds=arguments.pause,
            unfinished=arguments.unfinished,
        )
        return supervisor.supervise()


if __name__ == "__main__":
    sys.exit(run_command(main))
