"""The one exception that users see, and how commands show it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend; its text is one sentence naming the file, field or argument."""


class ReportedElsewhereError(UserError):
    """The same mistake on another process of a run; the first process shows it."""


class UnreadableError(UserError):
    """Storage does not deliver what it should have.

    Whoever starts something can look after it; in a run that has read there before it is no
    mistake but a fault, after which the run may be started again.
    """


class MachineError(UserError):
    """Something that a machine lacks or refuses, for which no input is to blame.

    As with `UnreadableError`, the same start may go well another time.
    """


class FailedProcessError(Exception):
    """A process of a run ends for a reason that was shown and written down already."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's main function and return its exit code.

    A `UserError` becomes one line on stderr and exit code 2; every other exception keeps its
    traceback, because it is a defect of ours.
    """
    try:
        return main() or 0
    except ReportedElsewhereError:
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
